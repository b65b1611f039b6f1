"""Drawing the parameters of a population: names, clusters, graph, medications and interactions."""

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

#: The parents of a code explain at most this share of its prevalence, so that leaks stay above 0.
_EXPLAINED = 0.7
#: An edge weaker than this would be there in name only.
_WEAKEST_EDGE = 0.05
#: Share of a code's parents that come from other clusters.
_FOREIGN_PARENTS = 0.15
#: Procedures come this much later than diagnoses in the order, in units of each kind's spread.
_PROCEDURE_DELAY = 0.3
#: How unequal the medications' popularity among clusters is (a Zipf exponent).
_POPULARITY = 0.6

_PILOT_PATIENTS = 1_000
_ROUNDS = 4
_BISECTIONS = 14


def draw_model(config: SyntheticConfig, rng: np.random.Generator) -> Model:
    """Draws the parameters of a population.

    Leaks are set so that codes have their Zipf-like prevalences; the number of edges to
    medications and the interacting pairs are then chosen on a pilot population so that
    medications per visit and the DDI rate are near `config`'s.
    """
    num_codes = config.num_diagnoses + config.num_procedures
    prevalence = np.concatenate(
        [
            rng.permutation(zipf(config, config.num_diagnoses, config.diagnoses_per_visit)),
            rng.permutation(zipf(config, config.num_procedures, config.procedures_per_visit)),
        ]
    )
    num_clusters = max(1, round(num_codes / config.codes_per_cluster))
    cluster = rng.permutation(np.arange(num_codes) % num_clusters).astype(np.int32)
    order = _draw_order(config, rng)
    parent, child, strength = _draw_edges(config, prevalence, cluster, order, rng)
    persistence = np.zeros(num_codes)
    persistence[: config.num_diagnoses] = config.diagnosis_persistence
    num_medications = config.num_medications
    model = Model(
        diagnoses=_diagnosis_names(config.num_diagnoses, rng),
        procedures=_procedure_names(config.num_procedures, rng),
        medications=_medication_names(num_medications, rng),
        cluster=cluster,
        order=order,
        parent=parent,
        child=child,
        edge_strength=strength,
        code_leak=_leaks(prevalence, persistence, parent, child, strength),
        code_persistence=persistence,
        cause=np.zeros(0, np.int32),
        caused=np.zeros(0, np.int32),
        cause_strength=np.zeros(0),
        medication_leak=np.full(num_medications, 1e-3),
        medication_persistence=rng.uniform(
            config.persistence_low, config.persistence_high, num_medications
        ),
        priority=rng.permutation(num_medications).astype(np.int32),
        ddi=np.zeros((num_medications, num_medications), np.bool_),
        avoidance=config.avoidance,
    )
    return _with_medications(config, model, prevalence, rng)


def zipf(config: SyntheticConfig, size: int, mean: float) -> Floats:
    """Zipf-like prevalences (size,), descending, with `mean` codes in a visit that has any."""
    shape = np.arange(1, size + 1) ** -config.zipf_exponent
    low, high = 0.0, config.top_prevalence / shape[-1]
    prevalence = np.zeros(size)
    for _ in range(100):
        scale = (low + high) / 2
        prevalence = np.minimum(config.top_prevalence, scale * shape)
        if prevalence.sum() / (1 - np.prod(1 - prevalence)) < mean:
            low = scale
        else:
            high = scale
    return prevalence


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


def _draw_order(config: SyntheticConfig, rng: np.random.Generator) -> NDArray[np.int32]:
    time = rng.random(config.num_diagnoses + config.num_procedures)
    time[config.num_diagnoses :] += _PROCEDURE_DELAY
    return np.argsort(time).astype(np.int32)


