"""The packing of visits that a server asks about: in whole blocks, and without gradients.

Codes, positions and steps are filled up to whole blocks (models/blocks.py) by what belongs to
nobody. It is worked out by torch rather than NumPy, so that a recording of a model
(models/tracing.py) does that too, without the interpreter.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

from models.blocks import BLOCK
from models.packing import Asked, Packing, Steps
from models.scripting import scripted
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
        is_recorded = bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
        work = _scripted_places() if is_recorded else places
        given = (self.counts, self.lengths, self.ids, self.classes, self.asked, self.filling)
        found = work(*given, _OFFSETS, first_visit_slot, window, BLOCK, KERNEL, PADDING)
        ids, modality, classes, visit, group, cell = found[:6]
        slot_cell, slot_group, slot_starts, position_visit, lengths, starts = found[6:12]
        every, list_starts, visit_starts, order, place, sizes = found[12:18]
        codes, known = Rows(found[18], found[19], None), Rows(found[20], found[21], None)
        return Packing(
            ids=ids,
            modality=modality,
            classes=classes,
            visit=visit,
            group=group,
            cell=cell,
            distinct=ids,
            spread=None,
            to_visits=SparseMap(Rows(every, visit_starts, None), None),
            to_groups=SparseMap(Rows(every, list_starts, None), None),
            slot_cell=slot_cell,
            slot_group=slot_group,
            slot_starts=slot_starts,
            position_visit=position_visit,
            lengths=lengths,
            starts=starts,
            steps=Steps(order, place, None, sizes if is_recorded else tuple(sizes.tolist())),
            window=Window(found[22], found[23], found[24], None) if window else None,
            asked=Asked(self.asked, codes, known),
        )


def places(
    counts: torch.Tensor,
    patients: torch.Tensor,
    own_ids: torch.Tensor,
    own_classes: torch.Tensor,
    asked: torch.Tensor,
    filling: torch.Tensor,
    offsets: torch.Tensor,
    first_visit_slot: bool,
    window: bool,
    block: int,
    kernel: int,
    padding: int,
) -> list[torch.Tensor]:
    """What `Codes.packed` needs, in its order; as torch compiles it.

    Args:
        counts: see Codes.
        patients: `lengths` of Codes.
        own_ids: `ids` of Codes.
        own_classes: `classes` of Codes.
        asked: see Codes.
        filling: see Codes.
        offsets: windows.OFFSETS.
        first_visit_slot: see `packing.pack`.
        window: see `packing.pack`.
        block: blocks.BLOCK.
        kernel: windows.KERNEL.
        padding: windows.PADDING.
    """
    filling_id, room = int(filling[0]), int(filling[1])
    num_visits, number = counts.shape[0], own_ids.shape[0]
    # The codes, one more than there are at least.
    num_codes = ((number if room < 0 else 3 * room) + block) // block * block
    list_numbers, every = torch.arange(3 * num_visits), torch.arange(num_codes)
    per_list = counts.reshape(-1).clone()
    per_list[-1] += num_codes - number
    group = list_numbers.repeat_interleave(per_list, output_size=num_codes)
    visit = group.floor_divide(3)
    modality = group - 3 * visit
    ids = torch.full((num_codes,), filling_id)
    ids[:number] = own_ids
    classes = torch.zeros_like(ids)
    classes[:number] = own_classes
    # The positions of each visit.
    lengths = counts.amax(1).clamp_min(1)
    own = int(lengths.sum())
    num_positions = ((own if room < 0 else 2 * room + block) + block - 1) // block * block
    lengths[-1] += num_positions - own
    ends = lengths.cumsum(0)
    starts = ends - lengths
    position_visit = torch.arange(num_visits).repeat_interleave(lengths, output_size=num_positions)
    # The cells of codes, and of slots.
    first_cells = (3 * starts[:, None] + torch.arange(3)).reshape(-1)
    list_starts = per_list.cumsum(0) - per_list
    visit_starts = list_starts[::3].contiguous()
    cell = 3 * every + (first_cells - 3 * list_starts).index_select(0, group)
    cell[number:] = first_cells[-1]
    patient_starts = patients.cumsum(0) - patients
    slot_starts, slot_group, slot_cell = list_starts, group[:number], cell[:number]
    if first_visit_slot:
        slots = counts.reshape(-1).clone()
        of_first = 3 * patient_starts + 2
        slots[of_first] = slots[of_first].clamp_min(1)
        slot_starts = slots.cumsum(0) - slots
        slot_group = list_numbers.repeat_interleave(slots)
        slot_cell = 3 * torch.arange(slot_group.shape[0])
        slot_cell = slot_cell + (first_cells - 3 * slot_starts).index_select(0, slot_group)
    # The steps: patients with most visits first, each step filled up by the last visit.
    by_length = torch.argsort(-patients, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(patients.shape[0])
    patient = torch.arange(patients.shape[0]).repeat_interleave(patients, output_size=num_visits)
    step = torch.arange(num_visits) - patient_starts.index_select(0, patient)
    sizes = (torch.bincount(step) + block - 1).floor_divide(block) * block
    place = (sizes.cumsum(0) - sizes).index_select(0, step) + rank.index_select(0, patient)
    order = torch.full((int(sizes.sum()),), num_visits - 1)
    order[place] = torch.arange(num_visits)
    out = [ids, modality, classes, visit, group, cell, slot_cell, slot_group, slot_starts]
    out += [position_visit, lengths, starts, every, list_starts, visit_starts, order, place, sizes]
    # The codes of the visits asked about; those of a visit begin with diagnoses and procedures.
    of_visits, asked_starts = counts.index_select(0, asked), visit_starts.index_select(0, asked)
    num_known = of_visits[:, 0] + of_visits[:, 1]
    for numbers in (num_known + of_visits[:, 2], num_known):
        begins = numbers.cumsum(0) - numbers
        at = (asked_starts - begins).repeat_interleave(numbers)
        at += torch.arange(at.shape[0])
        out += [ids.index_select(0, at), begins]
    if window:  # as windows.window_of
        position = torch.arange(num_positions)
        before = (position - starts.index_select(0, position_visit)).clamp_max(padding)
        after = (ends.index_select(0, position_visit) - position).clamp_max(padding + 1)
        neighbour = offsets.index_select(0, before * (padding + 2) + after) + position[:, None]
        numbers = before + after
        begins = numbers.cumsum(0) - numbers
        first = kernel * position + padding - (kernel + 1) * before
        rows = (first - (kernel + 1) * begins).repeat_interleave(numbers)
        rows += (kernel + 1) * torch.arange(rows.shape[0])
        out += [neighbour.clamp_max(num_positions), rows, begins]
    return out


@functools.cache
def _scripted_places() -> Callable[..., list[torch.Tensor]]:
    return scripted(places)
