"""The dropout of cheap random bits drops what it says, and nothing in evaluation."""

import pytest
import torch

from models.dropout import FastDropout

SHAPE = (999, 301)  # no multiple of the four elements that share a random word


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.7, 0.95])
def test_share_and_scale(rate):
    torch.manual_seed(0)
    out = FastDropout(rate)(torch.ones(SHAPE))
    kept = out > 0
    # Five standard errors of the share of 300,699 independent draws.
    assert float(kept.float().mean()) == pytest.approx(
        1 - rate, abs=5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    )
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - rate)), rtol=2e-4)
    assert out[~kept].abs().max() == 0


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    kept = (FastDropout(0.7)(torch.ones(SHAPE)).flatten()[:-3] > 0).float()
    for lag in (1, 2, 3, 4, 301):
        together = (kept[lag:] * kept[:-lag]).mean()
        assert float(together) == pytest.approx(0.09, abs=0.003)
    by_lane = kept[: len(kept) // 4 * 4].view(-1, 4).mean(0)
    assert (by_lane - 0.3).abs().max() < 0.01


def test_gradient_flows_through_what_is_kept():
    torch.manual_seed(0)
    rows = torch.randn(50, 3, requires_grad=True)
    out = FastDropout(0.5)(rows)
    out.sum().backward()
    assert torch.equal(rows.grad, (out.detach() != 0) * 2.0)


def test_seed_gives_the_same_draw():
    dropout, ones = FastDropout(0.5), torch.ones(SHAPE)
    torch.manual_seed(4)
    first = dropout(ones)
    second = dropout(ones)
    torch.manual_seed(4)
    assert torch.equal(dropout(ones), first)
    assert not torch.equal(first, second)


def test_evaluation_and_rate_zero_change_nothing():
    rows = torch.randn(5, 4)
    assert FastDropout(0.7).eval()(rows) is rows
    assert FastDropout(0.0)(rows) is rows
    assert torch.isfinite(FastDropout(0.9999999)(rows)).all()
