"""Equivalence classes of DAGs: essential graphs, their members, and the checks of both.

Adjacency: [i, j] = 1 and [j, i] = 0 is i → j; both 1 is the line i - j.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed.errors import ConfigError


def node_kinds(
    p: int, targets: Sequence[Sequence[int]] = ((),), tiers: NDArray[np.int64] | None = None
) -> NDArray[np.int32]:
    """Numbers nodes so that two have the same number if no target and no tier separates them.

    An edge between two numbers is an arrow in every essential graph: an intervention on one end
    only, or the order of tiers, fixes its direction.

    Args:
        targets: intervention targets, lists of node indices.
        tiers: int (p,), or None.
    """
    features = np.zeros((p, len(targets) + 1), np.int64)
    for e, nodes in enumerate(targets):
        features[list(nodes), e] = 1
    if tiers is not None:
        features[:, -1] = tiers
    if p == 0:
        return np.zeros(0, np.int32)
    return np.unique(features, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int32)


def is_acyclic(directed: NDArray[Any]) -> bool:
    """Says whether a directed graph, (p, p), has no cycle."""
    left = directed != 0
    remaining = np.ones(len(left), np.bool_)
    while remaining.any():
        free = remaining & ~left[remaining].any(axis=0)
        if not free.any():
            return False
        remaining &= ~free
    return True


def find_cycle(directed: NDArray[Any]) -> list[int]:
    """The nodes of a cycle of a directed graph that has one, the first again at the end."""
    left = np.asarray(directed) != 0
    on_cycles = np.ones(len(left), np.bool_)
    while True:
        inner = left & on_cycles & on_cycles[:, None]
        kept = inner.any(axis=0) & inner.any(axis=1)
        if (kept == on_cycles).all():
            break
        on_cycles = kept
    # Every node that is left has a child that is left.
    walk = [int(np.flatnonzero(on_cycles)[0])]
    while walk.count(walk[-1]) == 1:
        walk.append(int(np.flatnonzero(inner[walk[-1]])[0]))
    return walk[walk.index(walk[-1]) :]


def dag_to_essential(dag: NDArray[Any], kinds: NDArray[np.int32] | None = None) -> NDArray[np.int8]:
    """The essential graph of a DAG's (interventional) equivalence class.

    Args:
        dag: (p, p), acyclic.
        kinds: int32 (p,) from `node_kinds`; None without interventions.

    Returns:
        int8 (p, p).

    Raises:
        ConfigError: if the graph has a cycle.
    """
    from causal import pdag

    if not is_acyclic(dag):
        raise ConfigError("graph: expected a DAG, found a cycle")
    graph = pdag.empty_graph(np.zeros(len(dag), np.int32) if kinds is None else kinds)
    pdag.settle_all(graph, (np.asarray(dag) != 0).astype(np.uint8), False)
    return graph.edge.astype(np.int8)


def extend_to_dag(graph: NDArray[Any]) -> NDArray[np.int8] | None:
    """A DAG with the graph's edges, arrows and colliders (Dor and Tarsi 1992), or None.

    Takes nodes off one at a time: one without outgoing arrows whose lines lead to nodes connected
    to all its neighbours; its lines then point at it.

    Args:
        graph: (p, p), arrows and lines.

    Returns:
        int8 (p, p).
    """
    left = np.asarray(graph) != 0
    dag = left & ~left.T
    if not (left & left.T).any():
        return dag.astype(np.int8) if is_acyclic(dag) else None
    touching = left | left.T
    remaining = list(range(len(left)))
    while remaining:
        for x in reversed(remaining):
            if _is_sink(left, touching, x):
                dag[left[x] & left[:, x], x] = True
                for matrix in (left, touching):
                    matrix[x] = False
                    matrix[:, x] = False
                remaining.remove(x)
                break
        else:
            return None
    result: NDArray[np.int8] = dag.astype(np.int8)
    return result


def _is_sink(left: NDArray[np.bool_], touching: NDArray[np.bool_], x: int) -> bool:
    lines = left[x] & left[:, x]
    if (left[x] & ~lines).any():
        return False
    around = touching[x]
    for y in np.flatnonzero(lines):
        others = around.copy()
        others[y] = False
        if (others & ~touching[y]).any():
            return False
    return True


def is_essential(graph: NDArray[Any], kinds: NDArray[np.int32] | None = None) -> bool:
    """Says whether a graph is the essential graph of some DAG's class."""
    dag = extend_to_dag(graph)
    if dag is None or not is_acyclic(dag):
        return False
    same = dag_to_essential(dag, kinds) == (np.asarray(graph) != 0)
    return bool(same.all())
