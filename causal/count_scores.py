"""Local scores on counts straight from the rows, for what must not be dense.

The same questions as `local_scores.LocalScores` answers for the Gaussian scores, with the scores of
`causal.scores` that need configurations counted; a stratum has a table of its own.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from causal.scores import MAX_TABLE_PARENTS, Rule, Terms, term_tables


@dataclasses.dataclass(frozen=True)
class CountScores:
    """Scores of one column given its parents; n rows, p columns, S strata.

    Attributes:
        rows_of: CSC int8 (n, p), 1 where a column is 1.
        stratum: int64 (n,), 0 to S - 1, of each row.
        size: int64 (S,), rows.
        often: int64 (S, p), rows in which each column is 1.
        terms: what configurations add (`scores.Terms`).
        penalty: score of one parent beside that.
        empty: float64 (p,), local scores without parents.
    """

    rows_of: sparse.csc_array
    stratum: NDArray[np.int64]
    size: NDArray[np.int64]
    often: NDArray[np.int64]
    terms: Terms
    penalty: float
    empty: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        present: sparse.csr_array,
        strata: NDArray[np.integer],
        rule: Rule,
    ) -> "CountScores":
        """The scores of all columns.

        Args:
            present: CSR (n, p), 0 or 1.
            strata: (n,), any whole numbers.
            rule: a score on counts.
        """
        values, stratum = np.unique(strata, return_inverse=True)
        size = np.bincount(stratum, minlength=len(values)).astype(np.int64)
        often = np.array(
            [present[stratum == s].sum(axis=0) for s in range(len(values))], np.int64
        ).reshape(len(values), present.shape[1])
        terms = term_tables(rule.name, present.shape[0], rule.penalty)
        alone = terms.of(0, often, size[:, None]) - terms.cost[0]
        varies = (often > 0) & (often < size[:, None])
        return cls(
            present.astype(np.int8).tocsc(),
            stratum.astype(np.int64),
            size,
            often,
            terms,
            rule.edge_penalty(present.shape[0]),
            np.where(varies, alone, 0.0).sum(axis=0),
        )

    @property
    def max_parents(self) -> int:
        """More than these a column may not have."""
        return MAX_TABLE_PARENTS

    def local(self, column: int, parents: NDArray[np.int64]) -> float:
        """Score of one column given its parents, int64 (k,)."""
        total = -self.penalty * len(parents)
        for s in self._varying_in(column):
            rows, ones = self._family(s, column, self._codes(parents), 1 << len(parents))
            k = self._number_varying(s, parents)
            total += self.terms.of(k, ones, rows).sum() - self.terms.cost[k]
        return float(total)

    def losses(self, column: int, parents: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the score would lose with each parent, float64 (k,): fit less cost."""
        return self.changes(column, parents, parents[:0])[0]

    def changes(
        self, column: int, parents: NDArray[np.int64], sources: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each parent adds to the score of a column, and what each source would add.

        Args:
            column: of which the score is.
            parents: int64 (k,), at most MAX_TABLE_PARENTS.
            sources: int64 (m,), neither parents nor the column.

        Returns:
            float64 (k,) and float64 (m,), both less the cost of an edge; no source may be added to
            that many.
        """
        kept = np.full(len(parents), -self.penalty)
        added = np.full(len(sources), -self.penalty)
        if len(parents) >= MAX_TABLE_PARENTS:
            added[:] = -math.inf
            sources = sources[:0]
        codes = self._codes(parents)
        child = np.zeros(len(self.stratum), np.bool_)
        child[self._rows(column)] = True
        for s in self._varying_in(column):
            rows, ones = self._family(s, column, codes, 1 << len(parents))
            k = self._number_varying(s, parents)
            whole = float(self.terms.of(k, ones, rows).sum() - self.terms.cost[k])
            for i, parent in enumerate(parents.tolist()):
                if self._varies(s, parent):
                    kept[i] += whole - self._without(i, k - 1, rows, ones)
            for i, source in enumerate(sources.tolist()):
                if self._varies(s, source):
                    added[i] += self._with(s, source, k + 1, codes, child, rows, ones) - whole
        return kept, added

    def _without(self, i: int, k: int, rows: NDArray[np.int64], ones: NDArray[np.int64]) -> float:
        """A counted family's score without its parent i."""
        # Bit i of the configuration is the middle axis.
        merged_rows = rows.reshape(-1, 2, 1 << i).sum(axis=1)
        merged_ones = ones.reshape(-1, 2, 1 << i).sum(axis=1)
        return float(self.terms.of(k, merged_ones, merged_rows).sum() - self.terms.cost[k])

    def _with(
        self,
        stratum: int,
        source: int,
        k: int,
        codes: NDArray[np.int64],
        child: NDArray[np.bool_],
        rows: NDArray[np.int64],
        ones: NDArray[np.int64],
    ) -> float:
        """A counted family's score with one more parent."""
        having = self._rows(source)
        having = having[self.stratum[having] == stratum]
        n = np.bincount(codes[having], minlength=len(rows))
        n1 = np.bincount(codes[having[child[having]]], minlength=len(rows))
        fit = self.terms.of(k, n1, n).sum() + self.terms.of(k, ones - n1, rows - n).sum()
        return float(fit - self.terms.cost[k])

    def _rows(self, column: int) -> NDArray[np.integer]:
        start, end = self.rows_of.indptr[column : column + 2]
        rows: NDArray[np.integer] = self.rows_of.indices[start:end]
        return rows

    def _codes(self, parents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Configuration of the parents in each row, int64 (n,)."""
        codes = np.zeros(len(self.stratum), np.int64)
        for i, parent in enumerate(parents.tolist()):
            codes[self._rows(parent)] += 1 << i
        return codes

    def _family(
        self, stratum: int, column: int, codes: NDArray[np.int64], number: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of each configuration in a stratum, and those in which the column is 1."""
        rows = np.bincount(codes[self.stratum == stratum], minlength=number)
        having = self._rows(column)
        ones = np.bincount(codes[having[self.stratum[having] == stratum]], minlength=number)
        return rows.astype(np.int64), ones.astype(np.int64)

    def _varies(self, stratum: int, column: int) -> bool:
        return bool(0 < self.often[stratum, column] < self.size[stratum])

    def _varying_in(self, column: int) -> list[int]:
        return [s for s in range(len(self.size)) if self._varies(s, column)]

    def _number_varying(self, stratum: int, columns: NDArray[np.int64]) -> int:
        often = self.often[stratum, columns]
        return int(((often > 0) & (often < self.size[stratum])).sum())
