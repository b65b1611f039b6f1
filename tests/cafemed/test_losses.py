import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from cafemed import losses


def _case(seed=0, visits=9, medications=11):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, 2, (visits, medications)), dtype=torch.float32)
    targets = torch.tensor(rng.random((visits, medications)) < 0.3, dtype=torch.float32)
    a = np.triu(rng.random((medications, medications)) < 0.25, 1)
    return logits, targets, torch.tensor(a | a.T, dtype=torch.float32)


def _torch_margin(probabilities, targets):
    """torch's own loss for one visit: target indices first, then -1."""
    index = torch.full(targets.shape, -1, dtype=torch.int64)
    chosen = torch.nonzero(targets).flatten()
    index[: len(chosen)] = chosen
    return functional.multilabel_margin_loss(probabilities, index)


def _plain_rate(probabilities, ddi):
    chosen = [m for m, p in enumerate(probabilities.tolist()) if p >= 0.5]
    pairs = list(itertools.combinations(chosen, 2))
    return sum(ddi[a, b].item() for a, b in pairs) / len(pairs) if pairs else 0.0


def _plain_loss(logits, targets, ddi, target, coefficient, weight, margin_weight):
    p = torch.sigmoid(logits)
    bce = functional.binary_cross_entropy_with_logits(logits, targets)
    accuracy = (1 - margin_weight) * bce + margin_weight * _torch_margin(p, targets)
    rate = _plain_rate(p, ddi)
    if rate <= target:
        return accuracy
    beta = min(1.0, math.exp(coefficient * (1 - rate / target)))
    size = len(p)
    pairs = sum(ddi[i, j] * p[i] * p[j] for i in range(size) for j in range(size))
    return beta * accuracy + (1 - beta) * weight * pairs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("target", "coefficient"), [(0.06, 2.5), (0.3, 1.0), (1.0, 2.5)])
def test_loss_and_gradient_equal_the_plain_formula(seed, target, coefficient):
    logits, targets, ddi = _case(seed)
    ours = logits.clone().requires_grad_()
    plain = logits.clone().requires_grad_()
    got = losses.visit_losses(
        ours,
        targets,
        ddi,
        ddi_target=target,
        ddi_coefficient=coefficient,
        ddi_weight=0.01,
        margin_weight=0.2,
    ).loss
    expected = torch.stack(
        [
            _plain_loss(plain[v], targets[v], ddi, target, coefficient, 0.01, 0.2)
            for v in range(len(logits))
        ]
    )
    # float32 sums in another order: about 1e-7 of values near 1.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-7)


def test_margin_equals_torch_for_every_visit():
    logits, targets, _ = _case(1, visits=40)
    targets[0] = 0  # no target at all
    targets[1] = 1  # nothing but targets
    p = torch.sigmoid(logits)
    expected = torch.stack([_torch_margin(p[v], targets[v]) for v in range(len(p))])
    torch.testing.assert_close(losses.multilabel_margin(p, targets), expected)


@pytest.mark.parametrize("medications", [1, 2, 11])
def test_rate_counts_pairs_of_the_predicted_set(medications):
    logits, _, ddi = _case(2, visits=30, medications=medications)
    p = torch.sigmoid(logits)
    expected = torch.tensor([_plain_rate(row, ddi) for row in p])
    torch.testing.assert_close(losses.ddi_rate(p, ddi), expected)


def test_beta_at_twice_the_target_is_the_published_value():
    ddi = torch.zeros(4, 4)
    ddi[0, 1] = ddi[1, 0] = 1  # one of the six pairs interacts
    got = losses.visit_losses(torch.full((1, 4), 3.0), torch.ones(1, 4), ddi, ddi_target=1 / 12)
    assert got.beta.item() == pytest.approx(math.exp(-2.5), rel=1e-5)  # 0.082


def test_below_the_target_the_loss_is_accuracy_alone():
    logits, targets, ddi = _case(3)
    got = losses.visit_losses(logits, targets, ddi, ddi_target=1.0, ddi_weight=100.0)
    assert (got.beta == 1).all()
    torch.testing.assert_close(got.loss, 0.95 * got.bce + 0.05 * got.margin)


def test_beta_carries_no_gradient():
    logits, targets, ddi = _case(4)
    got = losses.visit_losses(logits.requires_grad_(), targets, ddi)
    assert (got.beta < 1).any()
    assert not got.beta.requires_grad
    assert got.loss.requires_grad


