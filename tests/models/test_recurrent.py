"""The parallel GRUs against torch's own, one patient at a time."""

import numpy as np
import torch

from cafemed.batches import collate
from models.packing import pack
from models.recurrent import ParallelGRU


def _torch_grus(gru):
    """torch's GRUs with the same weights."""
    grus = []
    for k in range(3):
        single = torch.nn.GRU(gru.weight_ih.shape[2], gru.weight_ih.shape[2], dtype=torch.float64)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(single, f"{name}_l0").data.copy_(getattr(gru, name)[k])
        grus.append(single)
    return grus


def _both(world):
    torch.manual_seed(3)
    gru = ParallelGRU(3, 5).double()
    batch = collate(world.arrays, np.array([2, 1, 0, 3]))
    visits = torch.randn(batch.num_visits, 3, 5, dtype=torch.float64, requires_grad=True)
    copies = visits.detach().clone().requires_grad_()
    singles = _torch_grus(gru)
    expected, start = [], 0
    for length in batch.lengths.tolist():
        own = copies[start : start + length]
        expected.append(torch.stack([singles[k](own[:, k])[0] for k in range(3)], 1))
        start += length
    return (
        gru,
        visits,
        gru(visits, pack(batch, world.inputs.sizes).steps),
        singles,
        copies,
        torch.cat(expected),
    )


def test_outputs_are_those_of_torchs_gru(world):
    _, _, got, _, _, expected = _both(world)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-12)


def test_gradients_are_those_of_torchs_gru(world):
    gru, visits, got, singles, copies, expected = _both(world)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(visits.grad, copies.grad, atol=1e-12)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        for k in range(3):
            reference = getattr(singles[k], f"{name}_l0").grad
            assert torch.allclose(getattr(gru, name).grad[k], reference, atol=1e-11), name


def test_weights_start_as_torchs_do():
    weight = ParallelGRU(3, 64).weight_hh
    assert 0.99 / 8 < weight.abs().max() <= 1 / 8
