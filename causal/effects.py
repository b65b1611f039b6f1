"""Effects of what is known at a visit on its medications, for every pair at once.

Of diagnoses and procedures, over all training visits; and of the medications of the visit before,
over those training visits that have one: a patient's first visit says nothing of what comes of not
having been given a medication.

Three estimators of how much more likely a medication is a target of a visit with a code:

- "raw": the difference of proportions P(m | code) - P(m | no code), what the literature uses
  (models.md 1.1). It is an association, not an effect.
- "adjusted": least squares with the back-door set that the causal graph gives (`causal.adjustment`)
  as covariates (`causal.regression`).
- "doubly_robust": augmented inverse probability weighting over the patterns of the same set
  (`causal.doubly_robust`).
"""

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.codes import node_name
from cafemed.cohort import Cohort
from cafemed.config import Range
from cafemed.graphs import CausalGraph, EffectTable
from causal import adjustment, doubly_robust, propensity, regression
from causal import columns as columns_of
from causal.columns import Columns
from causal.propensity import Floats


@dataclasses.dataclass(frozen=True)
class EffectsConfig:
    """How effects are estimated.

    Attributes:
        estimator: "raw", "adjusted" or "doubly_robust".
        adjust_for: "parents", the code's directed parents; "class", its parents in every member of
            the graph's Markov class, whose effects are averaged. Raw adjusts for nothing.
        min_support: visits with code and medication, observed or expected if they were
            independent, that make a pair supported.
        min_visits: visits that the comparison with and without a code must be worth for the code
            to be supported (`causal.propensity.worth`).
    """

    estimator: Literal["raw", "adjusted", "doubly_robust"] = "doubly_robust"
    adjust_for: Literal["parents", "class"] = "parents"
    min_support: Annotated[int, Range(1)] = 5
    min_visits: Annotated[float, Range(0)] = 10.0


def estimate(cohort: Cohort, graph: CausalGraph, config: EffectsConfig) -> EffectTable:
    """Estimates effects of diagnoses, procedures and previous medications on every medication.

    The outcome is the cohort's targets; codes and adjustment sets are what is known at the visit
    (`Cohort.known_inputs`). Training visits only, for previous medications no first visits.

    Returns:
        A table of differences of probabilities. A pair without support has effect 0 and standard
        error NaN, except that raw effects are kept as they are. A code that no visit or every
        visit has, or that its adjustment set determines, has effect 0 whatever the estimator.
    """
    columns = columns_of.of_cohort(cohort)
    visits = columns_of.training_visits(cohort)
    targets = columns_of.presence(cohort.targets, visits, cohort.sizes[2])
    codes = tuple(
        node_name(kind, code)
        for kind in ("diagnosis", "procedure")
        for code in cohort.vocabularies[kind]
    )
    medications = cohort.vocabularies["medication"]
    previous = tuple(node_name("previous_medication", code) for code in medications)
    later = np.flatnonzero(columns.strata)
    # One after the other, so that what models take of the first is the same with and without the
    # second, to the bit.
    parts = [
        _of_codes(codes, columns, targets, graph, config),
        _of_codes(previous, columns.visits(later), targets[later], graph, config),
    ]
    return EffectTable(
        codes=(*codes, *previous),
        medications=tuple(node_name("medication", code) for code in medications),
        estimator=config.estimator,
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
    )


def _of_codes(
    codes: tuple[str, ...],
    columns: Columns,
    targets: sparse.csr_array,
    graph: CausalGraph,
    config: EffectsConfig,
) -> dict[str, NDArray[Any]]:
    """The arrays of `EffectTable` for some of the columns, from all visits given."""
    position = {name: i for i, name in enumerate(columns.names)}
    treated = np.array([position[code] for code in codes], np.int64)
    if config.estimator == "raw":
        sets = [[np.zeros(0, np.int64)]] * len(codes)
    else:
        sets = adjustment.sets(graph, codes, columns.names, config.adjust_for)
    found = _over_sets(columns, treated, sets, targets, config.estimator)
    support = (columns.present[:, treated].T @ targets).toarray()
    supported = _supported(found, support, targets, config)
    kept = np.isfinite(found.standard_error) if config.estimator == "raw" else supported
    return {
        "effect": np.where(kept, found.effect, 0).astype(np.float32),
        "standard_error": np.where(kept, found.standard_error, np.nan).astype(np.float32),
        "minimum": np.where(kept, found.minimum, 0).astype(np.float32),
        "maximum": np.where(kept, found.maximum, 0).astype(np.float32),
        "support": support.astype(np.int32),
        "supported": supported,
        "visits": found.visits.astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class _Estimates:
    """Over the adjustment sets of each code: what `EffectTable` says of C codes, M medications."""

    effect: Floats  # (C, M)
    standard_error: Floats  # (C, M)
    minimum: Floats  # (C, M)
    maximum: Floats  # (C, M)
    visits: Floats  # (C,)


def _over_sets(
    columns: Columns,
    treated: NDArray[np.int64],
    sets: list[list[NDArray[np.int64]]],
    targets: sparse.csr_array,
    estimator: str,
) -> _Estimates:
    """Mean and range over the adjustment sets of each code.

    The estimates of one code share their visits, so that their mean's standard error is at most
    the mean of theirs, which is what is given. `visits` is of the set that leaves the fewest.
    """
    numbers = np.array([len(chosen) for chosen in sets], np.int64)
    every = [chosen for of_code in sets for chosen in of_code]
    repeated = np.repeat(treated, numbers)
    fit = doubly_robust.augmented if estimator == "doubly_robust" else regression.regress
    effect, error = fit(columns, repeated, every, targets)
    visits = propensity.all_worth(columns.present.tocsc(), repeated, every)
    if (numbers == 1).all():
        return _Estimates(effect, error, effect, effect, visits)
    first = np.cumsum(numbers) - numbers
    lowest, highest = (f.reduceat(effect, first) for f in (np.minimum, np.maximum))
    mean = np.add.reduceat(effect, first) / numbers[:, None]
    return _Estimates(
        effect=np.clip(mean, lowest, highest),  # which rounding may carry it beyond
        standard_error=np.add.reduceat(error, first) / numbers[:, None],
        minimum=lowest,
        maximum=highest,
        visits=np.minimum.reduceat(visits, first),
    )


def _supported(
    found: _Estimates, support: NDArray[np.int64], targets: sparse.csr_array, config: EffectsConfig
) -> NDArray[np.bool_]:
    """Pairs with enough visits to tell an effect by, bool (C, M).

    The expected number counts too: that a medication is never given with a code of many visits says
    as much about its effect as if it often were.
    """
    rate = np.asarray(targets.sum(axis=0)) / max(targets.shape[0], 1)
    enough = np.maximum(support, found.visits[:, None] * rate) >= config.min_support
    compared = found.visits >= config.min_visits
    known: NDArray[np.bool_] = enough & compared[:, None] & np.isfinite(found.standard_error)
    return known
