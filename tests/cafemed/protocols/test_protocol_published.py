import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from cafemed.codes import KINDS
from cafemed.cohort import SPLITS
from cafemed.errors import DataError
from cafemed.protocols import CohortConfig, published

CONFIG = CohortConfig(protocol="published")
LISTS = {"diagnosis": "diagnoses", "procedure": "procedures", "medication": "medications"}


def assert_equals_reference(cohort, expected, decoded):
    visits, vocabularies = expected
    keys = [(subject, hadm) for subject, hadm in visits]
    patients = np.asarray(cohort.patient_ids)[cohort.patient_of_visit()]
    assert list(zip(map(int, patients), map(int, cohort.visit_ids), strict=True)) == keys
    for kind in KINDS:
        codes = [code.split(":")[1] for code in cohort.vocabularies[kind]]
        assert codes == vocabularies[kind]
        lists = decoded(getattr(cohort, LISTS[kind]), cohort.vocabularies[kind])
        assert lists == [visit[kind] for visit in visits.values()]


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_scripts_in_pandas(seed, hospitals, reference, read, decoded):
    hospital = hospitals.draw(seed, num_patients=30)
    cohort, _ = published(*read(hospital), CONFIG)
    expected = reference.published(hospital, hospitals.NDC_TO_ATC)
    assert_equals_reference(cohort, expected, decoded)
    assert cohort.targets is cohort.medications


@pytest.mark.parametrize("seed", range(5))
def test_limits_and_molecules_restrict_the_codes(
    seed, hospitals, reference, read, decoded, monkeypatch
):
    monkeypatch.setattr("cafemed.protocols.protocol_published.MAX_DIAGNOSES", 5)
    monkeypatch.setattr("cafemed.protocols.protocol_published.MAX_MEDICATIONS", 3)
    smiles = hospitals.ATC[:4]
    hospital = hospitals.draw(100 + seed, num_patients=30)
    cohort, _ = published(*read(hospital, smiles), CONFIG)
    expected = reference.published(
        hospital, hospitals.NDC_TO_ATC, smiles=smiles, max_diagnoses=5, max_medications=3
    )
    assert_equals_reference(cohort, expected, decoded)


@pytest.mark.parametrize("seed", range(10))
def test_missing_patients_and_visits_are_filled_too(seed, hospitals, reference, read, decoded):
    hospital = hospitals.draw(200 + seed, num_patients=30)
    rng = np.random.default_rng(seed)
    for row in hospital.prescriptions:
        for column in ("subject_id", "hadm_id"):
            if rng.random() < 0.1:
                row[column] = ""
    cohort, dropped = published(*read(hospital), CONFIG)
    expected = reference.published(hospital, hospitals.NDC_TO_ATC)
    assert_equals_reference(cohort, expected, decoded)
    assert next(d.num_rows for d in dropped if d.reason == "visit not of this patient") > 0


def test_the_most_frequent_medications_are_those_with_most_starts(hospitals, read, monkeypatch):
    monkeypatch.setattr("cafemed.protocols.protocol_published.MAX_MEDICATIONS", 1)
    hospital = hospitals.draw(1, num_patients=30)
    hospital.prescriptions = []
    same = [ndc for ndc, atc in hospitals.NDC_TO_ATC.items() if atc == "A02B"]
    other = next(ndc for ndc, atc in hospitals.NDC_TO_ATC.items() if atc == "B01A")
    for visit in hospital.admissions:
        key = {k: visit[k] for k in ("row_id", "subject_id", "hadm_id")} | {"icustay_id": 1}
        # Two packages of one drug that start together count once, two starts count twice.
        starts = [(ndc, 1) for ndc in same] + [(other, 1), (other, 2)]
        hospital.prescriptions += [
            {**key, "startdate": f"2110-01-{day:02d} 00:00:00", "ndc": ndc} for ndc, day in starts
        ]
    assert len(same) == 2
    cohort, _ = published(*read(hospital), CONFIG)
    assert cohort.vocabularies["medication"] == ("atc:B01A",)


