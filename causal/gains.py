"""Kernels that score moves: what a new parent, a lost parent or a turned edge is worth.

For one target and one set of parents a single Cholesky factor gives the gain of every candidate
source at once: its rows, extended over all columns, leave each column's residual variance and its
residual covariance with the target. All variances are relative (correlation matrices).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, kernel, reference
from causal.pdag import Edges, Graph, Nodes, adjacent

Floats = NDArray[Any]

#: A step must gain more than this (pcalg: the square root of the machine's epsilon).
MIN_GAIN = 1.4901161193847656e-08

#: A column whose residual variance falls below this share of its variance is determined by others.
PIVOT = 1e-10


class Problem(NamedTuple):
    """What is searched: the score of p columns, and which edges may exist.

    Attributes:
        correlation: float64 (patterns, p, p).
        pattern: int64 (p,), the matrix of each target.
        rows: float64 (p,), rows of each target's regressions.
        threshold: float64 (p,), the squared partial correlation that pays for one parent.
        penalty: float64 (1,), score of one parent.
        allowed: uint8 (p, p), [x, y] = 1 if x → y may be in the graph.
        required: uint8 (p, p), [x, y] = 1 if x → y must stay.
        restricted: uint8 (1,), 1 if some class of the search may have no member that obeys
            `allowed` and `required`, so that every move has to be checked.
    """

    correlation: NDArray[Any]
    pattern: NDArray[Any]
    rows: NDArray[Any]
    threshold: NDArray[Any]
    penalty: NDArray[Any]
    allowed: NDArray[Any]
    required: NDArray[Any]
    restricted: NDArray[Any]


class _ProblemType(Reference):
    pass


ProblemRef = reference(Problem, _ProblemType)


class Work(NamedTuple):
    """Scratch of the kernels for p nodes and at most `depth` parents of one node.

    Attributes:
        row: float64 (depth + 2, p), rows of the factor over all columns.
        residual: float64 (depth + 2, p), residual variances after as many rows.
        target: float64 (p,), residual covariances with the target.
        small, small_row, small_residual: the same over a node and its neighbourhood.
        other, other_row, other_residual: once more, for the second node of a turned edge.
        parents, neighbours, children: int32 (p,).
        chosen, members: int32 (p + 2,), the clique being enumerated.
        limited: int64 (1,), 1 if a bound on parents or cliques left moves out.
    """

    row: NDArray[Any]
    residual: NDArray[Any]
    target: NDArray[Any]
    small: NDArray[Any]
    small_row: NDArray[Any]
    small_residual: NDArray[Any]
    other: NDArray[Any]
    other_row: NDArray[Any]
    other_residual: NDArray[Any]
    parents: NDArray[Any]
    neighbours: NDArray[Any]
    children: NDArray[Any]
    chosen: NDArray[Any]
    members: NDArray[Any]
    limited: NDArray[Any]


class _WorkType(Reference):
    pass


WorkRef = reference(Work, _WorkType)


#: More parents than this a node never gets; it bounds the scratch memory.
MAX_PARENTS = 256
#: More cliques than this among one node's neighbours are not looked at: 2^n of them would hang.
MAX_CLIQUES = 1 << 16


def make_work(p: int) -> Work:
    """Scratch for p nodes."""
    depth = min(p, MAX_PARENTS) + 2
    return Work(
        row=np.empty((depth, p)),
        residual=np.empty((depth, p)),
        target=np.empty(p),
        small=np.empty((p + 1, p + 1)),
        small_row=np.empty((depth, p + 1)),
        small_residual=np.empty((depth, p + 1)),
        other=np.empty((p + 1, p + 1)),
        other_row=np.empty((depth, p + 1)),
        other_residual=np.empty((depth, p + 1)),
        parents=np.empty(p, np.int32),
        neighbours=np.empty(p, np.int32),
        children=np.empty(p, np.int32),
        chosen=np.empty(p + 2, np.int32),
        members=np.empty(p + 2, np.int32),
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
def add_row(matrix: Floats, row: Floats, residual: Floats, r: int, s: int, width: int) -> None:
    """Adds column s to the factor as row r, over `width` columns.

    A column that the rows before determine adds nothing.
    """
    pivot = residual[r, s]
    if pivot < PIVOT:
        for x in range(width):
            row[r, x] = 0.0
            residual[r + 1, x] = residual[r, x]
        return
    for x in range(width):
        row[r, x] = matrix[s, x]
    for q in range(r):
        factor = row[q, s]
        for x in range(width):
            row[r, x] -= factor * row[q, x]
    scale = 1.0 / np.sqrt(pivot)
    for x in range(width):
        value = row[r, x] * scale
        row[r, x] = value
        residual[r + 1, x] = residual[r, x] - value * value


@kernel
def covariance_rest(matrix: Floats, row: Floats, r: int, x: int, y: int) -> float:
    """Residual covariance of columns x and y after r rows."""
    value = matrix[x, y]
    for q in range(r):
        value -= row[q, x] * row[q, y]
    return float(value)


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


@kernel
def gather(matrix: Floats, y: int, nodes: Nodes, count: int, small: Floats, rest: Floats) -> None:
    """Copies the correlations among `count` nodes and y, which comes last."""
    for i in range(count):
        a = nodes[i]
        for j in range(i):
            value = matrix[a, nodes[j]]
            small[i, j], small[j, i] = value, value
        small[i, i] = matrix[a, a]
        small[i, count], small[count, i] = matrix[a, y], matrix[a, y]
        rest[0, i] = matrix[a, a]
    small[count, count] = matrix[y, y]
    rest[0, count] = matrix[y, y]


@kernel
def fit_gain(rows: float, squared: float) -> float:
    """Log-likelihood gained by a parent with this squared partial correlation."""
    return float(-0.5 * rows * np.log1p(-squared))


@kernel
def factorise(problem: Problem, w: Work, y: int, nodes: Nodes, count: int) -> None:
    """Fills the second scratch with the factor of `count` nodes, with y last."""
    matrix = problem.correlation[problem.pattern[y]]
    gather(matrix, y, nodes, count, w.other, w.other_residual)
    for i in range(count):
        add_row(w.other, w.other_row, w.other_residual, i, i, count + 1)


@kernel
def loss_of(problem: Problem, w: Work, y: int, nodes: Nodes, count: int, x: int) -> float:
    """Log-likelihood that y loses when x leaves the parents `nodes` + x."""
    nodes[count] = x
    factorise(problem, w, y, nodes, count + 1)
    # The last row is x given the others: its coordinate of y is what x alone explains.
    rest, own = w.other_residual[count, count + 1], w.other_row[count, count + 1]
    if rest < PIVOT:
        return 0.0
    return fit_gain(problem.rows[y], min(own * own / rest, 1.0 - PIVOT))


@kernel
def score_deletions(
    g: Graph, problem: Problem, w: Work, y: int, gains: Floats, cliques: Nodes, loss: Floats
) -> float:
    """Fills row y of `gains` and `cliques` with the best deletion of each edge into y.

    Also fills loss[y, x] for every parent x: the log-likelihood lost with x, lines left out.
    Required edges get a gain of minus infinity. Returns the largest gain, 0 if none gains.
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
        total = min(k + size, len(w.other_row) - 2)
        factorise(problem, w, y, w.members, total)
        rest = max(w.other_residual[total, total], PIVOT)
        for i in range(total):
            x = w.members[i]
            share = _explained(w.other_row, total, i, w.target) / rest
            lost = 0.5 * problem.rows[y] * np.log1p(share)
            if size == 0:
                loss[y, x] = lost
            gain = problem.penalty[0] - lost
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
def _explained(row: Floats, total: int, i: int, column: Floats) -> float:
    """Variance that only member i explains: its squared coefficient over the inverse's diagonal.

    `row[b, a]` for a >= b is the factor, transposed; `column` becomes column i of its inverse.
    """
    if row[i, i] == 0.0:
        return 0.0
    coefficient, diagonal = 0.0, 0.0
    for a in range(i, total):
        column[a] = 0.0
        if row[a, a] == 0.0:
            continue
        value = 1.0 if a == i else 0.0
        for b in range(i, a):
            value -= row[b, a] * column[b]
        value /= row[a, a]
        column[a] = value
        coefficient += value * row[a, total]
        diagonal += value * value
    return coefficient * coefficient / diagonal
