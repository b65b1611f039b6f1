"""Who has a code: propensity by strata of an adjustment set, and what a comparison is worth.

Adjustment sets are codes, so that visits fall into strata, the distinct patterns of the set. Where
a stratum has many visits with the code, the propensity is their proportion. Where it has few, it
falls back on a logistic regression over all strata.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Visits with the code (or, if these are most, without) that a stratum's fallback is worth.
_PRIOR_VISITS = 2.0
#: Precision of the prior at 0 of the logistic regression's slopes.
_RIDGE = 1.0
_NEWTON_STEPS = 25
_LARGEST_STEP = 2.0
_LARGEST_LOGIT = 30.0


@dataclasses.dataclass(frozen=True)
class Strata:
    """Visits by the pattern of an adjustment set of k columns; n visits, S patterns.

    Attributes:
        of_visit: int64 (n,), the stratum of each visit.
        rows: int (r,), the visits with the code.
        patterns: float64 (S, k), 0 or 1.
        without, treated: float64 (S,), visits without and with the code.
    """

    of_visit: Ints
    rows: NDArray[np.integer]
    patterns: Floats
    without: Floats
    treated: Floats

    @classmethod
    def of(cls, present: sparse.csc_array, code: int, chosen: Ints) -> "Strata":
        """Counts visits by pattern.

        Args:
            present: CSC (n, p), 0 or 1.
            code: the column of the code; some visits have it and some do not.
            chosen: int64 (k,), the columns to adjust for.
        """
        of_visit, patterns = _patterns(present, chosen)
        rows = present.indices[present.indptr[code] : present.indptr[code + 1]]
        visits = np.bincount(of_visit, minlength=len(patterns)).astype(np.float64)
        treated = np.bincount(of_visit[rows], minlength=len(patterns)).astype(np.float64)
        return cls(of_visit, rows, patterns, visits - treated, treated)


def varies(present: sparse.csc_array, code: int) -> bool:
    """Says whether some visits have the code and some do not."""
    return bool(0 < present.indptr[code + 1] - present.indptr[code] < present.shape[0])


def share_treated(strata: Strata) -> Floats:
    """Propensity of each stratum, float64 (S,), above 0 and below 1."""
    visits = strata.without + strata.treated
    fitted = _logistic(strata.patterns, strata.treated, visits)
    prior = _PRIOR_VISITS / np.minimum(fitted, 1 - fitted)
    share: Floats = (strata.treated + prior * fitted) / (visits + prior)
    return share


def worth(strata: Strata, share: Floats) -> float:
    """How many visits a comparison of visits with and without the code is worth.

    n / mean(1 / (e (1 - e))), with which the smallest variance that any estimator of the mean
    effect can have shrinks (Hahn, Econometrica 66, 1998; Crump et al., Biometrika 96, 2009):
    n1 n0 / n where nothing is adjusted for, fewer the better the adjustment set tells who has the
    code, next to none where it tells for sure.
    """
    visits = strata.without + strata.treated
    return float(visits.sum() ** 2 / (visits @ (1 / (share * (1 - share)))))


def all_worth(present: sparse.csc_array, codes: Ints, adjusting: list[Ints]) -> Floats:
    """`worth` of each code with its adjustment set, float64 (T,); 0 for one that does not vary."""
    with_code = np.diff(present.indptr)[codes].astype(np.float64)
    # What nothing is adjusted for is worth; the strata of most codes need not be counted.
    found: Floats = with_code * (present.shape[0] - with_code) / max(present.shape[0], 1)
    for i, (code, chosen) in enumerate(zip(codes.tolist(), adjusting, strict=True)):
        if len(chosen) and varies(present, code):
            strata = Strata.of(present, code, chosen)
            found[i] = worth(strata, share_treated(strata))
    return found


def _patterns(present: sparse.csc_array, chosen: Ints) -> tuple[Ints, Floats]:
    """The stratum of each visit, int64 (n,), and the pattern of each stratum, float64 (S, k)."""
    member = np.zeros((len(chosen), present.shape[0]), np.int64)
    stratum = np.zeros(present.shape[0], np.int64)
    for row, column in zip(member, chosen, strict=True):
        row[present.indices[present.indptr[column] : present.indptr[column + 1]]] = 1
        stratum = 2 * stratum + row
        if stratum.max() > 4 * len(stratum):  # before the numbers grow out of hand
            stratum = np.unique(stratum, return_inverse=True)[1]
    number = np.cumsum(np.bincount(stratum) > 0) - 1
    stratum = number[stratum]
    of_stratum = np.zeros(int(number[-1]) + 1, np.int64)
    of_stratum[stratum] = np.arange(len(stratum))
    return stratum, member[:, of_stratum].T.astype(np.float64)


def _logistic(patterns: Floats, treated: Floats, visits: Floats) -> Floats:
    """Fitted probabilities (S,) of the code, linear in the pattern's logit, by Newton's steps."""
    design = np.column_stack([np.ones(len(patterns)), patterns])
    ridge = np.diag(np.append(0.0, np.full(patterns.shape[1], _RIDGE)))
    slopes = np.zeros(design.shape[1])
    slopes[0] = np.log(treated.sum() / (visits.sum() - treated.sum()))
    fitted = _logistic_of(design @ slopes)
    for _ in range(_NEWTON_STEPS):
        gradient = design.T @ (treated - visits * fitted) - ridge @ slopes
        curvature = (design * (visits * fitted * (1 - fitted))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature, gradient)
        largest = np.abs(step).max()
        slopes += step * min(1.0, _LARGEST_STEP / max(largest, 1e-300))
        fitted = _logistic_of(design @ slopes)
        if largest < 1e-9:
            break
    return fitted


def _logistic_of(logit: Floats) -> Floats:
    probability: Floats = 1 / (1 + np.exp(-np.clip(logit, -_LARGEST_LOGIT, _LARGEST_LOGIT)))
    return probability
