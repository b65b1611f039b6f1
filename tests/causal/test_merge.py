"""The acyclic union against networkx, scores against least squares."""

import networkx as nx
import numpy as np
import pytest

from causal import merge
from causal.merge import Arrows, arrows_of
from causal.scores import GaussianScore, gaussian_score
from causal.statistics import from_dense


def random_dag(p: int, seed: int, density: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    order = rng.permutation(p)
    dag = np.zeros((p, p), np.int8)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < density, 1)
    return dag


def matrix(arrows: Arrows, p: int) -> np.ndarray:
    dense = np.zeros((p, p), np.int8)
    dense[arrows.source, arrows.target] = 1
    return dense


def score_of(p: int, seed: int, n: int = 200) -> tuple[GaussianScore, np.ndarray]:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(n, p)) @ rng.normal(size=(p, p))
    return gaussian_score(from_dense(data), 2.0, "pooled"), data


def test_scores_are_those_of_least_squares() -> None:
    score, data = score_of(6, seed=1)
    n = len(data)
    for column, parents in ((0, []), (1, [0]), (5, [0, 2, 3]), (2, [0, 1, 3, 4, 5])):
        design = np.column_stack([np.ones(n), data[:, parents]])
        residual = data[:, column] - design @ np.linalg.lstsq(design, data[:, column])[0]
        expected = -0.5 * n * (1 + np.log((residual**2).mean())) - 2.0 * (1 + len(parents))
        assert merge.local_score(score, column, parents) == pytest.approx(expected, abs=1e-8)
    dag = random_dag(6, 2)
    by_column = [merge.local_score(score, j, np.flatnonzero(dag[:, j])) for j in range(6)]
    assert merge.total_score(score, arrows_of(dag)) == pytest.approx(sum(by_column), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_union_is_acyclic_and_drops_the_weakest_edge_of_each_cycle(seed: int) -> None:
    p = 7
    score, _ = score_of(p, seed)
    graphs = [arrows_of(random_dag(p, 100 * seed + k, 0.35)) for k in range(3)]
    union, dropped = merge.acyclic_union(graphs, score)
    every = np.maximum.reduce([matrix(g, p) for g in graphs])
    kept = matrix(union, p)
    assert nx.is_directed_acyclic_graph(nx.from_numpy_array(kept, create_using=nx.DiGraph))
    assert (kept <= every).all()
    assert dropped == every.sum() - kept.sum()
    strength = {}
    for i, j in zip(*np.nonzero(every), strict=True):
        pa = np.flatnonzero(every[:, j])
        with_it, without = (merge.local_score(score, j, s) for s in (pa, pa[pa != i]))
        strength[i, j] = with_it - without
    for i, j in zip(*np.nonzero(every > kept), strict=True):
        # It closes a cycle with kept edges that are all at least as strong.
        stronger = nx.DiGraph(
            [e for e in zip(*np.nonzero(kept), strict=True) if strength[e] >= strength[i, j]]
        )
        stronger.add_nodes_from(range(p))
        assert nx.has_path(stronger, j, i)


def test_union_does_not_depend_on_the_order_of_graphs() -> None:
    score, _ = score_of(8, 3)
    graphs = [arrows_of(random_dag(8, k)) for k in range(4)]
    a, _ = merge.acyclic_union(graphs, score)
    b, _ = merge.acyclic_union(graphs[::-1], score)
    np.testing.assert_array_equal(a.source, b.source)
    np.testing.assert_array_equal(a.target, b.target)


def test_union_of_nothing_is_empty() -> None:
    score, _ = score_of(3, 1)
    union, dropped = merge.acyclic_union([], score)
    assert len(union) == dropped == 0
    assert merge.total_score(score, union) == pytest.approx(score.empty.sum())


def test_duplicate_parents_neither_raise_nor_add() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(size=300)
    data = np.column_stack([a, a, a + rng.normal(size=300)])
    score = gaussian_score(from_dense(data), 2.0, "pooled")
    one = merge.local_score(score, 2, [0])
    assert merge.local_score(score, 2, [0, 1]) == pytest.approx(one - 2.0, abs=1e-6)
    assert np.isfinite(merge.local_score(score, 0, [1]))
