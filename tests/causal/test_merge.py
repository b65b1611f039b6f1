"""Local scores and the acyclic union against least squares and networkx."""

import networkx as nx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from causal import columns, gies, merge, scores
from causal.columns import Columns
from causal.count_scores import CountScores
from causal.local_scores import LocalScores
from causal.merge import Arrows, arrows_of

PENALTY = 2.0


def random_dag(p: int, seed: int, density: float = 0.4) -> NDArray[np.int8]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(p)
    dag = np.zeros((p, p), np.int8)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < density, 1)
    return dag


def matrix(arrows: Arrows, p: int) -> NDArray[np.int8]:
    dense = np.zeros((p, p), np.int8)
    dense[arrows.source, arrows.target] = 1
    return dense


def dependent_rows(p: int, seed: int, n: int = 300) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
    """0/1 rows, some columns made of others, and the stratum of each row."""
    rng = np.random.default_rng(seed)
    rows = rng.random((n, p)) < rng.uniform(0.1, 0.5, p)
    for j in range(1, p):
        rows[:, j] ^= rows[:, j - 1] & (rng.random(n) < 0.4)
    return rows, (rng.random(n) < 0.6).astype(np.int8)


def score_of(rows: NDArray[np.bool_], strata: NDArray[np.int8]) -> LocalScores:
    names = tuple(f"x{j}" for j in range(rows.shape[1]))
    tiers = np.zeros(rows.shape[1], np.int64)
    table = Columns(names, sparse.csr_array(rows.astype(np.int64)), tiers, strata)
    return LocalScores.of(columns.count(table), PENALTY)


def least_squares(
    rows: NDArray[np.bool_], strata: NDArray[np.int8], column: int, parents: list[int]
) -> float:
    """The score by regression with an intercept for each stratum."""
    design = np.column_stack([strata == 0, strata == 1, rows[:, parents]]).astype(float)
    y = rows[:, column].astype(float)
    residual = y - design @ np.linalg.lstsq(design, y)[0]
    n = len(rows)
    return float(-0.5 * n * (1 + np.log((residual**2).mean())) - PENALTY * (1 + len(parents)))


def test_scores_are_those_of_least_squares() -> None:
    rows, strata = dependent_rows(6, seed=1)
    score = score_of(rows, strata)
    for column, parents in ((0, []), (1, [0]), (5, [0, 2, 3]), (2, [0, 1, 3, 4, 5])):
        expected = least_squares(rows, strata, column, parents)
        assert score.local(column, np.array(parents, np.int64)) == pytest.approx(expected, abs=1e-8)
    dag = random_dag(6, 2)
    by_column = [
        least_squares(rows, strata, j, np.flatnonzero(dag[:, j]).tolist()) for j in range(6)
    ]
    assert merge.total_score(score, arrows_of(dag)) == pytest.approx(sum(by_column), abs=1e-8)


def test_changes_are_differences_of_scores() -> None:
    rows, strata = dependent_rows(7, seed=2)
    score = score_of(rows, strata)
    for parents, sources in (([], [0, 2]), ([1], []), ([0, 2, 5], [1, 4, 6])):
        whole = least_squares(rows, strata, 3, parents)
        kept, added = score.changes(3, np.array(parents, np.int64), np.array(sources, np.int64))
        without = [
            whole - least_squares(rows, strata, 3, [q for q in parents if q != parent])
            for parent in parents
        ]
        np.testing.assert_allclose(kept, without, atol=1e-8)
        np.testing.assert_allclose(score.losses(3, np.array(parents, np.int64)), without, atol=1e-8)
        more = [least_squares(rows, strata, 3, [*parents, x]) - whole for x in sources]
        np.testing.assert_allclose(added, more, atol=1e-8)


