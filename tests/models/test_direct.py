"""The direct path of CafeMed: where it starts, and that it stays finite and monotone."""

import dataclasses

import numpy as np
import pytest
import torch

import models
from cafemed.batches import collate
from models.direct import MAX_START_CHANCE, START_CHANCE, DirectPath
from models.packing import pack

PACE = 5.0


def _chances(path):
    return torch.sigmoid(PACE * path.table.detach().double())


def test_chances_start_from_the_effects_within_bounds(world):
    effects = world.inputs.effects.copy()
    effects[0, :3] = [1.0, -0.4, 0.5]
    inputs = dataclasses.replace(world.inputs, effects=effects)
    chances = _chances(DirectPath(inputs, "noisy_or", "effects", PACE))
    expected = np.full((51, 11), START_CHANCE)
    expected[:40] = effects.clip(START_CHANCE, MAX_START_CHANCE)
    assert np.abs(chances.numpy() - expected).max() < 1e-6
    assert chances[0, :3].tolist() == pytest.approx([0.95, 0.007, 0.5])


def test_chances_start_even_without_the_effects(world):
    chances = _chances(DirectPath(world.inputs, "noisy_or", "even", PACE))
    assert (chances - START_CHANCE).abs().max() < 1e-6


def test_pace_is_how_far_a_step_goes_and_not_where_it_starts(world):
    packing = pack(collate(world.arrays, np.arange(5)), world.inputs.sizes)
    moved = []
    for pace in (1.0, 4.0):
        path = DirectPath(world.inputs, "noisy_or", "effects", pace)
        before = pace * path.table.detach()
        optimizer = torch.optim.Adam(path.parameters(), lr=1e-3)
        path(torch.zeros(packing.num_visits, 11), packing).sum().backward()
        optimizer.step()
        moved.append((before, (pace * path.table.detach() - before)[packing.ids]))
    assert (moved[0][0] - moved[1][0]).abs().max() < 1e-5
    assert (moved[1][1] / moved[0][1] - 4).abs().max() < 0.05


def test_published_form_has_no_direct_path(world):
    published = models.build("cafemed", world.inputs, {"direct": "none"})
    ours = models.build("cafemed", world.inputs)
    assert set(ours.state_dict()) - set(published.state_dict()) == {"direct.table"}
    # What both have starts from the same draws.
    for name, weight in published.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


@pytest.mark.parametrize("link", ["noisy_or", "additive"])
@pytest.mark.parametrize("level", [-200.0, -30.0, 0.0, 30.0, 200.0])
@pytest.mark.parametrize("strength", [-60.0, 0.0, 60.0])
def test_logits_and_gradients_are_finite_at_the_extremes(link, level, strength, world):
    packing = pack(collate(world.arrays, np.arange(5)), world.inputs.sizes)
    path = DirectPath(world.inputs, link, "even", PACE)
    with torch.no_grad():
        path.table.fill_(strength / PACE)
    deep = torch.full((packing.num_visits, 11), level, requires_grad=True)
    logits = path(deep, packing)
    assert torch.isfinite(logits).all()
    for target in (0.0, 1.0):
        wanted = torch.full_like(logits, target)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        for gradient in torch.autograd.grad(loss, [deep, path.table], retain_graph=True):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("link", ["noisy_or", "additive"])
def test_codes_only_ever_raise_the_logits(link, world):
    packing = pack(collate(world.arrays, np.arange(5)), world.inputs.sizes)
    path = DirectPath(world.inputs, link, "effects", PACE).double()
    deep = torch.linspace(-8, 8, packing.num_visits * 11, dtype=torch.float64).view(-1, 11)
    with torch.no_grad():
        assert (path(deep, packing) > deep).all()


@pytest.mark.parametrize("link", ["noisy_or", "additive"])
def test_visit_without_codes_keeps_the_deep_logits(link, make_world):
    world = make_world([2], lambda _: (0, 0, 0))
    packing = pack(collate(world.arrays, np.array([0])), world.inputs.sizes)
    path = DirectPath(world.inputs, link, "effects", PACE)
    deep = torch.linspace(-9, 9, 22).view(2, 11)
    with torch.no_grad():
        assert (path(deep, packing) - deep).abs().max() < 1e-5
