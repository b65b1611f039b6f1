"""Packed operations against torch's own on one visit at a time, and their gradients."""

import numpy as np
import pytest
import torch

from cafemed.batches import collate
from models.packed import convolve, normalise, sum_slots
from models.packing import pack


@pytest.fixture
def packing(world):
    return pack(collate(world.arrays, np.array([0, 2, 4])), world.inputs.sizes, window=True)


def _visits(packing, rows):
    return torch.split(rows, packing.lengths.tolist())


@pytest.mark.parametrize(("in_channels", "out_channels"), [(6, 2), (2, 6), (3, 3)])
def test_convolution_sees_each_visit_alone(in_channels, out_channels, packing):
    torch.manual_seed(0)
    features = torch.randn(packing.num_positions, in_channels, dtype=torch.float64)
    weight = torch.randn(out_channels, in_channels, 7, dtype=torch.float64)
    bias = torch.randn(out_channels, dtype=torch.float64)
    expected = torch.cat(
        [
            torch.nn.functional.conv1d(visit.T[None], weight, bias, padding=3)[0].T
            for visit in _visits(packing, features)
        ]
    )
    assert torch.allclose(convolve(features, weight, bias, packing.window), expected, atol=1e-12)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 2), (2, 4)])
def test_gradients_of_the_convolution(in_channels, out_channels, packing):
    torch.manual_seed(0)
    shapes = [(packing.num_positions, in_channels), (out_channels, in_channels, 7), (out_channels,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: convolve(*a, packing.window), inputs)


def test_norm_is_torchs_instance_norm_on_each_visit(packing):
    torch.manual_seed(0)
    features = 3 + 2 * torch.randn(packing.num_positions, 4, dtype=torch.float64)
    got = normalise(features, packing.position_visit, packing.starts, packing.lengths)
    for visit, own in zip(_visits(packing, features), _visits(packing, got), strict=True):
        if len(visit) == 1:
            assert not own.any()
        else:
            expected = torch.nn.functional.instance_norm(visit.T[None])[0].T
            assert torch.allclose(own, expected, atol=1e-12)


def test_gradients_of_the_norm(packing):
    torch.manual_seed(0)
    rows = torch.randn(packing.num_positions, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: normalise(x, packing.position_visit, packing.starts, packing.lengths), [rows]
    )


def test_slots_add_up_with_one_for_the_medication_of_a_first_visit(world):
    batch = collate(world.arrays, np.array([0, 2]))
    for first_visit_slot in (True, False):
        packing = pack(batch, world.inputs.sizes, first_visit_slot)
        cells = torch.randn(packing.num_positions * 3, 2, dtype=torch.float64, requires_grad=True)
        sums = sum_slots(cells, packing).view(batch.num_visits, 3, 2)
        by_position = cells.view(-1, 3, 2)
        start = 0
        for v in range(batch.num_visits):
            for k in range(3):
                kept = int(batch.counts[v, k])
                if k == 2 and v in (0, 1) and first_visit_slot:
                    kept = 1
                expected = by_position[start : start + kept, k].sum(0)
                assert torch.allclose(sums[v, k], expected, atol=1e-12)
            start += int(packing.lengths[v])
        assert torch.autograd.gradcheck(lambda x, p=packing: sum_slots(x, p), [cells])
