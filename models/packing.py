"""Visits of different lengths laid end to end, so that no work is spent on padding.

A map of CHARM has one position per row of the longest modality of its visit. The positions of all
visits lie on one line with `GAP` empty positions after each visit: a convolution of kernel 7 over
the line then sees, for every visit, exactly the zeros that padding 3 would give it.
"""

import dataclasses

import torch

from cafemed.batches import Batch

#: Half of the kernel width 7 of equations (10) and (11).
GAP = 3


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the codes of a batch lie. V visits, N codes that exist, S slots, P positions.

    A slot is a place whose vector leaves CHARM: one for each code, and one for the medication of a
    first visit, which is a zero vector (models.md 1.0, 1.8). Slots are ordered by visit, modality
    and position; codes are the slots without those of the first visits, in the same order.

    Attributes:
        ids: int64 (N,), indices into the one table of all codes: diagnoses, procedures,
            medications.
        modality: int64 (N,), 0, 1 or 2.
        classes: int64 (N,), node classes.
        visit: int64 (N,), the visit row of each code.
        group: int64 (N,), visit * 3 + modality of each code.
        cell: int64 (N,), position * 3 + modality of each code.
        slot_cell: int64 (S,), the same of each slot.
        slot_group: int64 (S,), visit * 3 + modality of each slot.
        position_visit: int64 (P,), the visit row of each position; those of a gap hold the row of
            the visit before it.
        exists: bool (P,), False in gaps.
        lengths: int64 (V,), max(1, n_0, n_1, n_2) of each visit.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    classes: torch.Tensor
    visit: torch.Tensor
    group: torch.Tensor
    cell: torch.Tensor
    slot_cell: torch.Tensor
    slot_group: torch.Tensor
    position_visit: torch.Tensor
    exists: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_visits(self) -> int:
        """V."""
        return len(self.lengths)

    @property
    def num_positions(self) -> int:
        """P, gaps included."""
        return len(self.exists)


def pack(batch: Batch, sizes: tuple[int, int, int], first_visit_slot: bool = True) -> Packing:
    """Finds the places of a batch's codes; reads codes only where `counts` says they exist.

    Args:
        batch: V visits.
        sizes: (N_d, N_p, N_m).
        first_visit_slot: whether a first visit has a medication slot, its zero vector.
    """
    device = batch.counts.device
    place = torch.arange(batch.codes.shape[2], device=device)
    real = place < batch.counts[:, :, None]
    visit, modality, position = real.nonzero(as_tuple=True)
    lengths = batch.counts.amax(1).clamp(min=1)
    ends = (lengths + GAP).cumsum(0)
    starts = ends - lengths - GAP
    kept = real
    if first_visit_slot:
        kept = real.clone()
        kept[:, 2, 0] |= batch.is_first
    slot_visit, slot_modality, slot_position = kept.nonzero(as_tuple=True)
    offsets = torch.tensor([0, sizes[0], sizes[0] + sizes[1]], device=device)
    rows = torch.arange(len(lengths), device=device)
    position_visit = rows.repeat_interleave(lengths + GAP)
    within = torch.arange(len(position_visit), device=device) - starts[position_visit]
    return Packing(
        ids=batch.codes[visit, modality, position] + offsets[modality],
        modality=modality,
        classes=batch.classes[visit, modality, position],
        visit=visit,
        group=visit * 3 + modality,
        cell=(starts[visit] + position) * 3 + modality,
        slot_cell=(starts[slot_visit] + slot_position) * 3 + slot_modality,
        slot_group=slot_visit * 3 + slot_modality,
        position_visit=position_visit,
        exists=within < lengths[position_visit],
        lengths=lengths,
    )


def sum_groups(rows: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sums rows (N, ...) that share a group, int64 (N,), giving (num_groups, ...)."""
    return rows.new_zeros((num_groups, *rows.shape[1:])).index_add(0, group, rows)
