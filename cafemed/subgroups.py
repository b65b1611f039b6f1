"""How good a model is for whom: the metrics by sex, age, first or later visit, number of visits.

Every value has a 95 % interval from a bootstrap over whole patients, also where a group is of
visits: then a patient is drawn with all visits that are in the group. Groups of few patients are
kept back (cafemed/suppression.py). Nothing here is at patient level once it is returned.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed import calibration, intervals, metrics, suppression
from cafemed.cohort import SEXES, Cohort
from cafemed.intervals import LEVEL, ROUNDS, Interval
from cafemed.metrics import Metrics, VisitScores

#: Age bands in years at the visit: under 18, 18 to 44, … (a choice; no metric depends on it).
AGES = (18, 45, 65, 80)

#: A patient's numbers of visits, lowest of each group. Groups of exactly one number, but the first,
#: would let two kept-back numbers of patients be found from the total numbers of visits.
VISITS = (1, 2, 4)

#: What is given of every group.
NAMES = (*(field.name for field in dataclasses.fields(Metrics)), "ece")

_NUM_TERMS = 8  # of metrics.terms
_ECE = NAMES.index("ece")

#: Table → group → bool (V,), the visits in it.
Groups = dict[str, dict[str, NDArray[np.bool_]]]


@dataclasses.dataclass(frozen=True)
class Visits:
    """What P patients' V visits are grouped by.

    Attributes:
        patient_offsets: int64 (P + 1,), each patient has at least one visit.
        sex: int8 (P,), index into SEXES.
        age: float32 (V,), years; NaN where unknown.
        before: bool (V, N_m), medications of the patient's previous visit.
    """

    patient_offsets: NDArray[np.int64]
    sex: NDArray[np.int8]
    age: NDArray[np.float32]
    before: NDArray[np.bool_]

    @classmethod
    def of(cls, cohort: Cohort, patients: NDArray[np.int64]) -> "Visits":
        """The visits of these patients, patient by patient in the order given."""
        visits = cohort.visits_of(patients)
        before = cohort.previous(cohort.medications).take(visits)
        counts = np.diff(cohort.patient_offsets)[patients]
        return cls(
            patient_offsets=np.concatenate([[0], np.cumsum(counts)]),
            sex=cohort.sex[patients],
            age=cohort.age[visits],
            before=before.multi_hot(cohort.sizes[2]),
        )

    @property
    def is_later(self) -> NDArray[np.bool_]:
        """Says for every visit whether it is not its patient's first, bool (V,)."""
        later = np.ones(len(self.age), np.bool_)
        later[self.patient_offsets[:-1]] = False
        return later

    def groups(self) -> Groups:
        """The groups of every table; within a table each visit is in exactly one."""
        counts = np.diff(self.patient_offsets)
        sex, number = np.repeat(self.sex, counts), np.repeat(counts, counts)
        unknown = np.isnan(self.age)
        ages = {
            _between(low, high, "and over"): (self.age >= low) & (self.age < high)
            for low, high in itertools.pairwise((-math.inf, *AGES, math.inf))
        }
        return {
            "sex": {name: sex == i for i, name in enumerate(SEXES)},
            "age": {**ages, "unknown": unknown},
            "visit": {"first": ~self.is_later, "later": self.is_later},
            "visits of the patient": {
                _between(low, high, "or more"): (number >= low) & (number < high)
                for low, high in itertools.pairwise((*VISITS, math.inf))
            },
        }


