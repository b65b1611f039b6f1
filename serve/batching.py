"""Runs of the model: an answer must not depend on who else is in the run, bit for bit.

The visits of all patients of a run, of whatever lengths, are laid end to end. A matrix product
gives a row other last bits among 64 rows than alone, so products are done in blocks of a fixed
number of rows (models/blocks.py), and what a run has of visits, codes, positions (the sum over
visits of the longest list, at least 1) and asked-about visits is filled up to whole blocks: by
invented patients of one empty visit here, by codes and positions of the last of these in
models/asked.py. They come last, so that no patient's row is among a tensor's last few elements.

That the bits are a patient's own then is tried when a model is loaded (serve/recommender.py). Where
they are not (a GPU, several threads, another build of torch), a run is filled up to its whole room.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from cafemed.batches import Batch
from cafemed.graphs import CAUSE, EFFECT, MIDDLE, ORPHAN
from cafemed.scaling import Scaling
from models.asked import Codes
from models.blocks import whole
from models.packing import require_inside
from serve.encoding import EncodedPatient

#: Positions of a run of the endpoint, at most: the more, the less a patient costs and the longer
#: one waits. A hospital patient with two visits of fifteen codes takes 30. So few that of many who
#: wait some are answered, and others read, while the next are computed.
RUN_POSITIONS = 512
#: Of a code without edges among its list's codes, with outgoing, with incoming and with both.
_CLASSES = np.array([ORPHAN, CAUSE, EFFECT, MIDDLE])
#: Marks of the codes of a run: few enough to stay at hand, and twenty times as many as the codes.
_MARKS = 1 << 15

_chained = itertools.chain.from_iterable


@dataclasses.dataclass(frozen=True)
class Visits:
    """What the model is given of P patients with V visits, N codes and M values, end to end.

    Attributes:
        lengths: int64 (P,), visits of each patient, at least one.
        counts: int64 (V, 3), codes of each kind.
        ids: int64 (N,), indices into each kind's vocabulary, by visit and kind.
        classes: int64 (N,), node classes in the graph of a visit's codes of that kind alone.
        sex: int64 (P,).
        age: float32 (P,), scaled; NaN if unknown.
        num_values: int64 (V,), laboratory values.
        items: int64 (M,).
        values: float32 (M,), scaled.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    ids: NDArray[np.int64]
    classes: NDArray[np.int64]
    sex: NDArray[np.int64]
    age: NDArray[np.float32]
    num_values: NDArray[np.int64]
    items: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Edges:
    """Directed edges among the codes of each kind. The codes of all kinds are nodes of one table.

    Attributes:
        first: int64 (3,), the node of each kind's first code.
        starts: int64 (nodes,), where the nodes that each leads to begin among `targets`.
        numbers: int64 (nodes,), how many they are.
        targets: int64 (edges,).
    """

    first: NDArray[np.int64]
    starts: NDArray[np.int64]
    numbers: NDArray[np.int64]
    targets: NDArray[np.int64]

    @classmethod
    def of(cls, adjacencies: Sequence[sparse.csr_array]) -> "Edges":
        """Those of each kind's adjacency matrix (`batches.input_adjacencies`)."""
        first = _starts(np.array([matrix.shape[0] for matrix in adjacencies]))
        numbers = np.concatenate([np.diff(matrix.indptr) for matrix in adjacencies])
        targets = [matrix.indices + node for matrix, node in zip(adjacencies, first, strict=True)]
        return cls(first, _starts(numbers), numbers.astype(np.int64), np.concatenate(targets))

    def classes(self, counts: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class of each code in the graph of its list's codes alone, as `node_classes`, int64 (N,).

        Args:
            counts: int64 (V, 3), codes of each visit and kind, which are a list.
            ids: int64 (N,), indices into each kind's vocabulary, by visit and kind.
        """
        per_list, size = counts.reshape(-1), len(self.starts)
        # A key says which node of which list: a code has edges to the keys it leads to that exist.
        zeros = np.arange(0, len(per_list) * size, size)
        lists = zeros.repeat(per_list)
        keys = (zeros.reshape(-1, 3) + self.first).reshape(-1).repeat(per_list) + ids
        nodes = keys - lists
        numbers = self.numbers[nodes]
        source = np.arange(len(ids)).repeat(numbers)
        leads = np.arange(len(source)) + (self.starts[nodes] - _starts(numbers))[source]
        wanted = lists[source] + self.targets[leads]
        has = np.zeros(len(ids), np.int64)
        # Most codes that one leads to are not in its list: few keys are left to be looked for, and
        # few to be looked at.
        marks, mark = np.zeros(_MARKS, np.int8), keys & (_MARKS - 1)
        marks[mark] = 1
        likely = marks[wanted & (_MARKS - 1)].nonzero()[0]
        if len(likely):
            source, wanted = source[likely], wanted[likely]
            marks[wanted & (_MARKS - 1)] = 2
            target = (marks[mark] == 2).nonzero()[0]
            target = target[keys[target].argsort()]
            place = keys[target].searchsorted(wanted)
            target = target[np.minimum(place, len(target) - 1)]
            exists = keys[target] == wanted
            has[source[exists]] = 1
            has[target[exists]] |= 2
        return _CLASSES[has]


def positions_of(patient: EncodedPatient) -> int:
    """Positions of a patient: the longest list of each visit, at least 1, added up."""
    return sum(max(1, *map(len, lists)) for lists in zip(*patient.known, strict=True))


def room_for(positions: int, least: int = RUN_POSITIONS) -> int:
    """Positions of the runs that a patient with so many may be in, by itself or with others."""
    room = least
    while room < positions:
        room *= 2
    return room


def runs_of(positions: Sequence[int], least: int = RUN_POSITIONS) -> list[list[int]]:
    """Divides patients with so many positions into runs: indices, in order within each run.

    Args:
        positions: of each patient.
        least: positions that a run has room for, or more for a patient who has more.
    """
    runs: dict[int, list[list[int]]] = {}
    left: dict[int, int] = {}
    for i, number in enumerate(positions):
        room = room_for(number, least)
        if left.get(room, 0) < number:
            runs.setdefault(room, []).append([])
            left[room] = room
        runs[room][-1].append(i)
        left[room] -= number
    return [run for of_room in runs.values() for run in of_room]


def lay(patients: Sequence[EncodedPatient], edges: Edges, scaling: Scaling) -> Visits:
    """Lays patients end to end.

    Args:
        patients: at least one.
        edges: of the bundle's graph.
        scaling: of the bundle.
    """
    visits = (zip(*patient.known, strict=True) for patient in patients)
    lists = list(_chained(_chained(visits)))
    counts = np.array([len(codes) for codes in lists]).reshape(-1, 3)
    ids = np.fromiter(_chained(lists), np.int64)
    measured = list(_chained(patient.laboratory for patient in patients))
    pairs = list(_chained(measured))
    items, values = np.empty(0, np.int64), np.empty(0, np.float32)
    if pairs:
        items = np.array([item for item, _ in pairs], np.int64)
        values = scaling.values(items, np.array([value for _, value in pairs], np.float32))
    return Visits(
        lengths=np.array([patient.num_visits for patient in patients]),
        counts=counts,
        ids=ids,
        classes=edges.classes(counts, ids),
        sex=np.array([patient.sex for patient in patients]),
        age=scaling.ages(np.array([patient.age for patient in patients], np.float32)),
        num_values=np.array([len(visit) for visit in measured]),
        items=items,
        values=values,
    )


def codes_of(visits: Visits, sizes: tuple[int, int, int], room: int | None = None) -> Codes:
    """The codes of a run of patients of whom each one's last visit is asked about.

    Args:
        visits: of P patients, at least one.
        sizes: of the vocabularies.
        room: positions that the run is filled up for; None: it has whole blocks alone.

    Returns:
        codes whose first P visits asked about are the given patients' last.

    Raises:
        ArtifactError: if a code lies outside its vocabulary.
    """
    number, own = len(visits.lengths), len(visits.counts)
    rows = whole((own if room is None else room) + 1)
    lengths = np.ones(number + rows - own, np.int64)
    lengths[:number] = visits.lengths
    counts = np.zeros((rows, 3), np.int64)
    counts[:own] = visits.counts
    asked = np.full(whole((number if room is None else room) + 1), rows - 1)
    asked[:number] = visits.lengths.cumsum() - 1
    modality = np.arange(3 * own).repeat(visits.counts.reshape(-1)) % 3
    require_inside(visits.ids, modality, sizes)
    offsets = np.array([0, sizes[0], sizes[0] + sizes[1]])
    return Codes(
        counts=torch.from_numpy(counts),
        lengths=torch.from_numpy(lengths),
        ids=torch.from_numpy(visits.ids + offsets[modality]),
        classes=torch.from_numpy(visits.classes),
        asked=torch.from_numpy(asked),
        filling=torch.tensor([offsets[2], -1 if room is None else room]),
    )


def batch_of(visits: Visits, codes: Codes, sizes: tuple[int, int, int], num_items: int) -> Batch:
    """The rest of what a model is given of a run, for one that reads more than its codes.

    Args:
        visits: of P patients.
        codes: of these visits.
        sizes: of the vocabularies.
        num_items: laboratory items of the bundle.

    Returns:
        a batch whose first P patients are the given ones.
    """
    number, rows, lengths = len(visits.lengths), len(codes.counts), codes.lengths.numpy()
    steps = int(lengths.max())
    # Places of the grid that hold no visit before each patient's first one.
    before = np.arange(0, steps * len(lengths), steps) - _starts(lengths)
    age = np.full(len(lengths), np.nan, np.float32)
    age[:number] = visits.age
    sex = np.zeros(len(lengths), np.int64)
    sex[:number] = visits.sex
    none = torch.from_numpy(np.empty((rows, 3, 0), np.int64))
    return Batch(
        codes=none,
        counts=codes.counts,
        classes=none,
        lengths=codes.lengths,
        targets=torch.from_numpy(np.empty((rows, 0), np.float32)),
        sex=torch.from_numpy(sex),
        age=torch.from_numpy(age.repeat(lengths)),
        **_laboratory(visits, rows, num_items),
        slots=torch.from_numpy(np.arange(rows) + before.repeat(lengths)),
        num_steps=steps,
        sizes=sizes,
    )


def _laboratory(visits: Visits, rows: int, num_items: int) -> dict[str, torch.Tensor]:
    """Values of each visit side by side, always as many columns as there are items."""
    items = np.zeros((rows, num_items), np.int64)
    values = np.full((rows, num_items), np.nan, np.float32)
    number = np.zeros(rows, np.int64)
    number[: len(visits.num_values)] = visits.num_values
    if len(visits.items):
        row = np.repeat(np.arange(rows), number)
        place = np.arange(len(row)) - (np.cumsum(number) - number)[row]
        items[row, place] = visits.items
        values[row, place] = visits.values
    return {
        "laboratory_items": torch.from_numpy(items),
        "laboratory_values": torch.from_numpy(values),
        "laboratory_counts": torch.from_numpy(number),
    }


def _starts(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each of groups of these sizes begins."""
    starts: NDArray[np.int64] = counts.cumsum(dtype=np.int64) - counts
    return starts
