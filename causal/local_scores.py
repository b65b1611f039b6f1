"""Gaussian local scores straight from sparse counts, for what must not be dense.

The search kernels want a dense correlation matrix; merging looks at few columns at a time, and at
20,000 columns that matrix would be 3 GB. The score is theirs (`causal.scores`, an intercept for
each stratum), and so is the treatment of columns that others determine (`causal.gaussian`).

Sums are written without BLAS: with it, a result could depend on the number of threads.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from causal.columns import Cooccurrence

#: A column whose residual variance falls below this share of its variance is determined by others.
PIVOT = 1e-10

#: The search's bound (`causal.gaussian`).
_MAX_PARENTS = 256


class ColumnScores(Protocol):
    """Local scores of p columns, one column at a time: `LocalScores` or `CountScores`."""

    @property
    def empty(self) -> NDArray[np.float64]:
        """Local scores without parents, float64 (p,)."""
        ...

    @property
    def max_parents(self) -> int:
        """More than these a column may not have."""
        ...

    def local(self, column: int, parents: NDArray[np.int64]) -> float:
        """Score of one column given its parents."""
        ...

    def losses(self, column: int, parents: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the score would lose with each parent, float64 (k,): fit less cost."""
        ...

    def changes(
        self, column: int, parents: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each parent adds to the score of a column, and what each source would add."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalScores:
    """Gaussian scores of one column given its parents; p columns.

    Attributes:
        num_rows: n.
        penalty: score of one parent.
        stratum_rows: float64 (S,).
        sums: float64 (S, p), rows of each stratum that have the column.
        keys: int64, ascending: a * p + b for every two columns a, b that share a row.
        joint: int64, rows that have both.
        variance: float64 (p,), centred on the strata's means, times n.
        empty: float64 (p,), local scores without parents.
    """

    num_rows: int
    penalty: float
    stratum_rows: NDArray[np.float64]
    sums: NDArray[np.float64]
    keys: NDArray[np.int64]
    joint: NDArray[np.int64]
    variance: NDArray[np.float64]
    empty: NDArray[np.float64]

    @classmethod
    def of(cls, counts: Cooccurrence, penalty: float) -> "LocalScores":
        """The scores of all columns of some counts; an edge costs `penalty`."""
        total = counts.total
        total.sort_indices()
        p, n = total.shape[0], counts.num_rows
        row = np.repeat(np.arange(p, dtype=np.int64), np.diff(total.indptr))
        stratum_rows = np.maximum(counts.rows, 1).astype(np.float64)
        sums = np.array([s.diagonal() for s in counts.strata], np.float64)
        variance = total.diagonal() - (sums * sums / stratum_rows[:, None]).sum(axis=0)
        # Integers over integers: what does not vary gives exactly 0, or rounding noise.
        variance = np.where(variance > 1e-9, variance, 0.0)
        spread = np.where(variance > 0, variance, 1.0) / max(n, 1)
        empty = np.where(variance > 0, -0.5 * n * (1 + np.log(spread)), 0.0) - penalty
        keys = row * p + total.indices
        return cls(n, penalty, stratum_rows, sums, keys, total.data, variance, empty)

    @property
    def max_parents(self) -> int:
        """More than these a column may not have."""
        return _MAX_PARENTS

    def correlation(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """Correlations of columns within strata, float64, a and b broadcast; 0 without spread."""
        wanted = a * self.sums.shape[1] + b
        place = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        if len(self.keys) == 0:
            return np.zeros(wanted.shape)
        both = np.where(self.keys[place] == wanted, self.joint[place], 0).astype(np.float64)
        for rows, sums in zip(self.stratum_rows, self.sums, strict=True):
            both -= sums[a] * sums[b] / rows
        scale = self.variance[a] * self.variance[b]
        varies = scale > 0
        result: NDArray[np.float64] = np.where(
            varies, both / np.sqrt(np.where(varies, scale, 1)), 0
        )
        return result

    def local(self, column: int, parents: NDArray[np.int64]) -> float:
        """Score of one column given its parents, int64 (k,)."""
        if len(parents) == 0:
            return float(self.empty[column])
        paid = float(self.empty[column]) - self.penalty * len(parents)
        if self.variance[column] == 0:
            return paid
        rest = float(self._factor(column, parents, parents[:0])[1][len(parents)])
        return paid - 0.5 * self.num_rows * math.log(max(rest, PIVOT))

    def losses(self, column: int, parents: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the score would lose with each parent, float64 (k,): fit less penalty.

        Of parents that determine each other only the first of them counts.
        """
        if len(parents) == 0:
            return np.zeros(0)
        return self.changes(column, parents, parents[:0])[0]

    def changes(
        self, column: int, parents: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each parent adds to the score of a column, and what each source would add.

        Args:
            column: of which the score is.
            parents: int64 (k,).
            sources: int64 (m,), neither parents nor the column.

        Returns:
            float64 (k,) and float64 (m,), both less the penalty of an edge.
        """
        k = len(parents)
        row, residual = self._factor(column, parents, sources)
        rest = max(float(residual[k]), PIVOT)
        kept = np.log1p(_explained(row[:, : k + 1]) / rest)
        between = self.correlation(np.full(len(sources), column, np.int64), sources)
        between -= (row[:, k, None] * row[:, k + 1 :]).sum(axis=0)
        free = (residual[k + 1 :] >= PIVOT) & (residual[k] >= PIVOT)
        scale = np.where(free, rest * residual[k + 1 :], 1.0)
        share = np.where(free, np.minimum(between * between / scale, 1.0 - PIVOT), 0.0)
        half = 0.5 * self.num_rows
        return half * kept - self.penalty, -half * np.log1p(-share) - self.penalty

    def _factor(
        self, column: int, parents: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows of the Cholesky factor of the parents, over parents, column and sources.

        Returns:
            float64 (k, k + 1 + m), and the residual variances, float64 (k + 1 + m,).
        """
        every = np.concatenate([parents, [column], sources])
        row = self.correlation(parents[:, None], every[None, :])
        residual = (self.variance[every] > 0).astype(np.float64)
        for r in range(len(parents)):
            if residual[r] < PIVOT:
                row[r] = 0.0
                continue
            row[r] -= (row[:r, r, None] * row[:r]).sum(axis=0)
            row[r] /= np.sqrt(residual[r])
            row[r, :r] = 0.0
            residual = residual - row[r] * row[r]
        return row, residual


def _explained(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance that each parent alone explains: squared coefficients over the inverse's diagonal.

    Args:
        row: float64 (k, k + 1), the factor of k parents and, last, the column.
    """
    k = len(row)
    inverse = np.zeros((k, k))
    for a in range(k - 1, -1, -1):
        if row[a, a] > 0:
            inverse[a, a] = 1.0
            inverse[a] -= (row[a, a + 1 : k, None] * inverse[a + 1 :]).sum(axis=0)
            inverse[a] /= row[a, a]
    coefficient = (inverse * row[:, k]).sum(axis=1)
    diagonal = (inverse * inverse).sum(axis=1)
    alone: NDArray[np.float64] = coefficient * coefficient / np.where(diagonal > 0, diagonal, 1.0)
    return alone
