"""The ceiling of every model: probabilities of the medications given what a model may see.

A model sees at visit t the diagnoses and procedures of the cohort's vocabularies (with
inputs="history" those of visit t - 1) and the medications of visit t - 1. Given these, earlier
visits say nothing more: the probabilities here are the best that any model can have.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed import metrics
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError, ConfigError
from cafemed.metrics import Metrics
from cafemed.synthetic import truth
from cafemed.synthetic.model import (
    Bools,
    Floats,
    Model,
    codes_given,
    draft_log_miss,
    medication_probabilities,
    usable,
)
from cafemed.synthetic.truth import Truth

#: Simulated visits held at once.
_ROWS = 16_384
#: Probabilities are kept this far from 0 and 1 in the log loss.
_EDGE = 1e-7
#: Draws that carry the simulation's error into the metrics.
_ERROR_DRAWS = 20


def bayes_probabilities(
    truth_folder: Path,
    cohort: Cohort,
    visits: NDArray[np.integer[Any]],
    *,
    num_draws: int = 200,
    seed: int = 0,
    target_window_h: float | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probability of each target medication given what a model may see at these visits.

    Exact, with an error of 0, where a visit's own codes are the inputs and the vocabularies hold
    all codes of the population. Otherwise what is not seen is simulated: codes outside the
    vocabularies, weighted by the likelihood of the seen ones; with inputs="history" all codes of
    the visit. What a code or medication outside the vocabularies did at the visit before is not
    simulated: it counts as absent there.

    Args:
        truth_folder: what `write_tables` put into truth/.
        cohort: made from the tables beside it, with visits in time order.
        visits: indices of visits.
        num_draws: simulated visits for each visit, where one has to be simulated.
        seed: of the simulation.
        target_window_h: the cohort's, in hours; None: targets are the medications of the stay.

    Returns:
        Probabilities and their simulation's standard error, float32 (visits, N_m) each.

    Raises:
        ArtifactError: if the truth cannot be read, or the cohort is not of its population.
        ConfigError: if visits are not in time order, or the window is not the cohort's.
    """
    known = truth.read(truth_folder)
    share = 1.0 if target_window_h is None else started_within(known, target_window_h)
    _check(cohort, share)
    columns = _positions(known.model.medications, cohort.vocabularies["medication"])
    seen = _Seen.of(known.model, cohort, np.asarray(visits))
    if cohort.inputs == "current" and not len(seen.hidden):
        log_miss = draft_log_miss(known.model, seen.codes, seen.medications)
        probabilities = medication_probabilities(known.model, log_miss)
        errors = np.zeros(probabilities.shape)
    else:
        probabilities, errors = _simulate(known.model, seen, num_draws, seed)
    return (
        (share * probabilities[:, columns]).astype(np.float32),
        (share * errors[:, columns]).astype(np.float32),
    )


def started_within(known: Truth, window_h: float) -> float:
    """Share of a stay's medications that start less than `window_h` hours after admission.

    Admission is at any minute of its day, alike; a medication's start is a day, at 0:00.
    """
    minute = np.arange(24 * 60)
    day = np.arange(len(known.start_shares)) * 24 * 60
    in_time = day[:, None] - minute < window_h * 60
    return float(known.start_shares @ in_time.mean(axis=1))


