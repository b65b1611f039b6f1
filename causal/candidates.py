"""Kernels that list the moves of each target that gain, and check them when they are the best.

An insertion or a turn is scored for every clique of its target's neighbours that may go with it;
whether a path blocks it is looked at only when it is the best of all (`causal.pool`).
"""

import numpy as np

from causal import scoring
from causal.compiled import kernel
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
from causal.pool import Pool, append, begin, drop, finish, set_aside
from causal.problem import (
    MAX_CLIQUES,
    MIN_GAIN,
    Floats,
    Problem,
    Work,
    clique_at,
    next_clique,
    split,
)

#: What `valid_clique` returns if the pool's table of paths is full.
NO_ROOM = -2


@kernel
def score_deletions(
    g: Graph, problem: Problem, w: Work, y: int, gains: Floats, cliques: Nodes, loss: Floats
) -> float:
    """Fills row y of `gains` and `cliques` with the best deletion of each edge into y.

    Also fills loss[y, x] for every parent x: what y loses with x, lines left out. Required edges
    get a gain of minus infinity. Returns the largest gain, 0 if none gains.
    """
    k, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    for i in range(g.degree[y]):
        gains[y, g.near[y, i]], cliques[y, g.near[y, i]] = -np.inf, 0
    best, size, start, index = 0.0, 0, 0, 0
    while size >= 0 and index < MAX_CLIQUES:
        for i in range(k):
            w.members[i] = w.parents[i]
        for j in range(size):
            w.members[k + j] = w.neighbours[w.chosen[j]]
        total = k + size
        if total > scoring.most_parents(problem.local):
            total = scoring.most_parents(problem.local)
            w.limited[0] = 1
        scoring.parent_losses(problem.local, y, w.members, total, w.lost)
        for i in range(total):
            x, gain = w.members[i], -w.lost[i]
            if size == 0:
                loss[y, x] = w.lost[i]
            if problem.required[x, y] or problem.required[y, x]:
                gain = -np.inf
            if gain > gains[y, x]:
                gains[y, x], cliques[y, x] = gain, index
            best = max(best, gain)
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    if size >= 0:
        w.limited[0] = 1
    return best if best > MIN_GAIN else 0.0


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
    begin(pool, y)
    k, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    most = scoring.most_parents(problem.local)
    scoring.open_target(problem.local, y)
    for i in range(min(k, most)):
        scoring.add_parent(problem.local, y, i, w.parents[i])
    size, start, index = 0, 0, 0
    while size >= 0 and index < MAX_CLIQUES and k + size < most:
        if size > 0:
            last = w.neighbours[w.chosen[size - 1]]
            scoring.add_parent(problem.local, y, k + size - 1, last)
        scoring.source_gains(problem.local, g, problem.allowed, y, k + size, w.gain)
        for x in range(len(g.degree)):
            if w.gain[x] <= MIN_GAIN or problem.allowed[x, y] == 0 or adjacent(g.edge, x, y):
                continue
            if m > 0 and not _covers(g.edge, x, w.neighbours, m, w.chosen, size, False):
                continue
            if not append(pool, y, w.gain[x], x, index):
                return finish(pool, y, False)
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    if size >= 0:
        w.limited[0] = 1
    return finish(pool, y, True)


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
    w.members[count] = v
    return scoring.last_loss(problem.local, u, w.members, count + 1)


@kernel
def _position(near: Nodes, n: int, a: int) -> int:
    """Where a is among n ascending nodes."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if near[middle] < a:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def score_turns(g: Graph, problem: Problem, w: Work, pool: Pool, v: int, loss: Floats) -> bool:
    """Lists every turn of an edge at v into u → v that gains, paths not checked.

    `loss[u, v]` must be up to date for v's children u (`score_deletions`). Returns False if the
    pool has no room.
    """
    begin(pool, v)
    k, m, _ = split(g, v, w.parents, w.neighbours, w.children)
    n, near, most = g.degree[v], g.near[v], scoring.most_parents(problem.local)
    if n == k:
        return finish(pool, v, True)
    scoring.open_near(problem.local, v, near, n)
    for i in range(min(k, most)):
        scoring.add_near(problem.local, v, i, _position(near, n, w.parents[i]), near, n)
    size, start, index = 0, 0, 0
    while size >= 0 and index < MAX_CLIQUES and k + size < most:
        r = k + size
        if size > 0:
            at = _position(near, n, w.neighbours[w.chosen[size - 1]])
            scoring.add_near(problem.local, v, r - 1, at, near, n)
        for i in range(n):
            if not _may_turn(g, problem, w, near[i], v, m, size):
                continue
            gain = scoring.near_gain(problem.local, v, r, i, near, n)
            if gain > -np.inf:
                gain -= _turn_loss(g, problem, w, near[i], v, size, loss)
            if gain > MIN_GAIN and not append(pool, v, gain, near[i], index):
                return finish(pool, v, False)
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    if size >= 0:
        w.limited[0] = 1
    return finish(pool, v, True)


@kernel
def _may_turn(g: Graph, problem: Problem, w: Work, u: int, v: int, m: int, size: int) -> bool:
    """Can the edge of u and v, which is no u → v, become u → v with the chosen clique?"""
    if g.edge[v, u] == 0 or problem.allowed[u, v] == 0 or problem.required[v, u]:
        return False
    return is_line(g.edge, u, v) or _covers(g.edge, u, w.neighbours, m, w.chosen, size, True)


@kernel
def _turn_loss(
    g: Graph, problem: Problem, w: Work, u: int, v: int, size: int, loss: Floats
) -> float:
    """What u loses when v is no longer, or cannot become, its parent."""
    if is_line(g.edge, u, v):
        return _line_loss(g, problem, w, v, u, size)
    return float(loss[u, v])


@kernel
def valid_clique(g: Graph, w: Work, pool: Pool, move: int, v: int) -> int:
    """Checks the best insertion into v, or turn at v, against the graph as it is now.

    Returns the size of its clique, which is then in `w.members`; or -1 if it is not valid, and then
    it was dropped, or set aside if a path blocks it; or NO_ROOM if it could not be.
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
        return -1 if set_aside(pool, g, v, u) else NO_ROOM
    return size
