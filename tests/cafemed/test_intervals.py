import numpy as np
import pytest
from scipy import stats

from cafemed import intervals


def ratio(sums):
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., :1] / sums[..., 1:2]


def test_rounds_are_sums_over_patients_drawn_with_replacement():
    # Powers of a large base: a sum shows how often each patient was drawn.
    size = 4
    terms = np.stack([100.0 ** np.arange(size), np.ones(size)], axis=1)
    sums = intervals.resampled_sums(terms, 4000, seed=1)
    assert (sums[:, 1] == size).all()
    times = (sums[:, :1] // 100 ** np.arange(size) % 100).astype(int)
    assert (times.sum(axis=1) == size).all()
    # A patient is drawn binomially; chi-square over all patients and rounds.
    expected = stats.binom.pmf(np.arange(size + 1), size, 1 / size) * times.size
    found = np.bincount(times.ravel(), minlength=size + 1)
    assert ((found - expected) ** 2 / expected).sum() < stats.chi2.ppf(0.9999, size)


def test_the_same_seed_draws_the_same_patients_whatever_the_terms():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 1)), rng.random((30, 2))
    alone = intervals.resampled_sums(a, 50, seed=3)
    both = intervals.resampled_sums(np.hstack([a, b]), 50, seed=3)
    np.testing.assert_allclose(alone[:, 0], both[:, 0])
    assert not np.allclose(alone, intervals.resampled_sums(a, 50, seed=4))


def test_draws_in_pieces_are_all_filled(monkeypatch):
    monkeypatch.setattr(intervals, "_DRAWS", 70)
    sums = intervals.resampled_sums(np.ones((30, 1)), 7)
    np.testing.assert_array_equal(sums, np.full((7, 1), 30.0))


def test_the_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(2).gamma(2, size=60)
    terms = np.stack([values, np.ones(60)], axis=1)
    found = intervals.percentile(terms, ratio, rounds=20_000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert found.value[0] == pytest.approx(values.mean())
    assert found.low[0] == pytest.approx(expected.low, abs=0.015)
    assert found.high[0] == pytest.approx(expected.high, abs=0.015)


def test_a_wider_level_gives_a_wider_interval_that_holds_the_value():
    terms = np.stack([np.random.default_rng(5).random(25), np.ones(25)], axis=1)
    narrow, wide = (intervals.percentile(terms, ratio, 1000, level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_rounds_in_which_a_value_is_undefined_are_left_out():
    terms = np.zeros((12, 2))
    terms[0] = (1, 2)  # a third of the rounds do not draw the only patient who counts
    found = intervals.percentile(terms, ratio)
    assert (found.value[0], found.low[0], found.high[0]) == (0.5, 0.5, 0.5)
    nothing = intervals.percentile(np.zeros((12, 2)), ratio)
    assert np.isnan([nothing.value[0], nothing.low[0], nothing.high[0]]).all()


def test_a_reflected_interval_is_turned_round_at_its_value_and_not_below_zero():
    noise = np.random.default_rng(6).normal(0.02, 1, 200)
    terms = np.stack([noise, np.full(200, 1.0)], axis=1)

    def error(sums):
        return np.abs(ratio(sums))

    plain = intervals.percentile(terms, error)
    turned = intervals.percentile(terms, error, reflected=(0,))
    assert turned.low[0] == max(0.0, 2 * plain.value[0] - plain.high[0])
    assert turned.high[0] == pytest.approx(2 * plain.value[0] - plain.low[0])
