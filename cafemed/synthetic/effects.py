"""True effects: P(m = 1 | do(c = 1)) - P(m = 1 | do(c = 0)) for every code and medication."""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.codes import node_name
from cafemed.graphs import EffectTable
from cafemed.synthetic.generator import EFFECT_STREAM, Population, previous, stream
from cafemed.synthetic.model import (
    Bools,
    Floats,
    Model,
    codes_given,
    draft_log_miss,
    medication_probabilities,
    usable,
)


def true_effects(population: Population) -> EffectTable:
    """Simulates the effects of every code on every medication, visits as in the population.

    Visits of the population give the previous medications (and diagnoses, where these persist);
    the codes are drawn with c set to 1 and to 0 under the same noise, and the probabilities of
    the medications given the codes are exact. As in the population, visits without a diagnosis or
    a procedure do not count.

    Returns:
        All codes and medications of the model; standard_error is the simulation's. It has no rows
        of previous medications: see `previous_effects`.
    """
    config, model = population.config, population.model
    rng = stream(population.seed, EFFECT_STREAM)
    visits = rng.integers(0, population.num_visits, config.effect_draws)
    medications = previous(population, population.medications).take(visits)
    before = None
    if (model.code_persistence > 0).any():
        # Procedures do not persist: their rows are never looked at.
        before = np.zeros((model.num_codes, len(visits)), np.bool_)
        diagnoses = previous(population, population.diagnoses).take(visits)
        before[: len(model.diagnoses)] = diagnoses.multi_hot(len(model.diagnoses)).T
    multi_hot = medications.multi_hot(len(model.medications))
    effect, error = interventions(model, multi_hot, before, rng)
    return EffectTable.known(
        codes=code_names(model),
        medications=tuple(node_name("medication", code) for code in model.medications),
        effect=effect.astype(np.float32),
        standard_error=error.astype(np.float32),
        estimator="true",
    )


def previous_effects(population: Population) -> EffectTable:
    """Effects of having been given each medication at the visit before, at visits that have one.

    In the model a previous medication acts on this visit's medications alone: on itself, and by
    striking on others. So the visit's codes stay as they were drawn, and its other previous
    medications too; the probabilities given these are exact.

    Returns:
        All medications of the model; standard_error is that of the mean over the visits.
    """
    model = population.model
    rng = stream(population.seed, EFFECT_STREAM)
    later = np.flatnonzero(~population.is_first_visit())
    visits = rng.permutation(later)[: population.config.effect_draws]
    codes = np.hstack(
        [
            population.diagnoses.take(visits).multi_hot(len(model.diagnoses)),
            population.procedures.take(visits).multi_hot(len(model.procedures)),
        ]
    )
    before = previous(population, population.medications).take(visits)
    given = before.multi_hot(len(model.medications))
    log_miss = draft_log_miss(model, sparse.csr_array(codes.astype(np.float64)), given)
    persists = np.log1p(-model.medication_persistence)
    effect = np.zeros((len(persists), len(persists)))
    error = np.zeros(effect.shape)
    for j, strength in enumerate(persists):
        without, with_it = log_miss.copy(), log_miss.copy()
        without[given[:, j], j] -= strength
        with_it[~given[:, j], j] += strength
        difference = medication_probabilities(model, with_it)
        difference -= medication_probabilities(model, without)
        effect[j] = difference.mean(axis=0)
        error[j] = difference.std(axis=0, ddof=1) / np.sqrt(len(visits))
    return EffectTable.known(
        codes=tuple(node_name("previous_medication", code) for code in model.medications),
        medications=tuple(node_name("medication", code) for code in model.medications),
        effect=effect.astype(np.float32),
        standard_error=error.astype(np.float32),
        estimator="true",
    )


def code_names(model: Model) -> tuple[str, ...]:
    """Graph nodes of the N codes, in the model's order."""
    return (
        *(node_name("diagnosis", code) for code in model.diagnoses),
        *(node_name("procedure", code) for code in model.procedures),
    )


def interventions(
    model: Model, medications: Bools, before: Bools | None, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Effects of every code on every medication, and their standard errors.

    Every row is a visit seen twice, as drawn and with the code flipped: one of the two is
    do(c = 1), the other do(c = 0), and the noise of all other codes is the same.

    Args:
        model: the parameters.
        medications: (rows, N_m), medications of the visit before.
        before: (N, rows), codes of the visit before; None where they have no bearing.
        rng: source of the noise.

    Returns:
        Two float64 (N, N_m).
    """
    uniform = rng.random((model.num_codes, len(medications)), np.float32)
    codes = codes_given(model, uniform, before)
    log_miss = draft_log_miss(model, sparse.csr_array(codes.T.astype(np.float64)), medications)
    drawn = medication_probabilities(model, log_miss)
    counted = usable(model, codes)
    miss = model.log_miss.toarray()
    effect, error = np.zeros(miss.shape), np.zeros(miss.shape)
    reached = _reached(model)
    for code in range(model.num_codes):
        touched = reached[code]
        if not miss[touched].any():
            continue
        was = codes[touched]
        codes[code] = ~was[0]
        codes_given(model, uniform, before, nodes=touched[1:], known=codes)
        change = codes[touched].astype(np.float64) - was
        flipped = medication_probabilities(model, log_miss + change.T @ miss[touched])
        flipped_counted = usable(model, codes)
        codes[touched] = was
        effect[code], error[code] = _contrast(was[0], (drawn, counted), (flipped, flipped_counted))
    return effect, error


def _contrast(
    present: Bools, drawn: tuple[Floats, Bools], flipped: tuple[Floats, Bools]
) -> tuple[Floats, Floats]:
    """Mean difference between do(c = 1) and do(c = 0) over counted rows, and its error; (N_m,)."""
    one = np.where(present[:, None], drawn[0], flipped[0])
    zero = np.where(present[:, None], flipped[0], drawn[0])
    weight_one = np.where(present, drawn[1], flipped[1]) / 1.0
    weight_zero = np.where(present, flipped[1], drawn[1]) / 1.0
    weight_one /= max(weight_one.mean(), 1e-12)
    weight_zero /= max(weight_zero.mean(), 1e-12)
    rows = len(present)
    mean_one, mean_zero = weight_one @ one / rows, weight_zero @ zero / rows
    spread = weight_one[:, None] * (one - mean_one) - weight_zero[:, None] * (zero - mean_zero)
    return mean_one - mean_zero, spread.std(axis=0, ddof=1) / np.sqrt(rows)


def _reached(model: Model) -> list[list[int]]:
    """Each code followed by its descendants, in topological order."""
    children: dict[int, list[int]] = {}
    for parent, child in zip(model.parent.tolist(), model.child.tolist(), strict=True):
        children.setdefault(parent, []).append(child)
    place: NDArray[np.int64] = np.empty(model.num_codes, np.int64)
    place[model.order] = np.arange(model.num_codes)
    descendants: dict[int, set[int]] = {}
    for code in reversed(model.order.tolist()):
        below = children.get(code, [])
        descendants[code] = set(below).union(*(descendants[child] for child in below))
    return [
        [code, *sorted(descendants[code], key=lambda i: int(place[i]))]
        for code in range(model.num_codes)
    ]
