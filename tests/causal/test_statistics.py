"""Sufficient statistics against the rows they come from."""

import numpy as np
import pytest
from scipy import sparse

from cafemed.errors import ConfigError, DataError
from causal import statistics


def zero_one(n=300, p=7, seed=0):
    rows = (np.random.default_rng(seed).random((n, p)) < 0.2).astype(np.int8)
    rows[:, 4], rows[:, 5], rows[:, 6] = 1, 0, rows[:, 1]
    return rows


def test_dense_products_are_the_scatter_of_each_environment():
    rng = np.random.default_rng(0)
    rows, environments = rng.normal(size=(90, 4)) + 1e6, np.arange(90) % 3
    found = statistics.from_dense(rows, environments, [[], [1], [0, 2]])
    for e in range(3):
        part = rows[environments == e]
        assert found.products[e] == pytest.approx(29 * np.cov(part.T), rel=1e-7)
        assert found.means[e] == pytest.approx(part.mean(axis=0))
    assert found.counts.tolist() == [30, 30, 30]
    assert found.targets == ((), (1,), (0, 2))
    everything = found.pooled(np.arange(3), "pooled")
    assert everything[0] == 90
    assert everything[1] == pytest.approx(89 * np.cov(rows.T), rel=1e-7)
    own = found.pooled(np.arange(3), "per_environment")[1]
    assert own == pytest.approx(found.products.sum(axis=0))


def test_sparse_and_dense_agree_and_mark_constant_and_equal_columns():
    rows = zero_one()
    dense, thin = statistics.from_dense(rows), statistics.from_sparse(sparse.csc_array(rows))
    for found in (dense, thin):
        assert found.unusable.tolist() == [0, 0, 0, 0, 1, 1, 0]
        assert found.duplicate_of.tolist() == [0, 1, 2, 3, 4, 5, 1]
        assert (found.cooccurrence == rows.T.astype(int) @ rows).all()
    assert dense.products == pytest.approx(thin.products)


def test_counts_add_up_over_any_split_to_the_same_bits():
    rows = sparse.csr_array(zero_one(n=1000))
    whole = statistics.from_sparse(rows)
    parts = [statistics.cooccurrences(rows[a : a + 137]) for a in range(0, 1000, 137)]
    summed = statistics.from_cooccurrence([1000], [sum(parts)])
    assert summed.products.tobytes() == whole.products.tobytes()
    assert summed.means.tobytes() == whole.means.tobytes()


def test_a_block_is_a_slice():
    rng = np.random.default_rng(0)
    rows, environments = rng.normal(size=(60, 6)), np.arange(60) % 2
    rows[:, 5] = rows[:, 1]
    whole = statistics.from_dense(rows, environments, [[], [0, 3]])
    chosen = [5, 3, 1]
    block = whole.take(chosen)
    again = statistics.from_dense(rows[:, chosen], environments, [[], [1]])
    assert block.products == pytest.approx(again.products)
    assert block.targets == ((), (1,))
    assert block.duplicate_of.tolist() == [0, 1, 0]


def test_a_column_with_a_missing_value_is_marked():
    rows = np.random.default_rng(0).normal(size=(20, 3))
    rows[4, 1] = np.inf
    assert statistics.from_dense(rows).unusable.tolist() == [0, 2, 0]


def test_a_sparse_matrix_holds_ones_only():
    with pytest.raises(DataError, match="must hold 1 only"):
        statistics.from_sparse(sparse.csr_array(2 * np.eye(3)))
    with pytest.raises(ConfigError, match=r"targets\[0\]: column -1 does not exist"):
        statistics.from_sparse(sparse.csr_array(np.eye(3)), targets=[[-1]])
