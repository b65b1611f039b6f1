"""Metrics of predicted medication sets, as the literature of this task defines them.

Jaccard, F1 and PRAUC (average precision) are means over a patient's visits, then over patients.
The DDI rate pools the pairs of all predicted sets, and the number of medications is pooled over
visits. What is undefined counts as 0, as in the published evaluation code: the average precision
and F1 of a visit without target medications, the Jaccard and F1 of two empty sets, and the DDI
rate where no predicted set has a pair.

Every score is computed once a visit, for all visits together; `aggregate`, `bootstrap` and
`intervals` only average them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed.intervals import LEVEL, ROUNDS, percentile

#: Thresholds that `best_threshold` tries.
THRESHOLDS = tuple(round(0.01 * i, 2) for i in range(2, 99))


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Metrics of one set of patients (or their standard deviation over bootstrap rounds).

    Attributes:
        jaccard: |predicted ∩ target| / |predicted ∪ target|.
        f1: harmonic mean of the set's precision and recall.
        prauc: average precision of the probabilities.
        ddi_rate: interacting pairs / all pairs, over all predicted sets.
        num_medications: predicted medications / visits.
    """

    jaccard: float
    f1: float
    prauc: float
    ddi_rate: float
    num_medications: float

    def as_dict(self) -> dict[str, float]:
        """Name → value, for JSON and for reports to a tuner."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class VisitScores:
    """What the metrics average, for each of V visits.

    Attributes:
        jaccard, f1, prauc: float64 (V,).
        num_medications: int64 (V,), size of the predicted set.
        num_interactions: int64 (V,), interacting unordered pairs in the predicted set.
    """

    jaccard: NDArray[np.float64]
    f1: NDArray[np.float64]
    prauc: NDArray[np.float64]
    num_medications: NDArray[np.int64]
    num_interactions: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Mean and standard deviation (divisor: rounds) of the metrics over bootstrap rounds."""

    mean: Metrics
    sd: Metrics


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Lower and upper ends of the metrics' confidence intervals."""

    low: Metrics
    high: Metrics

    def as_dict(self) -> dict[str, list[float]]:
        """Name → [low, high], for JSON."""
        low, high = self.low.as_dict(), self.high.as_dict()
        return {name: [low[name], high[name]] for name in low}


def score_visits(
    probabilities: NDArray[np.floating[Any]],
    targets: NDArray[np.bool_],
    ddi: NDArray[np.bool_],
    threshold: float = 0.5,
) -> VisitScores:
    """Scores every visit by itself.

    Args:
        probabilities: (V, N_m); a medication is predicted where its probability is at least the
            threshold.
        targets: bool (V, N_m).
        ddi: bool (N_m, N_m), symmetric, zero diagonal.
        threshold: of the predicted sets; average precision does not depend on it.

    Raises:
        ValueError: if the shapes do not agree.
    """
    if probabilities.shape != targets.shape or ddi.shape != 2 * probabilities.shape[1:]:
        raise ValueError(
            f"probabilities {probabilities.shape}, targets {targets.shape} and ddi {ddi.shape} "
            "do not belong together"
        )
    predicted = probabilities >= threshold
    jaccard, f1 = _set_scores(predicted, targets)
    # float32 holds these counts exactly (at most N_m² / 2), and its product is the fast one.
    sets = predicted.astype(np.float32)
    interactions = np.einsum("vi,vi->v", sets @ ddi.astype(np.float32), sets) / 2
    return VisitScores(
        jaccard=jaccard,
        f1=f1,
        prauc=average_precision(probabilities, targets),
        num_medications=predicted.sum(axis=1),
        num_interactions=np.rint(interactions).astype(np.int64),
    )