def test_procedures_are_limited_where_there_are_icd10_codes(hospitals, read, monkeypatch):
    monkeypatch.setattr("cafemed.protocols.protocol_published.MAX_PROCEDURES_MIMIC4", 2)
    records, drugs = read(hospitals.draw(1, num_patients=30))
    cohort, _ = published(records, drugs, CONFIG)
    assert len(cohort.vocabularies["procedure"]) > 2
    names = [
        f"icd10:{name[5:]}" for name in records.diagnoses["code"].chunk(0).dictionary.to_pylist()
    ]
    codes = pa.DictionaryArray.from_arrays(
        records.diagnoses["code"].chunk(0).indices, pa.array(names)
    )
    of_mimic4 = dataclasses.replace(
        records, diagnoses=records.diagnoses.set_column(1, "code", codes)
    )
    cohort, _ = published(of_mimic4, drugs, CONFIG)
    assert len(cohort.vocabularies["procedure"]) == 2


@pytest.mark.parametrize("seed", range(4))
def test_split_is_cut_in_order_without_shuffling(seed, hospitals, reference, read):
    cohort, _ = published(*read(hospitals.draw(seed, num_patients=25)), CONFIG)
    train, test, validation = reference.published_split(cohort.num_patients)
    names = ["train"] * train + ["test"] * test + ["validation"] * validation
    assert [SPLITS[s] for s in cohort.split] == names
    subjects = [int(p) for p in cohort.patient_ids]
    assert subjects == sorted(subjects)


def test_without_icu_stays_that_column_is_not_filled(hospitals, reference, read, decoded):
    hospital = hospitals.draw(3, num_patients=30)
    for row in hospital.prescriptions:
        row["icustay_id"] = ""
    cohort, _ = published(*read(hospital), CONFIG)
    for row in hospital.prescriptions:  # the scripts for MIMIC-IV do not read the column
        row["icustay_id"] = "1"
    assert_equals_reference(cohort, reference.published(hospital, hospitals.NDC_TO_ATC), decoded)


def test_a_missing_drug_takes_that_of_the_row_above_even_of_another_patient(hospitals, read):
    hospital = hospitals.draw(0, num_patients=30)
    hospital.prescriptions = []
    for visit in hospital.admissions:
        key = {k: visit[k] for k in ("row_id", "subject_id", "hadm_id")}
        row = {"icustay_id": "7", "startdate": "2110-01-01 00:00:00", "ndc": ""}
        hospital.prescriptions.append({**key, **row})
    hospital.prescriptions[0]["ndc"] = next(iter(hospitals.NDC_TO_ATC))
    cohort, _ = published(*read(hospital), CONFIG)
    assert cohort.num_visits > 5
    assert cohort.vocabularies["medication"] == ("atc:A02B",)
    assert (cohort.medications.counts == 1).all()


def test_too_few_patients_are_refused(hospitals, read):
    with pytest.raises(DataError, match="at least 4 patients"):
        published(*read(hospitals.draw(0, num_patients=2)), CONFIG)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("prescriptions", "ndc", "0"),
        ("prescriptions", "ndc", "99999999999"),
        ("prescriptions", "hadm_id", 1),
        ("diagnoses", "icd9_code", ""),
        ("diagnoses", "hadm_id", 1),
    ],
)
def test_no_patient_left_is_refused(table, column, value, hospitals, read):
    hospital = hospitals.draw(2)
    for row in getattr(hospital, table):
        row[column] = value
    with pytest.raises(DataError, match=r"0 are left; dropped were [1-9]\d* \w+ \("):
        published(*read(hospital), CONFIG)


def test_the_real_demo_equals_the_scripts_in_pandas(demo, reference, decoded):
    rows, records, drugs, atc_of_ndc, smiles = demo
    cohort, _ = published(records, drugs, CONFIG)
    expected = reference.published(rows, atc_of_ndc, smiles=smiles)
    assert_equals_reference(cohort, expected, decoded)
    assert (cohort.num_patients, cohort.num_visits) == (13, 38)