@dataclasses.dataclass(frozen=True)
class Summary:
    """How good the best possible predictions are, on some visits.

    Attributes:
        log_loss: nats per visit and medication.
        at_half: metrics at threshold 0.5.
        threshold: the threshold with the best Jaccard on these very visits.
        at_best: metrics at that threshold.
        true_ddi_rate: DDI rate of the target sets themselves.
        true_num_medications: mean size of the target sets.
        log_loss_error, at_half_error, at_best_error: standard deviation of the same that the
            simulation's error causes; 0 where nothing was simulated.
    """

    log_loss: float
    at_half: Metrics
    threshold: float
    at_best: Metrics
    true_ddi_rate: float
    true_num_medications: float
    log_loss_error: float
    at_half_error: Metrics
    at_best_error: Metrics

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def summary(
    probabilities: NDArray[np.floating[Any]],
    errors: NDArray[np.floating[Any]],
    targets: NDArray[np.bool_],
    patient_offsets: NDArray[np.integer[Any]],
    ddi: NDArray[np.bool_],
    *,
    seed: int = 0,
) -> Summary:
    """Measures probabilities against what was prescribed, with the simulation's error.

    Args:
        probabilities, errors: (V, N_m), as `bayes_probabilities` gives them.
        targets: bool (V, N_m).
        patient_offsets: (P + 1,), see `cafemed.metrics.aggregate`.
        ddi: bool (N_m, N_m).
        seed: of the draws that carry the error into the metrics.
    """
    threshold, _ = metrics.best_threshold(probabilities, targets, patient_offsets)

    def measure(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        half = metrics.evaluate(values, targets, patient_offsets, ddi)
        best = metrics.evaluate(values, targets, patient_offsets, ddi, threshold)
        numbers = [
            log_loss(values, targets),
            *dataclasses.astuple(half),
            *dataclasses.astuple(best),
        ]
        return np.array(numbers)

    value = measure(probabilities)
    error = np.zeros_like(value)
    if np.any(errors):
        rng = np.random.default_rng(seed)
        shaken = [
            measure(np.clip(probabilities + errors * rng.standard_normal(errors.shape), 0, 1))
            for _ in range(_ERROR_DRAWS)
        ]
        error = np.std(shaken, axis=0)
    truly = metrics.evaluate(targets.astype(np.float32), targets, patient_offsets, ddi)
    half, best = slice(1, 6), slice(6, 11)
    return Summary(
        log_loss=float(value[0]),
        at_half=Metrics(*value[half].tolist()),
        threshold=threshold,
        at_best=Metrics(*value[best].tolist()),
        true_ddi_rate=truly.ddi_rate,
        true_num_medications=truly.num_medications,
        log_loss_error=float(error[0]),
        at_half_error=Metrics(*error[half].tolist()),
        at_best_error=Metrics(*error[best].tolist()),
    )


def log_loss(probabilities: NDArray[np.floating[Any]], targets: NDArray[np.bool_]) -> float:
    """Binary cross-entropy in nats, mean over visits and medications."""
    p = np.clip(np.asarray(probabilities, np.float64), _EDGE, 1 - _EDGE)
    return float(-np.log(np.where(targets, p, 1 - p)).mean())


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a model sees at v visits, in the indices of the population's model.

    Attributes:
        codes: CSR (v, N): of the visit itself, or with inputs="history" of no visit (empty).
        before: CSR (v, N), codes of the visit before.
        medications: float64 (v, N_m), of the visit before.
        hidden: codes that are to be simulated, in topological order.
    """

    codes: sparse.csr_array
    before: sparse.csr_array
    medications: Floats
    hidden: NDArray[np.int64]

    @classmethod
    def of(cls, model: Model, cohort: Cohort, visits: NDArray[np.integer[Any]]) -> "_Seen":
        split = len(model.diagnoses)
        diagnosis = _positions(model.diagnoses, cohort.vocabularies["diagnosis"])
        procedure = _positions(model.procedures, cohort.vocabularies["procedure"]) + split
        medication = _positions(model.medications, cohort.vocabularies["medication"])

        def codes(diagnoses: CodeLists, procedures: CodeLists) -> sparse.csr_array:
            size = model.num_codes
            return _matrix(diagnoses.take(visits), diagnosis, size) + _matrix(
                procedures.take(visits), procedure, size
            )

        now = codes(cohort.diagnoses, cohort.procedures)
        seen = np.zeros(model.num_codes, np.bool_)
        if cohort.inputs == "current":
            seen[diagnosis] = seen[procedure] = True
        else:
            now = now * 0
        before = codes(cohort.previous(cohort.diagnoses), cohort.previous(cohort.procedures))
        previous = cohort.previous(cohort.medications).take(visits)
        return cls(
            codes=now,
            before=before,
            medications=_matrix(previous, medication, len(model.medications)).toarray(),
            hidden=model.order[~seen[model.order]].astype(np.int64),
        )


def _simulate(model: Model, seen: _Seen, num_draws: int, seed: int) -> tuple[Floats, Floats]:
    """Means over simulated hidden codes and their errors, float64 (v, N_m) each."""
    rng = np.random.default_rng(seed)
    log_miss = draft_log_miss(model, seen.codes, seen.medications)
    probabilities = medication_probabilities(model, log_miss)
    errors = np.zeros(probabilities.shape)
    step = max(1, _ROWS // num_draws)
    for start in range(0, len(probabilities), step):
        visits = np.arange(start, min(start + step, len(probabilities)))
        codes, weight = _complete(model, seen, visits, num_draws, rng)
        share = weight.reshape(len(visits), num_draws)
        share = (share / share.sum(axis=1, keepdims=True)).ravel()
        # Most draws of a few rare hidden codes have none: they are the visit as seen.
        differs = np.flatnonzero(codes[seen.hidden].any(axis=0))
        visit = np.repeat(np.arange(len(visits)), num_draws)
        present = sparse.csr_array(codes[:, differs].T.astype(np.float64))
        rows = draft_log_miss(model, present, seen.medications[visits[visit[differs]]])
        values = np.vstack([probabilities[visits], medication_probabilities(model, rows)])
        column = visit.copy()
        column[differs] = len(visits) + np.arange(len(differs))
        probabilities[visits], errors[visits] = _weighted_mean(share, visit, column, values)
    return probabilities, errors


def _weighted_mean(
    share: Floats, row: NDArray[np.int64], place: NDArray[np.int64], values: Floats
) -> tuple[Floats, Floats]:
    """Self-normalised weighted means and their errors, √Σ share² (value - mean)²; (v, N_m) each.

    Args:
        share: (draws,), summing to 1 in each row; row: (draws,), 0 .. v - 1.
        place: (draws,), the draw's value among values (n, N_m).
    """
    shape = (int(row[-1]) + 1, len(values))
    # Draws of the same value add up here, their squared shares below.
    mean: Floats = sparse.csr_array((share, (row, place)), shape=shape) @ values
    squares = sparse.csr_array((share**2, (row, place)), shape=shape)
    spread = squares @ values**2 - 2 * mean * (squares @ values)
    spread += mean**2 * squares.sum(axis=1)[:, None]
    return mean, np.sqrt(np.maximum(spread, 0))


def _complete(
    model: Model, seen: _Seen, visits: NDArray[np.int64], num_draws: int, rng: np.random.Generator
) -> tuple[Bools, Floats]:
    """Draws the hidden codes of visits, given the seen ones, by likelihood weighting.

    Returns:
        Codes bool (N, rows), `num_draws` rows for each visit, and weights float64 (rows,): the
        probability of the seen codes given their drawn parents, 0 for a visit that the population
        would have drawn again.
    """
    codes = _repeated(seen.codes[visits], num_draws)
    before = None
    if (model.code_persistence > 0).any():
        before = _repeated(seen.before[visits], num_draws)
    uniform = np.empty(codes.shape, np.float32)
    uniform[seen.hidden] = rng.random((len(seen.hidden), codes.shape[1]), np.float32)
    codes_given(model, uniform, before, nodes=seen.hidden.tolist(), known=codes)
    weight = usable(model, codes).astype(np.float64)
    hidden = set(seen.hidden.tolist())
    for child, parents in model.parents.items():
        if child in hidden or not any(parent in hidden for parent, _ in parents):
            continue
        absent = np.full(codes.shape[1], 1 - model.code_leak[child])
        for parent, strength in parents:
            absent[codes[parent]] *= 1 - strength
        if before is not None:
            absent[before[child]] *= 1 - model.code_persistence[child]
        weight *= np.where(codes[child], 1 - absent, absent)
    return codes, np.maximum(weight, 1e-300)


def _repeated(matrix: sparse.csr_array, times: int) -> Bools:
    """A CSR (v, N) as bool (N, v * times), each row as so many columns."""
    return np.repeat(matrix.toarray().T > 0, times, axis=1)


def _check(cohort: Cohort, share: float) -> None:
    later = ~cohort.is_first_visit()[1:]
    if np.any(np.diff(cohort.admitted)[later] < np.timedelta64(0, "s")):
        raise ConfigError(
            "the ceiling needs each patient's visits in time order, but the cohort has others; "
            "make it with data.cohort.protocol=clean"
        )
    whole = np.array_equal(cohort.targets.ids, cohort.medications.ids)
    if whole != (share == 1):
        raise ConfigError(
            f"target_window_h: its share of each stay's medications is {share:.3f}, but the "
            f"cohort's targets are {'all' if whole else 'only some'} of them; give the cohort's own"
        )


def _positions(names: tuple[str, ...], wanted: tuple[str, ...]) -> NDArray[np.int64]:
    place = {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise ArtifactError(
            f"the cohort has {missing[0]} and {len(missing) - 1} other codes that the synthetic "
            "population never had; give the truth of the tables that the cohort was made from"
        )
    return np.array([place[name] for name in wanted], np.int64)


def _matrix(lists: CodeLists, position: NDArray[np.int64], size: int) -> sparse.csr_array:
    ones = np.ones(len(lists.ids))
    shape = (len(lists), size)
    return sparse.csr_array((ones, position[lists.ids], lists.offsets), shape=shape)
