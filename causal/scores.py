"""Scores of a graph as the search kernels see them; all are sums of local scores, higher is better.

Gaussian scores (`GaussianScore`): the local score of a column j with parents S is pcalg's (README
of the golden cases):

    -0.5 n_j (1 + log(rss_j(S) / n_j)) - penalty * (1 + |S|)

with n_j the rows in which j is not an intervention target, and rss_j(S) of the regression on S with
an intercept over those rows.

Scores on counts of 0/1 columns (`TablesScore`): the rows in which j is not a target are split by
the configurations c of S, and the local score is

- "discrete_bic": the log-likelihood sum over c of n_c1 log(n_c1/n_c) + n_c0 log(n_c0/n_c), less
  penalty * 0.5 log(rows) * 2^|S|;
- "bdeu": the log marginal likelihood under a Dirichlet prior of equivalent sample size 1 (Heckerman
  et al., Machine Learning 20, 1995, eq. 28 with N'_ijk = 1 / (2 * 2^|S|)), less gamma log(columns)
  for each parent. A configuration that no row has costs nothing.

Both give all graphs of a class the same score. In a table where a column never changes, it is left
out of the configurations.
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import gammaln, xlogy

from cafemed.errors import ConfigError
from causal.statistics import Statistics, cooccurrences

GAUSSIAN_SCORES = ("gaussian_bic", "extended_bic")
SCORES = (*GAUSSIAN_SCORES, "discrete_bic", "bdeu")
INTERCEPTS = ("pooled", "per_environment")

#: Below this share of a column's scatter, what is left of it is taken to be rounding noise.
_NOISE = 1e-13
#: More parents than this a node never gets in scores on counts: they have 2^12 configurations.
MAX_TABLE_PARENTS = 12


@dataclasses.dataclass(frozen=True)
class GaussianScore:
    """A Gaussian score over p columns.

    Attributes:
        correlation: float64 (patterns, p, p); a column without spread has a zero row and column.
        pattern: int64 (p,), which correlation matrix a column's regressions use.
        rows: float64 (p,), rows in a column's regressions.
        penalty: score paid for each parent.
        empty: float64 (p,), local scores without parents.
    """

    correlation: NDArray[np.float64]
    pattern: NDArray[np.int64]
    rows: NDArray[np.float64]
    penalty: float
    empty: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a configuration of k parents with n rows, n1 of which have the child, adds to a score.

    Attributes:
        ones: float64 (K, rows + 1), by k what n1 adds, and what n - n1 adds; the last row holds for
            all larger k.
        both: float64 (K, rows + 1), what n takes away.
        cost: float64, by k what the whole table costs.
    """

    ones: NDArray[np.float64]
    both: NDArray[np.float64]
    cost: NDArray[np.float64]

    def of(
        self, k: int, ones: NDArray[np.integer], rows: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Terms of configurations, in the shape of the counts."""
        i = min(k, len(self.ones) - 1)
        found: NDArray[np.float64] = (
            self.ones[i, ones] + self.ones[i, rows - ones] - self.both[i, rows]
        )
        return found


@dataclasses.dataclass(frozen=True)
class TablesScore:
    """A score on counts over p columns of 0 and 1; G groups of rows have a table each.

    Attributes:
        present: CSR (n, p), 1 where a column is 1; `by_column`, the same as CSC.
        environment: int32 (n,), of each row.
        pattern: int64 (p,), which of the patterns of intervention targets a column has.
        group_of: int32 (patterns, environments), the group that an environment's rows belong to in
            the score of a column; -1 if none.
        joint: int32 (G, p, p), rows in which two columns are both 1.
        size: int64 (G,), rows.
        terms: what configurations add, and what tables cost.
        penalty: score paid for each parent beside that.
        empty: float64 (p,), local scores without parents.
    """

    present: sparse.csr_array
    by_column: sparse.csc_array
    environment: NDArray[np.int32]
    pattern: NDArray[np.int64]
    group_of: NDArray[np.int32]
    joint: NDArray[np.int32]
    size: NDArray[np.int64]
    terms: Terms
    penalty: float
    empty: NDArray[np.float64]


Score = GaussianScore | TablesScore


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which score, and what an edge costs in it, whichever of the columns are looked at.

    Attributes:
        name: one of SCORES.
        penalty: factor on the BIC's penalty.
        gamma: weight of log(num_columns) in "extended_bic" and "bdeu".
        num_columns: among how many columns parents are chosen.

    Raises:
        ConfigError: if the score is unknown, or an option is out of range or has no meaning for it.
    """

    name: str
    penalty: float
    gamma: float
    num_columns: int

    def __post_init__(self) -> None:
        if self.name not in SCORES:
            raise ConfigError(f"score: expected one of {', '.join(SCORES)}, got {self.name!r}")
        for option, value in (("penalty", self.penalty), ("gamma", self.gamma)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{option}: expected a number of at least 0, got {value!r}")
        if self.name == "bdeu" and self.penalty != 1:
            raise ConfigError(
                f"penalty: has no meaning for bdeu, expected 1, got {self.penalty!r}; "
                "gamma is what an edge costs there"
            )

    @property
    def counts_rows(self) -> bool:
        """Whether the score needs the rows themselves, columns of 0 and 1."""
        return self.name not in GAUSSIAN_SCORES

    def edge_penalty(self, rows: int) -> float:
        """What one more parent costs, beside the cost of tables.

        "gaussian_bic": penalty * 0.5 log(rows). "extended_bic" adds gamma * log(num_columns) (Chen
        and Chen 2008, Biometrika 95(3), on the log-likelihood's scale). "bdeu": that alone, a prior
        on graphs. "discrete_bic": nothing.
        """
        bic = 0.0 if self.counts_rows else self.penalty * 0.5 * math.log(max(rows, 1))
        extended = self.name in ("extended_bic", "bdeu")
        return bic + (self.gamma * math.log(max(self.num_columns, 1)) if extended else 0.0)


def make_score(statistics: Statistics, rule: Rule, intercept: str) -> Score:
    """Prepares a score of all columns of the statistics.

    Args:
        intercept: "pooled" or "per_environment": one mean, or one table, for all environments in
            which the column is not a target, or one each.

    Raises:
        ConfigError: if the intercept is unknown, or a score on counts is asked of columns that are
            not 0 and 1.
    """
    cost = rule.edge_penalty(statistics.num_rows)
    if intercept not in INTERCEPTS:
        raise ConfigError(f"intercept: expected one of {', '.join(INTERCEPTS)}, got {intercept!r}")
    if rule.counts_rows:
        return _tables_score(statistics, rule, cost, intercept)
    return gaussian_score(statistics, cost, intercept)


def gaussian_score(statistics: Statistics, penalty: float, intercept: str) -> GaussianScore:
    """Prepares the Gaussian score of all columns.

    Args:
        statistics: of the columns to be searched.
        penalty: `Rule.edge_penalty`.
        intercept: "pooled" (pcalg) or "per_environment" (the gies package).
    """
    p = statistics.num_columns
    patterns, pattern = _patterns(statistics)
    correlation = np.zeros((len(patterns), p, p))
    rows, spread = np.zeros(p), np.zeros(p)
    everywhere = statistics.pooled(np.arange(len(statistics.counts)), "pooled")[1].diagonal()
    for m, targeted in enumerate(patterns):
        n, scatter = statistics.pooled(np.flatnonzero(~targeted), intercept)
        own = pattern == m
        rows[own] = n
        spread[own] = scatter.diagonal()[own]
        correlation[m] = _correlation(scatter, everywhere)
    usable = spread > _NOISE * np.maximum(everywhere, np.finfo(float).tiny)
    safe_rows = np.maximum(rows, 1.0)
    ratio = np.where(usable, spread, 1.0) / safe_rows
    # A column without spread in its own rows has no likelihood: its node counts the penalty only.
    empty = np.where(usable, -0.5 * rows * (1 + np.log(ratio)), 0.0) - penalty
    return GaussianScore(correlation, pattern, rows, penalty, empty)


def _patterns(statistics: Statistics) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The patterns of environments that target a column, bool (patterns, E), and each column's."""
    p = statistics.num_columns
    hit = np.zeros((p, len(statistics.counts)), np.bool_)
    for e, columns in enumerate(statistics.targets):
        hit[list(columns), e] = True
    patterns, pattern = np.unique(hit, axis=0, return_inverse=True) if p else (hit, np.zeros(0))
    return patterns, np.asarray(pattern, np.int64).reshape(-1)


def _correlation(
    scatter: NDArray[np.float64], reference: NDArray[np.float64]
) -> NDArray[np.float64]:
    variance = scatter.diagonal()
    usable = variance > _NOISE * np.maximum(reference, np.finfo(float).tiny)
    scale = np.where(usable, 1 / np.sqrt(np.where(usable, variance, 1.0)), 0.0)
    result: NDArray[np.float64] = scatter * scale[:, None] * scale[None, :]
    np.fill_diagonal(result, usable.astype(np.float64))
    return result


def _tables_score(
    statistics: Statistics, rule: Rule, penalty: float, intercept: str
) -> TablesScore:
    rows = statistics.rows
    if rows is None:
        raise ConfigError(
            f"score: {rule.name} needs rows of columns that are 0 and 1 only; "
            "gaussian_bic and extended_bic take any numbers"
        )
    patterns, pattern = _patterns(statistics)
    environments = np.arange(patterns.shape[1])
    if intercept == "pooled":
        group_of = np.where(patterns, -1, np.arange(len(patterns))[:, None])
        members = ~patterns
    else:
        group_of = np.where(patterns, -1, environments)
        members = np.eye(len(environments), dtype=np.bool_)
    joint = [cooccurrences(rows.present[member[rows.environment]]) for member in members]
    size = members.astype(np.int64) @ statistics.counts
    terms = term_tables(rule.name, statistics.num_rows, rule.penalty)
    p = statistics.num_columns
    score = TablesScore(
        present=rows.present,
        by_column=rows.present.tocsc(),
        environment=rows.environment,
        pattern=pattern,
        group_of=group_of.astype(np.int32),
        joint=np.array(joint, np.int32).reshape(len(members), p, p),
        size=size,
        terms=terms,
        penalty=penalty,
        empty=np.zeros(p),
    )
    return dataclasses.replace(score, empty=_empty_local(score))


def _empty_local(score: TablesScore) -> NDArray[np.float64]:
    """Local scores without parents, float64 (p,)."""
    empty = np.zeros(len(score.pattern))
    for group, rows in enumerate(score.size.tolist()):
        ones = score.joint[group].diagonal()
        uses = (score.group_of == group).any(axis=1)[score.pattern]
        fit = score.terms.of(0, ones, np.full_like(ones, rows)) - score.terms.cost[0]
        empty += np.where(uses & (ones > 0) & (ones < rows), fit, 0.0)
    return empty


@functools.lru_cache(maxsize=4)
def term_tables(name: str, rows: int, multiplier: float) -> Terms:
    """The terms of "discrete_bic" or "bdeu" for counts up to `rows`.

    Args:
        multiplier: of the BIC's penalty.
    """
    counts, parents = np.arange(rows + 1.0), np.arange(MAX_TABLE_PARENTS + 2.0)
    if name == "discrete_bic":
        fit = np.asarray(xlogy(counts, counts)[None], np.float64)
        return Terms(fit, fit, multiplier * 0.5 * math.log(max(rows, 1)) * np.exp2(parents))
    prior = np.exp2(-parents)[:, None]  # of a configuration; half of it for each value
    ones = np.asarray(gammaln(counts + prior / 2) - gammaln(prior / 2), np.float64)
    both = np.asarray(gammaln(counts + prior) - gammaln(prior), np.float64)
    return Terms(ones, both, np.zeros(len(parents)))