def measure(
    probabilities: NDArray[np.floating[Any]],
    targets: NDArray[np.bool_],
    visits: Visits,
    ddi: NDArray[np.bool_],
    threshold: float,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Measures all patients, every group of every table, and the changes between visits.

    Args:
        probabilities: (V, N_m), after temperature.
        targets: bool (V, N_m).
        visits: see Visits.
        ddi: bool (N_m, N_m).
        threshold: of the predicted sets.
        seed: of the bootstrap.
        rounds: of the bootstrap.

    Returns:
        JSON values. "all" is a cell: "patients" and "visits" (counts) and each of NAMES as [value,
        low, high]. "tables" maps each table to its cells, which have a "group" besides; a cell that
        is kept back has nothing but its "group" and "hidden". "changes": see `_changes`.
    """
    scores = metrics.score_visits(probabilities, targets, ddi, threshold)
    gaps = calibration.deviations(probabilities, targets)

    def cell(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        offsets = _offsets(chosen, visits.patient_offsets)
        terms = _terms(_take(scores, chosen), gaps[chosen], targets.shape[1], offsets)
        found = intervals.percentile(terms, _from_sums, rounds, LEVEL, seed, reflected=(_ECE,))
        counts = {"patients": len(offsets) - 1, "visits": int(offsets[-1])}
        return counts | dict(zip(NAMES, _triples(found), strict=True))

    everybody = np.ones(len(targets), np.bool_)
    if len(visits.sex) < suppression.FEWEST:
        whole: dict[str, Any] = {"hidden": True}
    else:
        whole = cell(everybody)
    tables, seen = {}, {}
    for table, groups in visits.groups().items():
        seen[table] = shown(groups, visits.patient_offsets)
        tables[table] = [
            {"group": name} | (cell(groups[name]) if visible else {"hidden": True})
            for name, visible in seen[table].items()
        ]
    changes = {"hidden": True}
    if seen["visit"].get("later", False):
        changes = _changes(probabilities >= threshold, targets, visits, seed, rounds)
    return {
        "level": LEVEL,
        "rounds": rounds,
        "fewest": suppression.FEWEST,
        "all": whole,
        "tables": tables,
        "changes": changes,
    }


def shown(
    groups: Mapping[str, NDArray[np.bool_]], patient_offsets: NDArray[np.int64]
) -> dict[str, bool]:
    """Says of every group that has a visit whether it may be published."""
    starts = patient_offsets[:-1]
    members = np.stack([np.logical_or.reduceat(g, starts) for g in groups.values()], axis=1)
    kept_back = suppression.hidden(members).tolist()
    return {
        name: not hidden
        for name, hidden, size in zip(groups, kept_back, members.sum(axis=0), strict=True)
        if size
    }


def _changes(
    predicted: NDArray[np.bool_],
    targets: NDArray[np.bool_],
    visits: Visits,
    seed: int,
    rounds: int,
) -> dict[str, Any]:
    """How well changes against the previous visit are found, pooled over all later visits.

    Started are the targets that the previous visit did not have, stopped its medications that are
    no targets. Of either, `recall` is the share that is found: recommended although the previous
    visit did not have it; no longer recommended. `precision` is the share of what the model starts
    (stops) that was started (stopped), `f1` their harmonic mean, `per_visit` how many there are a
    visit.

    Returns:
        "patients" and "visits"; "started" and "stopped" with their values as [value, low, high],
        None where undefined.
    """
    chosen = visits.is_later
    offsets = _offsets(chosen, visits.patient_offsets)
    now, said, before = targets[chosen], predicted[chosen], visits.before[chosen]
    pairs = {"started": (now & ~before, said & ~before), "stopped": (before & ~now, before & ~said)}
    result: dict[str, Any] = {"patients": len(offsets) - 1, "visits": int(offsets[-1])}
    for name, (true, found) in pairs.items():
        counts = [(true & found), true, found]
        columns = [c.sum(axis=1) for c in counts] + [np.ones(len(now), np.int64)]
        terms = np.add.reduceat(np.stack(columns, axis=1), offsets[:-1], axis=0)
        values = _triples(intervals.percentile(terms, _found, rounds, LEVEL, seed))
        result[name] = dict(zip(("recall", "precision", "f1", "per_visit"), values, strict=True))
    return result


def _found(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Recall, precision, F1 and truly a visit, of hits, true, found and visits: (..., 4)."""
    hits, true, found, visits = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [hits / true, hits / found, 2 * hits / (true + found), true / visits]
    return np.stack(ratios, axis=-1)


def _terms(
    scores: VisitScores,
    gaps: NDArray[np.float64],
    num_medications: int,
    offsets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """What each patient adds to the sums behind NAMES; rows are the visits of one group."""
    pairs = np.diff(offsets)[:, None] * num_medications
    gap_sums = np.add.reduceat(gaps, offsets[:-1], axis=0)
    return np.hstack([metrics.terms(scores, offsets), gap_sums, pairs])


def _from_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of NAMES, (..., 6), of sums of `_terms`."""
    usual = metrics.from_sums(sums[..., :_NUM_TERMS])
    error = calibration.error_of_sums(sums[..., _NUM_TERMS:-1], sums[..., -1])
    return np.concatenate([usual, error[..., None]], axis=-1)


def _offsets(chosen: NDArray[np.bool_], patient_offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets into the chosen visits of the patients that have one."""
    counts = np.add.reduceat(chosen.astype(np.int64), patient_offsets[:-1])
    return np.concatenate([[0], np.cumsum(counts[counts > 0])])


def _take(scores: VisitScores, chosen: NDArray[np.bool_]) -> VisitScores:
    return VisitScores(**{name: values[chosen] for name, values in vars(scores).items()})


def _triples(found: Interval) -> list[list[float | None]]:
    """[value, low, high] of each value; JSON has no NaN."""
    rows = np.stack([found.value, found.low, found.high], axis=1).tolist()
    return [[x if math.isfinite(x) else None for x in row] for row in rows]


def _between(low: float, high: float, beyond: str) -> str:
    """The name of whole numbers in [low, high)."""
    if low == -math.inf:
        return f"under {high:g}"
    if high == math.inf:
        return f"{low:g} {beyond}"
    return f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
