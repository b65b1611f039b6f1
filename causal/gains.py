"""Kernels that score moves: what a new parent, a lost parent or a turned edge is worth.

For one target and one set of parents a single Cholesky factor gives the gain of every candidate
source at once: its rows, extended over all columns, leave each column's residual variance and its
residual covariance with the target. All variances are relative (correlation matrices).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import kernel
from causal.pdag import adjacent

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

    correlation: NDArray[np.float64]
    pattern: NDArray[np.int64]
    rows: NDArray[np.float64]
    threshold: NDArray[np.float64]
    penalty: NDArray[np.float64]
    allowed: NDArray[np.uint8]
    required: NDArray[np.uint8]
    restricted: NDArray[np.uint8]


class Work(NamedTuple):
    """Scratch of the kernels for p nodes and at most `depth` parents of one node.

    Attributes:
        row: float64 (depth + 2, p), rows of the factor over all columns.
        residual: float64 (depth + 2, p), residual variances after as many rows.
        target: float64 (p,), residual covariances with the target.
        small, small_row, small_residual: the same over a node and its neighbourhood.
        other, other_row, other_residual: once more, for the second node of a turned edge.
        parents, neighbours, children: int32 (p,).
        clique, chosen, members: int32 (p + 2,), the clique being enumerated.
    """

    row: NDArray[np.float64]
    residual: NDArray[np.float64]
    target: NDArray[np.float64]
    small: NDArray[np.float64]
    small_row: NDArray[np.float64]
    small_residual: NDArray[np.float64]
    other: NDArray[np.float64]
    other_row: NDArray[np.float64]
    other_residual: NDArray[np.float64]
    parents: NDArray[np.int32]
    neighbours: NDArray[np.int32]
    children: NDArray[np.int32]
    clique: NDArray[np.int32]
    chosen: NDArray[np.int32]
    members: NDArray[np.int32]


#: More parents than this a node never gets; it bounds the scratch memory.
MAX_PARENTS = 256


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
        clique=np.empty(p + 2, np.int32),
        chosen=np.empty(p + 2, np.int32),
        members=np.empty(p + 2, np.int32),
    )


@kernel
def split(g, v, parents, neighbours, children):  # type: ignore[no-untyped-def]
    """Fills the three lists of v, ascending, and returns their lengths."""
    a, b, c = 0, 0, 0
    row = g.near[v]
    for i in range(g.degree[v]):
        u = row[i]
        if g.edge[u, v]:
            if g.edge[v, u]:
                neighbours[b] = u
                b += 1
            else:
                parents[a] = u
                a += 1
        else:
            children[c] = u
            c += 1
    return a, b, c


@kernel
def add_row(matrix, row, residual, r, s):  # type: ignore[no-untyped-def]
    """Adds column s to the factor as row r; a column that the others determine adds nothing."""
    pivot = residual[r, s]
    width = matrix.shape[1]
    new, before, after = row[r], residual[r], residual[r + 1]
    if pivot < PIVOT:
        for x in range(width):
            new[x] = 0.0
            after[x] = before[x]
        return
    source = matrix[s]
    for x in range(width):
        new[x] = source[x]
    for q in range(r):
        factor, old = row[q, s], row[q]
        for x in range(width):
            new[x] -= factor * old[x]
    scale = 1.0 / np.sqrt(pivot)
    for x in range(width):
        new[x] *= scale
        after[x] = before[x] - new[x] * new[x]


@kernel
def target_row(matrix, row, r, y, target):  # type: ignore[no-untyped-def]
    """Residual covariance of every column with y after r rows."""
    width = matrix.shape[1]
    source = matrix[y]
    for x in range(width):
        target[x] = source[x]
    for q in range(r):
        factor, old = row[q, y], row[q]
        for x in range(width):
            target[x] -= factor * old[x]


@kernel
def next_clique(g, neighbours, count, chosen, size, start):  # type: ignore[no-untyped-def]
    """One step of the depth-first walk over all cliques of a neighbour list.

    `chosen` holds positions in `neighbours`. From a clique of `size` members, tries to add a
    position of at least `start`, else backs up. Returns the new size, or -1 at the end. A new
    clique is there exactly when one call returns; its last member is chosen[size - 1].
    """
    while True:
        i = start
        while i < count:
            fits = True
            for j in range(size):
                if not adjacent(g, neighbours[i], neighbours[chosen[j]]):
                    fits = False
                    break
            if fits:
                chosen[size] = i
                return size + 1
            i += 1
        if size == 0:
            return -1
        size -= 1
        start = chosen[size] + 1


@kernel
def clique_at(g, w, v, index):  # type: ignore[no-untyped-def]
    """Writes the members of clique number `index` of v's neighbours; returns their number."""
    _, m, _ = split(g, v, w.parents, w.neighbours, w.children)
    size, start = 0, 0
    for _ in range(index):
        size = next_clique(g, w.neighbours, m, w.chosen, size, start)
        start = w.chosen[size - 1] + 1
    for j in range(size):
        w.members[j] = w.neighbours[w.chosen[j]]
    return size


