"""The independent protocols, and ways from a drawn hospital to records."""

import importlib.util
from pathlib import Path

import pytest

from cafemed import drugs
from cafemed.sources import mimic3


@pytest.fixture(scope="session")
def reference():
    """The module reference.py."""
    path = Path(__file__).parent / "reference.py"
    spec = importlib.util.spec_from_file_location("protocol_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(tmp_path, hospitals):
    """Writes a hospital and reads it back: records and drug knowledge."""

    def write_and_read(hospital, smiles=None):
        folder = hospital.write(tmp_path / "tables")
        table = hospitals.write_drugs(tmp_path / "drugs", smiles=smiles)
        return mimic3.read(folder), drugs.read(drugs.locate(table))

    return write_and_read


@pytest.fixture
def decoded():
    """Turns one list of a cohort back into codes without their system, a list a visit."""

    def decode(lists, codes):
        return [[codes[i].split(":")[1] for i in lists[visit]] for visit in range(len(lists))]

    return decode
