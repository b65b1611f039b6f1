"""A small world for models: random patients of chosen lengths, as arrays and as plain lists."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from cafemed.batches import ModelInputs, VisitArrays, collate

SIZES = (23, 17, 11)


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class World:
    """Patients as `VisitArrays` and, for the references, as lists of dicts of lists."""

    inputs: ModelInputs
    arrays: VisitArrays
    patients: list


def _visit(rng, first, counts):
    codes = [rng.choice(SIZES[k], counts[k], replace=False).tolist() for k in range(3)]
    if first:
        codes[2] = []
    return {"codes": codes, "classes": [rng.integers(0, 4, len(c)).tolist() for c in codes]}


def _arrays(patients, width):
    visits = [visit for patient in patients for visit in patient]
    rng = np.random.default_rng(5)
    # Padding is not zero: random valid ids and classes, which must not matter.
    codes = np.stack([rng.integers(0, SIZES[k], (len(visits), width)) for k in range(3)], 1)
    classes = rng.integers(0, 4, codes.shape)
    counts = np.zeros((len(visits), 3), np.int32)
    for v, visit in enumerate(visits):
        for k in range(3):
            number = len(visit["codes"][k])
            counts[v, k] = number
            codes[v, k, :number] = visit["codes"][k]
            classes[v, k, :number] = visit["classes"][k]
    lengths = [len(patient) for patient in patients]
    return VisitArrays(
        codes=codes.astype(np.int32),
        counts=counts,
        classes=classes.astype(np.int8),
        targets=rng.random((len(visits), SIZES[2])) < 0.3,
        patient_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sex=np.zeros(len(patients), np.int8),
        age=np.full(len(visits), np.nan, np.float32),
        laboratory_items=np.zeros((len(visits), 0), np.int32),
        laboratory_values=np.zeros((len(visits), 0), np.float32),
        laboratory_counts=np.zeros(len(visits), np.int32),
        sizes=SIZES,
    )


@pytest.fixture(scope="session")
def make_world():
    """Builds a World from lengths of patients; `counts(rng)` gives each visit's code numbers."""

    def make(lengths, counts=None, seed=0):
        rng = np.random.default_rng(seed)
        draw = counts or (lambda rng: (rng.integers(1, 9), rng.integers(0, 6), rng.integers(1, 8)))
        patients = [[_visit(rng, t == 0, draw(rng)) for t in range(n)] for n in lengths]
        effects = rng.normal(0, 0.3, (SIZES[0] + SIZES[1], SIZES[2])).astype(np.float32)
        ddi = np.triu(rng.random((SIZES[2], SIZES[2])) < 0.3, 1)
        inputs = ModelInputs(SIZES, effects, ddi | ddi.T)
        return World(inputs, _arrays(patients, 12), patients)

    return make


@pytest.fixture(scope="session")
def world(make_world):
    """Patients of 1, 29, 2, 5 and 3 visits."""
    return make_world([1, 29, 2, 5, 3])


@pytest.fixture(scope="session")
def build_eval():
    """Builds a model whose options and weights are far from where they have no effect."""

    def build(name, inputs, options, seed=0):
        model = models.build(name, inputs, options, seed).eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            for name, weight in model.named_parameters():
                if name == "embedding":
                    weight.mul_(10)  # at its scale of 0.1, half of the model is near linear
                elif weight.ndim < 2 or name in ("class_mask.mask", "fusion"):
                    weight.add_(0.3 * torch.randn_like(weight))
        return model

    return build


@pytest.fixture(scope="session")
def reference_cafemed():
    return _load("reference_cafemed")


@pytest.fixture(scope="session")
def logits_of():
    """The model's logits of the visits that exist, (V, N_m), for patients in the given order."""

    def logits(model, arrays, patients):
        with torch.no_grad():
            batch = collate(arrays, np.asarray(patients, np.int64))
            return batch.flatten(model(batch))

    return logits


@pytest.fixture(scope="session")
def reference_causalmed():
    return _load("reference_causalmed")


@pytest.fixture(scope="session")
def reference_graphdiffmed():
    return _load("reference_graphdiffmed")
