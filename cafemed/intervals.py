"""Confidence intervals from a bootstrap over patients.

Visits of one patient are alike, so whole patients are drawn, with replacement. Everything that is a
function of sums over patients (means, shares of pooled counts, calibration errors) needs only those
sums: a round is one row of a matrix product, however many visits there are.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Rounds of a percentile interval; its ends then move by about a hundredth of its length from seed
#: to seed.
ROUNDS = 2000
LEVEL = 0.95

#: Draws held at once.
_DRAWS = 4_000_000

#: From sums (..., K) to values (..., S), row by row; NaN where a value is undefined.
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """Values with their intervals, float64 (S,) each; NaN where a value is undefined."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def percentile(
    terms: NDArray[np.floating[Any]],
    statistic: Statistic,
    rounds: int = ROUNDS,
    level: float = LEVEL,
    seed: int = 0,
    reflected: Collection[int] = (),
) -> Interval:
    """Percentile interval of each value (Efron and Tibshirani 1993, section 13.3).

    A mean of absolute deviations, as the calibration error is, grows with every noise: the rounds'
    values lie above the value itself, which lies above the truth. For those named in `reflected`
    the interval is turned round at the value, [2 v - high, 2 v - low], at least 0. In simulations
    of 10 to 600 patients it held the truth in 82 to 94 % of cases, the other one in 29 to 90 %;
    where calibration is perfect it still begins a little above 0.

    Args:
        terms: (P, K), what each of P ≥ 1 patients adds to the sums.
        statistic: see Statistic.
        rounds: draws of P patients with replacement.
        level: share of the rounds' values inside the interval.
        seed: of the draws; the same seed draws the same patients whatever the terms.
        reflected: which values are such errors.
    """
    value = statistic(np.asarray(terms, np.float64).sum(axis=0))
    drawn = statistic(resampled_sums(terms, rounds, seed))
    tail = (1 - level) / 2
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    for i in range(len(value)):
        # A round without, say, any stopped medication says nothing of how they are found.
        defined = drawn[np.isfinite(drawn[:, i]), i]
        if len(defined) and np.isfinite(value[i]):
            low[i], high[i] = np.quantile(defined, (tail, 1 - tail))
        if i in reflected:
            low[i], high[i] = np.maximum(2 * value[i] - np.array([high[i], low[i]]), 0)
    return Interval(value, low, high)


def resampled_sums(
    terms: NDArray[np.floating[Any]], rounds: int = ROUNDS, seed: int = 0
) -> NDArray[np.float64]:
    """Sums of `terms` (P, K) over P patients drawn with replacement, float64 (rounds, K).

    Two calls with the same P, rounds and seed draw the same patients: the difference of two models
    round by round is a paired bootstrap.
    """
    size = len(terms)
    generator = np.random.default_rng(seed)
    values = np.asarray(terms, np.float64)
    sums = np.empty((rounds, values.shape[1]))
    step = max(1, _DRAWS // size)
    for start in range(0, rounds, step):
        count = min(step, rounds - start)
        drawn = generator.integers(size, size=(count, size))
        drawn += np.arange(count)[:, None] * size
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        sums[start : start + count] = times @ values
    return sums
