"""The candidate moves of each target, best first, and the blocked ones that wait.

A candidate that reached the top but is blocked by a path is set aside with that path's edges; it
comes back when one of them is lost. So each step looks at few candidates, and the best valid one
is always found.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, kernel, reference
from causal.pdag import Graph
from causal.problem import Floats

#: Positions in `Pool.size`.
USED, LIVE, PATHS, NUMBER, SINCE = 0, 1, 2, 3, 4
#: Factors of the hash of a pair of nodes.
_FIRST, _SECOND = 40503, 9973


class Pool(NamedTuple):
    """Candidates (source, clique, gain) of p targets, in one array.

    Attributes:
        gain: float64 (capacity,); negative if blocked by a path, 0 if it can no longer be valid.
        source, clique: int32 (capacity,).
        start, length: int64 (p,), where a target's candidates are.
        best: float64 (p,), the largest gain of a target, 0 if it has none.
        best_at: int64 (p,), its position.
        stale: uint8 (p,), 1 if a target has to be scored again.
        blocked: int64 (capacity,), number of the path that blocked a candidate last; 0 for none.
        path: int64 (entries, 6), (from, to, target, position, number, next entry).
        head: int32 (a power of two,), the first entry of each hash value.
        size: int64 (5,), candidates written, candidates alive, path entries, last path's number,
            and what that was when a move began to be looked for.
    """

    gain: NDArray[Any]
    source: NDArray[Any]
    clique: NDArray[Any]
    start: NDArray[Any]
    length: NDArray[Any]
    best: NDArray[Any]
    best_at: NDArray[Any]
    stale: NDArray[Any]
    blocked: NDArray[Any]
    path: NDArray[Any]
    head: NDArray[Any]
    size: NDArray[Any]


class _PoolType(Reference):
    pass


PoolRef = reference(Pool, _PoolType)


def make_pool(p: int, capacity: int) -> Pool:
    """An empty pool in which every target is stale."""
    return Pool(
        gain=np.empty(capacity),
        source=np.empty(capacity, np.int32),
        clique=np.empty(capacity, np.int32),
        start=np.zeros(p, np.int64),
        length=np.zeros(p, np.int64),
        best=np.zeros(p),
        best_at=np.zeros(p, np.int64),
        stale=np.ones(p, np.uint8),
        blocked=np.empty(capacity, np.int64),
        path=np.empty((min(1 << 18, 1024 + 512 * p), 6), np.int64),
        head=np.full(1 << min(14, 6 + p.bit_length()), -1, np.int32),
        size=np.zeros(5, np.int64),
    )


def grown(pool: Pool) -> Pool:
    """The same pool with at least twice the room for what is alive, and without gaps.

    The table of paths is doubled if it is half full.
    """
    capacity = max(2 * int(pool.size[LIVE]), len(pool.gain)) + 4 * len(pool.length) + 1024
    gain, source = np.empty(capacity), np.empty(capacity, np.int32)
    clique, start = np.empty(capacity, np.int32), np.zeros_like(pool.start)
    blocked = np.empty(capacity, np.int64)
    best_at, used = pool.best_at.copy(), 0
    for y, (a, n) in enumerate(zip(pool.start.tolist(), pool.length.tolist(), strict=True)):
        gain[used : used + n] = pool.gain[a : a + n]
        source[used : used + n] = pool.source[a : a + n]
        clique[used : used + n] = pool.clique[a : a + n]
        blocked[used : used + n] = pool.blocked[a : a + n]
        best_at[y] += used - a
        start[y] = used
        used += n
    size = pool.size.copy()
    size[USED] = used
    path, head = pool.path, pool.head
    if 2 * size[PATHS] > len(path):
        path, head = _more_paths(pool)
    return Pool(
        gain=gain,
        source=source,
        clique=clique,
        start=start,
        length=pool.length,
        best=pool.best,
        best_at=best_at,
        stale=pool.stale,
        blocked=blocked,
        path=path,
        head=head,
        size=size,
    )


def _more_paths(pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The table of paths and its heads, doubled, with every entry in its new list."""
    used, slots = int(pool.size[PATHS]), 2 * len(pool.head)
    path = np.empty((2 * len(pool.path), 6), np.int64)
    path[:used] = pool.path[:used]
    slot = (path[:used, 0] * _FIRST + path[:used, 1] * _SECOND) & (slots - 1)
    order = np.argsort(slot, kind="stable")
    begins = np.ones(used, np.bool_)
    begins[1:] = slot[order][1:] != slot[order][:-1]
    path[order, 5] = np.where(begins, -1, np.roll(order, 1))
    head = np.full(slots, -1, np.int32)
    head[slot] = np.arange(used)  # of equal slots the last entry stays
    return path, head


@kernel
def best_target(best: Floats) -> int:
    """The first target with the largest gain, -1 if none gains."""
    largest, target = 0.0, -1
    for y in range(len(best)):
        if best[y] > largest:
            largest, target = best[y], y
    return target


@kernel
def _find_best(pool: Pool, y: int) -> None:
    """Largest gain; ties go to the smaller source, then to the candidate found first."""
    gain, source = pool.gain, pool.source
    best, at = 0.0, -1
    for i in range(pool.start[y], pool.start[y] + pool.length[y]):
        if gain[i] > best or (gain[i] == best and at >= 0 and source[i] < source[at]):
            best, at = gain[i], i
    pool.best[y] = best
    pool.best_at[y] = at


