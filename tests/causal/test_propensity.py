"""Propensities against scikit-learn's logistic regression, and what a comparison is worth."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from causal import propensity
from causal.propensity import Strata


def rows(n: int, k: int, seed: int) -> np.ndarray:
    """A code in column 0 that depends on k others."""
    rng = np.random.default_rng(seed)
    others = rng.random((n, k)) < rng.uniform(0.05, 0.5, k)
    code = rng.random(n) < 0.05 + 0.5 * others.mean(axis=1)
    return np.column_stack([code, others]).astype(np.int64)


@pytest.mark.parametrize(("n", "k"), [(500, 1), (800, 3), (300, 9), (200, 70)])
def test_strata_are_the_distinct_rows(n: int, k: int) -> None:
    data = rows(n, k, k)
    strata = Strata.of(sparse.csc_array(data), 0, np.arange(1, k + 1))
    distinct, number = np.unique(data[:, 1:], axis=0, return_counts=True)
    order = np.lexsort(strata.patterns.T[::-1])
    np.testing.assert_array_equal(strata.patterns[order], distinct)
    np.testing.assert_array_equal((strata.treated + strata.without)[order], number)
    np.testing.assert_array_equal(strata.patterns[strata.of_visit], data[:, 1:])
    expected = np.bincount(strata.of_visit, weights=data[:, 0], minlength=len(distinct))
    np.testing.assert_array_equal(strata.treated, expected)


@pytest.mark.parametrize(("n", "k", "seed"), [(400, 1, 0), (400, 2, 1), (1500, 5, 2), (250, 12, 3)])
def test_the_share_is_a_proportion_that_falls_back_on_a_logistic_regression(
    n: int, k: int, seed: int
) -> None:
    data = rows(n, k, seed)
    strata = Strata.of(sparse.csc_array(data), 0, np.arange(1, k + 1))
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(data[:, 1:], data[:, 0])
    fitted = model.predict_proba(strata.patterns)[:, 1]
    prior = 2 / np.minimum(fitted, 1 - fitted)
    visits = strata.treated + strata.without
    expected = (strata.treated + prior * fitted) / (visits + prior)
    np.testing.assert_allclose(propensity.share_treated(strata), expected, rtol=1e-4)


def worth_of(data: np.ndarray) -> float:
    present = sparse.csc_array(data)
    chosen = [np.arange(1, data.shape[1])]
    return float(propensity.all_worth(present, np.array([0]), chosen)[0])


def test_what_a_comparison_is_worth() -> None:
    rng = np.random.default_rng(5)
    code = np.arange(1000) < 100
    alone = worth_of(code[:, None].astype(np.int64))
    assert alone == pytest.approx(100 * 900 / 1000)
    # A column that has nothing to do with the code takes next to nothing away,
    unrelated = np.column_stack([code, rng.random(1000) < 0.3]).astype(np.int64)
    assert 0.9 * alone < worth_of(unrelated) <= alone * 1.01
    # one that goes with it most, a copy all.
    close = np.column_stack([code, code ^ (rng.random(1000) < 0.02)]).astype(np.int64)
    assert 2 < worth_of(close) < 0.3 * alone
    assert worth_of(np.column_stack([code, code]).astype(np.int64)) < 2
    assert worth_of(np.column_stack([np.ones(50), rng.random(50) < 0.5]).astype(np.int64)) == 0
