"""Many patients at once: the endpoint's probabilities, bit for bit, at several times its speed.

A request's patients are looked up and laid end to end one by one. Here a table of patients is, with
a few array operations for all of them; what the model is given is the same (serve/batching.py).
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from cafemed.codes import CodeLists
from cafemed.laboratory import Laboratory
from serve.batching import RUN_POSITIONS, Visits, runs_of
from serve.encoding import EncodedPatient
from serve.recommender import Recommender

#: Positions of a run: nobody waits for one, and a patient costs least in runs of so many.
_RUN_POSITIONS = 4096


@dataclasses.dataclass(frozen=True)
class Patients:
    """P patients with V visits in all, patient by patient, encoded for one model.

    Attributes:
        offsets: int64 (P + 1,); patient p has the visits from its offset to the next, at least one.
        known: diagnoses, procedures and previous medications of the V visits, each index at most
            once a visit.
        sex: int8 (P,), index into cohort.SEXES.
        age: float32 (P,), years at the current visit; NaN if unknown.
        laboratory: what may be seen at each of the V visits.
        unknown: int64 (P,), codes and items that the vocabularies do not have.
        unknown_share: float64 (P,), as EncodedPatient has it.
    """

    offsets: NDArray[np.int64]
    known: tuple[CodeLists, CodeLists, CodeLists]
    sex: NDArray[np.int8]
    age: NDArray[np.float32]
    laboratory: Laboratory
    unknown: NDArray[np.int64]
    unknown_share: NDArray[np.float64]

    def __len__(self) -> int:
        """P."""
        return len(self.offsets) - 1

    def __getitem__(self, p: int) -> EncodedPatient:
        """One patient as the endpoint has it, without what only its answer needs."""
        visits = range(self.offsets[p], self.offsets[p + 1])
        diagnoses, procedures, medications = (
            tuple(tuple(lists[t].tolist()) for t in visits) for lists in self.known
        )
        items = self.laboratory.items
        values = [self.laboratory.values[items.offsets[t] : items.offsets[t + 1]] for t in visits]
        return EncodedPatient(
            known=(diagnoses, procedures, medications),
            taken=(),
            sex=int(self.sex[p]),
            age=float(self.age[p]),
            laboratory=tuple(
                tuple(zip(items[t].tolist(), v.tolist(), strict=True))
                for t, v in zip(visits, values, strict=True)
            ),
            unknown=(),
            unknown_share=float(self.unknown_share[p]),
        )


class Scorer:
    """Gives the probabilities of many patients.

    Attributes:
        recommender: whose they are.
    """

    def __init__(self, recommender: Recommender) -> None:
        """Takes the model that answers."""
        self.recommender = recommender

    def probabilities(self, patients: Patients) -> NDArray[np.float32]:
        """Probability of each medication at every patient's current visit, float32 (P, N_m).

        The bits of `Recommender.probabilities`.
        """
        visits = self._laid(patients)
        number = len(self.recommender.bundle.vocabularies["medication"])
        result = np.empty((len(patients), number), np.float32)
        offsets = patients.offsets
        positions = np.add.reduceat(visits.counts.max(axis=1).clip(min=1), offsets[:-1]).tolist()
        # Runs with as many visits in a step as possible: patients of like lengths together.
        order = np.argsort(visits.lengths, kind="stable")
        least = _RUN_POSITIONS if self.recommender.is_exact else RUN_POSITIONS
        for run in runs_of([positions[p] for p in order], least):
            members = order[run]
            part = _taken(visits, offsets, members)
            result[members] = self.recommender.score(part, positions[members[0]])
        return result

    def _laid(self, patients: Patients) -> Visits:
        """As `batching.lay`, of all patients at once."""
        lists, items = patients.known, patients.laboratory.items
        counts = np.stack([of.counts for of in lists], axis=1)
        starts = (np.cumsum(counts) - counts.reshape(-1)).reshape(-1, 3)
        ids = np.empty(int(counts.sum()), np.int64)
        for k, of in enumerate(lists):
            place = np.arange(len(of.ids)) + np.repeat(starts[:, k] - of.offsets[:-1], of.counts)
            ids[place] = of.ids
        scaling = self.recommender.bundle.preprocessing.scaling
        return Visits(
            lengths=np.diff(patients.offsets),
            counts=counts,
            ids=ids,
            classes=self.recommender.edges.classes(counts, ids),
            sex=patients.sex.astype(np.int64),
            age=scaling.ages(patients.age),
            num_values=items.counts,
            items=items.ids.astype(np.int64),
            values=scaling.values(items.ids, patients.laboratory.values),
        )


def _taken(visits: Visits, offsets: NDArray[np.int64], members: NDArray[np.int64]) -> Visits:
    """The visits of some of the patients, in that order."""
    rows = _within(offsets[members], visits.lengths[members])
    counts = visits.counts[rows]
    per_visit = visits.counts.sum(axis=1)
    codes = _within((np.cumsum(per_visit) - per_visit)[rows], per_visit[rows])
    num_values = visits.num_values
    measured = _within((np.cumsum(num_values) - num_values)[rows], num_values[rows])
    return Visits(
        lengths=visits.lengths[members],
        counts=counts,
        ids=visits.ids[codes],
        classes=visits.classes[codes],
        sex=visits.sex[members],
        age=visits.age[members],
        num_values=num_values[rows],
        items=visits.items[measured],
        values=visits.values[measured],
    )


def _within(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from each start on, so many of each."""
    shift: NDArray[np.int64] = starts - (np.cumsum(sizes) - sizes)
    return np.arange(int(sizes.sum())) + np.repeat(shift, sizes)
