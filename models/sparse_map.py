"""Sums of chosen rows as a linear map whose gradient is the same kind of sum.

`embedding_bag` reads each row once and writes each sum once. Its own gradient, and that of
`index_add`, scatter row by row, which on a CPU costs several times the sum itself; laid out by
source as well, the gradient is another `embedding_bag`.
"""

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows to add up: those of `index` from each start to the next.

    Attributes:
        index: int64 (E,).
        starts: int64 (targets,).
        weight: (E,), factor of each row, in the rows' type; None: 1.
    """

    index: torch.Tensor
    starts: torch.Tensor
    weight: torch.Tensor | None

    def add_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives (targets, d) from rows (sources, d); 0 where there is nothing to add."""
        return torch.embedding_bag(rows, self.index, self.starts, per_sample_weights=self.weight)[0]


@dataclasses.dataclass(frozen=True)
class SparseMap:
    """A linear map of rows: out[t] = sum of weight * rows[s] over pairs (t, s).

    Attributes:
        forward: the rows that each target adds up.
        backward: the targets whose gradients each source adds up; None where there will be none.
    """

    forward: Rows
    backward: Rows | None

    @classmethod
    def of(
        cls,
        target: torch.Tensor,
        source: torch.Tensor,
        num_targets: int,
        num_sources: int,
        weight: torch.Tensor | None = None,
    ) -> "SparseMap":
        """Builds the map from its pairs.

        Args:
            target: int64 (E,), ascending.
            source: int64 (E,).
            num_targets: rows of the result.
            num_sources: rows of what is given.
            weight: (E,), in the type of the rows; None: 1.
        """
        by_source = source.argsort(stable=True)
        return cls(
            Rows(source, _starts(target, num_targets), weight),
            Rows(
                target[by_source],
                _starts(source, num_sources),
                None if weight is None else weight[by_source],
            ),
        )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Maps (sources, d) to (targets, d)."""
        if self.backward is None:
            return self.forward.add_up(rows)
        out: torch.Tensor = _Apply.apply(rows, self)  # type: ignore[no-untyped-call]
        return out


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, mapping: SparseMap) -> torch.Tensor:
        ctx.mapping = mapping
        return mapping.forward.add_up(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.mapping.backward.add_up(gradient.contiguous()), None


def _starts(index: torch.Tensor, number: int) -> torch.Tensor:
    """Where each of 0 .. number - 1 begins among the sorted values of an index."""
    counts = torch.bincount(index, minlength=number)
    return counts.cumsum(0) - counts
