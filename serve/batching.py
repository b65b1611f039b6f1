"""Batches of fixed shape: an answer must not depend on who else is in the batch, bit for bit.

A matrix product gives a row other last bits among 64 rows than alone, so the model may only run at
a few fixed shapes, and a patient's shape must follow from that patient alone. Padding the lists is
not enough: a model may drop the padding and lay all codes of a batch end to end. So each patient
is filled up with visits after the current one, which cannot influence it, until the number of
visits, of codes, and of positions (the sum over visits of the longest list, at least 1) are all
those of the shape; and a batch is filled up by repeating its first patient. A run of few patients
has room for few (`Shape.room`), where that has been seen to give the bits of a whole one
(serve/recommender.py). Fillers have codes of
those kinds alone whose vocabulary is not empty: the others have no code to fill with.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from cafemed.batches import Batch
from cafemed.codes import KINDS
from cafemed.graphs import CAUSE, EFFECT, MIDDLE, ORPHAN
from cafemed.scaling import Scaling
from serve.encoding import EncodedPatient
from serve.schema import MAX_CODES

#: Smallest of the shapes' positions. A hospital patient with two visits of fifteen codes takes 48.
MIN_POSITIONS = 32
MIN_VISITS = 2
#: Positions of one run: the more, the better it fills the processor and the longer one waits.
_RUN_POSITIONS = 512
#: Smaller runs have room for a multiple of so many patients: products of fewer rows than these
#: mostly go to other routines, which round in another way.
_ROOM_STEP = 4
_ALL_KINDS = tuple(range(len(KINDS)))
#: [has incoming edges][has outgoing edges].
_CLASSES = ((ORPHAN, CAUSE), (EFFECT, MIDDLE))
_NOTHING: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """A shape that the model runs at.

    Attributes:
        visits: that a patient has room for; fillers come on top.
        positions: of every patient, fillers included.
        kinds: indices of the kinds that have a vocabulary (`kinds_of`).
    """

    visits: int
    positions: int
    kinds: tuple[int, ...] = _ALL_KINDS

    @property
    def codes(self) -> int:
        """Codes of every patient, fillers included.

        Three eighths of the way from the fewest to the most that visits with codes can have, one to
        K a position of K kinds: what hospital patients have, so that most find room where their
        positions do. With a single kind, all positions but those of `visits` empty visits.
        """
        if len(self.kinds) == 1:
            return self.positions - self.visits
        return self.positions * (3 * len(self.kinds) + 5) // 8

    @property
    def patients(self) -> int:
        """Patients of one run, at most."""
        return max(1, _RUN_POSITIONS // self.positions)

    def room(self, number: int) -> int:
        """Patients of a run that is to hold so many, at most `patients`."""
        return min(self.patients, -(-number // _ROOM_STEP) * _ROOM_STEP)

    @property
    def width(self) -> int:
        """Codes that one list has room for."""
        return min(MAX_CODES, self.positions)

    @property
    def num_fillers(self) -> int:
        """Filling visits of either kind (`fillers_of`)."""
        return math.ceil(self.positions / self.width)

    @property
    def steps(self) -> int:
        """Visits of every patient, fillers included."""
        room = self.visits if len(self.kinds) > 1 else 2 * self.visits
        return room + 2 * self.num_fillers


def kinds_of(vocabularies: Mapping[str, tuple[str, ...]]) -> tuple[int, ...]:
    """Indices of the kinds that have a vocabulary; medications always do."""
    return tuple(k for k, kind in enumerate(KINDS) if vocabularies[kind])


def shape_of(patient: EncodedPatient, kinds: tuple[int, ...] = _ALL_KINDS) -> Shape:
    """The shape for a patient: the smallest that has room for it and its fillers."""
    visits = MIN_VISITS
    while visits < patient.num_visits:
        visits *= 2
    for positions in position_sizes():
        shape = Shape(visits, positions, kinds)
        if _has_room(patient, shape):
            return shape
    raise AssertionError("unreachable")


def position_sizes() -> Iterator[int]:
    """The positions that shapes have, ascending: two to each doubling."""
    for power in itertools.count():
        yield MIN_POSITIONS << power
        yield 3 * MIN_POSITIONS // 2 << power


def fillers_of(patient: EncodedPatient, shape: Shape) -> NDArray[np.int64]:
    """Codes of each list of the visits that come after a patient's last, int64 (visits, 3).

    First empty visits, which have one position and no code; then visits with equally long lists of
    all K kinds, which have K codes a position, and visits with the first kind alone, which have
    one. So many of each are chosen that the sums come out. With a single kind there are no visits
    of the former sort, and as many empty ones as make `shape.visits` with the patient's own.
    """
    kinds = shape.kinds
    if len(kinds) == 1:
        empty, lists, single = _missing_of_one(patient, shape)
        fillers = np.zeros((empty + lists, 3), np.int64)
        fillers[empty:, kinds[0]] = _split(single, lists)
        return fillers
    full, single, odd = _missing(patient, shape)
    nothing = np.zeros((shape.visits - patient.num_visits, 3), np.int64)
    wide = np.zeros((shape.num_fillers, 3), np.int64)
    wide[:, kinds] = _split(full, shape.num_fillers)[:, None]
    ones = np.zeros((shape.num_fillers, 3), np.int64)
    ones[:, kinds[0]] = _split(single, shape.num_fillers)
    ones[0, kinds[1]] = odd
    return np.concatenate([nothing, wide, ones])


@dataclasses.dataclass(frozen=True)
class Edges:
    """Directed edges among the codes of a kind: index → the indices that it leads to, or that lead
    to it; codes without any are left out.
    """

    out: Mapping[int, frozenset[int]]
    into: Mapping[int, frozenset[int]]

    @classmethod
    def of(cls, adjacency: sparse.csr_array) -> "Edges":
        """Those of an adjacency matrix (`batches.input_adjacencies`)."""
        pair: list[dict[int, frozenset[int]]] = []
        for matrix in (adjacency, adjacency.T.tocsr()):
            ends = np.split(matrix.indices, matrix.indptr[1:-1])
            pair.append({i: frozenset(to.tolist()) for i, to in enumerate(ends) if len(to)})
        return cls(*pair)

    def classes(self, codes: Sequence[int]) -> list[int]:
        """Classes of a visit's codes in the graph of these codes alone, as `node_classes`."""
        found = []
        for code in codes:
            incoming = not self.into.get(code, _NOTHING).isdisjoint(codes)
            outgoing = not self.out.get(code, _NOTHING).isdisjoint(codes)
            found.append(_CLASSES[incoming][outgoing])
        return found


