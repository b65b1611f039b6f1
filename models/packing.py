"""Visits of different lengths laid end to end, so that no work is spent on padding.

A map of CHARM has one position for each row of the longest modality of its visit. The positions of
all visits of a batch follow one another without gaps; models/windows.py says which neighbours of a
position belong to its own visit, and so where a convolution meets the zeros of its padding.

All of it follows from how many codes each visit has, and is worked out on the host, in NumPy: on a
GPU, shapes that depend on data would make every step wait for the device.

models/asked.py has the packing of a server's answers.
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
from models.sparse_map import Rows, SparseMap
from models.windows import Window, window_of


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
        sizes: patients of each step; of visits asked about (models/asked.py) int64 (T,).
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

    Raises:
        ArtifactError: if a code lies outside its vocabulary.
    """
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
    require_inside(ids, modality, sizes)
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


def require_inside(
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


def _steps(lengths: NDArray[np.int64], slots: NDArray[np.int64], num_steps: int) -> Steps:
    rank = np.empty(len(lengths), np.int64)
    rank[(-lengths).argsort(kind="stable")] = np.arange(len(lengths))
    patient = slots // num_steps
    step = slots - patient * num_steps
    sizes = np.bincount(step, minlength=1)
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
