"""A tiny model and cohort, for what trains and evaluates models without knowing them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cafemed.batches import ModelInputs, VisitArrays

SIZES = (12, 7, 9)


class BagModel(torch.nn.Module):
    """Sums embeddings of a visit's codes, then dropout and a linear layer."""

    def __init__(self, inputs, dropout, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.tables = torch.nn.ModuleList(torch.nn.Embedding(n, 8) for n in inputs.sizes)
            self.dropout = torch.nn.Dropout(dropout)
            self.head = torch.nn.Linear(8, inputs.sizes[2])

    def forward(self, batch):
        position = torch.arange(batch.codes.shape[2])
        total = 0
        for k, table in enumerate(self.tables):
            mask = position < batch.counts[:, k, None]
            total = total + (table(batch.codes[:, k]) * mask[..., None]).sum(dim=1)
        return batch.pad(self.head(self.dropout(total)))


def _build(name, inputs, options, seed):
    assert name == "bag"
    return BagModel(inputs, options.get("dropout", 0.3), seed)


@pytest.fixture
def build_bag():
    return _build


@pytest.fixture(scope="session")
def small_inputs():
    rng = np.random.default_rng(0)
    ddi = np.triu(rng.random((SIZES[2], SIZES[2])) < 0.3, 1)
    effects = rng.normal(0, 0.1, (SIZES[0] + SIZES[1], SIZES[2])).astype(np.float32)
    return ModelInputs(SIZES, effects, ddi | ddi.T)


@pytest.fixture(scope="session")
def small_arrays():
    """40 patients with 1 to 4 visits, whose medications follow from their diagnoses."""
    rng = np.random.default_rng(1)
    visits = rng.integers(1, 5, 40)
    offsets = np.concatenate([[0], np.cumsum(visits)])
    shape = (int(offsets[-1]), 3)
    counts = rng.integers(1, 5, shape).astype(np.int32)
    counts[offsets[:-1], 2] = 0
    codes = np.stack(
        [rng.permuted(np.tile(np.arange(7), (shape[0], 1)), axis=1)[:, :4] for _ in range(3)],
        axis=1,
    ).astype(np.int32)
    present = np.arange(4) < counts[:, 0, None]
    targets = np.zeros((shape[0], SIZES[2]), np.bool_)
    visit, place = np.nonzero(present)
    targets[visit, codes[visit, 0, place]] = True
    return VisitArrays(
        codes=codes,
        counts=counts,
        classes=np.ones((*shape, 4), np.int8),
        targets=targets,
        patient_offsets=offsets,
        sex=np.zeros(40, np.int8),
        age=np.full(shape[0], np.nan, np.float32),
        laboratory_items=np.zeros((shape[0], 0), np.int32),
        laboratory_values=np.zeros((shape[0], 0), np.float32),
        laboratory_counts=np.zeros(shape[0], np.int32),
        sizes=SIZES,
    )


def _module(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sweeps():
    """The module sweeps.py: sweeps without Ray."""
    return _module("sweeps")


@pytest.fixture(scope="session")
def group(sweeps):
    """The module group_member.py: processes that train one model together, without Ray."""
    assert sys.modules["sweeps"] is sweeps  # which it imports
    return _module("group_member")


@pytest.fixture(scope="session")
def given(sweeps):
    """Sixty invented patients whose medications follow from their diagnoses."""
    return sweeps.invented_experiment()
