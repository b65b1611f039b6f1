"""A tiny generative model that can be enumerated, and populations to look at."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cafemed.synthetic import SyntheticConfig, generate, write_tables
from cafemed.synthetic.model import Model


@pytest.fixture(scope="session")
def tiny() -> Model:
    """Three diagnoses, two procedures, four medications; 0 → 2 → 3, 1 → 3, and 0 is a confounder.

    Medications 0, 1 and 2 interact pairwise; priority order 1, 0, 2, 3.
    """
    ddi = np.zeros((4, 4), np.bool_)
    ddi[:3, :3] = ~np.eye(3, dtype=np.bool_)
    return Model(
        diagnoses=("icd9:001", "icd9:002", "icd9:003"),
        procedures=("icd9:01", "icd9:02"),
        medications=("atc:A01A", "atc:A02A", "atc:A03A", "atc:B01A"),
        cluster=np.zeros(5, np.int32),
        order=np.array([1, 0, 2, 4, 3], np.int32),
        parent=np.array([0, 2, 1], np.int32),
        child=np.array([2, 3, 3], np.int32),
        edge_strength=np.array([0.7, 0.6, 0.4]),
        code_leak=np.array([0.4, 0.3, 0.1, 0.2, 0.5]),
        code_persistence=np.zeros(5),
        cause=np.array([0, 2, 3, 1, 4], np.int32),
        caused=np.array([0, 1, 2, 2, 3], np.int32),
        cause_strength=np.array([0.9, 0.8, 0.7, 0.5, 0.95]),
        medication_leak=np.array([0.05, 0.1, 0.02, 0.01]),
        medication_persistence=np.array([0.6, 0.9, 0.7, 0.8]),
        priority=np.array([1, 0, 2, 3], np.int32),
        ddi=ddi,
        avoidance=0.4,
    )


@pytest.fixture(scope="session")
def enumeration() -> ModuleType:
    """The module enumeration.py."""
    path = Path(__file__).parent / "enumeration.py"
    spec = importlib.util.spec_from_file_location("enumeration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def persistent(tiny) -> Model:
    """The tiny model with diagnoses that persist."""
    return dataclasses.replace(tiny, code_persistence=np.array([0.5, 0.3, 0.6, 0, 0]))


SMALL = SyntheticConfig(
    num_patients=800,
    num_visits=1_900,
    num_diagnoses=80,
    num_procedures=40,
    num_medications=40,
    effect_draws=500,
)


@pytest.fixture(scope="session")
def population():
    """A population of a few hundred patients."""
    return generate(SMALL, 3)


@pytest.fixture(scope="session")
def folder(population, tmp_path_factory):
    """Its tables."""
    target = tmp_path_factory.mktemp("tables")
    write_tables(population, target)
    return target
