"""Visits of different lengths laid end to end, so that no work is spent on padding.

A map of CHARM has one position for each row of the longest modality of its visit. The positions of
all visits of a batch follow one another without gaps; models/windows.py says which neighbours of a
position belong to its own visit, and so where a convolution meets the zeros of its padding.

All of it follows from how many codes each visit has, and is worked out on the host, in NumPy: on a
GPU, shapes that depend on data would make every step wait for the device.

For a server's answers (`Codes`) codes, positions and steps are filled up to whole blocks
(models/blocks.py) by what belongs to nobody.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cafemed.batches import Batch
from cafemed.codes import KINDS
from cafemed.errors import ArtifactError
from models.blocks import BLOCK, whole
from models.sparse_map import Rows, SparseMap
from models.windows import Window, window_of


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes of a batch whose last visits are asked about, without gradients.

    They take the place of the batch's own `codes` and `classes`. The batch has whole blocks of
    visits, of which the last is its patient's only one, has no codes and is not asked about: what
    fills up codes and positions is laid there.

    Attributes:
        ids: int64 (N,), indices into each modality's own vocabulary, ordered by visit, modality
            and position, as `counts` of the batch says.
        classes: int64 (N,), node classes.
        asked: int64 (A,), the visit rows that are asked about; whole blocks of them.
        room: None, or positions of own visits that there is room for: codes and positions are
            filled up to the same numbers whatever patients there are.
    """

    ids: NDArray[np.int64]
    classes: NDArray[np.int64]
    asked: NDArray[np.int64]
    room: int | None = None

    def num_codes(self) -> int:
        """Codes, filled up; more than there are."""
        return whole((len(self.ids) if self.room is None else 3 * self.room) + 1)

    def num_positions(self, own: int) -> int:
        """Positions, filled up, of a batch with so many."""
        return whole(own if self.room is None else 2 * self.room + BLOCK)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The visits that are asked about.

    Attributes:
        visits: int64 (A,), visit rows.
        codes: rows of the one table of all codes that belong to each.
        known: of these the diagnoses and procedures.
    """

    visits: torch.Tensor
    codes: Rows
    known: Rows


@dataclasses.dataclass(frozen=True)
class Steps:
    """The visits of a batch in the order in which recurrent layers meet them.

    Step t holds the t-th visits of the patients who have one, those with most visits first, so
    that the patients of a step are the first ones of the step before. In whole blocks, visits that
    mean nothing fill up every step.

    Attributes:
        order: int64 (V,), the visit row of each place; more than V in whole blocks.
        place: int64 (V,), the place of each visit row.
        previous: int64 (V - sizes[0],), the place of the visit before, for the places of all steps
            but the first; None where there will be no gradients.
        sizes: patients of each step; a tensor while a model is recorded (models/tracing.py).
    """

    order: torch.Tensor
    place: torch.Tensor
    previous: torch.Tensor | None
    sizes: tuple[int, ...] | torch.Tensor


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the codes of a batch lie. V visits, N codes that exist, S slots, Q positions.

    A slot is a place whose vector leaves CHARM: one for each code, and one for the medication of a
    first visit, which is a zero vector (docs/models.md 1.0, 1.8). Codes and slots are ordered by
    visit, modality and position.

    Attributes:
        ids: int64 (N,), indices into the one table of all codes: diagnoses, procedures,
            medications.
        modality: int64 (N,), 0, 1 or 2.
        classes: int64 (N,), node classes.
        visit: int64 (N,), the visit row of each code.
        group: int64 (N,), visit * 3 + modality of each code.
        cell: int64 (N,), position * 3 + modality of each code.
        distinct: int64 (U,), the ids that `spread` and `to_visits` start from: each once and
            ascending, or `ids` as they are.
        spread: from rows of `distinct` to rows of the N codes; None: they are the same.
        to_visits: adds up rows of `distinct` by visit, (U, ...) to (V, ...).
        to_groups: adds up rows of the codes by `group`, (N, ...) to (V * 3, ...).
        slot_cell: int64 (S,), the same as `cell` of each slot.
        slot_group: int64 (S,), visit * 3 + modality of each slot, ascending.
        slot_starts: int64 (V * 3,), the first slot of each visit and modality.
        position_visit: int64 (Q,), the visit row of each position.
        lengths: int64 (V,), max(1, n_0, n_1, n_2), the positions of each visit.
        starts: int64 (V,), the first position of each visit.
        steps: see Steps.
        window: the positions' neighbours; None where nobody asked for them.
        asked: the visits that are asked about; None: all are.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    classes: torch.Tensor
    visit: torch.Tensor
    group: torch.Tensor
    cell: torch.Tensor
    distinct: torch.Tensor
    spread: SparseMap | None
    to_visits: SparseMap
    to_groups: SparseMap
    slot_cell: torch.Tensor
    slot_group: torch.Tensor
    slot_starts: torch.Tensor
    position_visit: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    steps: Steps
    window: Window | None
    asked: Asked | None = None

    def of_codes(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives each code that exists its row, (N, ...), from those of `distinct`, (U, ...)."""
        return rows if self.spread is None else self.spread(rows)

    @property
    def num_visits(self) -> int:
        """V."""
        return self.lengths.shape[0]

    @property
    def num_positions(self) -> int:
        """Q."""
        return self.position_visit.shape[0]


