"""Kernels of the Gaussian scores: what a new parent, a lost parent or a turned edge is worth.

For one target and one set of parents a single Cholesky factor gives the gain of every candidate
source at once: its rows, extended over all columns, leave each column's residual variance and its
residual covariance with the target. All variances are relative (correlation matrices).
`causal.scoring` says what each of the functions is for.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, kernel, reference
from causal.pdag import Edges, Graph, Nodes
from causal.problem import Floats

#: A column whose residual variance falls below this share of its variance is determined by others.
PIVOT = 1e-10

#: More parents than this a node never gets; it bounds the scratch memory.
MAX_PARENTS = 256


class Gaussian(NamedTuple):
    """The score of p columns, and scratch for at most `depth` parents of one node.

    Attributes:
        correlation: float64 (patterns, p, p).
        pattern: int64 (p,), the matrix of each target.
        rows: float64 (p,), rows of each target's regressions.
        threshold: float64 (p,), the squared partial correlation that pays for one parent.
        penalty: float64 (1,), score of one parent.
        row: float64 (depth + 2, p), rows of the factor over all columns.
        residual: float64 (depth + 2, p), residual variances after as many rows.
        target: float64 (p + 1,), residual covariances with the target.
        small, small_row, small_residual: the same over a node and its neighbourhood.
        other, other_row, other_residual: once more, for a family factorised by itself.
    """

    correlation: NDArray[Any]
    pattern: NDArray[Any]
    rows: NDArray[Any]
    threshold: NDArray[Any]
    penalty: NDArray[Any]
    row: NDArray[Any]
    residual: NDArray[Any]
    target: NDArray[Any]
    small: NDArray[Any]
    small_row: NDArray[Any]
    small_residual: NDArray[Any]
    other: NDArray[Any]
    other_row: NDArray[Any]
    other_residual: NDArray[Any]


class GaussianType(Reference):
    """Numba's type of `GaussianRef`."""


GaussianRef = reference(Gaussian, GaussianType)


def make_gaussian(
    correlation: NDArray[np.float64],
    pattern: NDArray[np.int64],
    rows: NDArray[np.float64],
    threshold: NDArray[np.float64],
    penalty: float,
) -> Gaussian:
    """The score with its scratch; see `Gaussian`."""
    p = len(pattern)
    depth = min(p, MAX_PARENTS) + 2
    return Gaussian(
        correlation=correlation,
        pattern=pattern,
        rows=rows,
        threshold=threshold,
        penalty=np.array([penalty]),
        row=np.empty((depth, p)),
        residual=np.empty((depth, p)),
        target=np.empty(p + 1),
        small=np.empty((p + 1, p + 1)),
        small_row=np.empty((depth, p + 1)),
        small_residual=np.empty((depth, p + 1)),
        other=np.empty((p + 1, p + 1)),
        other_row=np.empty((depth, p + 1)),
        other_residual=np.empty((depth, p + 1)),
    )


@kernel
def _add_row(matrix: Floats, row: Floats, residual: Floats, r: int, s: int, width: int) -> None:
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
def _gather(matrix: Floats, y: int, nodes: Nodes, count: int, small: Floats, rest: Floats) -> None:
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
def _fit_gain(rows: float, squared: float) -> float:
    """Log-likelihood gained by a parent with this squared partial correlation."""
    return float(-0.5 * rows * np.log1p(-squared))


@kernel
def _factorise(s: Gaussian, y: int, nodes: Nodes, count: int) -> None:
    """Fills the last scratch with the factor of `count` nodes, with y last."""
    _gather(s.correlation[s.pattern[y]], y, nodes, count, s.other, s.other_residual)
    for i in range(count):
        _add_row(s.other, s.other_row, s.other_residual, i, i, count + 1)


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


@kernel
def most_parents(s: Gaussian) -> int:
    """See `causal.scoring`."""
    return len(s.row) - 2


