"""What the causal graph says links a code to a medication: a shortest path along its edges."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from cafemed.graphs import CausalGraph


@dataclasses.dataclass(frozen=True)
class Link:
    """A path in a causal graph.

    Attributes:
        nodes: names, from the code to the medication.
        directed: every edge has its direction in all graphs that explain the data equally well;
            False: at least one has it in some only.
        stability: the least of its edges' stability; NaN where no bootstraps were run.
    """

    nodes: tuple[str, ...]
    directed: bool
    stability: float


@dataclasses.dataclass(frozen=True)
class _Arrows:
    """Edges as they may be walked, ordered by target: int64 (arrows,) each."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    edge: NDArray[np.int64]


class Links:
    """Shortest paths of one graph; those to a medication are searched once, all together."""

    def __init__(self, graph: CausalGraph) -> None:
        self._graph = graph
        self._position = {name: i for i, name in enumerate(graph.nodes)}
        directed = np.flatnonzero(graph.directed)
        undirected = np.flatnonzero(~graph.directed)
        source, target = graph.source.astype(np.int64), graph.target.astype(np.int64)
        self._arrows = (
            _arrows(source[directed], target[directed], directed),
            _arrows(
                np.concatenate([source, target[undirected]]),
                np.concatenate([target, source[undirected]]),
                np.concatenate([np.arange(graph.num_edges), undirected]),
            ),
        )
        self._onward: dict[int, tuple[NDArray[np.int64], ...]] = {}

    def between(self, start: str, end: str) -> Link | None:
        """The shortest path along directed edges; if there is none, along edges of any kind but
        never against a direction; None if there is none either, or the graph lacks an end.

        Of several equally short ones, the one whose next node comes first by name.
        """
        a, b = self._position.get(start), self._position.get(end)
        if a is None or b is None:
            return None
        if b not in self._onward:
            self._onward[b] = tuple(
                _onward(arrows, b, len(self._graph.nodes)) for arrows in self._arrows
            )
        for directed, arrows, onward in zip(
            (True, False), self._arrows, self._onward[b], strict=True
        ):
            if onward[a] >= 0:
                return self._walk(a, b, arrows, onward, directed)
        return None

    def _walk(
        self, a: int, b: int, arrows: _Arrows, onward: NDArray[np.int64], directed: bool
    ) -> Link:
        nodes, edges = [a], []
        while nodes[-1] != b:
            arrow = onward[nodes[-1]]
            nodes.append(int(arrows.target[arrow]))
            edges.append(int(arrows.edge[arrow]))
        return Link(
            nodes=tuple(self._graph.nodes[i] for i in nodes),
            directed=directed,
            stability=float(self._graph.stability[edges].min()),
        )


def _arrows(
    source: NDArray[np.int64], target: NDArray[np.int64], edge: NDArray[np.int64]
) -> _Arrows:
    order = np.argsort(target, kind="stable")
    return _Arrows(source[order], target[order], edge[order])


def _onward(arrows: _Arrows, end: int, size: int) -> NDArray[np.int64]:
    """For each node the arrow that starts a shortest path to `end`, -1 if none; int64 (size,)."""
    onward = np.full(size, -1, np.int64)
    reached = np.zeros(size, np.bool_)
    frontier = np.zeros(size, np.bool_)
    reached[end] = frontier[end] = True
    while frontier.any():
        found = np.flatnonzero(frontier[arrows.target] & ~reached[arrows.source])
        # Arrows are ordered by target: the first of a node leads to the first name.
        nodes, first = np.unique(arrows.source[found], return_index=True)
        onward[nodes] = found[first]
        frontier[:] = False
        frontier[nodes] = reached[nodes] = True
    return onward
