"""From visits to a graph: blocks by visit, merging in parts and without a large search."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
from distributed import Client
from numpy.typing import NDArray
from scipy import sparse

from cafemed.cohort import Cohort
from causal import blocks, columns, discovery, essential, learning, merge, sparse_climb, tasks
from causal.blocks import BlocksConfig, Pairs
from causal.columns import Columns
from causal.discovery import CausalConfig
from causal.learning import Found, LearningConfig, Screened
from causal.merge import Arrows
from causal.tasks import Task
from causal.workers import Alone

MakeCohort = Callable[..., Cohort]
GAUSSIAN = LearningConfig(score="extended_bic", gamma=0.5, min_support=3)


def groups(number: int, size: int, n: int, seed: int) -> Columns:
    """Codes in groups, each code made of two before it in its group; two tiers."""
    rng = np.random.default_rng(seed)
    p = number * size
    rows = rng.random((n, p)) < 0.06
    for j in range(p):
        place = j % size
        for back in rng.choice(place, min(place, 2), replace=False) if place else []:
            rows[:, j] |= rows[:, j - place + back] & (rng.random(n) < 0.5)
    names = tuple(f"x{j:04}" for j in range(p))
    tiers = (np.arange(p) % size >= size // 2).astype(np.int64)
    strata = (np.arange(n) % 4 > 0).astype(np.int8)
    return Columns(names, sparse.csr_array(rows.astype(np.int64)), tiers, strata)


def learned(table: Columns, config: LearningConfig) -> tuple[Found, dict[str, object], Screened]:
    screened = learning.screen(table, columns.count(table), config)
    score = screened.problem.scores()
    found, report = learning.learn(screened, score, config, Alone(screened.problem))
    return found, report, screened


def dense(arrows: Arrows, p: int) -> NDArray[np.int8]:
    matrix = np.zeros((p, p), np.int8)
    matrix[arrows.source, arrows.target] = 1
    return matrix


@pytest.mark.parametrize("score", ["extended_bic", "bdeu"])
def test_parts_that_no_pair_joins_are_searched_apart_to_the_same_graph(score: str) -> None:
    config = dataclasses.replace(GAUSSIAN, score=score)
    table = groups(6, 6, 1500, seed=1)
    screened = learning.screen(table, columns.count(table), config)
    problem, pairs = screened.problem, screened.pairs
    parts = blocks.components(pairs.first, pairs.second, len(problem.tiers))
    assert len(parts) > 3
    apart = learning.search_pairs(
        problem, problem.scores(), pairs.first, pairs.second, None, config, Alone(problem), "all"
    )
    whole = tasks.search(problem, Task(np.arange(len(problem.tiers))))
    np.testing.assert_array_equal(dense(apart.edges, len(problem.tiers)), whole.adjacency)
    together = merge.total_score(problem.scores(), whole.arrows())
    assert merge.total_score(problem.scores(), apart.dag) == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("score", ["extended_bic", "bdeu"])
@pytest.mark.parametrize("by", ["communities", "visits"])
def test_more_than_a_search_can_hold_is_merged_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch, by: str, score: str
) -> None:
    small = BlocksConfig(by="visits" if by == "visits" else "communities", max_size=4)
    config = dataclasses.replace(GAUSSIAN, score=score, blocks=small)
    table = groups(4, 8, 700, seed=2)
    by_search, report, screened = learned(table, config)
    climb, climbed = sparse_climb.climb, []

    def watched(*given: Any) -> Arrows:
        climbed.append(len(given[2]))
        return climb(*given)

    monkeypatch.setattr(sparse_climb, "climb", watched)
    tiny = dataclasses.replace(small, max_search=2)
    by_pairs, _, _ = learned(table, dataclasses.replace(config, blocks=tiny))
    assert climbed
    assert max(climbed) > 10  # pairs that hang together
    p, tiers = len(screened.active), screened.problem.tiers
    dag = dense(by_pairs.dag, p)
    assert essential.is_acyclic(dag)
    expected = essential.dag_to_essential(dag, essential.node_kinds(p, ((),), tiers))
    np.testing.assert_array_equal(dense(by_pairs.edges, p), expected)
    assert (tiers[by_pairs.dag.source] <= tiers[by_pairs.dag.target]).all()
    score_of = screened.problem.scores()
    reached = merge.total_score(score_of, by_pairs.dag)
    union = report["scores"]["union"]["score"]  # type: ignore[index]
    assert reached >= union - 1e-9
    # Another local optimum is to be expected, not one that explains much less.
    alone = float(score_of.empty.sum())
    assert reached - alone > 0.95 * (merge.total_score(score_of, by_search.dag) - alone) > 100
    ours, theirs = (
        {frozenset(pair) for pair in zip(f.dag.source.tolist(), f.dag.target.tolist(), strict=True)}
        for f in (by_pairs, by_search)
    )
    assert len(ours & theirs) > 0.85 * len(theirs) > 10


def test_blocks_by_visit_are_the_visits_codes_that_have_a_partner() -> None:
    rng = np.random.default_rng(3)
    rows = (rng.random((200, 12)) < 0.25).astype(np.int64)
    rows[150:] = rows[:50]  # equal visits count once
    joined = [(0, 1), (1, 2), (4, 9), (5, 6)]
    pairs = Pairs(np.array([a for a, _ in joined]), np.array([b for _, b in joined]), np.ones(4))
    expected = set()
    for row in rows:
        codes = {code for pair in joined for code in pair if row[pair[0]] and row[pair[1]]}
        if codes:
            expected.add(tuple(sorted(codes)))
    for at_once in (7, 1000):
        found = blocks.of_visits(sparse.csr_array(rows), pairs, at_once)
        assert [tuple(block.members.tolist()) for block in found] == sorted(expected)
        assert all(len(block.boundary) == 0 for block in found)
    none = np.zeros(0, np.int64)
    assert blocks.of_visits(sparse.csr_array(rows), Pairs(none, none, np.zeros(0))) == []


def test_components_are_those_of_networkx() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 60, (2, 35))
    first, second = first[first != second], second[first != second]
    graph = nx.Graph(zip(first.tolist(), second.tolist(), strict=True))
    expected = sorted(sorted(part) for part in nx.connected_components(graph))
    found = blocks.components(first, second, 60)
    assert [part.tolist() for part in found] == expected
    assert blocks.components(first[:0], second[:0], 60) == []


def test_discovery_by_visits_finds_what_communities_find(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=1500, seed=1)
    graphs = []
    for by in ("communities", "visits"):
        shape = BlocksConfig(by="visits" if by == "visits" else "communities")
        found = discovery.discover(people, CausalConfig(blocks=shape), in_process)
        graphs.append(found.graph)
        assert math.isclose(
            found.report["scores"]["merged"]["score"],
            found.report["scores"]["direct"]["score"],
            abs_tol=5,
        )
    skeletons = [
        {frozenset(pair) for pair in zip(g.source.tolist(), g.target.tolist(), strict=True)}
        for g in graphs
    ]
    assert skeletons[0] == skeletons[1]
    assert len(skeletons[0]) > 3


def test_a_direct_search_that_does_not_fit_is_left_out_with_a_line(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=1500, seed=1)
    config = CausalConfig(blocks=BlocksConfig(max_search=4))
    report = discovery.discover(people, config, in_process).report
    assert set(report["scores"]) == {"union", "merged"}
    assert "causal.blocks.max_search is 4" in report["direct_left_out"]
    assert "\n" not in report["direct_left_out"]
