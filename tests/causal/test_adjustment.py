"""Adjustment sets against the parents in every member of the class, members listed one by one."""

import itertools

import numpy as np
import pytest

from cafemed.graphs import CausalGraph
from causal import adjustment, essential

NAMES = tuple(f"diagnosis/{i:02}" for i in range(12))


def graph_of(adjacency: np.ndarray, names: tuple[str, ...] = NAMES) -> CausalGraph:
    """[i, j] only: i → j; both: undirected."""
    edge = np.asarray(adjacency, bool)
    source, target = np.nonzero(edge & (~edge.T | np.triu(edge)))
    return CausalGraph(
        nodes=names[: len(edge)],
        source=source.astype(np.int32),
        target=target.astype(np.int32),
        directed=~edge.T[source, target],
        stability=np.full(len(source), np.nan, np.float32),
        support=np.ones(len(source), np.int64),
        strength=np.full(len(source), np.nan, np.float32),
    )


def colliders(dag: np.ndarray) -> set[tuple[int, int, int]]:
    skeleton = dag | dag.T
    return {
        (a, c, b)
        for c in range(len(dag))
        for a, b in itertools.combinations(np.flatnonzero(dag[:, c]), 2)
        if not skeleton[a, b]
    }


def acyclic(dag: np.ndarray) -> bool:
    left = dag.copy()
    while len(left):
        sources = ~left.any(axis=0)
        if not sources.any():
            return False
        left = left[~sources][:, ~sources]
    return True


def members(dag: np.ndarray) -> list[np.ndarray]:
    """Every DAG with the same skeleton and colliders, by trying all directions."""
    a, b = np.nonzero(np.triu(dag | dag.T))
    found = []
    for turned in itertools.product([False, True], repeat=len(a)):
        other = np.zeros_like(dag)
        flip = np.array(turned, bool)
        other[np.where(flip, b, a), np.where(flip, a, b)] = True
        if acyclic(other) and colliders(other) == colliders(dag):
            found.append(other)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_the_sets_of_a_class_are_the_parents_in_its_members(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(6)
    dag = np.zeros((6, 6), bool)
    dag[np.ix_(order, order)] = np.triu(rng.random((6, 6)) < rng.uniform(0.2, 0.7), 1)
    pattern = essential.dag_to_essential(dag, essential.node_kinds(6, ((),)))
    found = adjustment.sets(graph_of(pattern), NAMES[:6], NAMES[:6], "class")
    every = members(dag)
    for node in range(6):
        expected = {tuple(np.flatnonzero(member[:, node]).tolist()) for member in every}
        assert {tuple(s.tolist()) for s in found[node]} == expected
        assert len(found[node]) == len(expected)


@pytest.mark.parametrize("seed", range(30))
def test_the_same_where_tiers_orient_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tier = np.sort(rng.integers(0, 3, 6))
    dag = np.triu(rng.random((6, 6)) < rng.uniform(0.3, 0.7), 1)
    allowed = tier[:, None] <= tier[None, :]
    every = [member for member in members(dag) if not (member & ~allowed).any()]
    found = adjustment.sets(graph_of(np.any(every, axis=0)), NAMES[:6], NAMES[:6], "class")
    for node in range(6):
        expected = {tuple(np.flatnonzero(member[:, node]).tolist()) for member in every}
        assert {tuple(s.tolist()) for s in found[node]} == expected


def test_parents_are_directed_ones_and_columns_only() -> None:
    names = ("diagnosis/a", "diagnosis/b", "diagnosis/c", "medication/m", "previous_medication/m")
    edges = np.zeros((5, 5), bool)
    edges[0, 1] = edges[4, 1] = edges[3, 1] = True  # a, previous m and (it never should) m → b
    edges[1, 2] = edges[2, 1] = True
    graph = graph_of(edges, names)
    columns = ("diagnosis/c", "diagnosis/b", "diagnosis/a", "diagnosis/x", "previous_medication/m")
    codes = ("diagnosis/b", "diagnosis/c", "diagnosis/x")
    found = adjustment.sets(graph, codes, columns, "parents")
    assert [[s.tolist() for s in sets] for sets in found] == [[[2, 4]], [[]], [[]]]


def test_a_hub_has_a_bounded_number_of_sets_the_smallest_first() -> None:
    names = tuple(f"diagnosis/{i:03}" for i in range(101))
    star = np.zeros((101, 101), bool)
    star[0, 1:] = star[1:, 0] = True
    (found,) = adjustment.sets(graph_of(star, names), names[:1], names, "class")
    assert [s.tolist() for s in found] == [[], *([i] for i in range(1, adjustment.MOST_SETS))]