def pack(
    batch: Batch,
    sizes: tuple[int, int, int],
    first_visit_slot: bool = True,
    window: bool = False,
    distinct: bool = False,
    given: Codes | None = None,
) -> Packing:
    """Finds the places of a batch's codes; reads codes only where `counts` says they exist.

    Args:
        batch: V visits. If it is on another device than the CPU, this waits for the device; the
            packing is on the CPU.
        sizes: (N_d, N_p, N_m).
        first_visit_slot: whether a first visit has a medication slot, its zero vector.
        window: whether the positions' neighbours are wanted.
        distinct: whether codes that several visits share are to be computed once. Which they are
            depends on the other patients of the batch, and with it a result's last bits.
        given: see Codes; None: those of the batch.

    Raises:
        ArtifactError: if a code lies outside its vocabulary.
    """
    if given is not None:
        return _pack_blocks(batch, given, sizes, first_visit_slot, window)
    host = batch.to("cpu")
    counts, codes, classes = (x.numpy() for x in (host.counts, host.codes, host.classes))
    group, place = _ranges(counts.reshape(-1))
    visit = group // 3
    modality = group - 3 * visit
    lengths = counts.max(1, initial=1)
    starts = np.cumsum(lengths) - lengths
    cell = (starts[visit] + place) * 3 + modality
    slots, slot_group, slot_cell = counts, group, cell
    if first_visit_slot:
        slots = counts.copy()
        slots[:, 2] = np.maximum(counts[:, 2], host.is_first.numpy())
        slot_group, slot_place = _ranges(slots.reshape(-1))
        slot_visit = slot_group // 3
        slot_cell = (starts[slot_visit] + slot_place) * 3 + slot_group - 3 * slot_visit
    where = group * codes.shape[2] + place
    ids = codes.reshape(-1)[where]
    _require_inside(ids, modality, sizes)
    ids += np.cumsum([0, *sizes[:2]])[modality]
    found = {
        "ids": ids,
        "modality": modality,
        "classes": classes.reshape(-1)[where],
        "visit": visit,
        "group": group,
        "cell": cell,
        "slot_cell": slot_cell,
        "slot_group": slot_group,
        "slot_starts": _starts(slots.reshape(-1)),
        "position_visit": np.repeat(np.arange(len(lengths)), lengths),
        "lengths": lengths,
        "starts": starts,
    }
    every, of_groups = np.arange(len(ids)), _starts(counts.reshape(-1))
    return Packing(
        **_tensors(found),
        **_look_up(ids, visit, _starts(counts.sum(1)), distinct),
        to_groups=SparseMap(_rows(every, of_groups), _rows(group, every)),
        steps=_steps(host.lengths.numpy(), host.slots.numpy(), host.num_steps),
        window=window_of(lengths, gradients=True) if window else None,
    )


def _pack_blocks(
    batch: Batch,
    given: Codes,
    sizes: tuple[int, int, int],
    first_visit_slot: bool,
    window: bool,
) -> Packing:
    """The packing of codes that are asked about, in whole blocks and without gradients."""
    counts, patients = batch.counts.numpy(), batch.lengths.numpy()
    num_visits, number = len(counts), len(given.ids)
    list_numbers, every = np.arange(3 * num_visits), np.arange(given.num_codes())
    per_list = counts.reshape(-1).copy()
    per_list[-1] += len(every) - number  # medications: the one kind that every cohort has codes of
    group = list_numbers.repeat(per_list)
    visit = group // 3
    modality = group - 3 * visit
    ids = np.zeros(len(every), np.int64)
    ids[:number] = given.ids
    _require_inside(ids, modality, sizes)
    ids += np.array([0, sizes[0], sizes[0] + sizes[1]])[modality]
    classes = np.zeros(len(every), np.int64)
    classes[:number] = given.classes
    lengths = counts.max(1, initial=1)
    own = int(lengths.sum())
    lengths[-1] += given.num_positions(own) - own
    starts = _starts(lengths)
    first_cells = (3 * starts[:, None] + np.arange(3)).reshape(-1)
    list_starts = _starts(per_list)
    cell = 3 * every + (first_cells - 3 * list_starts)[group]
    cell[number:] = first_cells[-1]
    slot_starts, slot_group, slot_cell = list_starts, group[:number], cell[:number]
    if first_visit_slot:
        slots = counts.reshape(-1).copy()
        of_first = 3 * _starts(patients) + 2
        slots[of_first] = np.maximum(slots[of_first], 1)
        slot_starts = _starts(slots)
        slot_group = list_numbers.repeat(slots)
        slot_cell = 3 * np.arange(len(slot_group)) + (first_cells - 3 * slot_starts)[slot_group]
    found = {
        "ids": ids,
        "modality": modality,
        "classes": classes,
        "visit": visit,
        "group": group,
        "cell": cell,
        "slot_cell": slot_cell,
        "slot_group": slot_group,
        "slot_starts": slot_starts,
        "position_visit": np.arange(num_visits).repeat(lengths),
        "lengths": lengths,
        "starts": starts,
    }
    tensors, rows = _tensors(found), torch.from_numpy(every)
    visit_starts = list_starts[::3].copy()
    return Packing(
        **tensors,
        distinct=tensors["ids"],
        spread=None,
        to_visits=SparseMap(Rows(rows, torch.from_numpy(visit_starts), None), None),
        to_groups=SparseMap(Rows(rows, torch.from_numpy(list_starts), None), None),
        steps=_steps(patients, batch.slots.numpy(), batch.num_steps, BLOCK),
        window=window_of(lengths, gradients=False) if window else None,
        asked=_asked(given.asked, ids, visit_starts, counts),
    )


