"""Compelled edges against every DAG with the same skeleton and colliders."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from causal import essential, orientation
from causal.merge import arrows_of


def colliders(dag: NDArray[np.int8]) -> set[tuple[int, int, int]]:
    p = len(dag)
    return {
        (a, b, c)
        for b in range(p)
        for a, c in itertools.combinations(range(p), 2)
        if dag[a, b] and dag[c, b] and not dag[a, c] and not dag[c, a]
    }


def members(dag: NDArray[np.int8], kinds: NDArray[np.int64]) -> list[NDArray[np.int8]]:
    """The class by definition: same skeleton, colliders, and edges between kinds."""
    edges = list(zip(*np.nonzero(dag), strict=True))
    found = []
    for turned in itertools.product((False, True), repeat=len(edges)):
        other = np.zeros_like(dag)
        for (a, b), turn in zip(edges, turned, strict=True):
            other[(b, a) if turn else (a, b)] = 1
        crossing = kinds[:, None] != kinds[None, :]
        if (
            np.array_equal(other[crossing], dag[crossing])
            and essential.is_acyclic(other)
            and colliders(other) == colliders(dag)
        ):
            found.append(other)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_arrows_are_what_all_members_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = 6
    kinds = np.sort(rng.integers(0, 1 + seed % 3, p)) if seed % 2 else np.zeros(p, np.int64)
    order = np.lexsort((rng.random(p), kinds))  # edges between kinds lead to the later one
    dag = np.zeros((p, p), np.int8)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < 0.5, 1)
    arrows = arrows_of(dag)
    if len(arrows) > 11:
        arrows = type(arrows)(arrows.source[:11], arrows.target[:11])
        dag = np.zeros((p, p), np.int8)
        dag[arrows.source, arrows.target] = 1
    shared = np.minimum.reduce(members(dag, kinds))
    fixed = orientation.compelled(arrows, kinds)
    assert fixed.tolist() == (shared[arrows.source, arrows.target] == 1).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_larger_graphs_agree_with_the_kernels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = 80
    kinds = np.sort(rng.integers(0, 3, p)).astype(np.int32)
    dag = np.triu(rng.random((p, p)) < 0.06, 1).astype(np.int8)
    graph = essential.dag_to_essential(dag, kinds)
    arrows = arrows_of(dag)
    fixed = orientation.compelled(arrows, kinds)
    assert fixed.tolist() == (graph[arrows.target, arrows.source] == 0).tolist()
    assert 0 < fixed.sum() < len(fixed)
