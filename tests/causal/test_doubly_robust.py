"""The doubly robust estimator against its formula, visit by visit, with scikit-learn's models."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge

from causal import columns, doubly_robust


def columns_of(data: np.ndarray) -> columns.Columns:
    return columns.Columns(
        tuple(f"x{i:02}" for i in range(data.shape[1])),
        sparse.csr_array(data),
        np.zeros(data.shape[1], np.int64),
        np.zeros(len(data), np.int8),
    )


def drawn(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, the first depending on the others, and four outcomes that depend on all."""
    rng = np.random.default_rng(seed)
    others = rng.random((n, k)) < rng.uniform(0.05, 0.5, k)
    code = rng.random(n) < 0.1 + 0.5 * others.mean(axis=1)
    data = np.column_stack([code, others]).astype(np.int64)
    chance = 0.05 + 0.3 * data[:, :1] * np.array([0, 1, 1, 2]) + 0.3 * data[:, 1:2]
    return data, (rng.random((n, 4)) < chance).astype(np.int64)


def by_visit(code: np.ndarray, others: np.ndarray, outcome: np.ndarray) -> tuple[float, float]:
    """Effect and standard error of one code on one outcome, written over visits."""
    same = (others[:, None] == others[None]).all(axis=2)  # (n, n), visits of one stratum
    fitted = LogisticRegression(tol=1e-12, max_iter=10_000).fit(others, code)
    logit = fitted.predict_proba(others)[:, 1]
    prior = 2 / np.minimum(logit, 1 - logit)
    e = (same @ code + prior * logit) / (same.sum(axis=1) + prior)
    q = {}
    for arm in (0, 1):
        has = code == arm
        additive = Ridge(alpha=1.0).fit(others[has], outcome[has]).predict(others).clip(0, 1)
        q[arm] = (same[:, has] @ outcome[has] + 2 * additive) / (same[:, has].sum(axis=1) + 2)
    weight = np.where(code == 1, 1 / e, -1 / (1 - e))
    own = np.where(code == 1, q[1], q[0])
    effect = (q[1] - q[0] + weight * (outcome - own)).mean()
    variance = ((q[1] - q[0] - effect) ** 2 + weight**2 * own * (1 - own)).sum()
    squares = [weight[code == arm] ** 2 for arm in (0, 1)]
    variance += sum(np.average(square, weights=square) for square in squares)
    return effect, np.sqrt(variance) / len(code)


@pytest.mark.parametrize(("n", "k", "seed"), [(300, 1, 0), (400, 3, 1), (500, 6, 2), (200, 14, 3)])
def test_sums_over_strata_equal_the_formula_over_visits(n: int, k: int, seed: int) -> None:
    data, outcome = drawn(n, k, seed)
    effect, error = doubly_robust.augmented(
        columns_of(data), np.array([0]), [np.arange(1, k + 1)], sparse.csr_array(outcome)
    )
    for j in range(4):
        expected = by_visit(data[:, 0], data[:, 1:], outcome[:, j])
        assert effect[0, j] == pytest.approx(expected[0], abs=2e-5)
        assert error[0, j] == pytest.approx(expected[1], rel=1e-4)


def test_without_adjustment_it_is_the_difference_of_proportions() -> None:
    data, outcome = drawn(500, 3, 4)
    nothing = np.zeros(0, np.int64)
    effect, error = doubly_robust.augmented(
        columns_of(data), np.arange(4), [nothing] * 4, sparse.csr_array(outcome)
    )
    for c in range(4):
        one, none = outcome[data[:, c] == 1], outcome[data[:, c] == 0]
        expected = one.mean(axis=0) - none.mean(axis=0)
        np.testing.assert_allclose(effect[c], expected, rtol=0, atol=1e-12)
        variance = one.var(axis=0) / len(one) + none.var(axis=0) / len(none)
        variance += 1 / len(one) ** 2 + 1 / len(none) ** 2  # one visit more the other way
        np.testing.assert_allclose(error[c], np.sqrt(variance), rtol=1e-9)


def test_many_visits_give_the_standardised_difference() -> None:
    rng = np.random.default_rng(6)
    n = 200_000
    a, b = rng.random((2, n)) < 0.3
    code = rng.random(n) < 0.1 + 0.5 * (a ^ b)
    # Neither model is additive here: the strata themselves have to tell.
    outcome = rng.random(n) < 0.1 + 0.5 * (a ^ b) + 0.3 * (code & a)
    data = np.column_stack([code, a, b]).astype(np.int64)
    effect, error = doubly_robust.augmented(
        columns_of(data),
        np.array([0]),
        [np.array([1, 2])],
        sparse.csr_array(outcome[:, None].astype(np.int64)),
    )
    assert abs(effect[0, 0] - 0.3 * 0.3) < 4 * error[0, 0] < 0.02
    raw = outcome[code].mean() - outcome[~code].mean()
    assert raw > 0.25


def test_a_code_that_never_meets_the_medication_has_an_interval_all_the_same() -> None:
    data = np.zeros((1000, 1), np.int64)
    data[:20] = 1
    outcome = np.zeros((1000, 1), np.int64)
    outcome[20:120] = 1
    effect, error = doubly_robust.augmented(
        columns_of(data), np.array([0]), [np.zeros(0, np.int64)], sparse.csr_array(outcome)
    )
    assert effect[0, 0] == pytest.approx(-100 / 980)
    assert error[0, 0] > 1 / 20


def test_the_order_of_visits_changes_nothing() -> None:
    data, outcome = drawn(400, 5, 7)
    shuffled = np.random.default_rng(8).permutation(400)
    chosen = [np.arange(1, 6)]
    one = doubly_robust.augmented(
        columns_of(data), np.array([0]), chosen, sparse.csr_array(outcome)
    )
    other = doubly_robust.augmented(
        columns_of(data[shuffled]), np.array([0]), chosen, sparse.csr_array(outcome[shuffled])
    )
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-12)


def test_codes_that_do_not_vary_have_no_effect() -> None:
    data, outcome = drawn(100, 2, 9)
    data = np.column_stack([np.zeros(100), np.ones(100), data]).astype(np.int64)
    effect, error = doubly_robust.augmented(
        columns_of(data), np.array([0, 1]), [np.array([3])] * 2, sparse.csr_array(outcome)
    )
    assert (effect == 0).all()
    assert np.isnan(error).all()
