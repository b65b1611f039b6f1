"""Which columns to adjust for: the back-door sets that a causal graph gives for each code."""

import itertools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cafemed.graphs import CausalGraph

#: Sets of one code that are looked at, small ones first: 63 undirected neighbours that are not
#: adjacent to each other, or a clique of six.
MOST_SETS = 64


def sets(
    graph: CausalGraph,
    codes: tuple[str, ...],
    names: tuple[str, ...],
    adjust_for: Literal["parents", "class"],
) -> list[list[NDArray[np.int64]]]:
    """Adjustment sets of each code.

    "parents": one set, the code's directed parents (Pearl, Causality, 2009, section 3.3.1). An
    undirected neighbour is then no parent.

    "class": the code's parents in every member of the Markov class, as IDA has it (Maathuis,
    Kalisch and Bühlmann, Annals of Statistics 37, 2009). For that no member is listed: a set of
    undirected neighbours can be turned into parents if and only if that makes no new collider at
    the code (their Lemma 3.1), that is, if they and the parents are adjacent to each other. That
    holds too where tiers orient edges, since nodes that undirected edges connect still have the
    same parents (Bang and Didelez, UAI 2023). Each set counts once, however many members have it.

    Args:
        graph: directed and undirected edges; nodes that are not in `names` are left out.
        codes: nodes whose effects are asked for.
        names: of the columns.

    Returns:
        For each code its sets, sorted int64 columns; at most MOST_SETS, the smallest first.
    """
    parents, neighbours, adjacent = _around(graph, names)
    position = {name: i for i, name in enumerate(names)}
    found = []
    for code in codes:
        column = position[code]
        fixed = sorted(parents.get(column, ()))
        chosen: list[tuple[int, ...]] = [()]
        if adjust_for == "class":
            chosen = _locally_valid(sorted(neighbours.get(column, ())), fixed, adjacent)
        found.append([np.array(sorted((*fixed, *more)), np.int64) for more in chosen])
    return found


def _around(
    graph: CausalGraph, names: tuple[str, ...]
) -> tuple[dict[int, set[int]], dict[int, set[int]], set[tuple[int, int]]]:
    """Parents and undirected neighbours of each column, and adjacent pairs, both ways round."""
    position = {name: i for i, name in enumerate(names)}
    column = [position.get(node, -1) for node in graph.nodes]
    parents: dict[int, set[int]] = {}
    neighbours: dict[int, set[int]] = {}
    adjacent: set[tuple[int, int]] = set()
    ends = zip(graph.source.tolist(), graph.target.tolist(), graph.directed.tolist(), strict=True)
    for source, target, directed in ends:
        a, b = column[source], column[target]
        if a < 0 or b < 0:
            continue
        adjacent |= {(a, b), (b, a)}
        if directed:
            parents.setdefault(b, set()).add(a)
        else:
            neighbours.setdefault(a, set()).add(b)
            neighbours.setdefault(b, set()).add(a)
    return parents, neighbours, adjacent


def _locally_valid(
    neighbours: list[int], parents: list[int], adjacent: set[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """Cliques of undirected neighbours that are adjacent to all parents, the empty one first."""
    able = [s for s in neighbours if all((s, p) in adjacent for p in parents)]
    cliques: list[tuple[int, ...]] = [()]
    last = cliques
    while last and len(cliques) < MOST_SETS:
        last = [
            (*clique, more)
            for clique, more in itertools.product(last, able)
            if all(member < more and (member, more) in adjacent for member in clique)
        ]
        cliques = cliques + last
    return cliques[:MOST_SETS]
