import itertools
import math

import networkx as nx
import numpy as np
import pytest

from cafemed.graphs import CausalGraph
from serve.links import Link, Links


def graph(*edges: tuple[str, str, bool, float], nodes: tuple[str, ...] = ()) -> CausalGraph:
    names = sorted({*nodes, *(name for a, b, _, _ in edges for name in (a, b))})
    position = {name: i for i, name in enumerate(names)}
    return CausalGraph(
        nodes=tuple(names),
        source=np.array([position[a] for a, _, _, _ in edges], np.int32),
        target=np.array([position[b] for _, b, _, _ in edges], np.int32),
        directed=np.array([directed for _, _, directed, _ in edges], np.bool_),
        stability=np.array([stability for _, _, _, stability in edges], np.float32),
        support=np.ones(len(edges), np.int64),
        strength=np.full(len(edges), np.nan, np.float32),
    )


def random_graph(seed: int) -> CausalGraph:
    rng = np.random.default_rng(seed)
    names = [f"n{i:02d}" for i in range(14)]
    edges = []
    for a, b in itertools.combinations(names, 2):
        if rng.random() < 0.13:
            ends = (a, b) if rng.random() < 0.5 else (b, a)
            directed = bool(rng.random() < 0.6)
            # An undirected edge is listed once, the first name first.
            edges.append((*(ends if directed else (a, b)), directed, float(rng.random())))
    return graph(*edges, nodes=tuple(names))


def walkable(of: CausalGraph, only_directed: bool) -> nx.DiGraph:
    """The graph's edges, each in the directions in which it may be walked."""
    result = nx.DiGraph()
    result.add_nodes_from(of.nodes)
    for a, b, directed, stability in zip(
        of.source, of.target, of.directed, of.stability, strict=True
    ):
        ways = [(a, b)] if directed else [] if only_directed else [(a, b), (b, a)]
        for start, end in ways:
            result.add_edge(of.nodes[start], of.nodes[end], stability=stability)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_paths_are_networkxs_shortest(seed: int) -> None:
    causal = random_graph(seed)
    links, kinds = Links(causal), set()
    for start, end in itertools.permutations(causal.nodes, 2):
        expected = None
        for directed in (True, False):
            known = walkable(causal, only_directed=directed)
            if nx.has_path(known, start, end):
                # Of equally short ones the first by name, seen from the start.
                nodes = min(nx.all_shortest_paths(known, start, end))
                weakest = min(known.edges[e]["stability"] for e in itertools.pairwise(nodes))
                expected = Link(tuple(nodes), directed, float(weakest))
                break
        assert links.between(start, end) == expected
        kinds.add(None if expected is None else expected.directed)
    assert kinds == {True, False, None}


def test_a_directed_path_goes_before_a_shorter_one_without_directions() -> None:
    links = Links(graph(("a", "c", False, 1), ("a", "b", True, 0.5), ("b", "c", True, 0.75)))
    assert links.between("a", "c") == Link(("a", "b", "c"), True, 0.5)


def test_no_edge_is_walked_against_its_direction() -> None:
    links = Links(graph(("b", "a", True, 1), ("b", "c", True, 1), ("a", "d", False, 1)))
    assert links.between("a", "c") is None
    assert links.between("d", "b") is None


def test_without_bootstraps_there_is_no_stability() -> None:
    found = Links(graph(("a", "b", True, math.nan))).between("a", "b")
    assert found is not None
    assert math.isnan(found.stability)


def test_what_the_graph_lacks_is_not_linked() -> None:
    links = Links(graph(("a", "b", True, 1), nodes=("c",)))
    assert links.between("x", "b") is None
    assert links.between("a", "x") is None
    assert links.between("c", "b") is None
    assert Links(graph()).between("a", "b") is None
