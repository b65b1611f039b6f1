"""Merging block graphs: their acyclic union, from which one scored search goes on.

Blocks are learned apart, so their graphs may disagree and may form cycles together. The union keeps
the strongest edges: they enter one by one, and an edge that would close a cycle is left out, which
makes it the weakest of that cycle. Nothing is decided at random.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from causal.local_scores import ColumnScores


@dataclasses.dataclass(frozen=True)
class Arrows:
    """Directed edges between columns; no order is implied.

    Attributes:
        source, target: int64 (E,).
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source)

    def parents(self, num_columns: int) -> list[NDArray[np.int64]]:
        """The sorted parents of each column."""
        order = np.lexsort((self.source, self.target))
        ends = np.searchsorted(self.target[order], np.arange(num_columns + 1))
        return [self.source[order][a:b] for a, b in itertools.pairwise(ends)]


def arrows_of(dag: NDArray[np.int8]) -> Arrows:
    """The edges of a directed graph, (p, p) with [i, j] = 1 for i → j."""
    source, target = np.nonzero(dag)
    return Arrows(source.astype(np.int64), target.astype(np.int64))


def total_score(score: ColumnScores, arrows: Arrows) -> float:
    """Score of a directed acyclic graph."""
    parents = arrows.parents(len(score.empty))
    joined = {int(j): score.local(int(j), parents[j]) for j in np.unique(arrows.target)}
    alone = np.delete(score.empty, list(joined))
    return float(alone.sum()) + sum(joined.values())


def strengths(score: ColumnScores, arrows: Arrows) -> NDArray[np.float64]:
    """What each arrow adds to the score, given the other arrows into the same column."""
    found = np.zeros(len(arrows))
    order = np.lexsort((arrows.source, arrows.target))
    targets, starts = np.unique(arrows.target[order], return_index=True)
    for j, into in zip(targets.tolist(), np.split(order, starts[1:]), strict=False):
        found[into] = score.losses(j, arrows.source[into])
    return found


def acyclic_union(graphs: Iterable[Arrows], score: ColumnScores) -> tuple[Arrows, int]:
    """Unites graphs; of each cycle the edge that adds least to the score is dropped.

    A column that would have more parents than the score allows keeps those that alone gain most.

    Args:
        graphs: arrows between columns of `score`.
        score: of all columns.

    Returns:
        The union, sorted, and the number of edges that were dropped.
    """
    pairs = sorted(
        {pair for g in graphs for pair in zip(g.source.tolist(), g.target.tolist(), strict=True)}
    )
    every = _bounded(arrows_from(pairs), score)
    strength = strengths(score, every)
    order = np.lexsort((every.target, every.source, -strength))
    children: dict[int, set[int]] = {}
    kept = []
    for i in order:
        a, b = int(every.source[i]), int(every.target[i])
        if not _reaches(children, b, a):
            children.setdefault(a, set()).add(b)
            kept.append((a, b))
    return arrows_from(sorted(kept)), len(pairs) - len(kept)


def _bounded(arrows: Arrows, score: ColumnScores) -> Arrows:
    """Leaves out the weakest parents of columns with more than `score.max_parents`."""
    kept = np.ones(len(arrows), np.bool_)
    none = np.zeros(0, np.int64)
    targets, numbers = np.unique(arrows.target, return_counts=True)
    for j in targets[numbers > score.max_parents].tolist():
        into = np.flatnonzero(arrows.target == j)
        parents = arrows.source[into]
        alone = score.changes(j, none, parents)[1]
        kept[into[np.lexsort((parents, -alone))[score.max_parents :]]] = False
    return Arrows(arrows.source[kept], arrows.target[kept])


def _reaches(children: dict[int, set[int]], start: int, end: int) -> bool:
    """Whether a directed path leads from start to end."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node == end:
            return True
        new = children.get(node, set()) - seen
        seen |= new
        stack.extend(new)
    return False


def arrows_from(pairs: Sequence[tuple[int, int]]) -> Arrows:
    """Arrows of a list of (source, target)."""
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return Arrows(both[:, 0].copy(), both[:, 1].copy())
