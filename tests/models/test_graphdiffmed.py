"""GraphDiffMed against its one-visit-at-a-time reference, and what must not change its answer."""

import dataclasses

import numpy as np
import pytest
import torch

from cafemed import config
from models.graphdiffmed import GraphDiffMedOptions

# float32 over some hundred additions of numbers near 1; the logits are of order 1.
TOLERANCE = 1e-5

VARIANTS = {
    "default": {},
    "sex": {"modalities": "G"},
    "sex_and_age": {"modalities": "GY"},
    "two_heads": {"heads": 2},
    "no_graph_bias": {"graph_bias": 0.0},
    "strong_graph_bias": {"graph_bias": 3.0},
    "no_molecules": {"molecules": "none"},
    "three_relation_levels": {"relation_levels": 3},
    "no_virtual_edges": {"virtual_edges": "none"},
    "no_review": {"review": False},
    "review_by_all_effects": {"review_quantiles": "all"},
    "single_state": {"duplicate_state": False},
    "noisy_or": {"direct": "noisy_or"},
    "additive": {"direct": "additive", "direct_start": "even"},
}


def _with_knowledge(world, zero_share=0.9, seed=3):
    """The world with effects of all classes, of which a share is 0, molecules, sexes and ages."""
    rng = np.random.default_rng(seed)
    effects = rng.uniform(-0.4, 1, world.inputs.effects.shape).astype(np.float32)
    effects[rng.random(effects.shape) < zero_share] = 0
    effects[::5] = 0  # codes without any effect, so that some visits have none
    molecules = rng.random((world.inputs.sizes[2], 9)) < 0.15
    molecules[:2], molecules[3] = False, np.arange(9) < 3  # two medications have no molecule
    inputs = dataclasses.replace(world.inputs, effects=effects, molecules=molecules)
    arrays = world.arrays
    age = rng.normal(0, 1, arrays.num_visits).astype(np.float32)
    age[::4] = np.nan
    sex = (np.arange(arrays.num_patients) % 3).astype(np.int8)
    arrays = dataclasses.replace(arrays, age=age, sex=sex)
    return dataclasses.replace(world, inputs=inputs, arrays=arrays)


@pytest.fixture(scope="module")
def informed(world):
    return _with_knowledge(world)


def _visits_without_relevance(world):
    """Visits with diagnoses that are relevant to no molecule."""
    relevance = world.inputs.effects.astype(float) @ world.inputs.molecules
    return [
        (p, t)
        for p, visits in enumerate(world.patients)
        for t, visit in enumerate(visits)
        if visit["codes"][0] and not relevance[visit["codes"][0]].any()
    ]


def _expected(reference, model, world, options, patients, weights=None):
    values = dataclasses.asdict(config.from_mapping(GraphDiffMedOptions, options, "model"))
    if weights is None:
        weights = {name: weight.double() for name, weight in model.state_dict().items()}
    inputs = {
        "sizes": world.inputs.sizes,
        "effects": world.inputs.effects.astype(float).tolist(),
        "ddi": world.inputs.ddi.tolist(),
        "molecules": None if world.inputs.molecules is None else world.inputs.molecules.tolist(),
    }
    offsets = world.arrays.patient_offsets
    return torch.cat(
        [
            reference.patient_logits(
                weights,
                inputs,
                values,
                world.patients[p],
                int(world.arrays.sex[p]),
                world.arrays.age[offsets[p] : offsets[p + 1]].tolist(),
            )
            for p in patients
        ]
    )


def _small(options):
    return {"dimension": 16, **options}


@pytest.mark.parametrize("name", VARIANTS)
def test_batched_equals_one_visit_at_a_time(
    name, informed, build_eval, reference_graphdiffmed, logits_of
):
    assert _visits_without_relevance(informed)
    options = _small(VARIANTS[name])
    model = build_eval("graphdiffmed", informed.inputs, options)
    patients = [0, 2, 3, 4]
    expected = _expected(reference_graphdiffmed, model, informed, options, patients)
    got = logits_of(model, informed.arrays, patients).double()
    assert (got - expected).abs().max() < TOLERANCE
    got = logits_of(model.double(), informed.arrays, patients)
    assert (got - expected).abs().max() < 1e-12
