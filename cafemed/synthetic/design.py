"""Drawing the parameters of a population: names, clusters, the graph over codes, and leaks."""

import numpy as np
from numpy.typing import NDArray

from cafemed.synthetic.calibration import with_medications
from cafemed.synthetic.config import SyntheticConfig
from cafemed.synthetic.model import Floats, Model

#: The parents of a code explain at most this share of its prevalence, so that leaks stay above 0.
_EXPLAINED = 0.7
#: An edge weaker than this would be there in name only.
_WEAKEST_EDGE = 0.05
#: Share of a code's parents that come from other clusters.
_FOREIGN_PARENTS = 0.15
#: Procedures come this much later than diagnoses in the order, in units of each kind's spread.
_PROCEDURE_DELAY = 0.3


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
    return with_medications(config, model, prevalence, rng)


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
