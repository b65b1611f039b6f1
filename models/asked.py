"""The packing of visits that a server asks about: in whole blocks, and without gradients.

Codes, positions and steps are filled up to whole blocks (models/blocks.py) by what belongs to
nobody. It is worked out by torch rather than NumPy, so that a recording of a model
(models/tracing.py) does that too, without the interpreter.
"""

import dataclasses
from typing import NamedTuple

import torch

from models.blocks import BLOCK
from models.packing import Asked, Packing, Steps
from models.scripting import recordable
from models.sparse_map import Rows, SparseMap
from models.windows import KERNEL, OFFSETS, PADDING, Window

_OFFSETS = torch.from_numpy(OFFSETS)


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes of V visits, in whole blocks, of P patients whose last visits may be asked about.

    The last visit is its patient's only one, has no codes and is not asked about: what fills up
    codes and positions is laid there.

    Attributes:
        counts: int64 (V, 3), codes of each modality; V in whole blocks.
        lengths: int64 (P,), visits of each patient.
        ids: int64 (N,), indices into the one table of all codes, ordered by visit, modality and
            position.
        classes: int64 (N,), node classes.
        asked: int64 (A,), the visit rows that are asked about; whole blocks of them.
        filling: int64 (2,): the index that fills up, a medication's, the one kind that every
            cohort has codes of; and positions of own visits that there is room for, so that codes
            and positions are filled up to the same numbers whatever patients there are, or -1.
    """

    counts: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    classes: torch.Tensor
    asked: torch.Tensor
    filling: torch.Tensor

    def packed(self, first_visit_slot: bool, window: bool) -> Packing:
        """The packing of all visits; of recorded codes it is recorded.

        Args:
            first_visit_slot: see `packing.pack`.
            window: see `packing.pack`.
        """
        positions = lay_positions(self.counts, self.filling)
        codes = fill_codes(self.counts, self.ids, self.classes, self.filling, positions.starts)
        slots = lay_slots(self, positions, first_visit_slot)
        order, place, sizes = order_steps(self.lengths, self.counts)
        return Packing(
            ids=codes.ids,
            modality=codes.modality,
            classes=codes.classes,
            visit=codes.visit,
            group=codes.group,
            cell=codes.cell,
            distinct=codes.ids,
            spread=None,
            to_visits=SparseMap(Rows(codes.every, codes.visit_starts, None), None),
            to_groups=SparseMap(Rows(codes.every, codes.starts, None), None),
            slot_cell=slots.cell,
            slot_group=slots.group,
            slot_starts=slots.starts,
            position_visit=positions.visit,
            lengths=positions.lengths,
            starts=positions.starts,
            steps=Steps(order, place, None, sizes),
            window=find_neighbours(positions) if window else None,
            asked=find_asked(self, codes),
        )


class Positions(NamedTuple):
    """The positions of V visits.

    Attributes:
        lengths: int64 (V,), of each visit; the last one's fill up.
        starts: int64 (V,), the first of each visit.
        visit: int64 (Q,), the visit row of each.
    """

    lengths: torch.Tensor
    starts: torch.Tensor
    visit: torch.Tensor


class FilledCodes(NamedTuple):
    """Codes in whole blocks; the last visit's medications fill up. N codes.

    Attributes:
        ids, classes: int64 (N,), as of Codes.
        visit, modality, group, cell: int64 (N,), see Packing.
        starts: int64 (V * 3,), the first of each visit and modality.
        visit_starts: int64 (V,), the first of each visit.
        every: int64 (N,), 0 .. N - 1.
    """

    ids: torch.Tensor
    classes: torch.Tensor
    visit: torch.Tensor
    modality: torch.Tensor
    group: torch.Tensor
    cell: torch.Tensor
    starts: torch.Tensor
    visit_starts: torch.Tensor
    every: torch.Tensor


class Slots(NamedTuple):
    """`slot_cell`, `slot_group` and `slot_starts` of a Packing."""

    cell: torch.Tensor
    group: torch.Tensor
    starts: torch.Tensor


@recordable
def lay_positions(counts: torch.Tensor, filling: torch.Tensor, block: int = BLOCK) -> Positions:
    """Lays the positions of visits.

    Args:
        counts: see Codes.
        filling: see Codes.
        block: blocks.BLOCK.
    """
    lengths, room = counts.amax(1).clamp_min(1), int(filling[1])
    own = int(lengths.sum())
    total = ((own if room < 0 else 2 * room + block) + block - 1) // block * block
    lengths[-1] += total - own
    visit = torch.arange(lengths.shape[0]).repeat_interleave(lengths, output_size=total)
    return Positions(lengths, lengths.cumsum(0) - lengths, visit)


@recordable
def fill_codes(
    counts: torch.Tensor,
    own_ids: torch.Tensor,
    own_classes: torch.Tensor,
    filling: torch.Tensor,
    position_starts: torch.Tensor,
    block: int = BLOCK,
) -> FilledCodes:
    """Fills up codes to whole blocks.

    Args:
        counts: see Codes.
        own_ids: `ids` of Codes.
        own_classes: `classes` of Codes.
        filling: see Codes.
        position_starts: `starts` of Positions.
        block: blocks.BLOCK.
    """
    number, room = own_ids.shape[0], int(filling[1])
    # One more than there are at least.
    total = ((number if room < 0 else 3 * room) + block) // block * block
    ids = torch.full((total,), int(filling[0]))
    ids[:number] = own_ids
    classes = torch.zeros_like(ids)
    classes[:number] = own_classes
    per_list, every = counts.reshape(-1).clone(), torch.arange(total)
    per_list[-1] += total - number
    starts = per_list.cumsum(0) - per_list
    group = torch.arange(per_list.shape[0]).repeat_interleave(per_list, output_size=total)
    visit = group.floor_divide(3)
    cell = cells(group, starts, position_starts, every)
    cell[number:] = 3 * position_starts[-1] + 2  # there may be more of them than positions
    return FilledCodes(
        ids=ids,
        classes=classes,
        visit=visit,
        modality=group - 3 * visit,
        group=group,
        cell=cell,
        starts=starts,
        visit_starts=starts[::3].contiguous(),
        every=every,
    )


def lay_slots(codes: Codes, positions: Positions, first_visit_slot: bool) -> Slots:
    """Lays the slots; `first_visit_slot` as of `packing.pack`."""
    per_list = codes.counts.reshape(-1).clone()
    if first_visit_slot:
        of_first = 3 * (codes.lengths.cumsum(0) - codes.lengths) + 2
        per_list[of_first] = per_list[of_first].clamp_min(1)
    starts = per_list.cumsum(0) - per_list
    group = torch.arange(per_list.shape[0]).repeat_interleave(per_list)
    every = torch.arange(group.shape[0])
    return Slots(cells(group, starts, positions.starts, every), group, starts)


def find_asked(codes: Codes, filled: FilledCodes) -> Asked:
    """Finds the codes of the visits that are asked about."""
    numbers = codes.counts.index_select(0, codes.asked)
    first = filled.visit_starts.index_select(0, codes.asked)
    # The codes of a visit begin with its diagnoses and procedures.
    num_known = numbers[:, 0] + numbers[:, 1]
    every, every_starts = sequences(first, num_known + numbers[:, 2], 1)
    known, known_starts = sequences(first, num_known, 1)
    return Asked(
        visits=codes.asked,
        codes=Rows(filled.ids.index_select(0, every), every_starts, None),
        known=Rows(filled.ids.index_select(0, known), known_starts, None),
    )


@recordable
def order_steps(
    patients: torch.Tensor, counts: torch.Tensor, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orders the visits by step, patients with most visits first; the last visit fills up.

    Args:
        patients: `lengths` of Codes.
        counts: see Codes.
        block: blocks.BLOCK.
    """
    by_length = torch.argsort(-patients, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(patients.shape[0])
    visits = torch.arange(counts.shape[0])
    patient = torch.arange(patients.shape[0])
    patient = patient.repeat_interleave(patients, output_size=counts.shape[0])
    step = visits - (patients.cumsum(0) - patients).index_select(0, patient)
    sizes = (torch.bincount(step) + block - 1).floor_divide(block) * block
    place = (sizes.cumsum(0) - sizes).index_select(0, step) + rank.index_select(0, patient)
    order = torch.full((int(sizes.sum()),), counts.shape[0] - 1)
    order[place] = visits
    return order, place, sizes


def find_neighbours(positions: Positions) -> Window:
    """Finds the neighbours of positions, as `windows.window_of` does."""
    position = torch.arange(positions.visit.shape[0])
    ends = positions.starts + positions.lengths
    before = (position - positions.starts.index_select(0, positions.visit)).clamp_max(PADDING)
    after = (ends.index_select(0, positions.visit) - position).clamp_max(PADDING + 1)
    neighbour = _OFFSETS.index_select(0, before * (PADDING + 2) + after) + position[:, None]
    first = KERNEL * position + PADDING - (KERNEL + 1) * before
    to_sum, to_sum_starts = sequences(first, before + after, KERNEL + 1)
    return Window(neighbour.clamp_max(position.shape[0]), to_sum, to_sum_starts, None)


def cells(
    group: torch.Tensor, starts: torch.Tensor, position_starts: torch.Tensor, every: torch.Tensor
) -> torch.Tensor:
    """The cells of codes or slots, position * 3 + modality.

    Args:
        group: int64 (N,), visit * 3 + modality of each.
        starts: int64 (V * 3,), the first of each visit and modality.
        position_starts: `starts` of Positions.
        every: int64 (N,), 0 .. N - 1.
    """
    first = (3 * position_starts[:, None] + torch.arange(3)).reshape(-1)
    return 3 * every + (first - 3 * starts).index_select(0, group)


def sequences(
    first: torch.Tensor, numbers: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each one of `first` so many rows, that one and every `step` on; and where each starts."""
    starts = numbers.cumsum(0) - numbers
    rows = (first - step * starts).repeat_interleave(numbers)
    return rows + step * torch.arange(rows.shape[0]), starts
