"""Heterogeneous branch of CausalMed: two relational graph layers over a batch's visits.

A layer gives node i root x_i + bias + the sum over relations r of W_r times the mean of the nodes
that reach i by r (docs/models.md 2.3). Only medications send and only diagnoses and procedures
receive, and what leaves the branch are sums over a visit's codes. The second layer is linear, so
those sums are taken before its products: a row a visit instead of a row a code.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cafemed.batches import Batch
from models.blocks import BLOCK, is_fixed, product
from models.effect_edges import EffectEdges, EffectRelations
from models.packing import Packing
from models.sparse_map import SparseMap


@dataclasses.dataclass(frozen=True)
class Messages:
    """How rows become messages to T targets; found on the host.

    Rows that share a relation and a target are added up before the product with the relation's
    matrix, so that only what has edges is multiplied, and the products are taken in blocks of a
    fixed number of rows: in a product of another height a row has other last bits, and serving
    relies on a patient's bits not depending on the others' edges.

    Attributes:
        to_blocks: adds up share * rows of an edge's relation and target; each relation's sums
            begin a block, and what is left of its last block stays 0.
        num_blocks: of each relation.
        to_targets: adds up the products of each target.
    """

    to_blocks: SparseMap
    num_blocks: tuple[int, ...]
    to_targets: SparseMap

    @classmethod
    def of(
        cls,
        edges: EffectEdges,
        share: torch.Tensor,
        target: torch.Tensor,
        num_targets: int,
        num_sources: int,
        num_relations: int,
    ) -> "Messages":
        """Finds them.

        Args:
            edges: E edges, sorted by relation and then by `target`.
            share: (E,), factor of each edge's row, in the rows' type.
            target: int64 (E,).
            num_targets: T.
            num_sources: N.
            num_relations: R.
        """
        group, size = _groups(edges.relation * num_targets + target)
        last = size.cumsum(0) - 1
        relation, goal = edges.relation[last], target[last]
        sizes = torch.bincount(relation, minlength=num_relations)
        blocks = (sizes + BLOCK - 1) // BLOCK
        skipped = (blocks * BLOCK - sizes).cumsum(0) - (blocks * BLOCK - sizes)
        place = torch.arange(len(last)) + skipped[relation]
        num_blocks = tuple(blocks.tolist())
        height = BLOCK * sum(num_blocks)
        order = goal.argsort(stable=True)
        return cls(
            SparseMap.of(place[group], edges.source, height, num_sources, share),
            num_blocks,
            SparseMap.of(goal[order], place[order], num_targets, height),
        )


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

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """What nodes (N, d) keep of themselves: x W_root + bias."""
        return product(rows, self.root, self.bias)

    def messages(self, rows: torch.Tensor, messages: Messages) -> torch.Tensor:
        """Adds up share * rows[source] W_relation over the edges that lead to each target.

        Args:
            rows: (N, d).
            messages: of the layer's edges.

        Returns:
            (T, d).
        """
        sums = messages.to_blocks(rows)
        if is_fixed():
            # One by one: how many blocks a relation has depends on everybody in the batch.
            relation = [r for r, number in enumerate(messages.num_blocks) for _ in range(number)]
            parts = zip(sums.view(-1, BLOCK, sums.shape[1]), relation, strict=True)
            own = [product(part, self.weight[r]) for part, r in parts] or [sums]
            return messages.to_targets(torch.cat(own))
        projected = _ByRelation.apply(sums, self.weight, messages.num_blocks)  # type: ignore[no-untyped-call]
        return messages.to_targets(projected)


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

    def prepare(self, batch: Batch, packing: Packing) -> tuple[Messages, Messages]:
        """Finds the messages of both layers for a batch and its packing, all on the host."""
        edges, num_codes = self.relations(batch, packing), len(packing.ids)
        # The medications that reach a code by a relation lie together; each has its share.
        group, size = _groups(edges.relation * num_codes + edges.target)
        share = size.to(self.first.root.dtype).reciprocal()[group]
        number, goal = self.relations.number, packing.group[edges.target]
        return (
            Messages.of(edges, share, edges.target, num_codes, num_codes, number),
            Messages.of(edges, share, goal, 3 * packing.num_visits, num_codes, number),
        )

    def forward(
        self,
        embedded: torch.Tensor,
        batch: Batch,
        packing: Packing,
        layers: tuple[Messages, Messages],
    ) -> torch.Tensor:
        """Gives the sums of u over the codes of each visit and modality.

        Args:
            embedded: (N, d), the packed codes' embeddings.
            batch: B patients.
            packing: of the batch.
            layers: of `prepare`.

        Returns:
            (V, 3, d).
        """
        received = self.first.messages(embedded, layers[0])
        hidden = torch.relu(self.first.own(embedded) + received)

        sums = packing.to_groups(hidden).view(packing.num_visits, 3, -1)
        messages, counts = self.second.messages(hidden, layers[1]).view_as(sums), batch.counts
        if self.first_visit_slot:
            sums, messages, counts = self._add_slots(sums, messages, batch)
        return product(sums, self.second.root) + counts[..., None] * self.second.bias + messages

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


def _groups(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the runs of equal keys; gives each element's run and each run's length."""
    _, group, size = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    return group, size


class _ByRelation(torch.autograd.Function):
    """Multiplies blocks of rows, those of each relation together, by their relation's matrix."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, num_blocks: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = [BLOCK * number for number in num_blocks]
        out = torch.empty_like(rows)
        parts = (torch.split(t.view(-1, BLOCK, t.shape[1]), list(num_blocks)) for t in (out, rows))
        for part, given, matrix in zip(*parts, weight, strict=True):
            if len(given):
                torch.bmm(given, matrix.expand(len(given), -1, -1), out=part)
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
