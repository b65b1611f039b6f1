"""Scores of a graph as the search kernels see them: correlations, rows and a penalty per parent.

The local score of a column j with parents S is pcalg's (README of the golden cases):

    -0.5 n_j (1 + log(rss_j(S) / n_j)) - penalty * (1 + |S|)

with n_j the rows in which j is not an intervention target, and rss_j(S) of the regression on S with
an intercept over those rows. Higher is better.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from cafemed.errors import ConfigError
from causal.statistics import Statistics

SCORES = ("gaussian_bic", "extended_bic")
INTERCEPTS = ("pooled", "per_environment")

#: Below this share of a column's scatter, what is left of it is taken to be rounding noise.
_NOISE = 1e-13


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


def parent_penalty(score: str, rows: int, columns: int, multiplier: float, gamma: float) -> float:
    """What one more parent costs.

    "gaussian_bic": multiplier * 0.5 log(rows). "extended_bic" adds gamma * log(columns) (Chen and
    Chen 2008, Biometrika 95(3), on the log-likelihood's scale).

    Raises:
        ConfigError: if the score is unknown or the multiplier or gamma is negative.
    """
    if score not in SCORES:
        raise ConfigError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if not (multiplier >= 0 and math.isfinite(multiplier)):
        raise ConfigError(f"penalty: expected a number of at least 0, got {multiplier!r}")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ConfigError(f"gamma: expected a number of at least 0, got {gamma!r}")
    bic = multiplier * 0.5 * math.log(max(rows, 1))
    return bic + gamma * math.log(max(columns, 1)) if score == "extended_bic" else bic


def gaussian_score(statistics: Statistics, penalty: float, intercept: str) -> GaussianScore:
    """Prepares the Gaussian score of all columns.

    Args:
        statistics: of the columns to be searched.
        penalty: `parent_penalty`.
        intercept: "pooled" (pcalg) or "per_environment" (the gies package).

    Raises:
        ConfigError: if the intercept rule is unknown.
    """
    if intercept not in INTERCEPTS:
        raise ConfigError(f"intercept: expected one of {', '.join(INTERCEPTS)}, got {intercept!r}")
    p = statistics.num_columns
    hit = np.zeros((p, len(statistics.counts)), np.bool_)
    for e, columns in enumerate(statistics.targets):
        hit[list(columns), e] = True
    patterns, pattern = np.unique(hit, axis=0, return_inverse=True) if p else (hit, np.zeros(0))
    pattern = np.asarray(pattern, np.int64).reshape(-1)
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


def _correlation(
    scatter: NDArray[np.float64], reference: NDArray[np.float64]
) -> NDArray[np.float64]:
    variance = scatter.diagonal()
    usable = variance > _NOISE * np.maximum(reference, np.finfo(float).tiny)
    scale = np.where(usable, 1 / np.sqrt(np.where(usable, variance, 1.0)), 0.0)
    result: NDArray[np.float64] = scatter * scale[:, None] * scale[None, :]
    np.fill_diagonal(result, usable.astype(np.float64))
    return result
