"""Kernels on the search's state: an interventional essential graph, changed one move at a time.

A move turns the chain component of its target into arrows that suit it, changes one edge, and then
replaces unprotected arrows by lines until none is left (Hauser and Bühlmann, JMLR 13, 2012,
sections 3 and 4). Only arrows whose protection can have changed are looked at.

Interventions enter through `kind`: two nodes have the same kind if no target separates them; an
edge between two kinds always stays an arrow. Tiers are kinds too: a boundary between tiers protects
the edges across it exactly as an intervention on all later tiers would.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import cached_kernel, kernel

#: Positions in `Graph.size`.
LOGGED, QUEUED, STAMP = 0, 1, 2


class Graph(NamedTuple):
    """An essential graph over p nodes, with room for its moves. All arrays are changed in place.

    Attributes:
        edge: uint8 (p, p); edge[a, b] = 1 for a → b and, with edge[b, a] = 1, for a line a - b.
        near: int32 (p, p), the adjacent nodes of each node, ascending; `degree` of them are valid.
        degree: int32 (p,).
        kind: int32 (p,), edges between nodes of different kinds are never lines.
        log: int32 (pairs, 3), pairs a < b changed since the log was cleared, and their old code
            edge[a, b] + 2 edge[b, a].
        logged: uint8 (p, p), marks pairs in the log.
        queue: int32 (p * p, 2), arrows to be checked; `queued` marks them.
        queued: uint8 (p, p).
        seen: int64 (p,), equals the current stamp where a walk has been.
        stack, previous, weight, head: int32 (p + 1,) scratch of walks.
        bucket: int32 (2 p * p or less, 2), scratch of the ordering.
        size: int64 (3,), lengths of log and queue, and the last stamp.
    """

    edge: NDArray[np.uint8]
    near: NDArray[np.int32]
    degree: NDArray[np.int32]
    kind: NDArray[np.int32]
    log: NDArray[np.int32]
    logged: NDArray[np.uint8]
    queue: NDArray[np.int32]
    queued: NDArray[np.uint8]
    seen: NDArray[np.int64]
    stack: NDArray[np.int32]
    previous: NDArray[np.int32]
    weight: NDArray[np.int32]
    head: NDArray[np.int32]
    bucket: NDArray[np.int32]
    size: NDArray[np.int64]


def empty_graph(kind: NDArray[np.int32]) -> Graph:
    """A graph without edges; memory that no edge needs is never touched.

    Args:
        kind: int32 (p,), see `Graph`.
    """
    p = len(kind)
    return Graph(
        edge=np.zeros((p, p), np.uint8),
        near=np.empty((p, p), np.int32),
        degree=np.zeros(p, np.int32),
        kind=np.ascontiguousarray(kind, np.int32),
        log=np.empty((p * (p - 1) // 2 + 1, 3), np.int32),
        logged=np.zeros((p, p), np.uint8),
        queue=np.empty((p * p + 1, 2), np.int32),
        queued=np.zeros((p, p), np.uint8),
        seen=np.zeros(p, np.int64),
        stack=np.empty(p + 1, np.int32),
        previous=np.empty(p + 1, np.int32),
        weight=np.empty(p + 1, np.int32),
        head=np.empty(p + 2, np.int32),
        bucket=np.empty((p * p + p + 1, 2), np.int32),
        size=np.zeros(3, np.int64),
    )


@kernel
def adjacent(g, a, b):  # type: ignore[no-untyped-def]
    return g.edge[a, b] | g.edge[b, a]


@kernel
def is_arrow(g, a, b):  # type: ignore[no-untyped-def]
    return g.edge[a, b] == 1 and g.edge[b, a] == 0


@kernel
def is_line(g, a, b):  # type: ignore[no-untyped-def]
    return g.edge[a, b] == 1 and g.edge[b, a] == 1


@kernel
def _list_insert(g, a, b):  # type: ignore[no-untyped-def]
    row = g.near[a]
    i = g.degree[a]
    while i > 0 and row[i - 1] > b:
        row[i] = row[i - 1]
        i -= 1
    row[i] = b
    g.degree[a] += 1


@kernel
def _list_remove(g, a, b):  # type: ignore[no-untyped-def]
    row = g.near[a]
    i = 0
    while row[i] != b:
        i += 1
    for j in range(i, g.degree[a] - 1):
        row[j] = row[j + 1]
    g.degree[a] -= 1


@kernel
def set_pair(g, a, b, forth, back):  # type: ignore[no-untyped-def]
    """Sets a → b (forth) and b → a (back), and logs what the pair was."""
    if g.edge[a, b] == forth and g.edge[b, a] == back:
        return
    low, high = min(a, b), max(a, b)
    if g.logged[low, high] == 0:
        g.logged[low, high] = 1
        n = g.size[LOGGED]
        g.log[n, 0] = low
        g.log[n, 1] = high
        g.log[n, 2] = g.edge[low, high] + 2 * g.edge[high, low]
        g.size[LOGGED] = n + 1
    was = adjacent(g, a, b)
    g.edge[a, b] = forth
    g.edge[b, a] = back
    if was and not (forth or back):
        _list_remove(g, a, b)
        _list_remove(g, b, a)
    elif not was:
        _list_insert(g, a, b)
        _list_insert(g, b, a)


@kernel
def clear_log(g):  # type: ignore[no-untyped-def]
    for i in range(g.size[LOGGED]):
        g.logged[g.log[i, 0], g.log[i, 1]] = 0
    g.size[LOGGED] = 0


@kernel
def undo(g):  # type: ignore[no-untyped-def]
    """Takes back every change in the log, and clears it."""
    n = g.size[LOGGED]
    for i in range(n):
        a, b, code = g.log[i, 0], g.log[i, 1], g.log[i, 2]
        set_pair(g, a, b, code & 1, code >> 1)
    clear_log(g)


@kernel
def new_stamp(g):  # type: ignore[no-untyped-def]
    g.size[STAMP] += 1
    return g.size[STAMP]


@kernel
def path_exists(g, start, end, stamp, skip_direct):  # type: ignore[no-untyped-def]
    """Is there a path start → … → end along arrows and lines, avoiding nodes seen at `stamp`?

    `skip_direct` leaves out the edge between start and end. If there is one, `previous` leads back
    from end to start.
    """
    if g.seen[start] == stamp or g.seen[end] == stamp:
        return False
    g.seen[start] = stamp
    g.stack[0] = start
    n = 1
    while n > 0:
        n -= 1
        a = g.stack[n]
        row = g.near[a]
        for i in range(g.degree[a]):
            b = row[i]
            if g.edge[a, b] == 0 or g.seen[b] == stamp:
                continue
            if b == end:
                if skip_direct and a == start:
                    continue
                g.previous[b] = a
                return True
            g.previous[b] = a
            g.seen[b] = stamp
            g.stack[n] = b
            n += 1
    return False


@kernel
def _enqueue(g, a, b):  # type: ignore[no-untyped-def]
    if g.queued[a, b] == 0:
        g.queued[a, b] = 1
        n = g.size[QUEUED]
        g.queue[n, 0] = a
        g.queue[n, 1] = b
        g.size[QUEUED] = n + 1


@kernel
def _enqueue_into(g, b):  # type: ignore[no-untyped-def]
    for i in range(g.degree[b]):
        a = g.near[b, i]
        if is_arrow(g, a, b):
            _enqueue(g, a, b)


@kernel
def _enqueue_out_of(g, a):  # type: ignore[no-untyped-def]
    for i in range(g.degree[a]):
        b = g.near[a, i]
        if is_arrow(g, a, b):
            _enqueue(g, a, b)


@kernel
def _enqueue_common_children(g, u, v):  # type: ignore[no-untyped-def]
    for i in range(g.degree[u]):
        b = g.near[u, i]
        if is_arrow(g, u, b) and is_arrow(g, v, b):
            _enqueue_into(g, b)


@kernel
def _protected(g, a, b):  # type: ignore[no-untyped-def]
    """Is the arrow a → b strongly protected (configurations a to d of the paper)?"""
    if g.kind[a] != g.kind[b]:
        return True
    for i in range(g.degree[a]):
        c = g.near[a, i]
        if is_arrow(g, c, a) and not adjacent(g, c, b):
            return True
    lines = 0
    for i in range(g.degree[b]):
        c = g.near[b, i]
        if c == a or not is_arrow(g, c, b):
            continue
        if not adjacent(g, c, a) or is_arrow(g, a, c):
            return True
        if is_line(g, a, c):
            lines += 1
    if lines == 0:
        return False
    # Two unconnected parents of b, both connected to a. While arrows are still being replaced, one
    # of them may still point into a; two pointing into a would be a collider and protect nothing.
    for i in range(g.degree[b]):
        c = g.near[b, i]
        if c == a or not is_arrow(g, c, b) or not is_line(g, a, c):
            continue
        for j in range(g.degree[b]):
            d = g.near[b, j]
            if d != a and d != c and is_arrow(g, d, b) and not adjacent(g, c, d):
                return True
    return False


@kernel
def _settle(g):  # type: ignore[no-untyped-def]
    """Replaces unprotected arrows by lines until every arrow is protected."""
    while g.size[QUEUED] > 0:
        n = g.size[QUEUED] - 1
        g.size[QUEUED] = n
        a, b = g.queue[n, 0], g.queue[n, 1]
        g.queued[a, b] = 0
        if not is_arrow(g, a, b) or _protected(g, a, b):
            continue
        set_pair(g, a, b, 1, 1)
        _enqueue_into(g, b)
        _enqueue_out_of(g, b)
        _enqueue_out_of(g, a)


@kernel
def _orient(g, a, b):  # type: ignore[no-untyped-def]
    set_pair(g, a, b, 1, 0)
    _enqueue(g, a, b)


@kernel
def _visit(g, a, stamp, top, entries):  # type: ignore[no-untyped-def]
    """Orients a's lines away from it; returns the highest weight and the bucket's length."""
    g.seen[a] = stamp
    for i in range(g.degree[a]):
        b = g.near[a, i]
        if is_line(g, a, b) and g.seen[b] != stamp:
            if g.seen[b] != -stamp:
                g.seen[b] = -stamp
                g.weight[b] = 0
            g.weight[b] += 1
            w = g.weight[b]
            while top < w:
                top += 1
                g.head[top] = -1
            g.bucket[entries, 0] = b
            g.bucket[entries, 1] = g.head[w]
            g.head[w] = entries
            entries += 1
            _orient(g, a, b)
    return top, entries


@kernel
def orient_component(g, first, count):  # type: ignore[no-untyped-def]
    """Orients a chain component along a maximum cardinality search that begins with given nodes.

    Chain components are chordal, so such an order leaves no new collider. Nodes of the component
    that are reached from the first ones only are all of it.

    Args:
        first: int32 array, its first `count` entries are the beginning of the order.
    """
    stamp = new_stamp(g)
    top, entries = 0, 0
    g.head[0] = -1
    for i in range(count):
        top, entries = _visit(g, first[i], stamp, top, entries)
    while top > 0:
        entry = g.head[top]
        if entry < 0:
            top -= 1
            continue
        g.head[top] = g.bucket[entry, 1]
        a = g.bucket[entry, 0]
        if g.seen[a] != stamp and g.weight[a] == top:
            top, entries = _visit(g, a, stamp, top, entries)


@kernel
def _check_around(g, u, v):  # type: ignore[no-untyped-def]
    _enqueue_into(g, u)
    _enqueue_into(g, v)
    _enqueue_out_of(g, u)
    _enqueue_out_of(g, v)
    _enqueue_common_children(g, u, v)


@kernel
def insert(g, u, v, first, count):  # type: ignore[no-untyped-def]
    """Adds u → v; the `count` nodes in `first` (neighbours of v) become its parents before."""
    first[count] = v
    orient_component(g, first, count + 1)
    _orient(g, u, v)
    _enqueue_into(g, v)
    _enqueue_common_children(g, u, v)
    _settle(g)


@kernel
def delete(g, u, v, first, count):  # type: ignore[no-untyped-def]
    """Removes the edge between u and v; nodes in `first` become parents of v before."""
    if is_line(g, u, v):
        first[count] = u
        count += 1
    first[count] = v
    orient_component(g, first, count + 1)
    set_pair(g, u, v, 0, 0)
    _check_around(g, u, v)
    _settle(g)


@kernel
def turn(g, u, v, first, count):  # type: ignore[no-untyped-def]
    """Makes u → v of v → u or of a line; nodes in `first` become parents of v before."""
    first[count] = v
    if is_line(g, u, v):
        first[count + 1] = u
        orient_component(g, first, count + 2)
    else:
        orient_component(g, first, count + 1)
        first[0] = u
        orient_component(g, first, 1)
    set_pair(g, u, v, 1, 0)
    _enqueue(g, u, v)
    _check_around(g, u, v)
    _settle(g)


@cached_kernel
def essential_from_dag(g, dag):  # type: ignore[no-untyped-def]
    """Fills an empty graph with the essential graph of a DAG, uint8 (p, p)."""
    p = dag.shape[0]
    for a in range(p):
        for b in range(p):
            if dag[a, b]:
                _orient(g, a, b)
    _settle(g)
    clear_log(g)


@cached_kernel
def load(g, edge):  # type: ignore[no-untyped-def]
    """Fills an empty graph with arrows and lines, uint8 (p, p), as they are."""
    p = edge.shape[0]
    for a in range(p):
        for b in range(a):
            set_pair(g, a, b, edge[a, b], edge[b, a])
    clear_log(g)
