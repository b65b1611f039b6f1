"""Hill climbing over pairs: no single move is left that gains, by brute force; limits are kept."""

import itertools

import networkx as nx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from causal import columns, merge, sparse_climb
from causal.columns import Columns
from causal.local_scores import LocalScores
from causal.merge import Arrows, arrows_from

PENALTY = 3.0


def scores(p: int, seed: int, n: int = 3000) -> LocalScores:
    """Of columns that depend on others, through random graphs."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((n, p), np.int64)
    for j in range(p):
        parents = np.flatnonzero(rng.random(j) < 0.6)
        on = rng.random(n) < rng.uniform(0.1, 0.4)
        for parent in parents:
            on ^= (rows[:, parent] == 1) & (rng.random(n) < 0.5)
        rows[:, j] = on
    rows = rows[:, rng.permutation(p)]
    names = tuple(f"x{j}" for j in range(p))
    table = Columns(names, sparse.csr_array(rows), np.zeros(p, np.int64), np.zeros(n, np.int8))
    return LocalScores.of(columns.count(table), PENALTY)


def every_pair(p: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(p, 1)
    return first.astype(np.int64), second.astype(np.int64)


def pairs_of(arrows: Arrows) -> set[tuple[int, int]]:
    return set(zip(arrows.source.tolist(), arrows.target.tolist(), strict=True))


def neighbours(
    dag: set[tuple[int, int]], allowed: set[tuple[int, int]]
) -> list[set[tuple[int, int]]]:
    """All acyclic graphs that one addition, deletion or reversal leads to."""
    moves = [dag - {edge} for edge in dag]
    moves += [dag - {(a, b)} | {(b, a)} for a, b in dag if (b, a) in allowed]
    joined = dag | {(b, a) for a, b in dag}
    moves += [dag | {edge} for edge in allowed if edge not in joined]
    return [move for move in moves if nx.is_directed_acyclic_graph(nx.DiGraph(sorted(move)))]


@pytest.mark.parametrize("seed", range(12))
def test_it_ends_where_no_move_gains(seed: int) -> None:
    p = 7
    score = scores(p, seed)
    rng = np.random.default_rng(seed)
    tiers = np.sort(rng.integers(0, 2, p)) if seed % 2 else np.zeros(p, np.int64)
    first, second = every_pair(p)
    kept = rng.random(len(first)) < 0.8
    first, second = first[kept], second[kept]
    allowed = {
        (a, b)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
        for a, b in itertools.permutations(pair)
        if tiers[a] <= tiers[b]
    }
    begun = {(a, b) for a, b in sorted(allowed) if a < b and rng.random() < 0.5}
    found = sparse_climb.climb(score, arrows_from(sorted(begun)), first, second, tiers)
    dag = pairs_of(found)
    assert dag <= allowed
    assert nx.is_directed_acyclic_graph(nx.DiGraph(sorted(dag)))
    reached = merge.total_score(score, found)
    assert reached >= merge.total_score(score, arrows_from(sorted(begun)))
    around = [merge.total_score(score, arrows_from(sorted(m))) for m in neighbours(dag, allowed)]
    assert max(around) <= reached + 1e-6
    assert dag


def test_the_best_move_comes_first() -> None:
    score = scores(6, seed=50)
    first, second = every_pair(6)
    steps: list[float] = []
    climber = sparse_climb._Climber(score, arrows_from([]), first, second, np.zeros(6, np.int64))
    before: set[tuple[int, int]] = set()
    allowed = set(itertools.permutations(range(6), 2))
    while climber.move():
        after = {(a, b) for b, parents in climber.parents.items() for a in parents}
        reached = merge.total_score(score, arrows_from(sorted(after)))
        best = max(
            merge.total_score(score, arrows_from(sorted(m))) for m in neighbours(before, allowed)
        )
        assert reached == pytest.approx(best, abs=1e-6)
        steps.append(reached)
        before = after
    assert len(steps) > 5
    assert steps == sorted(steps)


def test_nothing_allowed_gives_nothing() -> None:
    none = np.zeros(0, np.int64)
    found = sparse_climb.climb(scores(3, 1), arrows_from([]), none, none, np.zeros(3, np.int64))
    assert len(found) == 0


class Told(LocalScores):
    """Scores of which each edge adds what a table says, whatever else there is."""

    def __init__(self, table: dict[tuple[int, int], float]) -> None:
        object.__setattr__(self, "table", table)

    def changes(
        self, column: int, parents: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        table: dict[tuple[int, int], float] = self.__dict__["table"]
        kept, added = (
            np.array([table.get((int(x), column), -1.0) for x in group])
            for group in (parents, sources)
        )
        return kept, added


def test_a_move_that_a_path_blocked_comes_back_when_the_path_is_gone() -> None:
    # 0 → 1 → 2 blocks 2 → 0, the best move, until 0 → 1, which costs, is deleted.
    score = Told({(0, 1): -5.0, (1, 2): 7.0, (2, 0): 10.0})
    first, second = np.array([0, 1, 0]), np.array([1, 2, 2])
    start = arrows_from([(0, 1), (1, 2)])
    found = sparse_climb.climb(score, start, first, second, np.zeros(3, np.int64))
    assert pairs_of(found) == {(1, 2), (2, 0)}
