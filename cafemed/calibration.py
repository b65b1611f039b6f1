"""Probabilities that mean something: temperature scaling, and how far a model is from calibrated.

A model is calibrated if, of all the times that it says 0.8, eight in ten come true. Temperature
scaling (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2) divides every
logit by one number, found on validation patients: it changes no order and, at threshold 0.5, no
recommended set.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import nn

from cafemed import evaluation, metrics
from cafemed.batches import VisitArrays
from cafemed.evaluation import EvaluationSet

#: Bins of the calibration error, equally wide, as in Guo et al.
NUM_BINS = 15

#: A temperature is looked for between these (an assumption: models that learned anything take 0.5
#: to 5). Logits that are never wrong, as few visits may have it, would take 0 and be sure of
#: everything; logits that are worse than none would take infinity.
ENDS = (0.1, 10.0)


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """What is chosen on the validation patients once a model is trained (group `calibration`).

    Attributes:
        temperature: "validation": the one with the least log loss there; "fixed": 1.
        threshold: "fixed": that of training; "validation": the one with the best Jaccard there,
            of the probabilities after temperature.
    """

    temperature: Literal["fixed", "validation"] = "validation"
    threshold: Literal["fixed", "validation"] = "fixed"


@dataclasses.dataclass(frozen=True)
class Decision:
    """How logits become probabilities and a recommended set.

    Attributes:
        temperature: logits are divided by it before the sigmoid.
        threshold: a medication is recommended if its probability, after temperature, reaches it.
    """

    temperature: float = 1.0
    threshold: float = 0.5


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of P patients' V visits, and what was given.

    Attributes:
        logits: float32 (V, N_m).
        targets: bool (V, N_m).
        patient_offsets: int64 (P + 1,) into the visits.
    """

    logits: NDArray[np.float32]
    targets: NDArray[np.bool_]
    patient_offsets: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        arrays: VisitArrays,
        patients: NDArray[np.int64],
        device: torch.device | str = "cpu",
    ) -> "Predictions":
        """Runs a model, which is on `device`, on all visits of these patients (at least one)."""
        chosen = EvaluationSet.of(arrays, patients, device=device)
        return cls(chosen.logits(model), chosen.targets, chosen.patient_offsets)

    @property
    def num_patients(self) -> int:
        """P."""
        return len(self.patient_offsets) - 1

    @property
    def num_visits(self) -> int:
        """V."""
        return len(self.targets)

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float32]:
        """Probabilities at a temperature, float32 (V, N_m)."""
        return evaluation.sigmoid(self.logits, temperature)


def choose(validation: Predictions, config: CalibrationConfig, threshold: float) -> Decision:
    """Chooses temperature, then threshold, on validation patients.

    Args:
        validation: of patients that the model is not reported for.
        config: see CalibrationConfig.
        threshold: that of training.
    """
    temperature = 1.0
    if config.temperature == "validation":
        temperature = fit_temperature(validation.logits, validation.targets)
    if config.threshold == "validation":
        threshold, _ = metrics.best_threshold(
            validation.probabilities(temperature), validation.targets, validation.patient_offsets
        )
    return Decision(temperature, threshold)


def fit_temperature(logits: NDArray[np.floating[Any]], targets: NDArray[np.bool_]) -> float:
    """The temperature T with the least log loss, over all (visit, medication) pairs.

    The log loss is convex in β = 1 / T, with the derivative mean(l (σ(β l) - y)): its only zero is
    looked for by Brent's method, which is deterministic. Where the loss falls up to an end of
    [0.1, 10], the end is taken.

    Args:
        logits: l, (V, N_m), finite.
        targets: y, bool (V, N_m).
    """
    logit, given = np.asarray(logits, np.float64).ravel(), targets.ravel()
    if not logit.any():
        return 1.0

    def slope(log_beta: float) -> float:
        scaled = np.exp(log_beta) * logit
        residual = np.where(given, -special.expit(-scaled), special.expit(scaled))
        return float(logit @ residual)

    lowest, highest = ENDS
    first, last = -np.log(highest), -np.log(lowest)
    if slope(first) >= 0:
        return highest
    if slope(last) <= 0:
        return lowest
    # Imported here: 26 MB, and an endpoint, which has this module, fits nothing.
    from scipy import optimize

    return float(np.exp(-optimize.brentq(slope, first, last, xtol=1e-10)))


