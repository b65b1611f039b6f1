"""Merging more columns than one search can hold: hill climbing over the allowed pairs alone.

Greedy moves on one DAG: the addition, deletion or reversal of an edge that raises the score most,
until none does. It looks at pairs only, where `causal.search` keeps matrices of all columns, so its
memory grows with the number of pairs. A move over classes of DAGs would see further; the union of
the blocks' graphs, from which this starts, was found by such moves.
"""

import heapq

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from causal.local_scores import ColumnScores
from causal.merge import Arrows, arrows_from

#: A move must gain more than this (`problem.MIN_GAIN`).
_MIN_GAIN = 1.4901161193847656e-08
_ADD, _DELETE, _TURN = 0, 1, 2

#: Gain with its sign turned (heaps give the smallest), target, source, kind, and the versions of
#: target and source when it was scored.
_Move = tuple[float, int, int, int, int, int]


def climb(
    score: ColumnScores,
    start: Arrows,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    tiers: NDArray[np.int64],
) -> Arrows:
    """Improves a DAG until no move does.

    Ties go to the smaller target, then to the smaller source.

    Args:
        score: of all p columns.
        start: acyclic, within the allowed pairs.
        first, second: int64 (E,), pairs that may be joined.
        tiers: int64 (p,), no edge leads from a higher one to a lower one.

    Returns:
        A DAG, sorted by source.
    """
    climber = _Climber(score, start, first, second, tiers)
    while climber.move():
        pass
    return arrows_from(sorted((a, b) for b, into in climber.parents.items() for a in into))


class _Climber:
    def __init__(
        self,
        score: ColumnScores,
        start: Arrows,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
        tiers: NDArray[np.int64],
    ) -> None:
        p = len(tiers)
        ends = np.concatenate([first, second]), np.concatenate([second, first])
        self._partners = sparse.csr_array((np.ones(len(ends[0]), np.int8), ends), shape=(p, p))
        self._partners.sum_duplicates()
        self._partners.sort_indices()
        self._score, self._tiers = score, tiers
        nodes = np.unique(ends[0]).tolist()
        self.parents: dict[int, set[int]] = {node: set() for node in nodes}
        self._children: dict[int, set[int]] = {node: set() for node in nodes}
        for a, b in zip(start.source.tolist(), start.target.tolist(), strict=True):
            self.parents[b].add(a)
            self._children[a].add(b)
        self._gain: dict[int, dict[int, float]] = {}
        self._loss: dict[int, dict[int, float]] = {}
        self._version = dict.fromkeys(nodes, 0)
        self._heap: list[_Move] = []
        self._blocked: list[_Move] = []
        for node in nodes:
            self._rescore(node)
        for node in nodes:
            self._offer(node)

    def _rescore(self, y: int) -> None:
        """What each parent of y adds, and what each other allowed source would."""
        start, end = self._partners.indptr[y : y + 2]
        allowed = self._partners.indices[start:end].astype(np.int64)
        allowed = allowed[self._tiers[allowed] <= self._tiers[y]]
        own = np.array(sorted(self.parents[y]), np.int64)
        sources = np.setdiff1d(allowed, own, assume_unique=True)
        kept, added = self._score.changes(y, own, sources)
        self._loss[y] = dict(zip(own.tolist(), kept.tolist(), strict=True))
        gains = zip(sources.tolist(), added.tolist(), strict=True)
        self._gain[y] = {x: gain for x, gain in gains if gain > _MIN_GAIN}
        self._version[y] += 1

    def _offer(self, y: int) -> None:
        """Puts all moves of y's edges that gain into the heap."""
        for x, gain in self._gain[y].items():
            if gain > _MIN_GAIN and y not in self.parents[x]:
                self._push(gain, y, x, _ADD)
        for x, loss in self._loss[y].items():
            if -loss > _MIN_GAIN:
                self._push(-loss, y, x, _DELETE)
            self._offer_turn(x, y)
        for z in self._children[y]:
            self._offer_turn(y, z)

    def _offer_turn(self, x: int, y: int) -> None:
        """x → y into y → x."""
        gain = self._gain[x].get(y)
        if gain is not None and gain - self._loss[y][x] > _MIN_GAIN:
            self._push(gain - self._loss[y][x], y, x, _TURN)

    def _push(self, gain: float, y: int, x: int, kind: int) -> None:
        move = (-gain, y, x, kind, self._version[y], self._version[x])
        heapq.heappush(self._heap, move)

    def _holds(self, move: _Move) -> bool:
        """Whether what the move was scored on is still so."""
        _, y, x, kind, of_target, of_source = move
        if self._version[y] != of_target or (kind == _TURN and self._version[x] != of_source):
            return False
        return not (kind == _ADD and y in self.parents[x])

    def move(self) -> bool:
        """Makes the best move that closes no cycle; False if there is none."""
        while self._heap:
            move = heapq.heappop(self._heap)
            if not self._holds(move):
                continue
            _, y, x, kind, _, _ = move
            if kind != _DELETE and self._closes_cycle(x, y, kind):
                self._blocked.append(move)
                continue
            self._apply(x, y, kind)
            return True
        return False

    def _apply(self, x: int, y: int, kind: int) -> None:
        if kind != _ADD:
            self.parents[y].discard(x)
            self._children[x].discard(y)
            # A path is gone: what it blocked may be possible now.
            for blocked in self._blocked:
                heapq.heappush(self._heap, blocked)
            self._blocked = []
        if kind == _ADD:
            self.parents[y].add(x)
            self._children[x].add(y)
        elif kind == _TURN:
            self.parents[x].add(y)
            self._children[y].add(x)
        changed = [y, x] if kind == _TURN else [y]
        for node in changed:
            self._rescore(node)
        for node in changed:
            self._offer(node)

    def _closes_cycle(self, x: int, y: int, kind: int) -> bool:
        """Does y lead to x (or, to turn x → y, x to y by another way)?"""
        start, end = (y, x) if kind == _ADD else (x, y)
        # Backwards from the end: few parents each, where a common cause may have many children.
        seen = {end}
        stack = [p for p in self.parents[end] if kind == _ADD or p != start]
        while stack:
            node = stack.pop()
            if node == start:
                return True
            if node not in seen and self._tiers[node] >= self._tiers[start]:
                seen.add(node)
                stack += self.parents[node] - seen
        return False
