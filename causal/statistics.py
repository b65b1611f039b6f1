"""Sufficient statistics of discovery: counts, means and cross products, one set per environment.

They are computed once from the rows; every block, penalty and intercept rule is then a slice or a
sum of them, and the rows are never touched again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of columns that are 0 and 1 only: what scores on counts count in.

    Attributes:
        present: CSR int32 (n, p), 1 where a column is 1.
        environment: int32 (n,), of each row.
    """

    present: sparse.csr_array
    environment: NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the scores need of a data set with p columns and E environments.

    Attributes:
        counts: int64 (E,), rows of each environment.
        means: float64 (E, p).
        products: float64 (E, p, p), cross products centred on the environment's means.
        targets: columns on which each environment intervened, sorted; `((),)` is observational.
        unusable: int8 (p,), why a column takes no part: 0 it does, 1 constant, 2 has a missing
            value.
        duplicate_of: int64 (p,), the first column with exactly the same values (itself if none).
        cooccurrence: int32 (p, p), rows in which both columns are 1, over all environments; None
            unless every column holds 0 and 1 only.
        rows: for scores on counts; None unless rows of 0 and 1 were given.
    """

    counts: NDArray[np.int64]
    means: NDArray[np.float64]
    products: NDArray[np.float64]
    targets: tuple[tuple[int, ...], ...]
    unusable: NDArray[np.int8]
    duplicate_of: NDArray[np.int64]
    cooccurrence: NDArray[np.int32] | None
    rows: Rows | None = None

    @property
    def num_columns(self) -> int:
        """Columns, p."""
        return int(self.means.shape[1])

    @property
    def num_rows(self) -> int:
        """Rows of all environments."""
        return int(self.counts.sum())

    def take(self, columns: Sequence[int] | NDArray[np.int64]) -> "Statistics":
        """The statistics of some columns, in the given order; targets are renumbered.

        Args:
            columns: distinct column indices.
        """
        index = np.asarray(columns, np.int64)
        place = {int(c): i for i, c in enumerate(index)}
        first: dict[int, int] = {}
        duplicate_of = np.array(
            [first.setdefault(int(self.duplicate_of[c]), i) for i, c in enumerate(index)], np.int64
        )
        square = np.ix_(index, index)
        return Statistics(
            counts=self.counts,
            means=self.means[:, index],
            products=np.ascontiguousarray(self.products[:, index[:, None], index[None, :]]),
            targets=tuple(tuple(sorted(place[t] for t in ts if t in place)) for ts in self.targets),
            unusable=self.unusable[index],
            duplicate_of=duplicate_of,
            cooccurrence=None if self.cooccurrence is None else self.cooccurrence[square],
            rows=None
            if self.rows is None
            else Rows(self.rows.present[:, index], self.rows.environment),
        )

    def pooled(
        self, environments: NDArray[np.int64], intercept: str
    ) -> tuple[int, NDArray[np.float64]]:
        """Rows and centred cross products of several environments together.

        Args:
            environments: indices of environments.
            intercept: "pooled", one mean for all their rows; "per_environment", each its own.

        Returns:
            number of rows, and float64 (p, p).
        """
        rows = self.counts[environments]
        total = int(rows.sum())
        scatter = self.products[environments].sum(axis=0)
        if intercept == "pooled" and len(environments) > 1 and total > 0:
            means = self.means[environments]
            shift = means - (rows @ means) / total
            scatter = scatter + (shift * rows[:, None]).T @ shift
        return total, scatter


def from_dense(
    data: NDArray[Any],
    environments: NDArray[Any] | None = None,
    targets: Sequence[Sequence[int]] | None = None,
) -> Statistics:
    """Statistics of an array.

    A column with a missing or infinite value is marked unusable rather than losing the row.

    Args:
        data: (n, p), numbers or booleans.
        environments: (n,), environment index of each row; None if there is one.
        targets: one list of column indices per environment; None means observational.

    Raises:
        DataError: if data is not a table of numbers, or has a row without any value.
        ConfigError: if environments or targets do not fit the data.
    """
    table = _table(data)
    n, p = table.shape
    of_row, checked = check_environments(n, p, environments, targets)
    finite = np.isfinite(table)
    empty = np.flatnonzero(~finite.any(axis=1)) if p else np.zeros(0, np.int64)
    if len(empty):
        raise DataError(
            f"data: {len(empty)} rows have no value at all (first: row {empty[0]}); remove them"
        )
    broken = ~finite.all(axis=0)
    table = np.where(broken, 0.0, table)
    constant = (table.max(axis=0) == table.min(axis=0)) if n else np.ones(p, np.bool_)
    binary = bool(((table == 0) | (table == 1)).all()) and not broken.any()
    # Centred before forming products: an offset of 1e6 would otherwise cost ten digits.
    centre = table.mean(axis=0) if n and not binary else np.zeros(p)
    shifted = table - centre
    count = np.bincount(of_row, minlength=len(checked)).astype(np.int64)
    means, products = np.zeros((len(checked), p)), np.zeros((len(checked), p, p))
    for e in np.flatnonzero(count):
        rows = shifted[of_row == e] if len(checked) > 1 else shifted
        means[e] = rows.mean(axis=0)
        rows = rows - means[e]
        products[e] = rows.T @ rows
    return Statistics(
        counts=count,
        means=means + centre,
        products=products,
        targets=checked,
        unusable=np.where(broken, 2, np.where(constant, 1, 0)).astype(np.int8),
        duplicate_of=_first_equal(table),
        cooccurrence=np.rint(table.T @ table).astype(np.int32) if binary else None,
        rows=_rows(table, of_row) if binary else None,
    )


def from_sparse(
    data: Any,
    environments: NDArray[Any] | None = None,
    targets: Sequence[Sequence[int]] | None = None,
) -> Statistics:
    """Statistics of a scipy sparse matrix of 0 and 1, from integer co-occurrence counts.

    Args:
        data: sparse (n, p); every stored value is 1.
        environments, targets: as in `from_dense`.

    Raises:
        DataError: if a stored value is not 1.
        ConfigError: if environments or targets do not fit the data.
    """
    matrix = sparse.csr_array(data)
    if matrix.nnz and not (matrix.data == 1).all():
        raise DataError("data: a sparse matrix must hold 1 only, found another stored value")
    matrix = matrix.astype(np.int32)
    n, p = matrix.shape
    of_row, checked = check_environments(n, p, environments, targets)
    rows = np.bincount(of_row, minlength=len(checked)).astype(np.int64)
    if len(checked) == 1:
        parts = [cooccurrences(matrix)]
    else:
        parts = [cooccurrences(matrix[np.flatnonzero(of_row == e)]) for e in range(len(checked))]
    counted = from_cooccurrence(rows, parts, checked)
    return dataclasses.replace(counted, rows=_rows(matrix, of_row))


def cooccurrences(matrix: Any) -> NDArray[np.int32]:
    """Exact counts of rows in which two columns are both 1, int32 (p, p); they add over rows."""
    csr = sparse.csr_array(matrix).astype(np.int32)
    counts: NDArray[np.int32] = (csr.T.tocsr() @ csr).toarray()
    return counts


def from_cooccurrence(
    rows: Sequence[int] | NDArray[np.int64],
    counts: Sequence[NDArray[np.int32]],
    targets: Sequence[Sequence[int]] = ((),),
) -> Statistics:
    """Statistics of 0/1 data from co-occurrence counts, however the rows were split to get them.

    Args:
        rows: (E,), rows of each environment.
        counts: E arrays int32 (p, p); the diagonal holds the columns' counts.
        targets: one list of column indices per environment.
    """
    n = np.asarray(rows, np.int64)
    total: NDArray[np.int32] = np.asarray(sum(counts[1:], counts[0]), np.int32)
    p = total.shape[0]
    means, products = np.zeros((len(n), p)), np.zeros((len(n), p, p))
    for e, both in enumerate(counts):
        often = both.diagonal().astype(np.float64)
        if n[e]:
            means[e] = often / n[e]
            products[e] = both - np.outer(often, often) / n[e]
    ones = total.diagonal()
    return Statistics(
        counts=n,
        means=means,
        products=products,
        targets=tuple(tuple(sorted(t)) for t in targets),
        unusable=((ones == 0) | (ones == n.sum())).astype(np.int8),
        duplicate_of=_first_equal_counts(total),
        cooccurrence=total,
    )


def check_environments(
    n: int,
    p: int,
    environments: NDArray[Any] | None,
    targets: Sequence[Sequence[int]] | None,
) -> tuple[NDArray[np.int64], tuple[tuple[int, ...], ...]]:
    """Environment of each row, int64 (n,), and the sorted targets of each environment.

    Raises:
        ConfigError: if a target or an environment does not exist, or lengths differ.
    """
    if environments is None:
        if targets is not None and len(targets) > 1:
            raise ConfigError(f"targets: {len(targets)} lists given, but environments is missing")
        of_row = np.zeros(n, np.int64)
    else:
        of_row = np.asarray(environments)
        if of_row.shape != (n,) or not np.array_equal(of_row, of_row.astype(np.int64)):
            raise ConfigError(
                f"environments: expected {n} whole numbers, got an array of shape {of_row.shape}"
            )
        of_row = of_row.astype(np.int64)
    lists = [[]] if targets is None and n == 0 else targets
    if lists is None:
        lists = [[] for _ in range(int(of_row.max()) + 1)]
    if n and (of_row.min() < 0 or of_row.max() >= len(lists)):
        raise ConfigError(
            f"environments: expected values 0 to {len(lists) - 1} (targets has {len(lists)} "
            f"lists), got {int(of_row.min())} to {int(of_row.max())}"
        )
    for e, columns in enumerate(lists):
        for column in columns:
            if not 0 <= int(column) < p:
                raise ConfigError(
                    f"targets[{e}]: column {column} does not exist; there are {p} columns"
                )
    return of_row, tuple(tuple(sorted({int(c) for c in columns})) for columns in lists)


def _rows(table: Any, of_row: NDArray[np.int64]) -> Rows:
    present = sparse.csr_array(table).astype(np.int32)
    present.sum_duplicates()
    return Rows(present, of_row.astype(np.int32))


def _table(data: NDArray[Any]) -> NDArray[np.float64]:
    table = np.asarray(data)
    if table.ndim != 2 or table.dtype.kind not in "biuf":
        raise DataError(
            f"data: expected a table of numbers (n, p), got shape {table.shape}, {table.dtype}"
        )
    return np.ascontiguousarray(table, dtype=np.float64)


def _first_equal(table: NDArray[np.float64]) -> NDArray[np.int64]:
    # Adding 0.0 makes -0.0 and 0.0 the same bytes.
    columns = np.ascontiguousarray(table.T) + 0.0
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(c.tobytes(), j) for j, c in enumerate(columns)], np.int64)


def _first_equal_counts(both: NDArray[np.int32]) -> NDArray[np.int64]:
    # Two 0/1 columns are equal if and only if they meet whenever either occurs.
    ones = both.diagonal()
    same = (both == ones[:, None]) & (both == ones[None, :])
    return same.argmax(axis=0).astype(np.int64) if len(ones) else np.zeros(0, np.int64)
