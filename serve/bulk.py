"""Many patients at once: the endpoint's probabilities, bit for bit, at several times its speed.

A request's patients are looked up and laid out one by one. Here a table of patients is, with a few
array operations for all of them; what the model is given is the same (serve/batching.py). Runs are
also several times as large, which shares each step's fixed cost among more patients. A larger
matrix product may give other last bits, so a larger run is used at a shape only after one with its
first patients has given what runs of the endpoint's size give.
"""

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from cafemed.batches import Batch, VisitArrays, input_adjacencies, visit_arrays
from cafemed.codes import CodeLists
from cafemed.graphs import ORPHAN
from cafemed.laboratory import Laboratory
from serve.batching import MIN_VISITS, Shape, kinds_of, position_sizes
from serve.encoding import EncodedPatient
from serve.recommender import Recommender

logger = logging.getLogger(__name__)

#: A run is up to so many times as large as the endpoint's; beyond, caches are too small for it.
_TIMES = 4


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
        """Prepares what all calls share."""
        self.recommender = recommender
        bundle = recommender.bundle
        self._kinds = kinds_of(bundle.vocabularies)
        self._adjacencies = input_adjacencies(bundle.graph, bundle.vocabularies)
        self._times: dict[Shape, int] = {}

    def probabilities(self, patients: Patients) -> NDArray[np.float32]:
        """Probability of each medication at every patient's current visit, float32 (P, N_m).

        The bits of `Recommender.probabilities`.
        """
        bundle = self.recommender.bundle
        if len(self._kinds) == 1:  # rare, and filled in another way
            return self.recommender.probabilities([patients[p] for p in range(len(patients))])
        arrays = visit_arrays(
            patients.known,
            None,
            patients.offsets,
            bundle.graph,
            bundle.vocabularies,
            patients.sex,
            np.repeat(patients.age, np.diff(patients.offsets)),
            bundle.preprocessing.scaling,
            patients.laboratory,
            self._adjacencies,
        )
        result = np.empty((len(patients), arrays.targets.shape[1]), np.float32)
        table = _Table(arrays, *_used(arrays))
        for shape, members in _by_shape(table, self._kinds):
            self._score(table, shape, members, result)
        return result

    def _score(
        self,
        table: "_Table",
        shape: Shape,
        members: NDArray[np.int64],
        result: NDArray[np.float32],
    ) -> None:
        """Fills in the rows of the patients of a shape."""
        start = 0
        while start < len(members):
            room = shape.patients * self._times.get(shape, _TIMES)
            if len(members) - start < room:
                room = shape.patients
            run = members[start : start + room]
            rows = self._run(table, shape, run, room)
            if room > shape.patients and shape not in self._times:
                rows = self._checked(table, shape, run, rows)
            result[run] = rows
            start += len(run)

    def _checked(
        self,
        table: "_Table",
        shape: Shape,
        run: NDArray[np.int64],
        rows: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Computes a large run again by runs of the endpoint's size, and keeps what they say."""
        parts = [run[i : i + shape.patients] for i in range(0, len(run), shape.patients)]
        exact = np.concatenate([self._run(table, shape, p, shape.patients) for p in parts])
        same = np.array_equal(exact, rows)
        self._times[shape] = _TIMES if same else 1
        if not same:
            logger.info("runs of %d patients differ in last bits: not used", len(run))
        return exact

    def _run(
        self, table: "_Table", shape: Shape, run: NDArray[np.int64], room: int
    ) -> NDArray[np.float32]:
        """One run of the model, float32 (len(run), N_m)."""
        items = self.recommender.bundle.preprocessing.scaling.num_items
        last = table.lengths[run] - 1
        repeated = np.concatenate([run, np.repeat(run[:1], room - len(run))])
        batch = _batch(table, shape, repeated, items)
        return self.recommender.score(batch, torch.from_numpy(last))


@dataclasses.dataclass(frozen=True)
class _Table:
    """What is worked out once for all runs.

    Attributes:
        arrays: of the P patients.
        used: int64 (P,), positions of each.
        codes: int64 (P,), codes of each.
    """

    arrays: VisitArrays
    used: NDArray[np.int64]
    codes: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Visits of each patient, int64 (P,)."""
        return np.diff(self.arrays.patient_offsets)


def _by_shape(table: _Table, kinds: tuple[int, ...]) -> Iterator[tuple[Shape, NDArray[np.int64]]]:
    """The patients of each shape, in order; as `batching.shape_of` for each of them."""
    lengths = table.lengths
    visits = np.maximum(MIN_VISITS, 1 << np.ceil(np.log2(lengths)).astype(np.int64))
    waiting = np.arange(len(lengths))
    for positions in position_sizes():
        if not len(waiting):
            return
        has_room = np.zeros(len(waiting), np.bool_)
        for most in np.unique(visits[waiting]).tolist():
            shape = Shape(most, positions, kinds)
            of_shape = visits[waiting] == most
            p = waiting[of_shape]
            full, single, _ = _missing(shape, lengths[p], table.used[p], table.codes[p])
            fits = np.minimum(full, single) >= shape.num_fillers
            has_room[of_shape] = fits
            if fits.any():
                yield shape, p[fits]
        waiting = waiting[~has_room]


def _used(arrays: VisitArrays) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions and codes of each patient, int64 (P,)."""
    starts = arrays.patient_offsets[:-1]
    counts = arrays.counts.astype(np.int64)
    positions = counts.max(axis=1).clip(min=1)
    return np.add.reduceat(positions, starts), np.add.reduceat(counts.sum(axis=1), starts)


def _missing(
    shape: Shape, lengths: NDArray[np.int64], used: NDArray[np.int64], codes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """What fillers add to each patient, as in serve/batching.py."""
    positions = shape.positions - used - (shape.visits - lengths)
    full, odd = np.divmod(shape.codes - codes - positions, len(shape.kinds) - 1)
    return full, positions - full, odd


def _batch(table: _Table, shape: Shape, run: NDArray[np.int64], num_items: int) -> Batch:
    """As `batching.batch_of`, of any number of patients."""
    arrays, lengths = table.arrays, table.lengths[run]
    num_rows = len(run) * shape.steps
    # Where the patients' own visits come from, and where they go.
    number = np.repeat(np.arange(len(run)), lengths)
    step = np.arange(len(number)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = arrays.patient_offsets[run][number] + step
    rows = number * shape.steps + step

    longest = min(shape.width, arrays.codes.shape[2])
    codes = np.zeros((num_rows, 3, shape.width), np.int64)
    codes[rows, :, :longest] = arrays.codes[source, :, :longest]
    classes = np.full((num_rows, 3, shape.width), ORPHAN, np.int64)
    classes[rows, :, :longest] = arrays.classes[source, :, :longest]
    counts = _filled(shape, lengths, table.used[run], table.codes[run])
    counts.reshape(num_rows, 3)[rows] = arrays.counts[source]
    measured = arrays.laboratory_items.shape[1]
    items = np.zeros((num_rows, num_items), np.int64)
    items[rows, :measured] = arrays.laboratory_items[source]
    values = np.full((num_rows, num_items), np.nan, np.float32)
    values[rows, :measured] = arrays.laboratory_values[source]
    num_values = np.zeros(num_rows, np.int64)
    num_values[rows] = arrays.laboratory_counts[source]
    age = np.repeat(arrays.age[arrays.patient_offsets[run]], shape.steps)
    return Batch(
        codes=torch.from_numpy(codes),
        counts=torch.from_numpy(counts.reshape(num_rows, 3)),
        classes=torch.from_numpy(classes),
        lengths=torch.full((len(run),), shape.steps),
        targets=torch.zeros(num_rows, arrays.targets.shape[1]),
        sex=torch.from_numpy(arrays.sex[run].astype(np.int64)),
        age=torch.from_numpy(age),
        laboratory_items=torch.from_numpy(items),
        laboratory_values=torch.from_numpy(values),
        laboratory_counts=torch.from_numpy(num_values),
        slots=torch.arange(num_rows),
        num_steps=shape.steps,
        sizes=arrays.sizes,
    )


def _filled(
    shape: Shape, lengths: NDArray[np.int64], used: NDArray[np.int64], codes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Codes of each list with fillers in place, int64 (patients, steps, 3); 0 for own visits."""
    full, single, odd = _missing(shape, lengths, used, codes)
    counts = np.zeros((len(lengths), shape.steps, 3), np.int64)
    wide = slice(shape.visits, shape.visits + shape.num_fillers)
    ones = slice(wide.stop, wide.stop + shape.num_fillers)
    for kind in shape.kinds:
        counts[:, wide, kind] = _split(full, shape.num_fillers)
    counts[:, ones, shape.kinds[0]] = _split(single, shape.num_fillers)
    counts[:, wide.stop, shape.kinds[1]] = odd
    return counts


def _split(totals: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Splits each number as evenly as can be, int64 (n, parts)."""
    return totals[:, None] // parts + (np.arange(parts) < totals[:, None] % parts)