def _asked(
    visits: NDArray[np.int64],
    ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> Asked:
    """The codes of the visits asked about; those of a visit begin with diagnoses and procedures."""
    of_visits = counts.take(visits, 0)
    known = of_visits[:, 0] + of_visits[:, 1]
    found = []
    for number in (known + of_visits[:, 2], known):
        begins = _starts(number)
        place = (starts[visits] - begins).repeat(number)
        place += np.arange(len(place))
        found.append(_rows(ids[place], begins))
    return Asked(torch.from_numpy(visits), *found)


def _require_inside(
    ids: NDArray[np.int64], modality: NDArray[np.int64], sizes: tuple[int, int, int]
) -> None:
    """Refuses a code beyond its vocabulary, which would be another one's of the one table."""
    # A negative index is a huge one without its sign.
    bad = (ids.view(np.uint64) >= np.array(sizes, np.uint64)[modality]).nonzero()[0]
    if len(bad):
        k = int(modality[bad[0]])
        raise ArtifactError(
            f"{KINDS[k]} codes of a batch: expected indices in 0 .. {sizes[k] - 1}, the "
            f"vocabulary's, got {ids[bad[0]]}"
        )


def _ranges(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The group of each element, for groups of these sizes, and its place in the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - _starts(counts)[group]


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    ends: NDArray[np.int64] = counts.cumsum()
    return ends - counts


def _tensors(arrays: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _rows(index: NDArray[np.int64], starts: NDArray[np.int64]) -> Rows:
    return Rows(torch.from_numpy(index), torch.from_numpy(starts), None)


def _look_up(
    ids: NDArray[np.int64],
    visit: NDArray[np.int64],
    starts: NDArray[np.int64],
    distinct: bool,
) -> dict[str, Any]:
    """`distinct`, `spread` and `to_visits` of a Packing; `starts` (V,) the visits' first codes."""
    every = np.arange(len(ids))
    if not distinct:
        to_visits = SparseMap(_rows(every, starts), _rows(visit, every))
        kept = torch.from_numpy(ids)
        return {"distinct": kept, "spread": None, "to_visits": to_visits}
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    begins = np.diff(ascending, prepend=-1) > 0
    first = np.flatnonzero(begins)
    row = np.empty_like(order)
    row[order] = np.cumsum(begins) - 1
    return {
        "distinct": torch.from_numpy(ascending[first]),
        "spread": SparseMap(_rows(row, every), _rows(order, first)),
        "to_visits": SparseMap(_rows(row, starts), _rows(visit[order], first)),
    }


def _steps(
    lengths: NDArray[np.int64], slots: NDArray[np.int64], num_steps: int, block: int = 0
) -> Steps:
    """The steps of patients of these lengths; `block`: each has a multiple of so many patients."""
    rank = np.empty(len(lengths), np.int64)
    rank[(-lengths).argsort(kind="stable")] = np.arange(len(lengths))
    patient = slots // num_steps
    step = slots - patient * num_steps
    sizes = np.bincount(step, minlength=1)
    if block:
        sizes = -(-sizes // block) * block
        place = _starts(sizes)[step] + rank[patient]
        order = np.full(int(sizes.sum()), len(slots) - 1)
        order[place] = np.arange(len(place))
        return Steps(torch.from_numpy(order), torch.from_numpy(place), None, tuple(sizes.tolist()))
    place = _starts(sizes)[step] + rank[patient]
    order = np.empty(len(place), np.int64)
    order[place] = np.arange(len(place))
    # The same patient lies as far into the step before as into its own.
    previous = np.arange(sizes[0], len(place)) - np.repeat(sizes[:-1], sizes[1:])
    found = {"order": order, "place": place, "previous": previous}
    return Steps(**_tensors(found), sizes=tuple(sizes.tolist()))


def sum_groups(rows: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sums rows (N, ...) that share a group, int64 (N,), giving (num_groups, ...)."""
    return rows.new_zeros((num_groups, *rows.shape[1:])).index_add(0, group, rows)