def _draw_edges(
    config: SyntheticConfig,
    prevalence: Floats,
    cluster: NDArray[np.int32],
    order: NDArray[np.int32],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
    """Edges over codes: mostly within clusters, from earlier codes of similar prevalence."""
    num_parents = rng.poisson(config.parents_per_code, len(order))
    edges: list[tuple[int, int, float]] = []
    for place, child in enumerate(order):
        earlier = order[:place]
        kin = earlier[cluster[earlier] == cluster[child]]
        foreign = rng.binomial(num_parents[child], _FOREIGN_PARENTS)
        chosen = _choose(kin, num_parents[child] - foreign, prevalence, child, rng)
        chosen |= _choose(earlier, foreign, prevalence, child, rng)
        for parent in sorted(chosen):
            wished = rng.uniform(config.code_strength_low, config.code_strength_high)
            share = _EXPLAINED * prevalence[child] / (len(chosen) * prevalence[parent])
            if (strength := min(wished, share)) >= _WEAKEST_EDGE:
                edges.append((parent, int(child), strength))
    return (
        np.array([e[0] for e in edges], np.int32),
        np.array([e[1] for e in edges], np.int32),
        np.array([e[2] for e in edges], np.float64),
    )


def _choose(
    candidates: NDArray[np.int32],
    size: int,
    prevalence: Floats,
    child: int,
    rng: np.random.Generator,
) -> set[int]:
    if size == 0 or len(candidates) == 0:
        return set()
    # A common cause of a rare code could only be a weak one: similar prevalences go together.
    weight = np.exp(-np.abs(np.log(prevalence[candidates] / prevalence[child])))
    size = min(size, len(candidates))
    return set(rng.choice(candidates, size, replace=False, p=weight / weight.sum()).tolist())


def _leaks(
    prevalence: Floats,
    persistence: Floats,
    parent: NDArray[np.int32],
    child: NDArray[np.int32],
    strength: Floats,
) -> Floats:
    """Leaks that give the prevalences, where a code's parents are taken as independent."""
    log_absent = np.log1p(-persistence * prevalence)
    np.add.at(log_absent, child, np.log1p(-strength * prevalence[parent]))
    leak: Floats = np.maximum(1 - (1 - prevalence) / np.exp(log_absent), 0.1 * prevalence)
    return leak


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


def _with_medications(
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


def _choose_ddi(config: SyntheticConfig, model: Model, pilot: _Pilot, tie: Floats) -> Bools:
    """Interacting pairs: random, leaning to pairs prescribed together as the DDI rate asks for."""
    size = config.num_medications
    a, b = np.triu_indices(size, 1)
    free = dataclasses.replace(model, ddi=np.zeros((size, size), np.bool_))
    sets = _pilot_medications(free, pilot).astype(np.float32)
    attraction = np.log1p((sets.T @ sets)[a, b])
    num_pairs = round(config.ddi_density * len(a))

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


def _diagnosis_names(size: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Invented codes in the shape of ICD-9: three digits and up to two more."""
    shapes = [f"{chapter:03d}{rest}" for chapter in range(1, 1000) for rest in _ENDINGS]
    return tuple(sorted(f"icd9:{code}" for code in rng.choice(shapes, size, replace=False)))


def _procedure_names(size: int, rng: np.random.Generator) -> tuple[str, ...]:
    shapes = [f"{chapter:02d}{rest}" for chapter in range(1, 100) for rest in _ENDINGS[1:]]
    return tuple(sorted(f"icd9:{code}" for code in rng.choice(shapes, size, replace=False)))


def _medication_names(size: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Invented codes in the shape of ATC's third level: letter, two digits, letter."""
    shapes = [f"{a}{n:02d}{b}" for a in "ABCDGHJLMNPRSV" for n in range(1, 17) for b in "ABCDEFGHX"]
    return tuple(sorted(f"atc:{code}" for code in rng.choice(shapes, size, replace=False)))


_ENDINGS = ("", *(str(n) for n in range(10)), *(f"{n:02d}" for n in range(0, 100, 7)))