def batch_of(
    patients: Sequence[EncodedPatient],
    shape: Shape,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
    edges: Sequence[Edges],
    room: int | None = None,
) -> Batch:
    """Makes the tensors of one run; what `batches.visit_arrays` and `collate` would, with fillers.

    Args:
        patients: 1 to `room`, all of this shape.
        shape: see Shape.
        vocabularies: of the bundle.
        scaling: of the bundle.
        edges: of the bundle's graph, one a kind.
        room: patients of the run; None: shape.patients.

    Returns:
        a batch of exactly `room` patients with shape.steps visits each; the given ones come
        first. Its laboratory arrays are as wide as there are items.
    """
    room = shape.patients if room is None else room
    visits = (room, shape.steps)
    codes = np.zeros((*visits, 3, shape.width), np.int64)
    classes = np.full((*visits, 3, shape.width), ORPHAN, np.int64)
    counts = np.zeros((*visits, 3), np.int64)
    items = np.zeros((*visits, scaling.num_items), np.int64)
    values = np.full((*visits, scaling.num_items), np.nan, np.float32)
    num_values = np.zeros(visits, np.int64)
    for p, patient in enumerate(patients):
        for k, lists in enumerate(patient.known):
            for t, ids in enumerate(lists):
                if ids:
                    codes[p, t, k, : len(ids)] = ids
                    classes[p, t, k, : len(ids)] = edges[k].classes(ids)
                    counts[p, t, k] = len(ids)
        counts[p, patient.num_visits :] = fillers_of(patient, shape)
        for t, measured in enumerate(patient.laboratory):
            if measured:
                own = np.array([item for item, _ in measured])
                items[p, t, : len(own)] = own
                given = np.array([value for _, value in measured], np.float32)
                values[p, t, : len(own)] = scaling.values(own, given)
                num_values[p, t] = len(own)
    for array in (codes, classes, counts, items, values, num_values):
        array[len(patients) :] = array[0]
    ages = scaling.ages(np.array([patient.age for patient in patients], np.float32))
    sexes = np.array([patient.sex for patient in patients], np.int64)
    of = np.zeros(room, np.int64)  # the patient that each is, the first again at the end
    of[: len(patients)] = np.arange(len(patients))
    rows = room * shape.steps
    num_diagnoses, num_procedures, num_medications = (len(vocabularies[kind]) for kind in KINDS)
    return Batch(
        codes=torch.from_numpy(codes.reshape(rows, 3, -1)),
        counts=torch.from_numpy(counts.reshape(rows, 3)),
        classes=torch.from_numpy(classes.reshape(rows, 3, -1)),
        lengths=torch.full((room,), shape.steps),
        targets=torch.zeros(rows, num_medications),
        sex=torch.from_numpy(sexes[of]),
        age=torch.from_numpy(np.repeat(ages[of], shape.steps)),
        laboratory_items=torch.from_numpy(items.reshape(rows, -1)),
        laboratory_values=torch.from_numpy(values.reshape(rows, -1)),
        laboratory_counts=torch.from_numpy(num_values.reshape(rows)),
        slots=torch.arange(rows),
        num_steps=shape.steps,
        sizes=(num_diagnoses, num_procedures, num_medications),
    )


def _has_room(patient: EncodedPatient, shape: Shape) -> bool:
    """Whether enough is missing for every filler with codes to have one of each of its lists."""
    if len(shape.kinds) == 1:
        _, lists, single = _missing_of_one(patient, shape)
        return single >= lists
    full, single, _ = _missing(patient, shape)
    return min(full, single) >= shape.num_fillers


def _missing(patient: EncodedPatient, shape: Shape) -> tuple[int, int, int]:
    """Positions to fill with K codes each and with one code each, and a code left over (K = 3)."""
    sizes = _sizes(patient)
    used = int(sizes.max(0).clip(min=1).sum())
    positions = shape.positions - used - (shape.visits - patient.num_visits)
    codes = shape.codes - int(sizes.sum())
    full, odd = divmod(codes - positions, len(shape.kinds) - 1)
    return full, positions - full, odd


def _missing_of_one(patient: EncodedPatient, shape: Shape) -> tuple[int, int, int]:
    """Of a single kind: empty visits to add, visits with codes to add, and their codes."""
    sizes = _sizes(patient)
    empty = shape.visits - int((sizes.sum(0) == 0).sum())
    lists = shape.steps - patient.num_visits - empty
    return empty, lists, shape.codes - int(sizes.sum())


def _sizes(patient: EncodedPatient) -> NDArray[np.int64]:
    """Codes of each list, int64 (3, visits)."""
    return np.array([[len(codes) for codes in kind] for kind in patient.known], np.int64)


def _split(total: int, parts: int) -> NDArray[np.int64]:
    """Splits a number as evenly as can be, int64 (parts,)."""
    return total // parts + (np.arange(parts) < total % parts).astype(np.int64)
