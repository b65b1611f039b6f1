"""Convolution, instance norm and sums over packed visits, with gradients written out.

Written out because they are most of a training step: as matrix products over the positions that
exist they run at the rate of torch's own products, where `conv1d` over padded visits also computes
the padding, and the norm needs a third of the passes over memory that autograd would make.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from models import blocks
from models.packing import Packing
from models.precision import product_type
from models.windows import Window

NORM_EPS = 1e-5


def convolve(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, window: Window
) -> torch.Tensor:
    """Convolution of kernel 7 and padding 3 within each visit.

    Args:
        features: (Q, C_in).
        weight: (C_out, C_in, 7), as of `conv1d`.
        bias: (C_out,).
        window: of the Q positions.

    Returns:
        (Q, C_out), in the type of products (`precision.py`).
    """
    out_channels, in_channels, _ = weight.shape
    kind = product_type(features)
    features, weight, bias = features.to(kind), weight.to(kind), bias.to(kind)
    matrix = _kernel_matrix(weight)
    if out_channels <= in_channels:
        out: torch.Tensor = _ProjectThenSum.apply(features, matrix, bias, window)  # type: ignore[no-untyped-call]
    else:
        out = _UnfoldThenProject.apply(features, matrix, bias, window)  # type: ignore[no-untyped-call]
    return out


class FoldedConvolution:
    """`convolve` with weights that no longer change, in blocks (models/blocks.py).

    Args:
        weight: (C_out, C_in, 7), as of `conv1d`.
        bias: (C_out,).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._projects_first = weight.shape[0] <= weight.shape[1]
        self._matrix, self._bias = _kernel_matrix(weight).contiguous(), bias

    def __call__(self, features: torch.Tensor, window: Window) -> torch.Tensor:
        """Convolves features (Q, C_in) within each visit, (Q, C_out)."""
        if self._projects_first:
            return _project_then_sum(features, self._matrix, self._bias, window)
        unfolded = _spread(features, window.neighbour)
        return blocks.product(unfolded, self._matrix, self._bias)


def _kernel_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The kernel (C_out, C_in, 7) as a matrix (C_in, 7 C_out) or (7 C_in, C_out).

    Whichever has fewer channels is the side on which the seven offsets are laid out.
    """
    out_channels, in_channels, kernel = weight.shape
    if out_channels <= in_channels:
        return weight.permute(1, 2, 0).reshape(in_channels, kernel * out_channels)
    return weight.permute(2, 1, 0).reshape(kernel * in_channels, out_channels)


def normalise(
    features: torch.Tensor, visit: torch.Tensor, starts: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """Instance norm: each column of a visit's rows to mean 0 and biased variance 1 (eps 1e-5).

    Args:
        features: (R, C), the rows of each visit together.
        visit: int64 (R,), the visit of each row, ascending, every visit at least once.
        starts: int64 (V,), the first row of each visit.
        number: int64 (V,), the rows of each visit.

    Returns:
        (R, C), at least float32; 0 where a visit has a single row.
    """
    if features.dtype.itemsize < torch.float32.itemsize:
        features = features.float()
    if blocks.is_fixed():
        return _normalised_by_sums(features, visit, starts, number[:, None])
    out: torch.Tensor = _Normalise.apply(features, visit, starts)  # type: ignore[no-untyped-call]
    return out


def sum_slots(cells: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Adds up what leaves CHARM: the vectors of each visit's and modality's slots.

    Args:
        cells: (Q * 3, d), row position * 3 + modality.
        packing: of the batch.

    Returns:
        (V * 3, d), row visit * 3 + modality.
    """
    if blocks.is_fixed():
        return _bag(cells, packing.slot_cell, packing.slot_starts)
    out: torch.Tensor = _SumSlots.apply(cells, packing)  # type: ignore[no-untyped-call]
    return out


def _bag(
    rows: torch.Tensor, index: torch.Tensor, starts: torch.Tensor, mean: bool = False
) -> torch.Tensor:
    """Sums (or averages) rows[index] from each start to the next."""
    return torch.embedding_bag(rows, index, starts, mode=1 if mean else 0)[0]


def _spread(rows: torch.Tensor, neighbour: torch.Tensor) -> torch.Tensor:
    """Lays the seven neighbours of each position side by side, 0 where there is none."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded.index_select(0, neighbour.flatten()).view(neighbour.shape[0], -1)


def _project_then_sum(
    features: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, window: Window
) -> torch.Tensor:
    projected = blocks.product(features, matrix).view(-1, bias.shape[0])
    return _bag(projected, window.to_sum, window.to_sum_starts).add_(bias)


def _normalised(
    features: torch.Tensor, visit: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `normalise` gives, the inverse standard deviation of each row, and all rows' indices."""
    every = torch.arange(visit.shape[0], device=visit.device)
    mean = _bag(features, every, starts, mean=True)
    centred = features - mean.index_select(0, visit)
    variance = _bag(centred * centred, every, starts, mean=True)
    inverse = torch.rsqrt(variance + NORM_EPS).index_select(0, visit)
    return centred.mul_(inverse), inverse, every


def _normalised_by_sums(
    features: torch.Tensor, visit: torch.Tensor, starts: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """`_normalised` with divided sums: on few rows a mean of bags takes several times as long."""
    every = torch.arange(visit.shape[0], device=visit.device)
    mean = _bag(features, every, starts) / number
    centred = features - mean.index_select(0, visit)
    variance = _bag(centred * centred, every, starts) / number
    return centred.mul_(torch.rsqrt(variance + NORM_EPS).index_select(0, visit))


class _ProjectThenSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, window: Window
    ) -> torch.Tensor:
        ctx.save_for_backward(features, matrix)
        ctx.window = window
        return _project_then_sum(features, matrix, bias, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, matrix = ctx.saved_tensors
        spread = _spread(gradient, ctx.window.backward.opposite)
        return spread @ matrix.T, features.T @ spread, gradient.sum(0), None


class _UnfoldThenProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, window: Window
    ) -> torch.Tensor:
        unfolded = _spread(features, window.neighbour)
        ctx.save_for_backward(unfolded, matrix)
        ctx.window, ctx.channels = window, features.shape[1]
        return torch.addmm(bias, unfolded, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unfolded, matrix = ctx.saved_tensors
        rows = (gradient @ matrix.T).view(-1, ctx.channels)
        back = ctx.window.backward
        of_features = _bag(rows, back.to_sum, back.to_sum_starts)
        return of_features, unfolded.T @ gradient, gradient.sum(0), None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, visit: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        out, inverse, every = _normalised(features, visit, starts)
        ctx.save_for_backward(out, inverse, every, visit, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, inverse, every, visit, starts = ctx.saved_tensors
        mean = _bag(gradient, every, starts, mean=True).index_select(0, visit)
        along = _bag(gradient * out, every, starts, mean=True).index_select(0, visit)
        of_features = (gradient - mean).sub_(along.mul_(out)).mul_(inverse)
        return of_features, None, None


class _SumSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing, ctx.shape = packing, cells.shape
        return _bag(cells, packing.slot_cell, packing.slot_starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_slots = gradient.index_select(0, ctx.packing.slot_group)
        of_cells = gradient.new_zeros(ctx.shape).index_copy_(0, ctx.packing.slot_cell, of_slots)
        return of_cells, None
