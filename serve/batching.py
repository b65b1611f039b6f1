"""Batches of fixed shape: an answer must not depend on who else is in the batch, bit for bit.

A matrix product gives a row other last bits among 64 rows than alone, so the model may only run at
a few fixed shapes, and a patient's shape must follow from that patient alone. Padding the lists is
not enough: a model may drop the padding and lay all codes of a batch end to end. So each patient
is filled up with visits after the current one, which cannot influence it, until the number of
visits, of codes, and of positions (the sum over visits of the longest list, at least 1) are all
those of the shape; and a batch is filled up by repeating its first patient. Fillers have codes of
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
from torch.nn.functional import pad

from cafemed.batches import Batch, collate, visit_arrays
from cafemed.codes import KINDS, CodeLists
from cafemed.graphs import CausalGraph
from cafemed.laboratory import Laboratory
from cafemed.scaling import Scaling
from serve.encoding import EncodedPatient
from serve.schema import MAX_CODES

#: Smallest of the shapes' positions. A hospital patient with two visits of fifteen codes takes 48.
MIN_POSITIONS = 32
MIN_VISITS = 2
#: Positions of one run: the more, the better it fills the processor and the longer one waits.
_RUN_POSITIONS = 512
_ALL_KINDS = tuple(range(len(KINDS)))


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
        """Patients of one run."""
        return max(1, _RUN_POSITIONS // self.positions)

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


def batch_of(
    patients: Sequence[EncodedPatient],
    shape: Shape,
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
    adjacencies: Sequence[sparse.csr_array],
) -> Batch:
    """Makes the tensors of one run.

    Args:
        patients: 1 to shape.patients, all of this shape.
        shape: see Shape.
        graph: of the bundle.
        vocabularies: of the bundle.
        scaling: of the bundle.
        adjacencies: of the graph (`batches.input_adjacencies`).

    Returns:
        a batch of exactly shape.patients patients with shape.steps visits each; the given ones
        come first. Its laboratory arrays are as wide as there are items.
    """
    repeated = [*patients, *[patients[0]] * (shape.patients - len(patients))]
    arrays = visit_arrays(
        _lists(repeated, shape),
        None,
        np.arange(shape.patients + 1, dtype=np.int64) * shape.steps,
        graph,
        vocabularies,
        np.array([patient.sex for patient in repeated], np.int8),
        np.repeat(np.array([patient.age for patient in repeated], np.float32), shape.steps),
        scaling,
        _laboratory(repeated, shape),
        adjacencies,
    )
    batch = collate(arrays, np.arange(shape.patients))
    counts = batch.counts.view(shape.patients, shape.steps, 3)
    for p, patient in enumerate(repeated):
        counts[p, patient.num_visits :] = torch.from_numpy(fillers_of(patient, shape))
    # A batch is as wide as its longest list; what the fillers' counts now cover is padding, which
    # holds valid indices.
    missing = (0, shape.width - batch.codes.shape[2])
    unmeasured = (0, scaling.num_items - batch.laboratory_items.shape[1])
    return dataclasses.replace(
        batch,
        codes=pad(batch.codes, missing),
        classes=pad(batch.classes, missing),
        laboratory_items=pad(batch.laboratory_items, unmeasured),
        laboratory_values=pad(batch.laboratory_values, unmeasured, value=math.nan),
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


def _lists(
    patients: Sequence[EncodedPatient], shape: Shape
) -> tuple[CodeLists, CodeLists, CodeLists]:
    """What is known at each visit, with none for the fillers."""
    lists: list[list[Sequence[int]]] = [[], [], []]
    for patient in patients:
        for k in range(3):
            lists[k].extend(patient.known[k])
            lists[k].extend([()] * (shape.steps - patient.num_visits))
    diagnoses, procedures, medications = map(CodeLists.of, lists)
    return diagnoses, procedures, medications


def _laboratory(patients: Sequence[EncodedPatient], shape: Shape) -> Laboratory:
    """What is measured at each visit, with nothing for the fillers."""
    visits: list[tuple[tuple[int, float], ...]] = []
    for patient in patients:
        visits.extend(patient.laboratory)
        visits.extend([()] * (shape.steps - patient.num_visits))
    items = CodeLists.of([[item for item, _ in measured] for measured in visits])
    values = [value for measured in visits for _, value in measured]
    return Laboratory(items, np.array(values, np.float32))
