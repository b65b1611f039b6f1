"""Confounded pairs against networkx's paths, and the definition on a graph drawn by hand."""

import networkx as nx
import numpy as np
import pytest

from cafemed.graphs import CausalGraph
from cafemed.synthetic.confounding import confounded


def graph_of(edges: list[tuple[str, str]]) -> CausalGraph:
    nodes = tuple(sorted({name for edge in edges for name in edge}))
    return CausalGraph(
        nodes=nodes,
        source=np.array([nodes.index(a) for a, _ in edges], np.int32),
        target=np.array([nodes.index(b) for _, b in edges], np.int32),
        directed=np.ones(len(edges), np.bool_),
        stability=np.full(len(edges), np.nan, np.float32),
        support=np.ones(len(edges), np.int64),
        strength=np.full(len(edges), np.nan, np.float32),
    )


def test_a_graph_drawn_by_hand() -> None:
    # a → b → c, a → m, c → n, and m strikes n.
    graph = graph_of([("a", "b"), ("b", "c"), ("a", "m"), ("c", "n"), ("m", "n")])
    codes, medications = ("a", "b", "c", "unknown"), ("m", "n", "unknown too")
    found = confounded(graph, codes, medications)
    # a is exogenous; b and m have a in common; a reaches n by way of c only, or through m.
    assert found[:, :2].tolist() == [[False, False], [True, False], [True, False], [False, False]]
    with_strikes = confounded(graph, codes, medications, through_medications=True)
    assert with_strikes[:, 1].tolist() == [False, True, True, False]
    assert not found[:, 2].any()


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs_against_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, medications = tuple(f"c{i}" for i in range(9)), tuple(f"m{i}" for i in range(4))
    names = [*codes, *medications]
    upper = np.triu(rng.random((13, 13)) < 0.2, 1)
    edges = [(names[a], names[b]) for a, b in zip(*np.nonzero(upper), strict=True)]
    whole = nx.DiGraph(edges)
    whole.add_nodes_from(names)
    found = confounded(graph_of(edges), codes, medications, through_medications=True)
    for i, code in enumerate(codes):
        without = whole.copy()
        without.remove_node(code)
        for j, medication in enumerate(medications):
            common = nx.ancestors(whole, code) & nx.ancestors(without, medication)
            assert found[i, j] == bool(common)