def test_the_scores_are_those_of_the_search() -> None:
    rows, strata = dependent_rows(8, seed=3)
    table = Columns(
        tuple("abcdefgh"), sparse.csr_array(rows.astype(np.int64)), np.zeros(8, np.int64), strata
    )
    statistics = columns.count(table).statistics(np.arange(8))
    dag = random_dag(8, 4)
    expected = gies.score_dag(
        statistics, dag, penalty=PENALTY / (0.5 * np.log(300)), intercept="per_environment"
    )
    found = merge.total_score(score_of(rows, strata), arrows_of(dag))
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_union_is_acyclic_and_drops_the_weakest_edge_of_each_cycle(seed: int) -> None:
    p = 7
    rows, strata = dependent_rows(p, seed)
    graphs = [arrows_of(random_dag(p, 100 * seed + k, 0.35)) for k in range(3)]
    union, dropped = merge.acyclic_union(graphs, score_of(rows, strata))
    every = np.maximum.reduce([matrix(g, p) for g in graphs])
    kept = matrix(union, p)
    assert nx.is_directed_acyclic_graph(nx.from_numpy_array(kept, create_using=nx.DiGraph))
    assert (kept <= every).all()
    assert dropped == every.sum() - kept.sum()
    strength = {}
    for i, j in zip(*np.nonzero(every), strict=True):
        pa = np.flatnonzero(every[:, j]).tolist()
        with_it = least_squares(rows, strata, int(j), pa)
        strength[i, j] = with_it - least_squares(rows, strata, int(j), [q for q in pa if q != i])
    for i, j in zip(*np.nonzero(every > kept), strict=True):
        # It closes a cycle with kept edges that are all at least as strong.
        stronger = nx.DiGraph(
            [e for e in zip(*np.nonzero(kept), strict=True) if strength[e] >= strength[i, j] - 1e-9]
        )
        stronger.add_nodes_from(range(p))
        assert nx.has_path(stronger, j, i)


def test_union_does_not_depend_on_the_order_of_graphs() -> None:
    score = score_of(*dependent_rows(8, 3))
    graphs = [arrows_of(random_dag(8, k)) for k in range(4)]
    a, _ = merge.acyclic_union(graphs, score)
    b, _ = merge.acyclic_union(graphs[::-1], score)
    np.testing.assert_array_equal(a.source, b.source)
    np.testing.assert_array_equal(a.target, b.target)


def test_union_of_nothing_is_empty() -> None:
    score = score_of(*dependent_rows(3, 1))
    union, dropped = merge.acyclic_union([], score)
    assert len(union) == dropped == 0
    assert merge.total_score(score, union) == pytest.approx(score.empty.sum())


def test_duplicate_and_constant_parents_neither_raise_nor_add() -> None:
    rng = np.random.default_rng(4)
    a = rng.random(300) < 0.4
    rows = np.column_stack([a, a, a ^ (rng.random(300) < 0.1), np.ones(300, bool)])
    score = score_of(rows, np.zeros(300, np.int8))
    one = score.local(2, np.array([0]))
    assert score.local(2, np.array([0, 1, 3])) == pytest.approx(one - 2 * PENALTY, abs=1e-6)
    _, added = score.changes(2, np.array([0]), np.array([1, 3]))
    np.testing.assert_allclose(added, [-PENALTY, -PENALTY], atol=1e-6)
    assert np.isfinite(score.local(0, np.array([1])))
    assert score.local(3, np.array([0])) == pytest.approx(score.empty[3] - PENALTY)


def test_the_union_has_no_more_parents_than_the_score_allows() -> None:
    rng = np.random.default_rng(5)
    p = scores.MAX_TABLE_PARENTS + 6
    rows = rng.random((400, p)) < 0.3
    rows[:, 0] = rows[:, 1:].sum(axis=1) > 0.3 * p
    rule = scores.Rule("bdeu", 1.0, 1.0, p)
    strata = np.zeros(400, np.int8)
    score = CountScores.of(sparse.csr_array(rows.astype(np.int64)), strata, rule)
    graphs = [merge.arrows_from([(j, 0)]) for j in range(1, p)]
    union, dropped = merge.acyclic_union(graphs, score)
    assert len(union) == score.max_parents == scores.MAX_TABLE_PARENTS
    assert dropped == p - 1 - len(union)
    alone = [score.local(0, np.array([j])) for j in range(1, p)]
    strongest = 1 + np.argsort(alone)[-len(union) :]
    assert sorted(union.source.tolist()) == sorted(strongest.tolist())
    assert np.isfinite(merge.total_score(score, union))
