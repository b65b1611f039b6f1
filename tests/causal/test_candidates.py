"""Conditions of moves against their definitions, and parents that determine each other."""

import itertools

import networkx as nx
import numba
import numpy as np
import pytest

from causal import candidates, gies, pdag, statistics
from causal.pdag import GraphRef, new_stamp

separated = candidates._separated


@numba.njit
def ask(graph, v, u, members):
    """`candidates._separated` with the clique marked, as its caller leaves it."""
    g = GraphRef(*graph)
    stamp = new_stamp(g)
    for a in members:
        g.seen[a] = stamp
    return separated(g, v, u, stamp)


def chordal(rng, p):
    """A random connected chordal graph: every new node joins part of a clique that is there."""
    graph = nx.Graph()
    graph.add_node(0)
    for node in range(1, p):
        clique = sorted(max(nx.find_cliques(graph), key=lambda c: (rng.random(), len(c))))
        size = int(rng.integers(1, min(3, len(clique)) + 1))
        graph.add_edges_from(
            (node, int(a)) for a in rng.choice(sorted(clique), size, replace=False)
        )
    return graph


def test_turned_lines_are_separated_as_the_paper_defines():
    """Hauser and Bühlmann (2012), proposition 31: walks of any length among v's neighbours."""
    rng = np.random.default_rng(0)
    answers, long_walks = set(), 0
    for _ in range(60):
        lines = chordal(rng, 11)
        graph = pdag.empty_graph(np.zeros(11, np.int32))
        pdag.settle_all(graph, nx.to_numpy_array(lines, dtype=np.uint8), False)
        for v, u in itertools.permutations(range(11), 2):
            if not lines.has_edge(v, u):
                continue
            near = set(lines[v]) - {u}
            common = near & set(lines[u])
            for size in (1, 2):
                for clique in map(set, itertools.combinations(sorted(near), size)):
                    if size == 2 and not lines.has_edge(*clique):
                        continue
                    own = clique - common
                    among = lines.subgraph(near - (clique & common))
                    reached = set().union(*(nx.node_connected_component(among, a) for a in own))
                    direct = own | {b for a in own for b in among[a]}
                    expected = bool(own) and not reached & common
                    long_walks += bool(own) and not direct & common and not expected
                    answers.add(expected)
                    found = ask(graph, v, u, np.array(sorted(clique)))
                    assert found == expected, (sorted(lines.edges), v, u, clique)
    assert answers == {True, False}
    assert long_walks > 0


@pytest.mark.parametrize("weights", [(1, 1), (2, 0), (-4, 0)])
def test_a_parent_that_others_determine_adds_its_penalty_alone(weights):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 500))
    third = weights[0] * a + weights[1] * b
    rows = np.column_stack([a, b, third, a - 2 * b + rng.normal(size=500)])
    moments = statistics.from_dense(rows)
    two, three = np.zeros((4, 4)), np.zeros((4, 4))
    two[:2, 3], three[:3, 3] = 1, 1
    paid = 0.5 * np.log(500)
    score = gies.score_dag(moments, two)
    assert gies.score_dag(moments, three) == pytest.approx(score - paid, abs=1e-6)
    found = gies.fit_statistics(moments, required=three)
    assert found.dag[:3, 3].all()
    assert np.isfinite(found.score)
