"""Kernels that keep the candidate moves of each target, best first, and wake blocked ones.

A candidate that reached the top but is blocked by a path is set aside with that path's edges; it
comes back when one of them is lost. So each step looks at few candidates, and the best valid one
is always found.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import kernel
from causal.gains import (
    MIN_GAIN,
    PIVOT,
    add_row,
    clique_at,
    fit_gain,
    loss_of,
    next_clique,
    split,
    target_row,
)
from causal.pdag import adjacent, is_arrow, is_line, new_stamp, path_exists

#: Positions in `Pool.size`.
USED, LIVE, PATHS = 0, 1, 2


class Pool(NamedTuple):
    """Candidates (source, clique, gain) of p targets, in one array.

    Attributes:
        gain: float64 (capacity,); negative if blocked by a path, 0 if it can no longer be valid.
        source, clique: int32 (capacity,).
        start, count: int64 (p,), where a target's candidates are.
        best: float64 (p,), the largest gain of a target, 0 if it has none.
        best_at: int64 (p,), its position.
        generation: int64 (p,), counts how often a target was scored.
        stale: uint8 (p,), 1 if a target has to be scored again.
        path: int64 (entries, 6), (from, to, target, position, generation, next entry).
        head: int32 (a power of two,), the first entry of each hash value.
        size: int64 (3,), candidates written, candidates alive, path entries.
    """

    gain: NDArray[np.float64]
    source: NDArray[np.int32]
    clique: NDArray[np.int32]
    start: NDArray[np.int64]
    count: NDArray[np.int64]
    best: NDArray[np.float64]
    best_at: NDArray[np.int64]
    generation: NDArray[np.int64]
    stale: NDArray[np.uint8]
    path: NDArray[np.int64]
    head: NDArray[np.int32]
    size: NDArray[np.int64]


def make_pool(p: int, capacity: int) -> Pool:
    """An empty pool in which every target is stale."""
    return Pool(
        gain=np.empty(capacity),
        source=np.empty(capacity, np.int32),
        clique=np.empty(capacity, np.int32),
        start=np.zeros(p, np.int64),
        count=np.zeros(p, np.int64),
        best=np.zeros(p),
        best_at=np.zeros(p, np.int64),
        generation=np.zeros(p, np.int64),
        stale=np.ones(p, np.uint8),
        path=np.empty((1 << 18, 6), np.int64),
        head=np.full(1 << 14, -1, np.int32),
        size=np.zeros(3, np.int64),
    )


def grown(pool: Pool) -> Pool:
    """The same pool with at least twice the room for what is alive, and without gaps."""
    capacity = max(2 * int(pool.size[LIVE]), len(pool.gain)) + 4 * len(pool.count) + 1024
    gain, source = np.empty(capacity), np.empty(capacity, np.int32)
    clique, start = np.empty(capacity, np.int32), np.zeros_like(pool.start)
    best_at, used = pool.best_at.copy(), 0
    for y, (a, n) in enumerate(zip(pool.start.tolist(), pool.count.tolist(), strict=True)):
        gain[used : used + n] = pool.gain[a : a + n]
        source[used : used + n] = pool.source[a : a + n]
        clique[used : used + n] = pool.clique[a : a + n]
        best_at[y] += used - a
        start[y] = used
        used += n
    size = pool.size.copy()
    size[USED] = used
    return pool._replace(
        gain=gain, source=source, clique=clique, start=start, best_at=best_at, size=size
    )


@kernel
def best_target(pool):  # type: ignore[no-untyped-def]
    """The first target with the largest gain."""
    best, target = 0.0, -1
    for y in range(len(pool.best)):
        if pool.best[y] > best:
            best, target = pool.best[y], y
    return target


@kernel
def _find_best(pool, y):  # type: ignore[no-untyped-def]
    """Largest gain; ties go to the smaller source, then to the candidate found later."""
    best, at = 0.0, -1
    for i in range(pool.start[y], pool.start[y] + pool.count[y]):
        gain = pool.gain[i]
        if gain > best or (gain == best and at >= 0 and pool.source[i] < pool.source[at]):
            best, at = gain, i
    pool.best[y] = best
    pool.best_at[y] = at


@kernel
def drop(pool, y, at):  # type: ignore[no-untyped-def]
    """Takes a candidate out until its target is scored again."""
    pool.gain[at] = 0.0
    _find_best(pool, y)


@kernel
def _slot(pool, a, b):  # type: ignore[no-untyped-def]
    return (a * 40503 + b * 9973) & (len(pool.head) - 1)


@kernel
def set_aside(pool, g, y, at, end):  # type: ignore[no-untyped-def]
    """Sets a candidate aside that is blocked by the path just found from y to `end`."""
    pool.gain[at] = -pool.gain[at]
    _find_best(pool, y)
    b = end
    while b != y:
        a = g.previous[b]
        n = pool.size[PATHS]
        if n == len(pool.path):
            _forget_paths(pool)
            return
        slot = _slot(pool, a, b)
        entry = pool.path[n]
        entry[0], entry[1], entry[2] = a, b, y
        entry[3], entry[4], entry[5] = at - pool.start[y], pool.generation[y], pool.head[slot]
        pool.head[slot] = n
        pool.size[PATHS] = n + 1
        b = a


@kernel
def _forget_paths(pool):  # type: ignore[no-untyped-def]
    """Empties the full table of paths: all blocked candidates will be looked at again."""
    pool.size[PATHS] = 0
    pool.head[:] = -1
    for y in range(len(pool.best)):
        for i in range(pool.start[y], pool.start[y] + pool.count[y]):
            pool.gain[i] = abs(pool.gain[i])
        _find_best(pool, y)


@kernel
def wake(pool, a, b):  # type: ignore[no-untyped-def]
    """The way a → b was lost: candidates that it blocked come back."""
    slot = _slot(pool, a, b)
    last, n = -1, pool.head[slot]
    while n >= 0:
        entry = pool.path[n]
        following = entry[5]
        y = entry[2]
        current = entry[4] == pool.generation[y]
        hit = entry[0] == a and entry[1] == b
        if hit and current and pool.stale[y] == 0:
            at = pool.start[y] + entry[3]
            if pool.gain[at] < 0.0:
                pool.gain[at] = -pool.gain[at]
                _find_best(pool, y)
        if hit or not current:
            if last < 0:
                pool.head[slot] = following
            else:
                pool.path[last, 5] = following
        else:
            last = n
        n = following


@kernel
def _begin(pool, y):  # type: ignore[no-untyped-def]
    pool.size[LIVE] -= pool.count[y]
    pool.count[y] = 0
    pool.start[y] = pool.size[USED]
    pool.generation[y] += 1


@kernel
def _append(pool, y, gain, source, clique):  # type: ignore[no-untyped-def]
    at = pool.start[y] + pool.count[y]
    if at >= len(pool.gain):
        return False
    pool.gain[at] = gain
    pool.source[at] = source
    pool.clique[at] = clique
    pool.count[y] += 1
    return True


@kernel
def _finish(pool, y, complete):  # type: ignore[no-untyped-def]
    if not complete:
        pool.count[y] = 0
        pool.best[y] = 0.0
        return False
    pool.size[USED] += pool.count[y]
    pool.size[LIVE] += pool.count[y]
    pool.stale[y] = 0
    _find_best(pool, y)
    return True


@kernel
def _covers(g, x, neighbours, m, clique, size):  # type: ignore[no-untyped-def]
    """Are all neighbours in the list that x touches members of the clique (positions)?"""
    j = 0
    for i in range(m):
        if j < size and clique[j] == i:
            j += 1
        elif adjacent(g, neighbours[i], x):
            return False
    return True


@kernel
def score_insertions(g, problem, w, pool, y):  # type: ignore[no-untyped-def]
    """Lists every insertion x → y with its clique that gains, paths not checked.

    Returns False if the pool has no room (the target then stays stale).
    """
    _begin(pool, y)
    k, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    if k + 1 >= len(w.row) - 1:
        return _finish(pool, y, True)
    matrix = problem.correlation[problem.pattern[y]]
    p = matrix.shape[0]
    for x in range(p):
        w.residual[0, x] = matrix[x, x]
    for i in range(k):
        add_row(matrix, w.row, w.residual, i, w.parents[i])
    size, start, index = 0, 0, 0
    threshold, penalty = problem.threshold[y], problem.penalty[0]
    while size >= 0:
        r = k + size
        if size > 0:
            add_row(matrix, w.row, w.residual, r - 1, w.neighbours[w.chosen[size - 1]])
        target_row(matrix, w.row, r, y, w.target)
        residual, own = w.residual[r], w.residual[r, y]
        if own > PIVOT:
            bound = threshold * own
            for x in range(p):
                squared = w.target[x] * w.target[x]
                if squared <= bound * residual[x] or residual[x] < PIVOT or x == y:
                    continue
                if problem.allowed[x, y] == 0 or adjacent(g, x, y):
                    continue
                if m > 0 and not _covers(g, x, w.neighbours, m, w.chosen, size):
                    continue
                squared /= own * residual[x]
                if own * (1.0 - squared) < PIVOT:
                    continue
                gain = fit_gain(problem, y, squared) - penalty
                if gain > MIN_GAIN and not _append(pool, y, gain, x, index):
                    return _finish(pool, y, False)
        if r + 2 >= len(w.row):
            return _finish(pool, y, True)
        size = next_clique(g, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    return _finish(pool, y, True)


@kernel
def insertion_valid(g, w, pool, y):  # type: ignore[no-untyped-def]
    """Checks the best insertion into y; if it is not valid, it is dropped or set aside.

    If valid, w.members holds its clique; returns (valid, clique size).
    """
    at = pool.best_at[y]
    x = pool.source[at]
    if adjacent(g, x, y):
        drop(pool, y, at)
        return False, 0
    size = clique_at(g, w, y, pool.clique[at])
    _, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    if m > 0 and not _covers(g, x, w.neighbours, m, w.chosen, size):
        drop(pool, y, at)
        return False, 0
    stamp = new_stamp(g)
    for j in range(size):
        g.seen[w.members[j]] = stamp
    if path_exists(g, y, x, stamp, False):
        set_aside(pool, g, y, at, x)
        return False, 0
    return True, size


@kernel
def _gather_near(matrix, near, n, v, small, residual):  # type: ignore[no-untyped-def]
    for i in range(n):
        source = matrix[near[i]]
        for j in range(n):
            small[i, j] = source[near[j]]
        small[i, n] = source[v]
        small[n, i] = source[v]
        residual[0, i] = small[i, i]
    small[n, n] = matrix[v, v]
    residual[0, n] = small[n, n]


@kernel
def _separated(g, v, u, stamp):  # type: ignore[no-untyped-def]
    """Does the part of the clique (seen at `stamp`) that u touches cut the rest off from u?

    Walks among v's neighbours from the clique's members that u does not touch; the walk must not
    meet a common neighbour of u and v outside the clique. There must be such a member.
    """
    n = 0
    for i in range(g.degree[v]):
        a = g.near[v, i]
        if g.seen[a] == stamp and not adjacent(g, a, u):
            g.stack[n] = a
            n += 1
    if n == 0:
        return False
    while n > 0:
        n -= 1
        a = g.stack[n]
        for i in range(g.degree[a]):
            b = g.near[a, i]
            if b == u or g.seen[b] == stamp or not is_line(g, v, b) or not adjacent(g, a, b):
                continue
            if is_line(g, u, b):
                return False
            g.seen[b] = stamp
            g.stack[n] = b
            n += 1
    return True


@kernel
def _line_turn_loss(g, problem, w, v, u, size):  # type: ignore[no-untyped-def]
    """What u loses with v when the line is turned into u → v; infinite if that is not valid."""
    stamp = new_stamp(g)
    for j in range(size):
        a = w.neighbours[w.chosen[j]]
        if a == u:
            return np.inf
        g.seen[a] = stamp
    if not _separated(g, v, u, stamp):
        return np.inf
    count = 0
    for i in range(g.degree[u]):
        a = g.near[u, i]
        if is_arrow(g, a, u):
            w.members[count] = a
            count += 1
    for j in range(size):
        a = w.neighbours[w.chosen[j]]
        if is_line(g, a, u):
            w.members[count] = a
            count += 1
    return loss_of(problem, w, u, w.members, count, v)


@kernel
def _position(near, n, a):  # type: ignore[no-untyped-def]
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if near[middle] < a:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _parents_covered(g, u, neighbours, m, clique, size):  # type: ignore[no-untyped-def]
    """Are all listed neighbours that are parents of u members of the clique?"""
    j = 0
    for i in range(m):
        if j < size and clique[j] == i:
            j += 1
        elif is_arrow(g, neighbours[i], u):
            return False
    return True


@kernel
def score_turns(g, problem, w, pool, v, loss):  # type: ignore[no-untyped-def]
    """Lists every turn of an edge at v into u → v that gains, paths not checked.

    `loss[u, v]` must be up to date for v's children u (`gains.best_deletion`).
    """
    _begin(pool, v)
    k, m, _ = split(g, v, w.parents, w.neighbours, w.children)
    n = g.degree[v]
    if k + 2 >= len(w.row):
        return _finish(pool, v, True)
    near = g.near[v]
    # A node's position in near[v] is its column in the small matrix; v itself is the last.
    small, row = w.small[: n + 1, : n + 1], w.small_row[:, : n + 1]
    residual = w.small_residual[:, : n + 1]
    _gather_near(problem.correlation[problem.pattern[v]], near, n, v, small, residual)
    for i in range(k):
        add_row(small, row, residual, i, _position(near, n, w.parents[i]))
    size, start, index = 0, 0, 0
    while size >= 0:
        r = k + size
        if size > 0:
            latest = w.neighbours[w.chosen[size - 1]]
            add_row(small, row, residual, r - 1, _position(near, n, latest))
        own = residual[r, n]
        for i in range(n):
            u = near[i]
            if g.edge[v, u] == 0 or own < PIVOT or residual[r, i] < PIVOT:
                continue
            if problem.allowed[u, v] == 0 or problem.required[v, u]:
                continue
            covariance = small[i, n]
            for q in range(r):
                covariance -= row[q, i] * row[q, n]
            squared = covariance * covariance / (own * residual[r, i])
            if own * (1.0 - squared) < PIVOT:
                continue
            won = fit_gain(problem, v, squared)
            if g.edge[u, v]:
                gain = won - _line_turn_loss(g, problem, w, v, u, size)
            elif _parents_covered(g, u, w.neighbours, m, w.chosen, size):
                gain = won - loss[u, v]
            else:
                continue
            if gain > MIN_GAIN and not _append(pool, v, gain, u, index):
                return _finish(pool, v, False)
        if r + 3 >= len(w.row):
            return _finish(pool, v, True)
        size = next_clique(g, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    return _finish(pool, v, True)


@kernel
def turn_valid(g, w, pool, v):  # type: ignore[no-untyped-def]
    """Checks the path condition of the best turn at v; a blocked one is set aside.

    If valid, w.members holds its clique; returns (valid, clique size).
    """
    at = pool.best_at[v]
    u = pool.source[at]
    size = clique_at(g, w, v, pool.clique[at])
    if is_line(g, u, v):
        return True, size
    stamp = new_stamp(g)
    for j in range(size):
        g.seen[w.members[j]] = stamp
    for i in range(g.degree[u]):
        if is_line(g, u, g.near[u, i]):
            g.seen[g.near[u, i]] = stamp
    if path_exists(g, v, u, stamp, True):
        set_aside(pool, g, v, at, u)
        return False, 0
    return True, size