@kernel
def open_target(s: Gaussian, y: int) -> None:
    """See `causal.scoring`."""
    matrix = s.correlation[s.pattern[y]]
    for x in range(len(s.pattern)):
        s.residual[0, x] = matrix[x, x]


@kernel
def add_parent(s: Gaussian, y: int, r: int, x: int) -> None:
    """See `causal.scoring`."""
    _add_row(s.correlation[s.pattern[y]], s.row, s.residual, r, x, len(s.pattern))


@kernel
def source_gains(
    s: Gaussian,
    g: Graph,  # noqa: ARG001
    allowed: Edges,  # noqa: ARG001
    y: int,
    r: int,
    gain: Floats,
) -> None:
    """See `causal.scoring`; a source that is of no use costs next to nothing here."""
    matrix, row, residual, target = s.correlation[s.pattern[y]], s.row, s.residual, s.target
    p, own = len(s.pattern), s.residual[r, y]
    for x in range(p):
        gain[x] = 0.0
    if own < PIVOT:
        return
    for x in range(p):
        target[x] = matrix[y, x]
    for q in range(r):
        factor = row[q, y]
        for x in range(p):
            target[x] -= factor * row[q, x]
    bound, penalty, rows = s.threshold[y] * own, s.penalty[0], s.rows[y]
    for x in range(p):
        squared, rest = target[x] * target[x], residual[r, x]
        if squared <= bound * rest or rest < PIVOT or x == y:
            continue
        squared /= own * rest
        if own * (1.0 - squared) >= PIVOT:
            gain[x] = _fit_gain(rows, squared) - penalty


@kernel
def parent_losses(s: Gaussian, y: int, nodes: Nodes, count: int, lost: Floats) -> None:
    """See `causal.scoring`."""
    _factorise(s, y, nodes, count)
    rest = max(s.other_residual[count, count], PIVOT)
    for i in range(count):
        share = _explained(s.other_row, count, i, s.target) / rest
        lost[i] = 0.5 * s.rows[y] * np.log1p(share) - s.penalty[0]


@kernel
def open_near(s: Gaussian, v: int, near: Nodes, n: int) -> None:
    """See `causal.scoring`."""
    _gather(s.correlation[s.pattern[v]], v, near, n, s.small, s.small_residual)


@kernel
def add_near(s: Gaussian, v: int, r: int, at: int, near: Nodes, n: int) -> None:  # noqa: ARG001
    """See `causal.scoring`."""
    _add_row(s.small, s.small_row, s.small_residual, r, at, n + 1)


@kernel
def near_gain(s: Gaussian, v: int, r: int, at: int, near: Nodes, n: int) -> float:  # noqa: ARG001
    """See `causal.scoring`."""
    own, rest = s.small_residual[r, n], s.small_residual[r, at]
    if own < PIVOT or rest < PIVOT:
        return -np.inf
    covariance = s.small[at, n]
    for q in range(r):
        covariance -= s.small_row[q, at] * s.small_row[q, n]
    squared = covariance * covariance / (own * rest)
    if own * (1.0 - squared) < PIVOT:
        return -np.inf
    return float(_fit_gain(s.rows[v], squared) - s.penalty[0])


@kernel
def last_loss(s: Gaussian, y: int, nodes: Nodes, count: int) -> float:
    """See `causal.scoring`."""
    _factorise(s, y, nodes, count)
    last = count - 1
    # The last row is that node given the others: its coordinate of y is what it alone explains.
    rest, own = s.other_residual[last, count], s.other_row[last, count]
    if rest < PIVOT:
        return float(-s.penalty[0])
    return float(_fit_gain(s.rows[y], min(own * own / rest, 1.0 - PIVOT)) - s.penalty[0])


@kernel
def family_gain(s: Gaussian, y: int, nodes: Nodes, count: int) -> float:
    """See `causal.scoring`."""
    _factorise(s, y, nodes, count)
    rest = s.other_residual[count, count]
    fit = -0.5 * s.rows[y] * np.log(rest) if rest > 0.0 else 0.0
    return float(fit - s.penalty[0] * count)
