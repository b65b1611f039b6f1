"""Kernels on the search's state: an interventional essential graph, changed one move at a time.

A move turns the chain component of its target into arrows that suit it, changes one edge, and then
replaces unprotected arrows by lines until none is left (Hauser and Bühlmann, JMLR 13, 2012,
sections 3 and 4). Only arrows whose protection can have changed are looked at.

Interventions enter through `kind`: two nodes have the same kind if no target separates them; an
edge between two kinds always stays an arrow. Tiers are kinds too: a boundary between tiers protects
the edges across it exactly as an intervention on all later tiers would.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, cached_kernel, kernel, reference

# Any, because what is taken out of them serves as an index; see `Graph` for the types.
Edges = NDArray[Any]
Nodes = NDArray[Any]

#: Positions in `Graph.size`.
LOGGED, QUEUED, STAMP = 0, 1, 2
#: Moves.
INSERT, DELETE, TURN = 0, 1, 2


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

    edge: NDArray[Any]
    near: NDArray[Any]
    degree: NDArray[Any]
    kind: NDArray[Any]
    log: NDArray[Any]
    logged: NDArray[Any]
    queue: NDArray[Any]
    queued: NDArray[Any]
    seen: NDArray[Any]
    stack: NDArray[Any]
    previous: NDArray[Any]
    weight: NDArray[Any]
    head: NDArray[Any]
    bucket: NDArray[Any]
    size: NDArray[Any]


class _GraphType(Reference):
    pass


GraphRef = reference(Graph, _GraphType)


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
def adjacent(edge: Edges, a: int, b: int) -> bool:
    """Says whether there is an edge between a and b, directed or not."""
    return bool(edge[a, b] != 0 or edge[b, a] != 0)


@kernel
def is_arrow(edge: Edges, a: int, b: int) -> bool:
    """Says whether a → b."""
    return bool(edge[a, b] != 0 and edge[b, a] == 0)


@kernel
def is_line(edge: Edges, a: int, b: int) -> bool:
    """Says whether a - b, undirected."""
    return bool(edge[a, b] != 0 and edge[b, a] != 0)


@kernel
def _list_insert(near: Nodes, degree: Nodes, a: int, b: int) -> None:
    i = degree[a]
    while i > 0 and near[a, i - 1] > b:
        near[a, i] = near[a, i - 1]
        i -= 1
    near[a, i] = b
    degree[a] += 1


@kernel
def _list_remove(near: Nodes, degree: Nodes, a: int, b: int) -> None:
    i = 0
    while near[a, i] != b:
        i += 1
    degree[a] -= 1
    for j in range(i, degree[a]):
        near[a, j] = near[a, j + 1]


@kernel
def set_pair(g: Graph, a: int, b: int, forth: int, back: int) -> None:
    """Sets a → b (forth) and b → a (back), and logs what the pair was."""
    edge = g.edge
    if edge[a, b] == forth and edge[b, a] == back:
        return
    low, high = min(a, b), max(a, b)
    if g.logged[low, high] == 0:
        g.logged[low, high] = 1
        log, n = g.log, g.size[LOGGED]
        log[n, 0], log[n, 1] = low, high
        log[n, 2] = edge[low, high] + 2 * edge[high, low]
        g.size[LOGGED] = n + 1
    was = adjacent(edge, a, b)
    edge[a, b] = forth
    edge[b, a] = back
    if was and forth == 0 and back == 0:
        _list_remove(g.near, g.degree, a, b)
        _list_remove(g.near, g.degree, b, a)
    elif not was:
        _list_insert(g.near, g.degree, a, b)
        _list_insert(g.near, g.degree, b, a)


@kernel
def clear_log(g: Graph) -> None:
    """Forgets the logged changes, which stay made."""
    log, logged = g.log, g.logged
    for i in range(g.size[LOGGED]):
        logged[log[i, 0], log[i, 1]] = 0
    g.size[LOGGED] = 0


@kernel
def undo(g: Graph) -> None:
    """Takes back every change in the log, and clears it."""
    for i in range(g.size[LOGGED]):
        code = g.log[i, 2]
        set_pair(g, g.log[i, 0], g.log[i, 1], code & 1, code >> 1)
    clear_log(g)


@kernel
def new_stamp(g: Graph) -> int:
    """Gives a mark that no earlier walk over the graph has left on a node."""
    g.size[STAMP] += 1
    return int(g.size[STAMP])


@kernel
def path_exists(g: Graph, start: int, end: int, stamp: int, skip_direct: bool) -> bool:
    """Is there a path start → … → end along arrows and lines, avoiding nodes seen at `stamp`?

    `skip_direct` leaves out the edge between start and end. If there is one, `previous` leads back
    from end to start along a shortest: the fewer edges it has, the longer it blocks.
    """
    edge, near, degree, seen = g.edge, g.near, g.degree, g.seen
    stack, previous = g.stack, g.previous
    if seen[start] == stamp or seen[end] == stamp:
        return False
    seen[start] = stamp
    stack[0] = start
    i, n = 0, 1
    while i < n:
        a = stack[i]
        i += 1
        for j in range(degree[a]):
            b = near[a, j]
            if edge[a, b] == 0 or seen[b] == stamp:
                continue
            if b == end:
                if skip_direct and a == start:
                    continue
                previous[b] = a
                return True
            previous[b] = a
            seen[b] = stamp
            stack[n] = b
            n += 1
    return False


@kernel
def _enqueue(g: Graph, a: int, b: int) -> None:
    if g.queued[a, b] == 0:
        g.queued[a, b] = 1
        n = g.size[QUEUED]
        g.queue[n, 0], g.queue[n, 1] = a, b
        g.size[QUEUED] = n + 1


@kernel
def _enqueue_at(g: Graph, a: int, incoming: bool, outgoing: bool) -> None:
    """Has the arrows into a, or out of it, checked."""
    edge, near = g.edge, g.near
    for i in range(g.degree[a]):
        b = near[a, i]
        if incoming and is_arrow(edge, b, a):
            _enqueue(g, b, a)
        elif outgoing and is_arrow(edge, a, b):
            _enqueue(g, a, b)


@kernel
def _protected(g: Graph, a: int, b: int) -> bool:
    """Is the arrow a → b strongly protected (configurations a to d of the paper)?"""
    edge, near, degree = g.edge, g.near, g.degree
    if g.kind[a] != g.kind[b]:
        return True
    for i in range(degree[a]):
        c = near[a, i]
        if is_arrow(edge, c, a) and not adjacent(edge, c, b):
            return True
    lines = False
    for i in range(degree[b]):
        c = near[b, i]
        if c == a or not is_arrow(edge, c, b):
            continue
        if edge[c, a] == 0:
            return True  # not connected to a, or a → c
        lines = lines or edge[a, c] != 0
    return lines and _two_apart(edge, near, degree, a, b)


@kernel
def _two_apart(edge: Edges, near: Nodes, degree: Nodes, a: int, b: int) -> bool:
    """Are there two unconnected parents of b that are both connected to a, one by a line?

    While arrows are still being replaced, the other may still point into a; two that point into a
    are a collider and protect nothing.
    """
    for i in range(degree[b]):
        c = near[b, i]
        if c == a or not is_arrow(edge, c, b) or not is_line(edge, a, c):
            continue
        for j in range(degree[b]):
            d = near[b, j]
            if d != a and d != c and is_arrow(edge, d, b) and not adjacent(edge, c, d):
                return True
    return False


@kernel
def _settle(g: Graph) -> None:
    """Replaces unprotected arrows by lines until every arrow is protected."""
    while g.size[QUEUED] > 0:
        n = g.size[QUEUED] - 1
        g.size[QUEUED] = n
        a, b = g.queue[n, 0], g.queue[n, 1]
        g.queued[a, b] = 0
        if not is_arrow(g.edge, a, b) or _protected(g, a, b):
            continue
        set_pair(g, a, b, 1, 1)
        _enqueue_at(g, b, True, True)
        _enqueue_at(g, a, False, True)


@kernel
def _visit(g: Graph, a: int, stamp: int, top: int, entries: int) -> tuple[int, int]:
    """Orients a's lines away from it; returns the highest weight and the bucket's length."""
    seen, weight, head, bucket = g.seen, g.weight, g.head, g.bucket
    seen[a] = stamp
    for i in range(g.degree[a]):
        b = g.near[a, i]
        if not is_line(g.edge, a, b) or seen[b] == stamp:
            continue
        if seen[b] != -stamp:
            seen[b] = -stamp
            weight[b] = 0
        weight[b] += 1
        w = weight[b]
        while top < w:
            top += 1
            head[top] = -1
        bucket[entries, 0], bucket[entries, 1] = b, head[w]
        head[w] = entries
        entries += 1
        set_pair(g, a, b, 1, 0)
        _enqueue(g, a, b)
    return top, entries


@kernel
def orient_component(g: Graph, first: Nodes, count: int) -> None:
    """Orients a chain component along a maximum cardinality search that begins with given nodes.

    Chain components are chordal, so such an order leaves no new collider.

    Args:
        first: its first `count` entries are the beginning of the order.
    """
    stamp = new_stamp(g)
    top, entries, i = 0, 0, 0
    while i < count or top > 0:
        if i < count:
            a = first[i]
            i += 1
        else:
            entry = g.head[top]
            if entry < 0:
                top -= 1
                continue
            g.head[top] = g.bucket[entry, 1]
            a = g.bucket[entry, 0]
            if g.seen[a] == stamp or g.weight[a] != top:
                continue
        top, entries = _visit(g, a, stamp, top, entries)


@kernel
def change(g: Graph, move: int, u: int, v: int, first: Nodes, count: int) -> None:
    """Makes a move of u → v: INSERT adds it, DELETE removes the edge, TURN makes v → u (or a line)
    u → v.

    Args:
        first: its first `count` entries, neighbours of v, become parents of v before; there is
            room for two more.
    """
    line = is_line(g.edge, u, v)
    if move == DELETE and line:
        first[count] = u
        count += 1
    first[count] = v
    count += 1
    if move == TURN and line:
        first[count] = u
        count += 1
    orient_component(g, first, count)
    if move == TURN and not line:
        first[0] = u
        orient_component(g, first, 1)
    added = 0 if move == DELETE else 1
    set_pair(g, u, v, added, 0)
    if added:
        _enqueue(g, u, v)
    _enqueue_at(g, v, True, move != INSERT)
    if move != INSERT:
        _enqueue_at(g, u, True, True)
    # Colliders and chains through both ends protect arrows into their common children.
    for i in range(g.degree[u]):
        b = g.near[u, i]
        if is_arrow(g.edge, u, b) and is_arrow(g.edge, v, b):
            _enqueue_at(g, b, True, False)
    _settle(g)


@cached_kernel
def settle_all(graph: Graph, edge: Edges, orient: bool) -> None:
    """Fills an empty graph with arrows and lines, uint8 (p, p), and replaces unprotected arrows.

    From a DAG this gives the essential graph of its class; an essential graph stays what it is.
    With `orient` every line is then directed, so that it becomes a DAG of its class.
    """
    g = GraphRef(*graph)
    p = edge.shape[0]
    for a in range(p):
        for b in range(a):
            set_pair(g, a, b, edge[a, b], edge[b, a])
    for a in range(p):
        _enqueue_at(g, a, False, True)
    _settle(g)
    if orient:
        first = np.empty(1, np.int64)
        for a in range(p):
            first[0] = a
            orient_component(g, first, 1)
        for i in range(g.size[QUEUED]):
            g.queued[g.queue[i, 0], g.queue[i, 1]] = 0
        g.size[QUEUED] = 0
    clear_log(g)
