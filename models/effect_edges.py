"""Edges of CausalMed's heterogeneous graphs: from medications to codes, by the size of effects.

docs/models.md 2.2. The graph of a visit holds its diagnoses, its procedures and the medications of
the visit before; a batch's graphs are found together.
"""

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import nn

from cafemed.batches import Batch, ModelInputs
from models.packing import Packing

#: Entries of the table of relations that are none: an effect of 0, and one too small for an edge.
_ZERO, _SMALL = -2, -1


@dataclasses.dataclass(frozen=True)
class EffectEdges:
    """E edges from medications to codes, sorted by relation and then by code.

    Attributes:
        source: int64 (E,), the medication among the packed codes.
        target: int64 (E,), the diagnosis or procedure among the packed codes.
        relation: int64 (E,).
    """

    source: torch.Tensor
    target: torch.Tensor
    relation: torch.Tensor


class EffectRelations(nn.Module):
    """Which relation leads from a medication to a diagnosis or procedure.

    With c classes of effects there are 2 (c + 1) relations: 0 .. c into diagnoses, c + 1 .. 2c + 1
    into procedures; the first of each is virtual, relation b after it is of b/c < E <= (b+1)/c.

    Args:
        inputs: sizes and effects.
        levels: c.
        sign: classes of E or of |E|.
        virtual: where every effect between the medications and the diagnoses (procedures) of a
            later visit is 0: virtual edges from all medications, from the first, or none.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        levels: int,
        sign: Literal["signed", "absolute"],
        virtual: Literal["all", "first", "none"],
    ) -> None:
        super().__init__()
        self.sizes, self.per_modality, self.virtual = inputs.sizes, levels + 1, virtual
        effects = np.abs(inputs.effects) if sign == "absolute" else inputs.effects
        bounds = (np.arange(1, levels + 1) / levels).astype(np.float32)
        table = np.searchsorted(bounds, effects).astype(np.int16)  # b of the class, 0 below all
        first = np.repeat([0, self.per_modality], inputs.sizes[:2]).astype(np.int16)
        table = np.where(table > 0, table + first[:, None], _SMALL)
        table[inputs.effects == 0] = _ZERO
        self.table = torch.from_numpy(table.astype(np.int16))  # edges are found on the host

    @property
    def number(self) -> int:
        """Relations, the virtual ones too."""
        return 2 * self.per_modality

    def forward(self, batch: Batch, packing: Packing) -> EffectEdges:
        """Finds the edges of a batch, but for those of first visits (which send nothing).

        Both batch and packing are on the host.
        """
        source, target, is_first_medication = _pairs(batch, packing)
        row, column = packing.ids[target], packing.ids[source] - sum(self.sizes[:2])
        relation = self.table[row, column].long()
        kept = relation >= 0
        if self.virtual != "none":
            # All effects of a visit and modality are 0: its pairs take the virtual relation.
            group = packing.group[target]
            has_effect = torch.zeros(3 * packing.num_visits, dtype=torch.bool, device=group.device)
            has_effect[group[relation != _ZERO]] = True
            virtual = ~has_effect[group]
            if self.virtual == "first":
                virtual &= is_first_medication
            relation = torch.where(virtual, packing.modality[target] * self.per_modality, relation)
            kept = kept | virtual
        chosen = kept.nonzero()[:, 0]
        chosen = chosen[relation[chosen].argsort(stable=True)]  # pairs are sorted by target
        return EffectEdges(source[chosen], target[chosen], relation[chosen])


def _pairs(batch: Batch, packing: Packing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs of a medication with a diagnosis or procedure of the same visit, by the latter.

    Returns:
        Positions among the packed codes of medication and code, and whether the medication is the
        first of its visit.
    """
    counts = batch.counts
    first_code = (counts.flatten().cumsum(0) - counts.flatten()).view(-1, 3)
    codes = (packing.modality < 2).nonzero()[:, 0]
    number = counts[packing.visit[codes], 2]
    target = codes.repeat_interleave(number)
    first_pair = (number.cumsum(0) - number).repeat_interleave(number)
    place = torch.arange(len(target), device=target.device) - first_pair
    return first_code[packing.visit[target], 2] + place, target, place == 0