def average_precision(
    probabilities: NDArray[np.floating[Any]], targets: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Average precision of every row, float64 (V,); 0 for a row without targets.

    Equal to scikit-learn's `average_precision_score` row by row: equal probabilities are one step
    of the precision-recall curve.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    scores = np.take_along_axis(probabilities, order, axis=1)
    hits = np.take_along_axis(targets, order, axis=1)
    found = np.cumsum(hits, axis=1)
    # Each target counts with the precision at the end of its run of equal probabilities.
    size = scores.shape[1]
    ends = np.full(scores.shape, size - 1)
    ends[:, :-1] = np.where(scores[:, 1:] != scores[:, :-1], np.arange(size - 1), size - 1)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    precision = np.take_along_axis(found, ends, axis=1) / (ends + 1)
    total = np.where(hits, precision, 0.0).sum(axis=1)
    return _ratio(total, hits.sum(axis=1))


def aggregate(scores: VisitScores, patient_offsets: NDArray[np.integer[Any]]) -> Metrics:
    """Averages visits' scores over each patient's visits, then over patients.

    Args:
        scores: of V visits, patient by patient.
        patient_offsets: (P + 1,); patient p has rows `patient_offsets[p]` and on, to
            `patient_offsets[p + 1] - 1`. Every patient has at least one visit.
    """
    sums = _PatientSums.of(scores, patient_offsets)
    return sums.metrics(np.arange(len(patient_offsets) - 1))


def evaluate(
    probabilities: NDArray[np.floating[Any]],
    targets: NDArray[np.bool_],
    patient_offsets: NDArray[np.integer[Any]],
    ddi: NDArray[np.bool_],
    threshold: float = 0.5,
) -> Metrics:
    """The metrics of these visits: `score_visits`, then `aggregate`."""
    return aggregate(score_visits(probabilities, targets, ddi, threshold), patient_offsets)


def bootstrap(
    scores: VisitScores,
    patient_offsets: NDArray[np.integer[Any]],
    rounds: int = 10,
    share: float = 0.8,
    seed: int = 0,
) -> Bootstrap:
    """Metrics of `rounds` draws of `round(share * P)` patients with replacement.

    Ten rounds of 80 % are what the literature reports as mean ± standard deviation; that is a
    spread between draws, not a confidence interval (see `intervals`).
    """
    sums = _PatientSums.of(scores, patient_offsets)
    num_patients = len(patient_offsets) - 1
    generator = np.random.default_rng(seed)
    size = max(1, round(share * num_patients))
    drawn = [
        dataclasses.astuple(sums.metrics(generator.choice(num_patients, size, replace=True)))
        for _ in range(rounds)
    ]
    return Bootstrap(Metrics(*np.mean(drawn, axis=0)), Metrics(*np.std(drawn, axis=0)))


def intervals(
    scores: VisitScores,
    patient_offsets: NDArray[np.integer[Any]],
    rounds: int = ROUNDS,
    level: float = LEVEL,
    seed: int = 0,
) -> Intervals:
    """Percentile confidence intervals of what `aggregate` gives, from draws of whole patients.

    Args:
        scores, patient_offsets: see `aggregate`.
        rounds: draws of as many patients as there are, with replacement.
        level: 0.95 for a 95 % interval.
        seed: of the draws.
    """
    found = percentile(terms(scores, patient_offsets), from_sums, rounds, level, seed)
    return Intervals(Metrics(*found.low.tolist()), Metrics(*found.high.tolist()))


def terms(scores: VisitScores, patient_offsets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """What each patient adds to the sums that `from_sums` makes the metrics of, (P, 8)."""
    sums = _PatientSums.of(scores, patient_offsets)
    return np.hstack([sums.means, np.ones((len(sums.means), 1)), sums.totals])


def from_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The metrics, in the order of `Metrics`, of sums of `terms`: (..., 8) → (..., 5)."""
    averaged = sums[..., :3] / sums[..., 3:4]
    interactions, pairs, medications, visits = np.moveaxis(sums[..., 4:], -1, 0)
    pooled = np.stack([_ratio(interactions, pairs), medications / visits], axis=-1)
    return np.concatenate([averaged, pooled], axis=-1)


def best_threshold(
    probabilities: NDArray[np.floating[Any]],
    targets: NDArray[np.bool_],
    patient_offsets: NDArray[np.integer[Any]],
    candidates: Sequence[float] = THRESHOLDS,
) -> tuple[float, float]:
    """The threshold with the highest Jaccard, and that Jaccard; the lowest of equal ones.

    Choose it on validation patients, never on those it is then reported for.
    """
    counts = np.diff(patient_offsets)
    best = (candidates[0], -1.0)
    for threshold in candidates:
        jaccard, _ = _set_scores(probabilities >= threshold, targets)
        value = float(np.mean(np.add.reduceat(jaccard, patient_offsets[:-1]) / counts))
        if value > best[1]:
            best = (threshold, value)
    return best


@dataclasses.dataclass(frozen=True)
class _PatientSums:
    """One number a patient for every term, so that a bootstrap round is an index and a mean."""

    means: NDArray[np.float64]  # (P, 3): jaccard, f1, prauc, over the patient's visits
    totals: NDArray[np.int64]  # (P, 4): interactions, pairs, medications, visits

    @classmethod
    def of(cls, scores: VisitScores, patient_offsets: NDArray[np.integer[Any]]) -> "_PatientSums":
        starts, counts = patient_offsets[:-1], np.diff(patient_offsets)
        if len(starts) == 0 or counts.min() < 1 or patient_offsets[-1] != len(scores.jaccard):
            raise ValueError(
                f"patient_offsets: expected at least one patient, each with a visit, covering "
                f"{len(scores.jaccard)} visits"
            )
        averaged = np.stack([scores.jaccard, scores.f1, scores.prauc], axis=1)
        size = scores.num_medications
        pooled = np.stack(
            [scores.num_interactions, size * (size - 1) // 2, size, np.ones_like(size)], axis=1
        )
        return cls(
            np.add.reduceat(averaged, starts, axis=0) / counts[:, None],
            np.add.reduceat(pooled, starts, axis=0),
        )

    def metrics(self, patients: NDArray[np.integer[Any]]) -> Metrics:
        jaccard, f1, prauc = self.means[patients].mean(axis=0).tolist()
        interactions, pairs, medications, visits = self.totals[patients].sum(axis=0).tolist()
        ddi_rate = interactions / pairs if pairs else 0.0
        return Metrics(jaccard, f1, prauc, ddi_rate, medications / visits)


def _set_scores(
    predicted: NDArray[np.bool_], targets: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Jaccard and F1 of every visit's two sets, float64 (V,) each; 0 where both are empty."""
    common = (predicted & targets).sum(axis=1)
    sizes = predicted.sum(axis=1) + targets.sum(axis=1)
    return _ratio(common, sizes - common), _ratio(2 * common, sizes)


def _ratio(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """a / b, and 0 where b is 0 (there a is 0 too)."""
    result: NDArray[np.float64] = a / np.maximum(b, 1)
    return result