def test_a_visits_loss_does_not_depend_on_the_others():
    logits, targets, ddi = _case(5)
    together = losses.visit_losses(logits, targets, ddi).loss
    alone = torch.cat(
        [losses.visit_losses(logits[v : v + 1], targets[v : v + 1], ddi).loss for v in range(9)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


def _plain_sum(logits, targets, ddi, target, coefficient, weight, margin_weight):
    """The objective "sum" of a batch of visits, as GraphDiffMed's paper writes it; (V,)."""
    p = torch.sigmoid(logits)
    pairs = interacting = 0
    sets = [[m for m in range(len(row)) if row[m] >= 0.5] for row in p]
    for chosen in sets:
        both = list(itertools.combinations(chosen, 2))
        pairs += len(both)
        interacting += sum(ddi[a, b].item() for a, b in both)
    current = interacting / pairs if pairs else 0.0
    beta = max(0.0, 1 - math.exp(-coefficient * (current - target) / target))
    found = []
    for row, chosen, wanted, logit in zip(p, sets, targets, logits, strict=True):
        bce = functional.binary_cross_entropy_with_logits(logit, wanted)
        accuracy = (1 - margin_weight) * bce + margin_weight * _torch_margin(row, wanted)
        interactions = sum(row[i] * row[j] * ddi[i, j] for i in chosen for j in chosen)
        if chosen:
            interactions = weight / len(chosen) ** 2 * interactions
        found.append(accuracy + beta * interactions)
    return torch.stack(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("target", "coefficient", "margin_weight"),
    [(0.06, 2.5, 0.0), (0.2, 1.0, 0.2), (1.0, 2.5, 0.05), (0.06, 0.0, 0.0)],
)
def test_sum_and_its_gradient_equal_the_plain_formula(seed, target, coefficient, margin_weight):
    logits, targets, ddi = _case(seed)
    logits[0] = -3  # nothing is predicted
    ours = logits.clone().requires_grad_()
    plain = logits.clone().requires_grad_()
    got = losses.visit_losses(
        ours,
        targets,
        ddi,
        ddi_target=target,
        ddi_coefficient=coefficient,
        ddi_weight=0.5,
        margin_weight=margin_weight,
        objective="sum",
    )
    expected = _plain_sum(plain, targets, ddi, target, coefficient, 0.5, margin_weight)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-6)
    assert got.ddi[0] == 0
    assert (got.ddi[1:] > 0).any()
    got.loss.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-7)
    assert not got.beta.requires_grad


@pytest.mark.parametrize("level", [-40.0, 40.0, -1e4, 1e4])
def test_sum_is_finite_where_nothing_or_everything_is_predicted(level):
    _, targets, ddi = _case(6)
    logits = torch.full_like(targets, level).requires_grad_()
    got = losses.visit_losses(logits, targets, ddi, margin_weight=0.0, objective="sum")
    assert torch.isfinite(got.loss).all()
    got.loss.mean().backward()
    assert torch.isfinite(logits.grad).all()
    if level < 0:
        assert (got.beta == 0).all()
        assert (got.ddi == 0).all()
    else:  # every pair is predicted for certain
        density = float(ddi.mean())
        torch.testing.assert_close(got.ddi, torch.full((9,), 0.0005 * density))


def test_sum_does_not_reward_interactions_below_the_target():
    logits, targets, ddi = _case(7)
    got = losses.visit_losses(
        logits, targets, ddi, ddi_target=1.0, ddi_weight=100.0, margin_weight=0.0, objective="sum"
    )
    assert (got.beta == 0).all()
    torch.testing.assert_close(got.loss, got.bce)


def test_sum_approaches_full_weight_as_the_rate_grows():
    ddi = 1 - torch.eye(4)
    logits, targets = torch.full((1, 4), 3.0), torch.ones(1, 4)

    def beta(target, coefficient):
        return losses.visit_losses(
            logits,
            targets,
            ddi,
            ddi_target=target,
            ddi_coefficient=coefficient,
            objective="sum",
        ).beta.item()

    assert beta(0.5, 2.5) == pytest.approx(1 - math.exp(-2.5), rel=1e-5)  # twice the target
    assert beta(1e-3, 2.5) == 1.0
    assert beta(1.0, 2.5) == 0.0
    # It is what "mixture" takes away from the accuracy terms of such a visit.
    mixture = losses.visit_losses(logits, targets, ddi, ddi_target=0.5).beta.item()
    assert beta(0.5, 2.5) == pytest.approx(1 - mixture, rel=1e-5)


def test_weight_decay_is_the_papers_penalty_on_all_parameters():
    # α ‖θ‖² has the gradient 2 α θ: weight_decay = 2 α adds it to Adam's gradient.
    alpha, start = 0.005, torch.linspace(-2, 2, 7, dtype=torch.float64)

    def step(penalty, weight_decay):
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=0.01, weight_decay=weight_decay)
        for _ in range(5):
            optimizer.zero_grad()
            (torch.sin(theta).sum() + penalty * theta.pow(2).sum()).backward()
            optimizer.step()
        return theta.detach()

    torch.testing.assert_close(step(0.0, 2 * alpha), step(alpha, 0.0), rtol=1e-12, atol=1e-12)
