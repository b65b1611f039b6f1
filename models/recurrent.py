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

from cafemed.batches import Batch


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

    def forward(self, visits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Runs over each patient's visits.

        Args:
            visits: float32 (V, K, d).
            batch: says which visits follow each other.

        Returns:
            float32 (V, K, d), the output of each GRU at each visit.
        """
        number, dimension = visits.shape[1:]
        projected = torch.baddbmm(
            self.bias_ih[:, None], visits.transpose(0, 1), self.weight_ih.transpose(1, 2)
        )
        grid = batch.pad(projected.transpose(0, 1))  # (B, T, K, 3d); visits that do not exist: 0
        steps = grid.permute(1, 2, 0, 3).contiguous()
        outputs = _Recurrence.apply(steps, self.weight_hh, self.bias_hh)  # type: ignore[no-untyped-call]
        flat: torch.Tensor = batch.flatten(outputs.permute(2, 0, 1, 3))
        return flat.view(-1, number, dimension)


class _Recurrence(torch.autograd.Function):
    """Projected inputs (T, K, B, 3d) to outputs (T, K, B, d)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        num_steps, number, size, width = inputs.shape
        d = width // 3
        states = inputs.new_zeros(num_steps + 1, number, size, d)
        gates = inputs.new_empty(num_steps, number, size, 2 * d)
        news, hidden = (inputs.new_empty(num_steps, number, size, d) for _ in range(2))
        transposed = weight.transpose(1, 2)
        for t in range(num_steps):
            own = torch.baddbmm(bias[:, None], states[t], transposed)
            torch.add(inputs[t, ..., : 2 * d], own[..., : 2 * d], out=gates[t]).sigmoid_()
            hidden[t] = own[..., 2 * d :]
            reset, update = gates[t, ..., :d], gates[t, ..., d:]
            torch.addcmul(inputs[t, ..., 2 * d :], reset, hidden[t], out=news[t]).tanh_()
            torch.lerp(news[t], states[t], update, out=states[t + 1])
        ctx.save_for_backward(states, gates, news, hidden, weight)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states, gates, news, hidden, weight = ctx.saved_tensors
        d = news.shape[-1]
        reset, update = gates[..., :d], gates[..., d:]
        # What does not depend on the recurrence, for all steps at once.
        to_new = (1 - update) * (1 - news * news)
        to_update = (states[:-1] - news) * update * (1 - update)
        to_reset = hidden * reset * (1 - reset)
        of_inputs = gates.new_empty(*news.shape[:-1], 3 * d)
        of_own = torch.empty_like(of_inputs)
        carried = torch.zeros_like(news[0])
        for t in reversed(range(len(news))):
            carried = carried + gradient[t]
            of_new = torch.mul(carried, to_new[t], out=of_inputs[t, ..., 2 * d :])
            torch.mul(carried, to_update[t], out=of_inputs[t, ..., d : 2 * d])
            torch.mul(of_new, to_reset[t], out=of_inputs[t, ..., :d])
            of_own[t, ..., : 2 * d] = of_inputs[t, ..., : 2 * d]
            torch.mul(of_new, reset[t], out=of_own[t, ..., 2 * d :])
            carried = torch.baddbmm(carried.mul_(update[t]), of_own[t], weight)
        by_gru = of_own.transpose(0, 1).flatten(1, 2)
        previous = states[:-1].transpose(0, 1).flatten(1, 2)
        return of_inputs, by_gru.transpose(1, 2) @ previous, by_gru.sum(1)
