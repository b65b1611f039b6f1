"""Choosing edges to medications and interacting pairs, so that a pilot population has the means.

A pilot of patients keeps its codes and its noise while edges and pairs change: medications per
visit rise with the edges, the DDI rate with the leaning of the pairs, and bisection finds both.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.synthetic.config import SyntheticConfig
from cafemed.synthetic.model import (
    Bools,
    Floats,
    Model,
    draft_log_miss,
    draw_codes,
    struck,
)

#: How unequal the medications' popularity among clusters is (a Zipf exponent).
_POPULARITY = 0.6
_PILOT_PATIENTS = 1_000
_ROUNDS = 4
_BISECTIONS = 18


def with_medications(
    config: SyntheticConfig, model: Model, prevalence: Floats, rng: np.random.Generator
) -> Model:
    """Chooses edges to medications and interacting pairs, in turn, until both aims are met."""
    cause, caused = _candidates(config, model.cluster, rng)
    strength = rng.uniform(config.strength_low, config.strength_high, len(cause))
    key = rng.random(len(cause)) * (prevalence[cause] / prevalence.min()) ** config.specificity
    # Every medication keeps one cause, whatever share of the candidates is taken.
    first = np.unique(caused[np.argsort(key)], return_index=True)[1]
    key[np.argsort(key)[first]] = 0
    tie = rng.gumbel(size=config.num_medications * (config.num_medications - 1) // 2)
    pilot = _pilot(config, model, rng)

    def at(share: float) -> Model:
        taken = key <= share
        return dataclasses.replace(
            model, cause=cause[taken], caused=caused[taken], cause_strength=strength[taken]
        )

    for _ in range(_ROUNDS):
        low, high = 0.0, float(key.max())
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            drawn = _pilot_medications(at(share), pilot)
            if drawn.sum() / max(drawn.any(axis=1).sum(), 1) < config.medications_per_visit:
                low = share
            else:
                high = share
        model = at((low + high) / 2)
        leak = np.maximum(config.leak_share * _pilot_medications(model, pilot).mean(axis=0), 1e-4)
        model = dataclasses.replace(model, medication_leak=leak)
        model = dataclasses.replace(model, ddi=_choose_ddi(config, model, pilot, tie))
    return model


def visit_counts(num_patients: int, num_visits: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Visits of each patient, int64 (num_patients,): 2 + geometric, `num_visits` altogether."""
    extra = num_visits - 2 * num_patients
    counts = rng.geometric(num_patients / (num_patients + extra), num_patients) + 1
    while (excess := int(counts.sum()) - num_visits) != 0:
        if excess > 0:
            chosen = rng.permutation(np.flatnonzero(counts > 2))[:excess]
            counts[chosen] -= 1
        else:
            counts[rng.permutation(num_patients)[:-excess]] += 1
    return counts


def ddi_rate(medications: Bools, ddi: Bools) -> float:
    """Interacting pairs among all pairs of the same visit, pooled; 0 without any pair."""
    sets = medications.astype(np.float32)
    sizes = sets.sum(axis=1)
    pairs = float((sizes * (sizes - 1)).sum())
    together = float(((sets @ ddi.astype(np.float32)) * sets).sum())
    return together / pairs if pairs else 0.0


def _candidates(
    config: SyntheticConfig, cluster: NDArray[np.int32], rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Every (code, medication) pair of the same cluster, sorted by code then medication."""
    num_clusters, num_medications = int(cluster.max()) + 1, config.num_medications
    size = min(
        num_medications, max(config.medications_per_cluster, -(-num_medications // num_clusters))
    )
    popularity = rng.permutation(np.arange(1, num_medications + 1) ** -_POPULARITY)
    dealt = rng.permutation(num_medications)
    sets = [set(dealt[c::num_clusters].tolist()) for c in range(num_clusters)]
    for chosen in sets:
        weight = popularity.copy()
        weight[list(chosen)] = 0
        if (more := size - len(chosen)) > 0:
            weight /= weight.sum()
            chosen.update(rng.choice(num_medications, more, replace=False, p=weight).tolist())
    pairs = [(i, j) for i, c in enumerate(cluster) for j in sorted(sets[c])]
    cause, caused = np.array(pairs, np.int32).T
    return cause, caused


def _choose_ddi(config: SyntheticConfig, model: Model, pilot: "_Pilot", tie: Floats) -> Bools:
    """Interacting pairs: random, leaning to pairs prescribed together as the DDI rate asks for."""
    size = config.num_medications
    a, b = np.triu_indices(size, 1)
    free = dataclasses.replace(model, ddi=np.zeros((size, size), np.bool_))
    sets = _pilot_medications(free, pilot).astype(np.float32)
    attraction = np.log1p((sets.T @ sets)[a, b])
    num_pairs = max(1, round(config.ddi_density * len(a)))

    def leaning(tilt: float) -> Bools:
        top = np.argsort(-(tilt * attraction + tie), kind="stable")[:num_pairs]
        ddi = np.zeros((size, size), np.bool_)
        ddi[a[top], b[top]] = ddi[b[top], a[top]] = True
        return ddi

    # Beyond 2 the strikes remove more pairs than the leaning adds.
    low, high = -2.0, 2.0
    for _ in range(_BISECTIONS):
        tilt = (low + high) / 2
        ddi = leaning(tilt)
        tried = dataclasses.replace(model, ddi=ddi)
        if ddi_rate(_pilot_medications(tried, pilot), ddi) < config.ddi_rate:
            low = tilt
        else:
            high = tilt
    return leaning((low + high) / 2)


@dataclasses.dataclass(frozen=True)
class _Pilot:
    """Visits to calibrate on: their codes and noise; `positions[t]` are patients' t-th visits."""

    codes: sparse.csr_array
    positions: list[NDArray[np.int64]]
    draft_noise: NDArray[np.float32]
    strike_noise: NDArray[np.float32]


def _pilot(config: SyntheticConfig, model: Model, rng: np.random.Generator) -> _Pilot:
    num_visits = round(_PILOT_PATIENTS * config.num_visits / config.num_patients)
    counts = visit_counts(_PILOT_PATIENTS, num_visits, rng)
    starts = np.cumsum(counts) - counts
    positions = [starts[counts > t] + t for t in range(int(counts.max()))]
    codes = np.zeros((model.num_codes, num_visits), np.bool_)
    for t, visits in enumerate(positions):
        before = codes[:, visits - 1] if t else None
        codes[:, visits] = draw_codes(model, len(visits), before, rng)
    shape = (num_visits, config.num_medications)
    return _Pilot(
        sparse.csr_array(codes.T.astype(np.float64)),
        positions,
        rng.random(shape, np.float32),
        rng.random(shape, np.float32),
    )


def _pilot_medications(model: Model, pilot: _Pilot) -> Bools:
    """Medications of the pilot's visits; an empty draft counts as one that stayed empty."""
    medications = np.zeros(pilot.draft_noise.shape, np.bool_)
    log_miss = draft_log_miss(model, pilot.codes, np.zeros_like(medications))
    persists = np.log1p(-model.medication_persistence)
    for t, visits in enumerate(pilot.positions):
        rows = log_miss[visits]
        if t:
            rows = rows + medications[visits - 1] * persists
        draft = pilot.draft_noise[visits] >= np.exp(rows)
        medications[visits] = struck(model, draft, pilot.strike_noise[visits])
    return medications
