"""GraphDiffMed's laboratory events: a sum over what was measured at a visit."""

import math
from typing import Literal

import torch
from torch import nn

from cafemed.batches import Batch
from models.embeddings import embedding_table


class LaboratoryEncoder(nn.Module):
    """Sum over a visit's events (item i, value x) of ReLU(W [n_i, x] + b).

    n_i = (i - mean) / sd over the items 0 .. N - 1: the item's number. With `encoding="embedding"`
    every item has vectors of its own instead, ReLU(a_i + x c_i).

    Args:
        number: of items, N.
        dimension: d.
        encoding: see above.
        scaling: of n and x: "training", as they come; "visit": both are centred and scaled once
            more, over the visit's own events.
    """

    def __init__(
        self,
        number: int,
        dimension: int,
        encoding: Literal["number", "embedding"],
        scaling: Literal["training", "visit"],
    ) -> None:
        super().__init__()
        self.within_visit = scaling == "visit"
        self.mean, self.sd = (number - 1) / 2, math.sqrt((number**2 - 1) / 12) or 1.0
        self.events, self.items = None, None
        if encoding == "number":
            self.events = nn.Linear(2, dimension)
        else:
            self.items = embedding_table(number, 2 * dimension)

    def forward(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Gives (V, d), 0 where nothing was measured; reads only events that exist."""
        places = torch.arange(batch.laboratory_items.shape[1], device=batch.laboratory_items.device)
        exists = places < batch.laboratory_counts[:, None]
        values = torch.where(exists, batch.laboratory_values, 0.0).to(dtype)
        items = torch.where(exists, batch.laboratory_items, 0)
        if self.within_visit:
            values = _standardise(values, exists)
        if self.events is not None:
            numbers = (items.to(dtype) - self.mean) / self.sd
            if self.within_visit:
                numbers = _standardise(numbers, exists)
            of_number, of_value = self.events.weight.unbind(1)
            terms = numbers[..., None] * of_number + values[..., None] * of_value + self.events.bias
        else:
            assert self.items is not None
            alone, slope = self.items[items].chunk(2, dim=-1)
            terms = alone + values[..., None] * slope
        return torch.where(exists[..., None], torch.relu(terms), 0.0).sum(1)


def _standardise(values: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Values (V, E) less their mean, over their biased standard deviation, within each visit.

    0 where all of a visit's are equal.
    """
    number = exists.sum(1, keepdim=True).clamp(min=1)
    centred = values - torch.where(exists, values, 0.0).sum(1, keepdim=True) / number
    squares = torch.where(exists, centred * centred, 0.0)
    sd = (squares.sum(1, keepdim=True) / number).sqrt()
    return centred / torch.where(sd > 1e-6, sd, 1.0)
