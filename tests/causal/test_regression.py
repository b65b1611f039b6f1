"""Least squares of whole tables against numpy's, pair by pair."""

import numpy as np
from scipy import sparse

from causal import columns, regression


def test_regression_of_random_tables_equals_numpy_to_1e_12() -> None:
    rng = np.random.default_rng(3)
    n, p, num_targets = 400, 12, 4
    dense = (rng.random((n, p)) < 0.3).astype(np.int64)
    outcome = (rng.random((n, num_targets)) < 0.2 + 0.3 * dense[:, :1]).astype(np.int64)
    cols = columns.Columns(
        tuple(f"x{i:02}" for i in range(p)),
        sparse.csr_array(dense),
        np.zeros(p, np.int64),
        np.zeros(n, np.int8),
    )
    parents = [np.sort(rng.choice([i for i in range(p) if i != j], j % 6, False)) for j in range(p)]
    found, error = regression.regress(cols, np.arange(p), parents, sparse.csr_array(outcome))
    for j in range(p):
        design = np.column_stack([np.ones(n), dense[:, j], dense[:, parents[j]]])
        coefficients, rss, *_ = np.linalg.lstsq(design, outcome.astype(float))
        inverse = np.linalg.inv(design.T @ design)
        expected_error = np.sqrt(rss / (n - design.shape[1]) * inverse[1, 1])
        np.testing.assert_allclose(found[j], coefficients[1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(error[j], expected_error, rtol=1e-9)


def test_codes_without_variance_of_their_own_have_no_effect() -> None:
    rng = np.random.default_rng(4)
    n = 300
    a, b = rng.random((2, n)) < 0.4
    dense = np.column_stack([np.zeros(n), np.ones(n), a, a, b]).astype(np.int64)
    cols = columns.Columns(
        ("always", "never", "a", "copy", "b"),
        sparse.csr_array(dense),
        np.zeros(5, np.int64),
        np.zeros(n, np.int8),
    )
    outcome = sparse.csr_array((rng.random((n, 3)) < 0.3).astype(np.int64))
    nothing = np.zeros(0, np.int64)
    parents = [nothing, nothing, np.array([3]), nothing, np.array([2, 3])]
    found, error = regression.regress(cols, np.arange(5), parents, outcome)
    assert (found[:3] == 0).all()
    assert np.isnan(error[:3]).all()
    # Two copies of one parent adjust like one.
    once, once_error = regression.regress(cols, np.array([4]), [np.array([2])], outcome)
    np.testing.assert_allclose(found[4], once[0], atol=1e-12)
    np.testing.assert_allclose(error[4], once_error[0], rtol=1e-12)
