"""GIES: greedy search over interventional essential graphs, from sufficient statistics.

`fit_gies` (in `causal`) takes rows; what follows takes statistics, so that blocks, penalties and
bootstraps share one pass over the data:

    fit_statistics(statistics, *, score="gaussian_bic", penalty=1.0, intercept="pooled",
                   search="best", gamma=1.0, num_columns=None, forbidden=None, required=None,
                   tiers=None, start=None, min_support=0, max_restarts=100_000, time_budget_s=None)

with `statistics` a `causal.statistics.Statistics`, of which `statistics.take(columns)` is a block.
Hauser and Bühlmann, JMLR 13 (2012) 2409-2464; Chickering, JMLR 3 (2002) 507-554; Nazaret and Blei,
UAI 2024 (XGES).
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed.errors import ConfigError
from causal import essential, scores
from causal.statistics import Statistics

SEARCHES = ("fast", "textbook", "best")


@dataclasses.dataclass(frozen=True)
class GiesResult:
    """A learned equivalence class.

    Attributes:
        adjacency: int8 (p, p), the essential graph; [i, j] = 1, [j, i] = 0 is i → j, both 1 i - j.
        score: of any member, higher is better; pcalg's convention (`causal.scores`), over the
            columns that took part.
        dag: int8 (p, p), one member.
        truncated: True if the time budget or max_restarts ended the search, or a bound on one
            node's parents (256; 12 of scores on counts) or cliques of neighbours (65,536) left
            moves out.
        dropped: columns that took no part, and why ("constant", "missing values", "same as 3");
            they have no edges.
        steps: moves made by the search that gave the result.
    """

    adjacency: NDArray[np.int8]
    score: float
    dag: NDArray[np.int8]
    truncated: bool
    dropped: dict[int, str]
    steps: int


def fit_statistics(
    statistics: Statistics,
    *,
    score: str = "gaussian_bic",
    penalty: float = 1.0,
    intercept: str = "pooled",
    search: str = "best",
    gamma: float = 1.0,
    num_columns: int | None = None,
    forbidden: NDArray[np.bool_] | None = None,
    required: NDArray[np.bool_] | None = None,
    tiers: NDArray[np.int64] | None = None,
    start: NDArray[np.integer] | None = None,
    min_support: int = 0,
    max_restarts: int = 100_000,
    time_budget_s: float | None = None,
) -> GiesResult:
    """Searches the equivalence class with the best score, greedily.

    Args:
        statistics: of p columns, with their environments and targets.
        score: "gaussian_bic" or "extended_bic"; of columns of 0 and 1 also "discrete_bic" or
            "bdeu" (`causal.scores`).
        penalty: multiplies the BIC's penalty; 1 is pcalg's.
        intercept: "pooled" (pcalg), or "per_environment" (the gies package); of scores on counts,
            one table for all environments or one each.
        search: "textbook", pcalg's order: all insertions, all deletions, all turns, repeated;
            "fast", XGES's order: a deletion if one gains, else a turn, else an insertion; "best",
            both, then improved by doing without one edge at a time (XGES), the better kept.
        gamma: weight of log(columns) in "extended_bic" and "bdeu".
        num_columns: the number of columns in that; None for those that take part. A block of a
            larger problem has the larger number.
        forbidden: bool (p, p), [i, j] forbids i → j.
        required: bool (p, p), [i, j] keeps i → j; acyclic.
        tiers: int (p,); no edge from a later tier to an earlier one.
        start: (p, p), a graph to begin with; arrows, or arrows and lines of one class.
        min_support: edges only between 0/1 columns that are both 1 in at least as many rows.
        max_restarts: bound on the edges that each of its three passes tries to do without.
        time_budget_s: seconds after which the search stops where it is; None for no bound. With a
            bound the result depends on the machine.

    Raises:
        ConfigError: if an option is unknown, of the wrong shape, or contradicts another.
    """
    if search not in SEARCHES:
        raise ConfigError(f"search: expected one of {', '.join(SEARCHES)}, got {search!r}")
    limits = _limits(statistics, forbidden, required, tiers, min_support)
    dropped = dropped_columns(statistics)
    keep = np.array([j for j in range(statistics.num_columns) if j not in dropped], np.int64)
    rule = scores.Rule(score, penalty, gamma, len(keep) if num_columns is None else num_columns)
    local = scores.make_score(statistics.take(keep), rule, intercept)
    square = np.ix_(keep, keep)
    limits = _Limits(
        limits.allowed[square], limits.required[square], limits.kinds[keep], limits.tiers[keep]
    )
    begin = _start(start, limits, statistics.num_columns, keep)
    deadline = math.inf if time_budget_s is None else time.monotonic() + time_budget_s
    from causal.climb import Climber  # numba is loaded when a search begins, not on import

    climber = Climber(local, limits.allowed, limits.required, limits.kinds, deadline)
    found = climber.search(search, begin, max_restarts)
    p = statistics.num_columns
    adjacency, dag = np.zeros((p, p), np.int8), np.zeros((p, p), np.int8)
    adjacency[square], dag[square] = found.adjacency, found.dag
    return GiesResult(adjacency, found.score, dag, climber.truncated, dropped, found.steps)


@dataclasses.dataclass(frozen=True)
class _Limits:
    allowed: NDArray[np.bool_]
    required: NDArray[np.bool_]
    kinds: NDArray[np.int32]
    tiers: NDArray[np.int64]


def _limits(
    statistics: Statistics,
    forbidden: NDArray[np.bool_] | None,
    required: NDArray[np.bool_] | None,
    tiers: NDArray[np.int64] | None,
    min_support: int,
) -> _Limits:
    p = statistics.num_columns
    allowed = ~np.eye(p, dtype=np.bool_)
    allowed &= ~_mask("forbidden", forbidden, p)
    needed = _mask("required", required, p)
    level = np.zeros(p, np.int64) if tiers is None else np.asarray(tiers)
    if level.shape != (p,):
        raise ConfigError(f"tiers: expected {p} numbers, got shape {level.shape}")
    allowed &= level[:, None] <= level[None, :]
    if min_support > 0:
        if statistics.cooccurrence is None:
            raise ConfigError("min_support: needs columns of 0 and 1 only")
        allowed &= (statistics.cooccurrence >= min_support) | needed
    clash = np.argwhere(needed & ~allowed)
    if len(clash):
        i, j = clash[0]
        raise ConfigError(f"required: {i} → {j} is forbidden by forbidden, tiers or i = j")
    if not essential.is_acyclic(needed):
        cycle = " → ".join(map(str, essential.find_cycle(needed)))
        raise ConfigError(f"required: {cycle} is a cycle; take out one of its edges")
    kinds = essential.node_kinds(p, statistics.targets, level)
    return _Limits(allowed, needed, kinds, level)


def _mask(name: str, value: Any, p: int) -> NDArray[np.bool_]:
    if value is None:
        return np.zeros((p, p), np.bool_)
    mask = np.asarray(value)
    if mask.shape != (p, p):
        raise ConfigError(f"{name}: expected shape ({p}, {p}), got {mask.shape}")
    return np.asarray(mask != 0, np.bool_)


def score_dag(
    statistics: Statistics,
    dag: NDArray[np.integer],
    *,
    score: str = "gaussian_bic",
    penalty: float = 1.0,
    intercept: str = "pooled",
    gamma: float = 1.0,
) -> float:
    """The score of a DAG, (p, p), over all columns of the statistics; options as in the search.

    Columns without spread count the penalty only.
    """
    from causal.climb import Climber

    p = statistics.num_columns
    local = scores.make_score(statistics, scores.Rule(score, penalty, gamma, p), intercept)
    free = np.ones((p, p), np.bool_)
    return Climber(local, free, ~free, np.zeros(p, np.int32), math.inf).score(dag)


def dropped_columns(statistics: Statistics) -> dict[int, str]:
    """Columns that a search leaves out, and why (`GiesResult.dropped`)."""
    reasons = {1: "constant", 2: "missing values"}
    dropped = {
        int(j): reasons[int(statistics.unusable[j])] for j in statistics.unusable.nonzero()[0]
    }
    kinds = essential.node_kinds(statistics.num_columns, statistics.targets)
    for j, first in enumerate(statistics.duplicate_of.tolist()):
        # Equal columns with different targets are different variables: regressions tell them apart.
        if first != j and j not in dropped and kinds[first] == kinds[j]:
            dropped[j] = f"same as {first}"
    return dropped


def _start(
    start: NDArray[np.integer] | None, limits: _Limits, p: int, keep: NDArray[np.int64]
) -> NDArray[np.int8]:
    """The DAG that the search begins with, over the kept columns."""
    if start is None:
        return limits.required.astype(np.int8)
    given = _mask("start", start, p)[np.ix_(keep, keep)] | limits.required
    # A line whose direction the limits decide is an arrow.
    given &= ~(given.T & ~limits.allowed) & ~limits.required.T
    dag = essential.extend_to_dag(given)
    if dag is None:
        raise ConfigError("start: expected a DAG or the graph of one equivalence class")
    bad = np.argwhere((dag != 0) & ~limits.allowed)
    if len(bad):
        i, j = keep[bad[0]]
        raise ConfigError(f"start: {i} → {j} is not allowed by forbidden, tiers or min_support")
    return dag
