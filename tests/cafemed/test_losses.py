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
