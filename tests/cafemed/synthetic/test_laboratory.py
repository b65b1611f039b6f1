"""Laboratory events and molecules: what they are, and that they change nothing else."""

import dataclasses
import gzip
import hashlib

import numpy as np
import pandas as pd
import pytest

from cafemed import drugs, molecules, protocols, scaling
from cafemed.protocols import CohortConfig
from cafemed.sources import laboratory, mimic3
from cafemed.synthetic import generate, write_tables
from cafemed.synthetic.molecules import _molecule

#: SHA-256 of what the population of this folder's conftest was before it had laboratory events;
#: tables unpacked.
BEFORE = {
    "population": "8431a5a78520f893",
    "ADMISSIONS.csv.gz": "1a01b52fd27429a2",
    "DIAGNOSES_ICD.csv.gz": "a0d7ed241ab0dd99",
    "PATIENTS.csv.gz": "a3a0e4bce8e69b7c",
    "PRESCRIPTIONS.csv.gz": "b04ae200a5873a7c",
    "PROCEDURES_ICD.csv.gz": "f620a5074161cf0f",
    "drugs/ddi_atc3.csv": "dba39c117378490b",
    "drugs/ndc_to_atc3.csv": "7d6a3ee0e0267467",
}


def test_the_populations_are_those_of_before(population, folder):
    digest = hashlib.sha256()
    for name in ("diagnoses", "procedures", "medications"):
        lists = getattr(population, name)
        digest.update(lists.ids.tobytes())
        digest.update(lists.offsets.tobytes())
    found = {"population": digest.hexdigest()[:16]}
    for name in list(BEFORE)[1:]:
        content = (folder / name).read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    assert found == BEFORE


@pytest.mark.parametrize("number", [0, 3])
def test_other_numbers_of_items_change_only_the_laboratory(number, population, folder, tmp_path):
    config = dataclasses.replace(population.config, num_laboratory=number)
    write_tables(generate(config, population.seed), tmp_path)
    names = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    others = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert {str(p) for p in others - names} == (set() if number else {"LABEVENTS.csv.gz"})
    differing = {str(p) for p in names if (tmp_path / p).read_bytes() != (folder / p).read_bytes()}
    assert differing == ({"LABEVENTS.csv.gz"} if number else set())


@pytest.fixture(scope="module")
def cohort(folder):
    knowledge = drugs.read(drugs.locate(folder / "drugs"))
    made, _ = protocols.clean(mimic3.read(folder), knowledge, CohortConfig())
    file = mimic3.locate(folder, laboratory=True)["LABEVENTS"]
    measured = laboratory.read(file, mimic3.LABORATORY, made.visit_ids, made.admitted)
    added, dropped = protocols.with_laboratory(made, measured, 100)
    lost = {d.reason: d.num_rows for d in dropped}
    filters = ("no visit", "no finite number", "measured before admission")
    assert all(lost[reason] for reason in (*filters, "not the first of its item and visit"))
    return added


def test_items_are_measured_at_many_visits_and_never_negative(cohort, population):
    assert len(cohort.vocabularies["laboratory"]) == population.config.num_laboratory
    share = cohort.laboratory.items.multi_hot(12).mean(axis=0)
    assert (share > 0.25).all()
    assert (share < 0.97).all()
    assert cohort.laboratory.values.min() > 0


def test_diagnoses_explain_a_part_of_the_values(cohort):
    """Regresses each item's log value on the diagnoses: adjusted R²."""
    present = cohort.diagnoses.multi_hot(len(cohort.vocabularies["diagnosis"])).astype(float)
    visit = np.repeat(np.arange(cohort.num_visits), cohort.laboratory.items.counts)
    explained = []
    for item in range(12):
        rows = cohort.laboratory.items.ids == item
        x = np.column_stack([present[visit[rows]], np.ones(int(rows.sum()))])
        y = np.log(cohort.laboratory.values[rows].astype(float))
        x = x[:, x.any(axis=0)]
        fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
        degrees = (len(y) - 1) / (len(y) - np.linalg.matrix_rank(x))
        explained.append(1 - degrees * np.var(y - fitted) / np.var(y))
    # About half of 10.5 diagnoses move one of 12 items by 0.5 to 2 spreads each: a variance of
    # about 0.4 beside the noise's 1.
    assert 0.1 < np.mean(explained) < 0.6
    assert max(explained) > 0.3


def test_scaled_values_are_of_size_one(cohort):
    made = scaling.fit(cohort)
    z = made.values(cohort.laboratory.items.ids, cohort.laboratory.values)
    assert abs(float(np.median(z))) < 0.5
    assert 0.5 < float(z.std()) < 1.5


def test_values_recover_over_a_stay_and_come_in_order_of_time(folder):
    rows = pd.read_csv(folder / "LABEVENTS.csv.gz", parse_dates=["CHARTTIME"])
    assert list(rows.columns) == [
        *("ROW_ID", "SUBJECT_ID", "HADM_ID", "ITEMID", "CHARTTIME", "VALUENUM")
    ]
    in_order = rows.sort_values(["SUBJECT_ID", "CHARTTIME"], kind="stable")
    assert in_order["ROW_ID"].is_monotonic_increasing
    stays = pd.read_csv(folder / "ADMISSIONS.csv.gz", parse_dates=["ADMITTIME", "DISCHTIME"])
    joined = rows.dropna().merge(stays, on="HADM_ID")
    assert (joined["CHARTTIME"] <= joined["DISCHTIME"]).all()
    early = (joined["CHARTTIME"] < joined["ADMITTIME"]).mean()
    assert 0.01 < early < 0.03
    joined = joined[joined["CHARTTIME"] >= joined["ADMITTIME"]]
    joined["log"] = np.log(joined["VALUENUM"])
    centred = joined["log"] - joined.groupby("ITEMID")["log"].transform("mean")
    nth = joined.groupby(["HADM_ID", "ITEMID"]).cumcount()
    assert centred[nth == 0].var() > 1.1 * centred[nth >= 2].var()


def test_invented_molecules_are_valid_shared_and_of_every_medication(folder, population):
    pytest.importorskip("rdkit")
    known = drugs.read(drugs.locate(folder / "drugs"))
    found, dropped = molecules.canonical(known.molecules, population.model.medications)
    assert dropped[0].num_rows == dropped[2].num_rows == 0
    assert tuple(found) == population.model.medications
    distinct = {smiles for of_one in found.values() for smiles in of_one}
    assert len(distinct) > len(found)
    assert sum(map(len, found.values())) > len(distinct)  # some are shared


def test_invented_molecules_are_valid_whatever_is_drawn():
    pytest.importorskip("rdkit")
    rng = np.random.default_rng(0)
    given = [(i, "atc:A01A", _molecule(rng)) for i in range(2_000)]
    found, dropped = molecules.canonical(given, ["atc:A01A"])
    assert dropped[2].num_rows == 0
    assert len(found["atc:A01A"]) > 1_500
