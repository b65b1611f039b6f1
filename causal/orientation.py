"""Which edges of a DAG have their direction in every member of its class, without dense matrices.

`essential.dag_to_essential` answers the same on (p, p) matrices; this is for graphs over 20,000
columns of which few are joined.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from causal.merge import Arrows


def compelled(dag: Arrows, kinds: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Finds the arrows that the class of a DAG fixes: colliders, order in time, Meek's rules.

    Args:
        dag: acyclic; each arrow once.
        kinds: (p,), from `essential.node_kinds`: an edge between two kinds never turns.

    Returns:
        bool (E,), aligned with the arrows; the others are lines of the essential graph.
    """
    pairs = list(zip(dag.source.tolist(), dag.target.tolist(), strict=True))
    graph = _Partial(pairs)
    for a, b in pairs:
        if kinds[a] != kinds[b]:
            graph.fix(a, b)
    for b, parents in graph.parents_in_dag.items():
        for a, c in itertools.combinations(sorted(parents), 2):
            if c not in graph.adjacent[a]:
                graph.fix(a, b)
                graph.fix(c, b)
    open_edges = [pair for pair in pairs if pair[0] not in graph.fixed_parents[pair[1]]]
    while True:
        # Edges fixed in this pass serve the later ones of it.
        still_open = [pair for pair in open_edges if not graph.fix_if_forced(*pair)]
        if len(still_open) == len(open_edges):
            break
        open_edges = still_open
    return np.array([a in graph.fixed_parents[b] for a, b in pairs], np.bool_)


class _Partial:
    """A DAG's skeleton, of which some edges are fixed in the DAG's direction."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        nodes = {node for pair in pairs for node in pair}
        self.adjacent: dict[int, set[int]] = {node: set() for node in nodes}
        self.parents_in_dag: dict[int, set[int]] = {node: set() for node in nodes}
        self.fixed_parents: dict[int, set[int]] = {node: set() for node in nodes}
        self.fixed_children: dict[int, set[int]] = {node: set() for node in nodes}
        for a, b in pairs:
            self.adjacent[a].add(b)
            self.adjacent[b].add(a)
            self.parents_in_dag[b].add(a)

    def fix(self, a: int, b: int) -> None:
        self.fixed_parents[b].add(a)
        self.fixed_children[a].add(b)

    def fix_if_forced(self, a: int, b: int) -> bool:
        """Fixes a → b if one of Meek's rules does."""
        forced = (
            bool(self.fixed_parents[a] - self.adjacent[b] - {b})  # rule 1
            or bool(self.fixed_children[a] & self.fixed_parents[b])  # rule 2
            or self._forced_by_two(a, b)
        )
        if forced:
            self.fix(a, b)
        return forced

    def _forced_by_two(self, a: int, b: int) -> bool:
        """Rules 3 and 4: a - d, and c → b with c adjacent to a, where d → b or d → c."""
        lines = self.adjacent[a] - self.fixed_parents[a] - self.fixed_children[a] - {b}
        for c in self.fixed_parents[b] & lines:
            for d in lines - {c}:
                third = d in self.fixed_parents[b] and d not in self.adjacent[c]
                fourth = d in self.fixed_parents[c] and d not in self.adjacent[b]
                if third or fourth:
                    return True
        return False