@kernel
def gather(problem, y, nodes, count, small, residual):  # type: ignore[no-untyped-def]
    """Correlations among `count` nodes and y (last), in y's pattern."""
    matrix = problem.correlation[problem.pattern[y]]
    for i in range(count):
        row = matrix[nodes[i]]
        for j in range(count):
            small[i, j] = row[nodes[j]]
        small[i, count] = row[y]
        small[count, i] = row[y]
        residual[0, i] = row[nodes[i]]
    small[count, count] = matrix[y, y]
    residual[0, count] = matrix[y, y]


@kernel
def fit_gain(problem, y, squared):  # type: ignore[no-untyped-def]
    """Log-likelihood gained by a parent with this squared partial correlation."""
    return -0.5 * problem.rows[y] * np.log1p(-squared)


@kernel
def relative_variance(problem, w, y, nodes, count):  # type: ignore[no-untyped-def]
    """Residual variance of y given `count` nodes, as a share of its variance."""
    width = count + 1
    small, row = w.other[:width, :width], w.other_row[:, :width]
    residual = w.other_residual[:, :width]
    gather(problem, y, nodes, count, small, residual)
    for i in range(count):
        add_row(small, row, residual, i, i)
    return residual[count, count]


@kernel
def loss_of(problem, w, y, nodes, count, x):  # type: ignore[no-untyped-def]
    """Log-likelihood that y loses when x leaves the parents `nodes` + x."""
    nodes[count] = x
    width = count + 2
    small, row = w.other[:width, :width], w.other_row[:, :width]
    residual = w.other_residual[:, :width]
    gather(problem, y, nodes, count + 1, small, residual)
    for i in range(count):
        add_row(small, row, residual, i, i)
    covariance = small[count, count + 1]
    for q in range(count):
        covariance -= row[q, count] * row[q, count + 1]
    a, b = residual[count, count], residual[count, count + 1]
    if a < PIVOT or b < PIVOT:
        return 0.0
    return fit_gain(problem, y, min(covariance * covariance / (a * b), 1.0 - PIVOT))


@kernel
def best_deletion(g, problem, w, y, loss):  # type: ignore[no-untyped-def]
    """The best deletion of an edge into y: gain, source, clique number (gain 0 if none).

    Also fills loss[y, x] for every parent x: the log-likelihood lost with x, lines left out.
    """
    k, m, _ = split(g, y, w.parents, w.neighbours, w.children)
    best, source, clique = 0.0, -1, 0
    size, start, index = 0, 0, 0
    while size >= 0:
        for i in range(k):
            w.members[i] = w.parents[i]
        for j in range(size):
            w.members[k + j] = w.neighbours[w.chosen[j]]
        total = k + size
        width = total + 1
        small, row = w.small[:width, :width], w.small_row[:, :width]
        residual = w.small_residual[:, :width]
        gather(problem, y, w.members, total, small, residual)
        for i in range(total):
            add_row(small, row, residual, i, i)
        # Row i holds column j's coordinate: row[i, j] for j >= i is the factor, transposed.
        rest = residual[total, total]
        for i in range(total):
            x = w.members[i]
            lost = _loss_at(row, total, i, rest, problem.rows[y], w.target)
            if size == 0:
                loss[y, x] = lost
            gain = problem.penalty[0] - lost
            if problem.required[x, y] or problem.required[y, x] or gain <= MIN_GAIN:
                continue
            if gain > best or (gain == best and x < source):
                best, source, clique = gain, x, index
        size = next_clique(g, w.neighbours, m, w.chosen, size, start)
        if size > 0:
            start = w.chosen[size - 1] + 1
        index += 1
    return best, source, clique


@kernel
def _loss_at(row, total, i, rest, rows, scratch):  # type: ignore[no-untyped-def]
    """Log-likelihood lost with member i: by its coefficient and the inverse's diagonal.

    With z = column i of the inverse of the (lower) factor, the coefficient is z' t and the inverse
    covariance's diagonal z' z, t the target's coordinates.
    """
    if row[i, i] == 0.0:
        return 0.0
    coefficient, diagonal = 0.0, 0.0
    for a in range(i, total):
        value = 1.0 if a == i else 0.0
        if row[a, a] == 0.0:
            scratch[a] = 0.0
            continue
        for b in range(i, a):
            value -= row[b, a] * scratch[b]
        scratch[a] = value / row[a, a]
        coefficient += scratch[a] * row[a, total]
        diagonal += scratch[a] * scratch[a]
    return 0.5 * rows * np.log1p(coefficient * coefficient / (diagonal * max(rest, PIVOT)))
