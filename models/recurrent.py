"""The three GRUs of equation (14), run side by side in one pass over the visits.

h_t = (1 - z) * n + z * h_{t-1} with r, z = sigmoid(W_i x + b_i + W_h h + b_h) and
n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), as PyTorch's GRU, h_0 = 0. The gradient is written
out: on a CPU the many small steps of three separate GRUs cost more than their arithmetic.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from models import blocks
from models.packing import Steps
from models.precision import without_autocast
from models.scripting import recordable


class ParallelGRU(nn.Module):
    """K independent single-layer GRUs d → d.

    Weights have the layout of `nn.GRU` (reset, update, new) with a leading axis of K, and its
    initialisation, uniform in (-1 / sqrt(d), 1 / sqrt(d)).

    Args:
        number: K.
        dimension: d.
    """

    def __init__(self, number: int, dimension: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dimension)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weight_ih = weights(number, 3 * dimension, dimension)
        self.weight_hh = weights(number, 3 * dimension, dimension)
        self.bias_ih = weights(number, 3 * dimension)
        self.bias_hh = weights(number, 3 * dimension)

    def forward(self, visits: torch.Tensor, steps: Steps) -> torch.Tensor:
        """Runs over each patient's visits.

        Args:
            visits: float32 (V, K, d).
            steps: says which visits follow each other.

        Returns:
            float32 (V, K, d), the output of each GRU at each visit.
        """
        if blocks.is_fixed():
            return self._in_blocks(visits, steps)
        with without_autocast(visits):  # many small steps: nothing to win
            weight, bias = self.weight_ih.transpose(1, 2), self.bias_ih[:, None]
            by_step = visits.to(weight.dtype).index_select(0, steps.order).transpose(0, 1)
            inputs = torch.baddbmm(bias, by_step, weight)
            outputs = _Recurrence.apply(inputs, self.weight_hh, self.bias_hh, steps)  # type: ignore[no-untyped-call]
            of_visits: torch.Tensor = outputs.transpose(0, 1).index_select(0, steps.place)
        return of_visits

    def _in_blocks(self, visits: torch.Tensor, steps: Steps) -> torch.Tensor:
        """As `forward`, without gradients, every product of blocks.BLOCK rows."""
        inputs = in_blocks(
            visits.transpose(0, 1),
            blocks.widened(self.weight_ih.transpose(1, 2)),
            blocks.widened(self.bias_ih)[:, None],
        )
        weight = blocks.widened(self.weight_hh.transpose(1, 2))
        bias = blocks.widened(self.bias_hh)[:, None]
        by_step = inputs.index_select(1, steps.order)
        states = run_steps(by_step, weight, bias, torch.as_tensor(steps.sizes))
        return states.index_select(1, steps.place).transpose(0, 1)


@recordable
def in_blocks(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, block: int = blocks.BLOCK
) -> torch.Tensor:
    """K products at once, block by block of so many rows.

    Args:
        rows: (K, V, d).
        weight: (K, d, 3d), or wider (`blocks.widened`).
        bias: (K, 1, 3d), or as wide.
        block: rows of a product, a divisor of V.

    Returns:
        (K, V, 3d), or as wide.
    """
    parts: list[torch.Tensor] = []
    for i in range(0, rows.shape[1], block):
        parts.append(torch.baddbmm(bias, rows[:, i : i + block], weight))
    return torch.cat(parts, 1)


@recordable
def run_steps(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    sizes: torch.Tensor,
    block: int = blocks.BLOCK,
) -> torch.Tensor:
    """The recurrence on whole blocks.

    Args:
        inputs: projected inputs (K, V, 3d), in the places of the steps.
        weight: (K, d, 3d), or wider (`blocks.widened`).
        bias: (K, 1, 3d), or as wide.
        sizes: int64 (T,), patients of each step, multiples of `block`.
        block: rows of a product.

    Returns:
        (K, V, d).
    """
    d = weight.shape[1]
    states = inputs.new_empty((inputs.shape[0], inputs.shape[1], d))
    numbers: list[int] = sizes.tolist()
    begin, before = 0, 0
    for t, size in enumerate(numbers):
        given = inputs[:, begin : begin + size]
        state = states[:, before : before + size]
        own = bias.expand(-1, size, -1)  # before the first visit the state is 0
        if t > 0:
            parts: list[torch.Tensor] = []
            for i in range(0, size, block):
                parts.append(torch.baddbmm(bias, state[:, i : i + block], weight))
            own = torch.cat(parts, 1)
        gate = torch.sigmoid(given[:, :, : 2 * d] + own[:, :, : 2 * d])
        reset, update = gate[:, :, :d], gate[:, :, d:]
        new = torch.tanh(given[:, :, 2 * d : 3 * d] + reset * own[:, :, 2 * d : 3 * d])
        states[:, begin : begin + size] = (
            torch.lerp(new, state, update) if t > 0 else new - update * new
        )
        before = begin
        begin += size
    return states


class _Recurrence(torch.autograd.Function):
    """Projected inputs (K, V, 3d), in the places of the steps, to outputs (K, V, d)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, steps: Steps
    ) -> torch.Tensor:
        d = inputs.shape[2] // 3
        states, news, hidden = (inputs.new_empty(*inputs.shape[:2], d) for _ in range(3))
        gates = inputs.new_empty(*inputs.shape[:2], 2 * d)
        transposed, first = weight.transpose(1, 2), bias[:, None]
        begin = 0
        for t, size in enumerate(steps.sizes):
            here, before = slice(begin, begin + size), begin - (steps.sizes[t - 1] if t else 0)
            given, state = inputs[:, here], states[:, before : before + size]
            # Before the first visit the state is 0, of which the product is 0.
            own = torch.baddbmm(first, state, transposed) if t else first.expand(-1, size, -1)
            hidden[:, here] = own[..., 2 * d :]
            gate = torch.add(given[..., : 2 * d], own[..., : 2 * d], out=gates[:, here]).sigmoid_()
            reset, update = gate[..., :d], gate[..., d:]
            new = torch.addcmul(given[..., 2 * d :], reset, own[..., 2 * d :], out=news[:, here])
            new.tanh_()
            if t:
                torch.lerp(new, state, update, out=states[:, here])
            else:
                torch.addcmul(new, update, new, value=-1, out=states[:, here])
            begin += size
        ctx.save_for_backward(states, gates, news, hidden, weight, steps.previous)
        ctx.sizes = steps.sizes
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, gates, news, hidden, weight, before = ctx.saved_tensors
        sizes, d = ctx.sizes, news.shape[-1]
        first = sizes[0]
        reset, update = gates[..., :d], gates[..., d:]
        previous = states.index_select(1, before)
        # What does not depend on the recurrence, for all steps at once.
        kept = 1 - update
        to_new = (1 - news * news).mul_(kept)
        to_update = torch.cat([-news[:, :first], previous - news[:, first:]], 1)
        to_update.mul_(kept).mul_(update)
        to_reset = (1 - reset).mul_(reset).mul_(hidden)
        of_inputs = gates.new_empty(*news.shape[:2], 3 * d)
        of_own = torch.empty_like(of_inputs)
        end, later = news.shape[1], None
        for t in reversed(range(len(sizes))):
            here = slice(end - sizes[t], end)
            carried = gradient[:, here]
            if later is not None:
                carried = carried.clone()
                carried[:, : later.shape[1]] += later
            given, own = of_inputs[:, here], of_own[:, here]
            of_new = torch.mul(carried, to_new[:, here], out=given[..., 2 * d :])
            torch.mul(carried, to_update[:, here], out=given[..., d : 2 * d])
            torch.mul(of_new, to_reset[:, here], out=given[..., :d])
            own[..., : 2 * d] = given[..., : 2 * d]
            torch.mul(of_new, reset[:, here], out=own[..., 2 * d :])
            if t:
                later = torch.baddbmm(carried * update[:, here], own, weight)
            end -= sizes[t]
        of_weight = of_own[:, first:].transpose(1, 2) @ previous
        return of_inputs, of_weight, of_own.sum(1), None
