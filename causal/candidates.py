"""Kernels that keep the candidate moves of each target, best first, and wake blocked ones.

A candidate that reached the top but is blocked by a path is set aside with that path's edges; it
comes back when one of them is lost. So each step looks at few candidates, and the best valid one
is always found.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, kernel, reference
from causal.gains import (
    MAX_CLIQUES,
    MIN_GAIN,
    PIVOT,
    Floats,
    Problem,
    Work,
    add_row,
    clique_at,
    covariance_rest,
    fit_gain,
    gather,
    loss_of,
    next_clique,
    split,
)
from causal.pdag import (
    INSERT,
    Edges,
    Graph,
    Nodes,
    adjacent,
    is_arrow,
    is_line,
    new_stamp,
    path_exists,
)

#: Positions in `Pool.size`.
USED, LIVE, PATHS = 0, 1, 2


class Pool(NamedTuple):
    """Candidates (source, clique, gain) of p targets, in one array.

    Attributes:
        gain: float64 (capacity,); negative if blocked by a path, 0 if it can no longer be valid.
        source, clique: int32 (capacity,).
        start, length: int64 (p,), where a target's candidates are.
        best: float64 (p,), the largest gain of a target, 0 if it has none.
        best_at: int64 (p,), its position.
        generation: int64 (p,), counts how often a target was scored.
        stale: uint8 (p,), 1 if a target has to be scored again.
        path: int64 (entries, 6), (from, to, target, position, generation, next entry).
        head: int32 (a power of two,), the first entry of each hash value.
        size: int64 (3,), candidates written, candidates alive, path entries.
    """

    gain: NDArray[Any]
    source: NDArray[Any]
    clique: NDArray[Any]
    start: NDArray[Any]
    length: NDArray[Any]
    best: NDArray[Any]
    best_at: NDArray[Any]
    generation: NDArray[Any]
    stale: NDArray[Any]
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
        generation=np.zeros(p, np.int64),
        stale=np.ones(p, np.uint8),
        path=np.empty((1 << 18, 6), np.int64),
        head=np.full(1 << 14, -1, np.int32),
        size=np.zeros(3, np.int64),
    )


def grown(pool: Pool) -> Pool:
    """The same pool with at least twice the room for what is alive, and without gaps."""
    capacity = max(2 * int(pool.size[LIVE]), len(pool.gain)) + 4 * len(pool.length) + 1024
    gain, source = np.empty(capacity), np.empty(capacity, np.int32)
    clique, start = np.empty(capacity, np.int32), np.zeros_like(pool.start)
    best_at, used = pool.best_at.copy(), 0
    for y, (a, n) in enumerate(zip(pool.start.tolist(), pool.length.tolist(), strict=True)):
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
    return (a * 40503 + b * 9973) & (slots - 1)


@kernel
def set_aside(pool: Pool, g: Graph, y: int, end: int) -> None:
    """Sets the best candidate aside, blocked by the path just found from y to `end`."""
    at = pool.best_at[y]
    pool.gain[at] = -pool.gain[at]
    _find_best(pool, y)
    path, head = pool.path, pool.head
    b = end
    while b != y:
        a = g.previous[b]
        n = pool.size[PATHS]
        if n == len(path):
            _forget_paths(pool)
            return
        slot = _slot(a, b, len(head))
        path[n, 0], path[n, 1], path[n, 2] = a, b, y
        path[n, 3], path[n, 4], path[n, 5] = at - pool.start[y], pool.generation[y], head[slot]
        head[slot] = n
        pool.size[PATHS] = n + 1
        b = a


@kernel
def _forget_paths(pool: Pool) -> None:
    """Empties the full table of paths: all blocked candidates will be looked at again."""
    pool.size[PATHS] = 0
    for i in range(len(pool.head)):
        pool.head[i] = -1
    for y in range(len(pool.best)):
        for i in range(pool.start[y], pool.start[y] + pool.length[y]):
            pool.gain[i] = abs(pool.gain[i])
        _find_best(pool, y)


@kernel
def wake(pool: Pool, a: int, b: int) -> None:
    """The way a → b was lost: candidates that it blocked come back."""
    path, head = pool.path, pool.head
    slot = _slot(a, b, len(head))
    last, n = -1, head[slot]
    while n >= 0:
        following, y = path[n, 5], path[n, 2]
        current = path[n, 4] == pool.generation[y]
        hit = path[n, 0] == a and path[n, 1] == b
        if hit and current and pool.stale[y] == 0:
            at = pool.start[y] + path[n, 3]
            if pool.gain[at] < 0.0:
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
def _begin(pool: Pool, y: int) -> None:
    pool.size[LIVE] -= pool.length[y]
    pool.length[y] = 0
    pool.start[y] = pool.size[USED]
    pool.generation[y] += 1


@kernel
def _append(pool: Pool, y: int, gain: float, source: int, clique: int) -> bool:
    at = pool.start[y] + pool.length[y]
    if at >= len(pool.gain):
        return False
    pool.gain[at] = gain
    pool.source[at] = source
    pool.clique[at] = clique
    pool.length[y] += 1
    return True


@kernel
def _finish(pool: Pool, y: int, complete: bool) -> bool:
    if not complete:
        pool.length[y] = 0
        pool.best[y] = 0.0
        return False
    pool.size[USED] += pool.length[y]
    pool.size[LIVE] += pool.length[y]
    pool.stale[y] = 0
    _find_best(pool, y)
    return True


@kernel
def _covers(
    edge: Edges, x: int, listed: Nodes, m: int, chosen: Nodes, size: int, arrows: bool
) -> bool:
    """Are all listed nodes that touch x (with `arrows`: that point at x) among the chosen?

    `chosen` holds `size` ascending positions in the list of m nodes.
    """
    j = 0
    for i in range(m):
        if j < size and chosen[j] == i:
            j += 1
        elif is_arrow(edge, listed[i], x) or (not arrows and adjacent(edge, listed[i], x)):
            return False
    return True


@kernel
def score_insertions(g: Graph, problem: Problem, w: Work, pool: Pool, y: int) -> bool:
    """Lists every insertion x → y with its clique that gains, paths not checked.

    Returns False if the pool has no room (the target then stays stale).
    """
    _begin(pool, y)
    k, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    matrix, row, residual = problem.correlation[problem.pattern[y]], w.row, w.residual
    p = len(g.degree)
    for x in range(p):
        residual[0, x] = matrix[x, x]
    k = min(k, len(row) - 2)
    for i in range(k):
        add_row(matrix, row, residual, i, w.parents[i], p)
    size, start, index = 0, 0, 0
    while size >= 0 and k + size < len(row) - 2 and index < MAX_CLIQUES:
        r = k + size
        if size > 0:
            add_row(matrix, row, residual, r - 1, w.neighbours[w.chosen[size - 1]], p)
        if not _append_insertions(g, problem, w, pool, y, r, m, size, index):
            return _finish(pool, y, False)
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    if size >= 0:
        w.limited[0] = 1
    return _finish(pool, y, True)


@kernel
def _append_insertions(
    g: Graph, problem: Problem, w: Work, pool: Pool, y: int, r: int, m: int, size: int, index: int
) -> bool:
    """Lists the sources that gain with one clique, given r rows of the factor."""
    matrix, row, residual, target = (
        problem.correlation[problem.pattern[y]],
        w.row,
        w.residual,
        w.target,
    )
    edge, own, p = g.edge, w.residual[r, y], len(g.degree)
    if own < PIVOT:
        return True
    for x in range(p):
        target[x] = matrix[y, x]
    for q in range(r):
        factor = row[q, y]
        for x in range(p):
            target[x] -= factor * row[q, x]
    bound = problem.threshold[y] * own
    for x in range(p):
        squared, rest = target[x] * target[x], residual[r, x]
        if squared <= bound * rest or rest < PIVOT or x == y:
            continue
        if problem.allowed[x, y] == 0 or adjacent(edge, x, y):
            continue
        if m > 0 and not _covers(edge, x, w.neighbours, m, w.chosen, size, False):
            continue
        squared /= own * rest
        if own * (1.0 - squared) < PIVOT:
            continue
        gain = fit_gain(problem.rows[y], squared) - problem.penalty[0]
        if gain > MIN_GAIN and not _append(pool, y, gain, x, index):
            return False
    return True


@kernel
def _separated(g: Graph, v: int, u: int, stamp: int) -> bool:
    """Does the part of the clique (seen at `stamp`) that u touches cut the rest off from u?

    Walks among v's neighbours from the clique's members that u does not touch; the walk must not
    meet a common neighbour of u and v outside the clique. There must be such a member.
    """
    edge, near, degree, stack, seen = g.edge, g.near, g.degree, g.stack, g.seen
    n = 0
    for i in range(degree[v]):
        a = near[v, i]
        if seen[a] == stamp and not adjacent(edge, a, u):
            stack[n] = a
            n += 1
    if n == 0:
        return False
    while n > 0:
        n -= 1
        a = stack[n]
        for i in range(degree[a]):
            b = near[a, i]
            if b == u or seen[b] == stamp or not is_line(edge, v, b):
                continue
            if is_line(edge, u, b):
                return False
            seen[b] = stamp
            stack[n] = b
            n += 1
    return True


@kernel
def _line_loss(g: Graph, problem: Problem, w: Work, v: int, u: int, size: int) -> float:
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
        if is_arrow(g.edge, a, u):
            w.members[count] = a
            count += 1
    for j in range(size):
        a = w.neighbours[w.chosen[j]]
        if is_line(g.edge, a, u):
            w.members[count] = a
            count += 1
    return loss_of(problem, w, u, w.members, count, v)


@kernel
def _position(near: Nodes, v: int, n: int, a: int) -> int:
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if near[v, middle] < a:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def score_turns(g: Graph, problem: Problem, w: Work, pool: Pool, v: int, loss: Floats) -> bool:
    """Lists every turn of an edge at v into u → v that gains, paths not checked.

    `loss[u, v]` must be up to date for v's children u (`gains.best_deletion`). Returns False if the
    pool has no room.
    """
    _begin(pool, v)
    k, m, _ = split(g, v, w.parents, w.neighbours, w.children)
    n = g.degree[v]
    if n == k:
        return _finish(pool, v, True)
    # A node's position in near[v] is its column in the small matrix; v itself is the last.
    small, row, residual = w.small, w.small_row, w.small_residual
    gather(problem.correlation[problem.pattern[v]], v, g.near[v], n, small, residual)
    k = min(k, len(row) - 3)
    for i in range(k):
        add_row(small, row, residual, i, _position(g.near, v, n, w.parents[i]), n + 1)
    size, start, index = 0, 0, 0
    while size >= 0 and k + size < len(row) - 3 and index < MAX_CLIQUES:
        if size > 0:
            at = _position(g.near, v, n, w.neighbours[w.chosen[size - 1]])
            add_row(small, row, residual, k + size - 1, at, n + 1)
        if not _append_turns(g, problem, w, pool, v, loss, k + size, m, size, index):
            return _finish(pool, v, False)
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    if size >= 0:
        w.limited[0] = 1
    return _finish(pool, v, True)


@kernel
def _append_turns(
    g: Graph,
    problem: Problem,
    w: Work,
    pool: Pool,
    v: int,
    loss: Floats,
    r: int,
    m: int,
    size: int,
    index: int,
) -> bool:
    """Lists the turns at v that gain with one clique, given r rows of the small factor."""
    edge, n, residual = g.edge, g.degree[v], w.small_residual
    own = residual[r, n]
    for i in range(n):
        u = g.near[v, i]
        if edge[v, u] == 0 or own < PIVOT or residual[r, i] < PIVOT:
            continue
        if problem.allowed[u, v] == 0 or problem.required[v, u]:
            continue
        covariance = covariance_rest(w.small, w.small_row, r, i, n)
        squared = covariance * covariance / (own * residual[r, i])
        if own * (1.0 - squared) < PIVOT:
            continue
        gain = fit_gain(problem.rows[v], squared)
        if edge[u, v]:
            gain -= _line_loss(g, problem, w, v, u, size)
        elif _covers(edge, u, w.neighbours, m, w.chosen, size, True):
            gain -= loss[u, v]
        else:
            continue
        if gain > MIN_GAIN and not _append(pool, v, gain, u, index):
            return False
    return True


@kernel
def valid_clique(g: Graph, w: Work, pool: Pool, move: int, v: int) -> int:
    """Checks the best insertion into v, or turn at v, against the graph as it is now.

    Returns the size of its clique, which is then in `w.members`; or -1 if it is not valid, and then
    it was dropped, or set aside if a path blocks it.
    """
    at = pool.best_at[v]
    u = pool.source[at]
    size = clique_at(g, w, v, pool.clique[at])
    turned = move != INSERT
    if turned and is_line(g.edge, u, v):
        return size
    if not turned:
        m = split(g, v, w.parents, w.neighbours, w.children)[1]
        covered = _covers(g.edge, u, w.neighbours, m, w.chosen, size, False)
        if adjacent(g.edge, u, v) or not covered:
            drop(pool, v)
            return -1
    stamp = new_stamp(g)
    for j in range(size):
        g.seen[w.members[j]] = stamp
    if turned:
        for i in range(g.degree[u]):
            if is_line(g.edge, u, g.near[u, i]):
                g.seen[g.near[u, i]] = stamp
    if path_exists(g, v, u, stamp, turned):
        set_aside(pool, g, v, u)
        return -1
    return size