def log_loss(
    logits: NDArray[np.floating[Any]], targets: NDArray[np.bool_], temperature: float = 1.0
) -> float:
    """Binary cross-entropy in nats, mean over all (visit, medication) pairs; exact for any logit.

    log(1 + e^z) - y z with z = logit / temperature.
    """
    z = np.asarray(logits, np.float64) / temperature
    return float((np.logaddexp(0, z) - np.where(targets, z, 0)).mean())


def deviations(
    probabilities: NDArray[np.floating[Any]], targets: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Sum of p - y over each visit's medications, bin by bin, float64 (V, NUM_BINS).

    A calibration error is a function of their sums: see `error_of_sums`.
    """
    rows = np.arange(len(targets))[:, None] * NUM_BINS
    places = (rows + bins(probabilities)).ravel()
    gaps = (probabilities - targets.astype(np.float64)).ravel()
    sums = np.bincount(places, gaps, len(targets) * NUM_BINS)
    return np.asarray(sums, np.float64).reshape(len(targets), NUM_BINS)


def error_of_sums(
    sums: NDArray[np.float64], num_pairs: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Expected calibration error: Σ_b |Σ_{pairs in bin b} (p - y)| / pairs.

    Equation (3) of Guo et al., Σ_b n_b / n |acc(b) - conf(b)|, with the n_b cancelled. There p is
    the probability of the likeliest class; here every (visit, medication) pair is a prediction of
    its own, p the probability and y whether the medication was given.

    Args:
        sums: (..., NUM_BINS), of `deviations`.
        num_pairs: (...), all pairs behind them.
    """
    result: NDArray[np.float64] = np.abs(sums).sum(axis=-1) / num_pairs
    return result


def expected_error(probabilities: NDArray[np.floating[Any]], targets: NDArray[np.bool_]) -> float:
    """Expected calibration error over all (visit, medication) pairs; see `error_of_sums`."""
    sums = deviations(probabilities, targets).sum(axis=0)
    return float(error_of_sums(sums, targets.size))


def bins(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """The bin of each probability: bin b holds b ≤ NUM_BINS p < b + 1, the last one also p = 1."""
    scaled = np.asarray(probabilities, np.float64) * NUM_BINS
    return np.minimum(scaled.astype(np.int64), NUM_BINS - 1)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """A reliability diagram as a table, one row a bin.

    Attributes:
        edges: float64 (NUM_BINS + 1,).
        pairs: int64 (NUM_BINS,), (visit, medication) pairs with a probability in the bin.
        probability, share: float64 (NUM_BINS,), their mean probability, and the share of them that
            were given; NaN without pairs.
        present: bool (P, NUM_BINS), patients with a pair in the bin.
    """

    edges: NDArray[np.float64]
    pairs: NDArray[np.int64]
    probability: NDArray[np.float64]
    share: NDArray[np.float64]
    present: NDArray[np.bool_]

    @classmethod
    def of(cls, predictions: Predictions, temperature: float) -> "Reliability":
        """The table of these predictions at a temperature."""
        probabilities = predictions.probabilities(temperature)
        place = bins(probabilities)
        pairs = np.bincount(place.ravel(), minlength=NUM_BINS)
        patient = np.repeat(
            np.arange(predictions.num_patients), np.diff(predictions.patient_offsets)
        )
        present = np.zeros((predictions.num_patients, NUM_BINS), np.bool_)
        present[patient[:, None], place] = True

        def mean(values: NDArray[Any]) -> NDArray[np.float64]:
            total = np.bincount(place.ravel(), values.ravel(), minlength=NUM_BINS)
            return np.where(pairs > 0, total / np.maximum(pairs, 1), np.nan)

        return cls(
            edges=np.arange(NUM_BINS + 1) / NUM_BINS,
            pairs=pairs,
            probability=mean(probabilities),
            share=mean(predictions.targets),
            present=present,
        )


def measure(predictions: Predictions, temperature: float) -> dict[str, dict[str, float]]:
    """Log loss and expected calibration error without temperature and with it; JSON values."""
    return {
        name: {
            "log_loss": log_loss(predictions.logits, predictions.targets, at),
            "ece": expected_error(predictions.probabilities(at), predictions.targets),
        }
        for name, at in (("before", 1.0), ("after", temperature))
    }
