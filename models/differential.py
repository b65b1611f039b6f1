"""GraphDiffMed's differential attention, within a visit and from a visit to those before it.

Queries have H pairs of heads, keys and values H heads that each serve a pair:

    S = q k^T / sqrt(w) + lambda_g B,   C1, C2 = softmax(S) v of the first and second of each pair,
    out = W_o dropout(C1 - lambda C2) + b_o,   lambda = sigmoid(W_l x + b_l) per token x and pair,

w = d / H (docs/models.md 3.4). All visits of a batch are attended from at once.
"""

import dataclasses
import math

import torch
from torch import nn

from cafemed.batches import Batch
from models import blocks
from models.dropout import FastDropout
from models.sparse_map import SparseMap

#: Place of the medications among a visit's tokens and among the blocks of keys.
_MEDICATION = 2


class IntraVisitAttention(nn.Module):
    """From a visit's medications to each of its other modalities; summed over a patient's visits.

    There is one key, whose softmax is 1: C1 = C2 = v, whatever queries and keys are. So their
    weights do not exist here.

    Args:
        dimension: d.
        heads: H, a divisor of d.
        dropout: on the differences of contexts, in training.
    """

    def __init__(self, dimension: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.value = blocks.Linear(dimension, dimension)
        self.gate = blocks.Linear(dimension, heads)
        self.output = nn.Linear(dimension, dimension)
        self.dropout = FastDropout(dropout)

    def forward(self, visits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Gives the sums over visits 1 .. t for every visit t; 0 at a first visit.

        Args:
            visits: float32 (V, K, d), the sums of each modality's codes.
            batch: says which visits follow each other.

        Returns:
            float32 (V, d).
        """
        others = torch.cat([visits[:, :_MEDICATION], visits[:, _MEDICATION + 1 :]], 1)
        kept = 1 - torch.sigmoid(self.gate(visits[:, _MEDICATION]))
        values = self.value(others).unflatten(2, (kept.shape[1], -1))  # (V, K - 1, H, w)
        contexts = self.dropout(values * kept[:, None, :, None]).sum(1).flatten(1)
        # W_o is linear, so the visits are added up before it.
        history = batch.flatten(batch.pad(contexts).cumsum(1))
        added = others.shape[1] * (batch.slots % batch.num_steps + 1)
        out = blocks.product(history, self.output.weight.T) + added[:, None] * self.output.bias
        return torch.where(batch.is_first[:, None], 0.0, out)


@dataclasses.dataclass(frozen=True)
class VisitPairs:
    """Every visit of a batch with each of its patient's earlier ones, P pairs.

    Attributes:
        later: int64 (P,), visit rows, ascending.
        earlier: int64 (P,), visit rows, ascending for equal `later`.
        to_later: adds up pairs by their later visit.
    """

    later: torch.Tensor
    earlier: torch.Tensor
    to_later: SparseMap

    @classmethod
    def of(cls, batch: Batch) -> "VisitPairs":
        """Finds the pairs of a batch."""
        rows = torch.arange(batch.num_visits, device=batch.slots.device)
        before = batch.slots % batch.num_steps
        later = rows.repeat_interleave(before)
        first_pair = before.cumsum(0) - before
        pair = torch.arange(len(later), device=rows.device)
        earlier = (rows - before - first_pair)[later] + pair
        return cls(later, earlier, SparseMap.of(later, pair, batch.num_visits, len(pair)))


class InterVisitAttention(nn.Module):
    """From a visit's tokens to the GRUs' outputs of its patient's earlier visits.

    Args:
        dimension: d.
        heads: H, a divisor of d.
        dropout: on the differences of contexts, in training.
        bias_scale: lambda_g.
    """

    def __init__(self, dimension: int, heads: int, dropout: float, bias_scale: float) -> None:
        super().__init__()
        self.heads, self.bias_scale = heads, bias_scale
        self.query = blocks.Linear(dimension, 2 * dimension)
        self.key = blocks.Linear(dimension, dimension)
        self.value = blocks.Linear(dimension, dimension)
        self.gate = blocks.Linear(dimension, heads)
        self.output = nn.Linear(dimension, dimension)
        self.dropout = FastDropout(dropout)

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, pairs: VisitPairs, bias: torch.Tensor
    ) -> torch.Tensor:
        """Gives the sum of the tokens' outputs for every visit; 0 at a first visit.

        Args:
            tokens: float32 (V, Q, d), the queries' side; medications are token 2.
            states: float32 (V, K, d), the keys' side; medications are block 2.
            pairs: which visits attend to which.
            bias: float32 (P,), B of each pair between medications; elsewhere B is 0.

        Returns:
            float32 (V, d).
        """
        num_tokens = tokens.shape[1]
        contexts = self._contexts(tokens, states, pairs, bias)  # (V, Q, H, 2, w)
        gate = torch.sigmoid(self.gate(tokens))[..., None]
        difference = contexts[:, :, :, 0] - gate * contexts[:, :, :, 1]
        summed = self.dropout(difference).sum(1).flatten(1)
        out = blocks.product(summed, self.output.weight.T) + num_tokens * self.output.bias
        return torch.where(_has_earlier(pairs, len(tokens))[:, None], out, 0.0)

    def _contexts(
        self, tokens: torch.Tensor, states: torch.Tensor, pairs: VisitPairs, bias: torch.Tensor
    ) -> torch.Tensor:
        """C of each token and head: softmax over the earlier visits' blocks, times their values."""
        heads = self.heads
        query = self.query(tokens).unflatten(2, (heads, 2, -1))  # (V, Q, H, 2, w)
        key = self.key(states).unflatten(2, (heads, -1))  # (V, K, H, w)
        value = self.value(states).unflatten(2, (heads, -1))
        scores = torch.einsum(
            "pqhnw,pkhw->pqhnk",
            query.index_select(0, pairs.later) / math.sqrt(query.shape[-1]),
            key.index_select(0, pairs.earlier),
        )
        scores[:, _MEDICATION, :, :, _MEDICATION] += self.bias_scale * bias[:, None, None]
        with torch.no_grad():
            # A softmax does not change with what is subtracted: the largest score of its visit.
            largest = scores.amax(4)
            top = torch.zeros_like(query[..., 0])
            place = pairs.later.view(-1, 1, 1, 1).expand_as(largest)
            top.scatter_reduce_(0, place, largest, "amax", include_self=False)
        weights = torch.exp(scores - top.index_select(0, pairs.later)[..., None])
        weighted = torch.einsum("pqhnk,pkhw->pqhnw", weights, value.index_select(0, pairs.earlier))
        sums = pairs.to_later(weighted.flatten(1)).view_as(query)
        total = pairs.to_later(weights.sum(4).flatten(1)).view_as(top)
        # A first visit has no pairs, and sums of 0.
        total = torch.where(total == 0, 1.0, total)
        return sums / total[..., None]


def _has_earlier(pairs: VisitPairs, num_visits: int) -> torch.Tensor:
    has = torch.zeros(num_visits, dtype=torch.bool, device=pairs.later.device)
    has[pairs.later] = True
    return has
