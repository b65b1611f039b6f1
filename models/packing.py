"""Visits of different lengths laid end to end, so that no work is spent on padding.

A map of CHARM has one position for each row of the longest modality of its visit. The positions of
all visits of a batch follow one another without gaps; `window` says which neighbours of a position
belong to its own visit, and so where a convolution meets the zeros of its padding.
"""

import dataclasses
import functools

import torch

from cafemed.batches import Batch

#: Kernel width of equations (10) and (11), and the padding on each side.
KERNEL = 7
PADDING = 3


@dataclasses.dataclass(frozen=True)
class Window:
    """The neighbours of every position within its visit. Q positions.

    Attributes:
        neighbour: int64 (Q, 7); [q, o] is q + o - 3 if that lies in the visit of q, else Q.
        opposite: int64 (Q, 7); [q, o] is q - o + 3 if that lies in the visit of q, else Q.
        to_sum, to_sum_starts: rows of a (Q * 7, ...) array, row q * 7 + o, that add up at each
            position: those at its neighbours, each under its own offset o.
        to_sum_back, to_sum_back_starts: the same over `opposite`, for gradients.
    """

    neighbour: torch.Tensor
    opposite: torch.Tensor
    to_sum: torch.Tensor
    to_sum_starts: torch.Tensor
    to_sum_back: torch.Tensor
    to_sum_back_starts: torch.Tensor


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
        slot_cell: int64 (S,), the same of each slot.
        slot_group: int64 (S,), visit * 3 + modality of each slot, ascending.
        slot_starts: int64 (V * 3,), the first slot of each visit and modality.
        position_visit: int64 (Q,), the visit row of each position.
        lengths: int64 (V,), max(1, n_0, n_1, n_2), the positions of each visit.
        starts: int64 (V,), the first position of each visit.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    classes: torch.Tensor
    visit: torch.Tensor
    group: torch.Tensor
    cell: torch.Tensor
    slot_cell: torch.Tensor
    slot_group: torch.Tensor
    slot_starts: torch.Tensor
    position_visit: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor

    @functools.cached_property
    def window(self) -> Window:
        """The positions' neighbours; found when asked for, since only CHARM looks at them."""
        return _window(self.starts, self.lengths, self.position_visit)

    @property
    def num_visits(self) -> int:
        """V."""
        return len(self.lengths)

    @property
    def num_positions(self) -> int:
        """Q."""
        return len(self.position_visit)


def pack(batch: Batch, sizes: tuple[int, int, int], first_visit_slot: bool = True) -> Packing:
    """Finds the places of a batch's codes; reads codes only where `counts` says they exist.

    Args:
        batch: V visits.
        sizes: (N_d, N_p, N_m).
        first_visit_slot: whether a first visit has a medication slot, its zero vector.
    """
    device = batch.counts.device
    real = torch.arange(batch.codes.shape[2], device=device) < batch.counts[:, :, None]
    visit, modality, place = real.nonzero(as_tuple=True)
    lengths = batch.counts.amax(1).clamp(min=1)
    starts = lengths.cumsum(0) - lengths
    slot_visit, slot_modality, slot_place, num_slots = visit, modality, place, batch.counts
    if first_visit_slot:
        kept = real.clone()
        kept[:, 2, 0] |= batch.is_first
        slot_visit, slot_modality, slot_place = kept.nonzero(as_tuple=True)
        num_slots = kept.sum(2)
    offsets = torch.tensor([0, sizes[0], sizes[0] + sizes[1]], device=device)
    position_visit = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    return Packing(
        ids=batch.codes[visit, modality, place] + offsets[modality],
        modality=modality,
        classes=batch.classes[visit, modality, place],
        visit=visit,
        group=visit * 3 + modality,
        cell=(starts[visit] + place) * 3 + modality,
        slot_cell=(starts[slot_visit] + slot_place) * 3 + slot_modality,
        slot_group=slot_visit * 3 + slot_modality,
        slot_starts=num_slots.flatten().cumsum(0) - num_slots.flatten(),
        position_visit=position_visit,
        lengths=lengths,
        starts=starts,
    )


def _window(starts: torch.Tensor, lengths: torch.Tensor, position_visit: torch.Tensor) -> Window:
    device = starts.device
    first = starts[position_visit][:, None]
    end = first + lengths[position_visit][:, None]
    offset = torch.arange(-PADDING, PADDING + 1, device=device)
    neighbour = torch.arange(len(position_visit), device=device)[:, None] + offset
    inside = (neighbour >= first) & (neighbour < end)
    neighbour = torch.where(inside, neighbour, len(position_visit))
    opposite = neighbour.flip(1)
    to_sum, to_sum_starts = _rows_to_sum(neighbour, inside)
    to_sum_back, to_sum_back_starts = _rows_to_sum(opposite, inside.flip(1))
    return Window(neighbour, opposite, to_sum, to_sum_starts, to_sum_back, to_sum_back_starts)


def _rows_to_sum(
    neighbour: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = neighbour * KERNEL + torch.arange(KERNEL, device=neighbour.device)
    number = inside.sum(1)
    return rows[inside], number.cumsum(0) - number


def sum_groups(rows: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sums rows (N, ...) that share a group, int64 (N,), giving (num_groups, ...)."""
    return rows.new_zeros((num_groups, *rows.shape[1:])).index_add(0, group, rows)