@kernel
def drop(pool: Pool, y: int) -> None:
    """Takes the best candidate out until its target is scored again."""
    pool.gain[pool.best_at[y]] = 0.0
    _find_best(pool, y)


@kernel
def _slot(a: int, b: int, slots: int) -> int:
    return (a * _FIRST + b * _SECOND) & (slots - 1)


@kernel
def set_aside(pool: Pool, g: Graph, y: int, end: int) -> bool:
    """Sets the best candidate aside, blocked by the path just found from y to `end`.

    If the table of paths is full, those that were set aside before this move was looked for come
    back: to look at them again costs less than a larger table. Returns False, with the candidate
    where it was, if the table is too small for this move alone.
    """
    at, length, b = pool.best_at[y], 0, end
    while b != y:
        b = g.previous[b]
        length += 1
    if pool.size[PATHS] + length > len(pool.path):
        _compact_paths(pool)
        # Nearly full again it would soon have to be compacted anew.
        if 2 * (pool.size[PATHS] + length) > len(pool.path):
            _bring_back(pool)
            _compact_paths(pool)
        if 4 * (pool.size[PATHS] + length) > 3 * len(pool.path):
            return False
    pool.gain[at] = -pool.gain[at]
    _find_best(pool, y)
    pool.size[NUMBER] += 1
    pool.blocked[at] = pool.size[NUMBER]
    b = end
    while b != y:
        a = g.previous[b]
        _add_path(pool, pool.size[PATHS], a, b, y, at - pool.start[y], pool.size[NUMBER])
        pool.size[PATHS] += 1
        b = a
    return True


@kernel
def _add_path(pool: Pool, n: int, a: int, b: int, y: int, place: int, number: int) -> None:
    path, head = pool.path, pool.head
    slot = _slot(a, b, len(head))
    path[n, 0], path[n, 1], path[n, 2] = a, b, y
    path[n, 3], path[n, 4], path[n, 5] = place, number, head[slot]
    head[slot] = n


@kernel
def _blocks(pool: Pool, n: int) -> bool:
    """Does a path entry still set its candidate aside?"""
    y, place = pool.path[n, 2], pool.path[n, 3]
    if pool.stale[y] or place >= pool.length[y]:
        return False
    at = pool.start[y] + place
    return bool(pool.blocked[at] == pool.path[n, 4] and pool.gain[at] < 0.0)


@kernel
def _bring_back(pool: Pool) -> None:
    """Has candidates looked at again that were set aside before this move was looked for."""
    for y in range(len(pool.best)):
        found = False
        for at in range(pool.start[y], pool.start[y] + pool.length[y]):
            if pool.gain[at] < 0.0 and pool.blocked[at] <= pool.size[SINCE]:
                pool.gain[at] = -pool.gain[at]
                found = True
        if found and pool.stale[y] == 0:
            _find_best(pool, y)


@kernel
def _compact_paths(pool: Pool) -> None:
    """Drops the entries that set nothing aside any more."""
    path, kept = pool.path, 0
    for i in range(len(pool.head)):
        pool.head[i] = -1
    for i in range(pool.size[PATHS]):
        if _blocks(pool, i):
            _add_path(pool, kept, path[i, 0], path[i, 1], path[i, 2], path[i, 3], path[i, 4])
            kept += 1
    pool.size[PATHS] = kept


@kernel
def wake(pool: Pool, a: int, b: int) -> None:
    """The way a → b was lost: candidates that it blocked come back."""
    path, head = pool.path, pool.head
    slot = _slot(a, b, len(head))
    last, n = -1, head[slot]
    while n >= 0:
        following, y = path[n, 5], path[n, 2]
        current = _blocks(pool, n)
        hit = path[n, 0] == a and path[n, 1] == b
        if hit and current:
            at = pool.start[y] + path[n, 3]
            pool.gain[at] = -pool.gain[at]
            _find_best(pool, y)
        if current and not hit:
            last = n
        elif last < 0:
            head[slot] = following
        else:
            path[last, 5] = following
        n = following


@kernel
def begin(pool: Pool, y: int) -> None:
    """Empties the list of a target, to fill it anew."""
    pool.size[LIVE] -= pool.length[y]
    pool.length[y] = 0
    pool.start[y] = pool.size[USED]


@kernel
def append(pool: Pool, y: int, gain: float, source: int, clique: int) -> bool:
    """Adds a candidate to the list being filled; False if there is no room."""
    at = pool.start[y] + pool.length[y]
    if at >= len(pool.gain):
        return False
    pool.gain[at] = gain
    pool.source[at] = source
    pool.clique[at] = clique
    pool.blocked[at] = 0
    pool.length[y] += 1
    return True


@kernel
def finish(pool: Pool, y: int, complete: bool) -> bool:
    """Ends the list being filled; without room for all of it the target stays stale."""
    if not complete:
        pool.length[y] = 0
        pool.best[y] = 0.0
        return False
    pool.size[USED] += pool.length[y]
    pool.size[LIVE] += pool.length[y]
    pool.stale[y] = 0
    _find_best(pool, y)
    return True
