"""What is searched and the scratch of a search; the walk over cliques of neighbours."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, kernel, reference
from causal.pdag import Edges, Graph, Nodes, adjacent

Floats = NDArray[Any]

#: A step must gain more than this (pcalg: the square root of the machine's epsilon).
MIN_GAIN = 1.4901161193847656e-08
#: More cliques than this among one node's neighbours are not looked at: 2^n of them would hang.
MAX_CLIQUES = 1 << 16


class Problem(NamedTuple):
    """What is searched: the score of p columns, and which edges may exist.

    Attributes:
        local: the local scores, `gaussian.Gaussian` or `tables.Tables`.
        allowed: uint8 (p, p), [x, y] = 1 if x → y may be in the graph.
        required: uint8 (p, p), [x, y] = 1 if x → y must stay.
        restricted: uint8 (1,), 1 if some class of the search may have no member that obeys
            `allowed` and `required`, so that every move has to be checked.
    """

    local: Any
    allowed: NDArray[Any]
    required: NDArray[Any]
    restricted: NDArray[Any]


class _ProblemType(Reference):
    pass


ProblemRef = reference(Problem, _ProblemType)


class Work(NamedTuple):
    """Scratch of the kernels for p nodes.

    Attributes:
        gain: float64 (p,), of every source.
        lost: float64 (p + 2,), of every parent.
        parents, neighbours, children: int64 (p,).
        chosen, members: int64 (p + 2,), the clique being enumerated.
        limited: int64 (1,), 1 if a bound on parents or cliques left moves out.
    """

    gain: NDArray[Any]
    lost: NDArray[Any]
    parents: NDArray[Any]
    neighbours: NDArray[Any]
    children: NDArray[Any]
    chosen: NDArray[Any]
    members: NDArray[Any]
    limited: NDArray[Any]


class _WorkType(Reference):
    pass


WorkRef = reference(Work, _WorkType)


def make_work(p: int) -> Work:
    """Scratch for p nodes."""
    return Work(
        gain=np.empty(p),
        lost=np.empty(p + 2),
        parents=np.empty(p, np.int64),
        neighbours=np.empty(p, np.int64),
        children=np.empty(p, np.int64),
        chosen=np.empty(p + 2, np.int64),
        members=np.empty(p + 2, np.int64),
        limited=np.zeros(1, np.int64),
    )


@kernel
def split(
    g: Graph, v: int, parents: Nodes, neighbours: Nodes, children: Nodes
) -> tuple[int, int, int]:
    """Fills the three lists of v, ascending, and returns their lengths."""
    edge, near = g.edge, g.near
    a, b, c = 0, 0, 0
    for i in range(g.degree[v]):
        u = near[v, i]
        if edge[u, v] == 0:
            children[c] = u
            c += 1
        elif edge[v, u] == 0:
            parents[a] = u
            a += 1
        else:
            neighbours[b] = u
            b += 1
    return a, b, c


@kernel
def next_clique(
    edge: Edges, neighbours: Nodes, count: int, chosen: Nodes, size: int, start: int
) -> int:
    """One step of the depth-first walk over all cliques of a list of neighbours.

    `chosen` holds positions in `neighbours`. To a clique of `size` members, tries to add a position
    of at least `start`, else backs up. Returns the size of the next clique, whose last member is
    chosen[size - 1], or -1 at the end.
    """
    while True:
        for i in range(start, count):
            fits = True
            for j in range(size):
                if not adjacent(edge, neighbours[i], neighbours[chosen[j]]):
                    fits = False
                    break
            if fits:
                chosen[size] = i
                return size + 1
        if size == 0:
            return -1
        size -= 1
        start = chosen[size] + 1


@kernel
def clique_at(g: Graph, w: Work, v: int, index: int) -> int:
    """Writes the members of clique number `index` of v's neighbours; returns their number."""
    m = split(g, v, w.parents, w.neighbours, w.children)[1]
    size, start = 0, 0
    for _ in range(index):
        size = next_clique(g.edge, w.neighbours, m, w.chosen, size, start)
        start = w.chosen[size - 1] + 1
    for j in range(size):
        w.members[j] = w.neighbours[w.chosen[j]]
    return size
