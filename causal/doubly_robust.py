"""Doubly robust effects of codes on medications, from counts of distinct patterns.

Augmented inverse probability weighting (Robins, Rotnitzky and Zhao, JASA 89, 1994): a model of the
code given its adjustment set (e, `causal.propensity`) and one of the medication given code and set
(Q) are joined so that the estimate is right in the limit if either is,

    1/n Σ_i [ Q1 - Q0 + T (Y - Q1) / e - (1 - T) (Y - Q0) / (1 - e) ].

All sums are over the strata of the set, from counts. Where a stratum has many visits both models
are its own proportions; where it has few they fall back on additive models of all strata.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from causal import propensity
from causal.columns import Columns
from causal.propensity import Floats, Ints, Strata

#: Visits that a stratum's fallback is worth in Q.
_PRIOR_VISITS = 2.0
#: Precision of the prior at 0 of the fallback's slopes.
_RIDGE = 1.0


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Visits with each medication by stratum, without and with the code; float64 (S, M)."""

    without: Floats
    treated: Floats


def augmented(
    columns: Columns, treated: Ints, adjusting: list[Ints], targets: sparse.csr_array
) -> tuple[Floats, Floats]:
    """Doubly robust effects of T codes, each with its adjustment set, on all M targets.

    Args:
        columns: n visits, p columns.
        treated: int64 (T,), the column of each code.
        adjusting: for each code the columns to adjust for.
        targets: CSR int64 (n, M), 0 or 1.

    Returns:
        Effects and standard errors, float64 (T, M) each; 0 and NaN for a code that no visit or
        every visit has.
    """
    present = columns.present.tocsc()
    totals = np.asarray(targets.sum(axis=0), np.float64)
    effect = np.zeros((len(treated), targets.shape[1]))
    error = np.full(effect.shape, np.nan)
    for i, (code, chosen) in enumerate(zip(treated.tolist(), adjusting, strict=True)):
        if propensity.varies(present, code):
            strata = Strata.of(present, code, chosen)
            effect[i], error[i] = estimate(strata, count(strata, targets, totals))
    return effect, error


def count(strata: Strata, targets: sparse.csr_array, totals: Floats) -> Outcomes:
    """Counts the outcomes of every stratum; `totals` are the targets' sums, float64 (M,)."""
    size = len(strata.patterns)
    # The largest stratum holds most visits, those with none of the columns: it is what is left.
    largest = int((strata.without + strata.treated).argmax())
    every = _outcomes(strata.of_visit, np.flatnonzero(strata.of_visit != largest), targets, size)
    every[largest] = totals - every.sum(axis=0)
    treated = _outcomes(strata.of_visit, strata.rows, targets, size)
    return Outcomes(every - treated, treated)


def estimate(strata: Strata, outcomes: Outcomes) -> tuple[Floats, Floats]:
    """Effects and their standard errors, float64 (M,) each.

    The standard error is that of the influence function over independent visits, its conditional
    variances taken from Q, and as if one visit more in each arm had come out the other way: without
    that an arm whose few visits all came out the same would seem to be known without error
    (compare Agresti and Caffo, The American Statistician 54, 2000). That visit has the weight of
    those that matter to the variance: the mean of w^2 under weights w^2.
    """
    share = propensity.share_treated(strata)
    weight, weight_without = 1 / share, 1 / (1 - share)
    rate = _rate(strata.patterns, strata.treated, outcomes.treated)
    rate_without = _rate(strata.patterns, strata.without, outcomes.without)
    visits = strata.without + strata.treated
    n = visits.sum()
    missed = outcomes.treated - strata.treated[:, None] * rate
    missed_without = outcomes.without - strata.without[:, None] * rate_without
    contrast = rate - rate_without
    effect = (visits @ contrast + weight @ missed - weight_without @ missed_without) / n
    variance = visits @ (contrast - effect) ** 2
    for arm, by, q in (
        (strata.treated, weight, rate),
        (strata.without, weight_without, rate_without),
    ):
        variance += (arm * by**2) @ (q * (1 - q)) + (arm @ by**4) / (arm @ by**2)
    return effect, np.sqrt(variance) / n


def _outcomes(
    stratum: Ints, rows: NDArray[np.integer], targets: sparse.csr_array, size: int
) -> Floats:
    """Visits of the given rows with each medication by stratum, float64 (S, M)."""
    taken = targets[rows]
    num_targets = targets.shape[1]
    cell = np.repeat(stratum[rows] * num_targets, np.diff(taken.indptr)) + taken.indices
    counts = np.bincount(cell, minlength=size * num_targets).astype(np.float64)
    return counts.reshape(size, num_targets)


def _rate(patterns: Floats, visits: Floats, outcomes: Floats) -> Floats:
    """Q of an arm in each stratum, (S, M): its own proportion, and least squares where sparse."""
    mean = outcomes.sum(axis=0) / visits.sum()
    design = np.column_stack([np.ones(len(patterns)), patterns])
    # The intercept is free; the tiny ridge only keeps the system solvable.
    ridge = np.diag(np.append(1e-9, np.full(patterns.shape[1], _RIDGE)))
    system = (design * visits[:, None]).T @ design + ridge
    slopes = np.linalg.solve(system, design.T @ (outcomes - visits[:, None] * mean))
    fallback = np.clip(mean + design @ slopes, 0.0, 1.0)
    rate: Floats = (outcomes + _PRIOR_VISITS * fallback) / (visits + _PRIOR_VISITS)[:, None]
    return rate
