"""Heterogeneous branch of CausalMed: two relational graph layers over a batch's visits.

A layer gives node i root x_i + bias + the sum over relations r of W_r times the mean of the nodes
that reach i by r (docs/models.md 2.3). Only medications send and only diagnoses and procedures
receive, and what leaves the branch are sums over a visit's codes. The second layer is linear, so
those sums are taken before its products: a row a visit instead of a row a code.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cafemed.batches import Batch
from models.effect_edges import EffectEdges, EffectRelations
from models.packing import Packing
from models.sparse_map import SparseMap


class RelationalLayer(nn.Module):
    """Weights of one layer, Glorot-uniform with zero bias, as PyTorch Geometric's RGCNConv.

    Args:
        number: of relations, R.
        dimension: d.
    """

    def __init__(self, number: int, dimension: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (2 * dimension))
        self.weight = nn.Parameter(torch.empty(number, dimension, dimension))
        self.root = nn.Parameter(torch.empty(dimension, dimension))
        self.bias = nn.Parameter(torch.zeros(dimension))
        for weights in (self.weight, self.root):
            nn.init.uniform_(weights, -bound, bound)

    def project(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Multiplies rows (G, d), those of each relation together, by their W_r.

        Args:
            rows: in the order of the relations.
            sizes: (R,), rows of each relation.
        """
        out: torch.Tensor = _ByRelation.apply(rows, self.weight, sizes)  # type: ignore[no-untyped-call]
        return out


class HeterogeneousBranch(nn.Module):
    """Sums of the second layer's outputs over each visit's codes of a modality.

    Args:
        relations: of the edges.
        dimension: d.
        first_visit_slot: a first visit has one medication node, a zero vector, with a virtual edge
            to every code.
    """

    def __init__(self, relations: EffectRelations, dimension: int, first_visit_slot: bool) -> None:
        super().__init__()
        self.relations = relations
        self.first_visit_slot = first_visit_slot
        self.first = RelationalLayer(relations.number, dimension)
        self.second = RelationalLayer(relations.number, dimension)

    def forward(
        self, embedded: torch.Tensor, batch: Batch, packing: Packing, to_visits: SparseMap
    ) -> torch.Tensor:
        """Gives the sums of u over the codes of each visit and modality.

        Args:
            embedded: (N, d), the packed codes' embeddings.
            batch: B patients.
            packing: of the batch.
            to_visits: adds up packed codes by visit and modality.

        Returns:
            (V, 3, d).
        """
        edges = self.relations(batch, packing)
        # The medications that reach a code by a relation lie together; each has its share.
        group, size = _groups(edges.relation * len(embedded) + edges.target)
        share = size.to(embedded.dtype).reciprocal()[group]
        last = size.cumsum(0) - 1
        means = SparseMap.of(group, edges.source, len(size), len(embedded), share)(embedded)
        projected = self.first.project(means, self._sizes(edges.relation[last]))
        own = torch.addmm(self.first.bias, embedded, self.first.root)
        hidden = torch.relu(own + _gather(projected, edges.target[last], len(embedded)))

        sums = to_visits(hidden).view(packing.num_visits, 3, -1)
        messages, counts = self._messages(hidden, edges, share, packing), batch.counts
        if self.first_visit_slot:
            sums, messages, counts = self._add_slots(sums, messages, batch)
        return sums @ self.second.root + counts[..., None] * self.second.bias + messages

    def _messages(
        self, hidden: torch.Tensor, edges: EffectEdges, share: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """What the second layer's relations send to each visit and modality, (V, 3, d)."""
        num_visits = packing.num_visits
        group, size = _groups(edges.relation * num_visits + packing.visit[edges.target])
        last = size.cumsum(0) - 1
        sums = SparseMap.of(group, edges.source, len(size), len(hidden), share)(hidden)
        projected = self.second.project(sums, self._sizes(edges.relation[last]))
        goal = packing.group[edges.target[last]]
        return _gather(projected, goal, 3 * num_visits).view(num_visits, 3, -1)

    def _add_slots(
        self, sums: torch.Tensor, messages: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds first visits' medication nodes to sums, messages and counts, each (V, 3, ...).

        The node is a zero vector: it sends nothing in the first layer, of which its own bias is
        all that is left.
        """
        hidden = torch.relu(self.first.bias)
        first = batch.is_first[:, None]
        at_slot = first & (torch.arange(3, device=first.device) == 2)
        sent = hidden @ self.second.weight[:: self.relations.per_modality]  # by virtual relations
        received = (first * batch.counts[:, :2])[..., None] * sent
        return (
            sums + at_slot[..., None] * hidden,
            messages + nn.functional.pad(received, (0, 0, 0, 1)),
            batch.counts + at_slot,
        )

    def _sizes(self, relation: torch.Tensor) -> list[int]:
        sizes: list[int] = torch.bincount(relation, minlength=self.relations.number).tolist()
        return sizes


def _groups(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the runs of equal keys; gives each element's run and each run's length."""
    _, group, size = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    return group, size


def _gather(rows: torch.Tensor, target: torch.Tensor, num_targets: int) -> torch.Tensor:
    """Adds rows (G, d) up by target, int64 (G,) in any order; gives (num_targets, d)."""
    order = target.argsort(stable=True)
    return SparseMap.of(target[order], order, num_targets, len(target))(rows)


class _ByRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        out = torch.empty_like(rows)
        parts = (torch.split(t, sizes) for t in (out, rows))
        for part, given, matrix in zip(*parts, weight, strict=True):
            torch.mm(given, matrix, out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight = torch.empty_like(rows), torch.empty_like(weight)
        gradient = gradient.contiguous()
        parts = (torch.split(t, ctx.sizes) for t in (of_rows, gradient, rows))
        for part, own, given, matrix, of_matrix in zip(*parts, weight, of_weight, strict=True):
            torch.mm(own, matrix.T, out=part)
            torch.mm(given.T, own, out=of_matrix)
        return of_rows, of_weight, None
