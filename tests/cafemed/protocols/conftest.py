"""The independent protocols, and ways from a drawn hospital to records."""

import csv
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


@pytest.fixture
def demo(real_data, hospitals):
    """The real demo: its rows, records, drug knowledge, NDC table and codes with a molecule."""
    folder = real_data / "drug-knowledge"
    known = drugs.read(drugs.locate(folder))
    rows = hospitals.load(real_data / "mimic3-demo")
    with (folder / "ndc_to_atc3.csv").open() as file:
        atc_of_ndc = {row["ndc"]: row["atc3"] for row in csv.DictReader(file)}
    with (folder / "atc3_smiles.csv").open() as file:
        smiles = {row["atc3"] for row in csv.DictReader(file)}
    return rows, mimic3.read(real_data / "mimic3-demo"), known, atc_of_ndc, smiles
