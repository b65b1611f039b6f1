import pytest

from cafemed.cohort import SEXES
from cafemed.drugs import ndc
from cafemed.errors import DataError
from cafemed.sources import mimic3


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_every_row_is_read_as_it_is(upper, packed, hospitals, tmp_path):
    hospital = hospitals.draw(1)
    records = mimic3.read(hospital.write(tmp_path, upper=upper, packed=packed))
    people = {row["subject_id"]: row for row in hospital.patients}
    for row, visit in zip(records.visits.to_pylist(), hospital.admissions, strict=True):
        assert row["visit"] == str(visit["hadm_id"])
        assert row["patient"] == str(visit["subject_id"])
        assert str(row["admitted"] or "") == visit["admittime"]
        person = people[visit["subject_id"]]
        assert str(row["birth"]) == person["dob"]
        assert SEXES[row["sex"]][0].upper() == person["gender"]
    for table, rows in (
        (records.diagnoses, hospital.diagnoses),
        (records.procedures, hospital.procedures),
    ):
        expected = [
            {
                "visit": str(row["hadm_id"]),
                "code": f"icd9:{row['icd9_code']}" if row["icd9_code"] else None,
                "sequence": row["seq_num"] or None,
            }
            for row in rows
        ]
        assert table.to_pylist() == expected
    drugs = [
        (row["code"], str(row["start"] or ""), row["stay"])
        for row in records.prescriptions.to_pylist()
    ]
    assert drugs == [
        (ndc(row["ndc"]) if row["ndc"] else None, row["startdate"], str(row["icustay_id"]) or None)
        for row in hospital.prescriptions
    ]
    assert [file.num_rows for file in records.files][:2] == [len(hospital.admissions), len(people)]


def test_icd_codes_are_written_one_way(hospitals, tmp_path):
    hospital = hospitals.draw(1)
    hospital.diagnoses[0]["icd9_code"] = " v45.81"
    hospital.diagnoses[1]["icd9_code"] = "V4581 "
    codes = mimic3.read(hospital.write(tmp_path)).diagnoses["code"].to_pylist()
    assert codes[:2] == ["icd9:V4581"] * 2


def test_a_patient_that_is_not_listed_has_no_sex_or_birth(hospitals, tmp_path):
    hospital = hospitals.draw(1)
    gone = hospital.patients.pop()["subject_id"]
    visits = mimic3.read(hospital.write(tmp_path)).visits.to_pylist()
    assert {(v["sex"], v["birth"]) for v in visits if v["patient"] == str(gone)} == {(0, None)}


def test_icustay_id_may_be_absent(hospitals, tmp_path):
    hospital = hospitals.draw(1)
    for row in hospital.prescriptions:
        row.pop("icustay_id", None)
    prescriptions = mimic3.read(hospital.write(tmp_path)).prescriptions
    assert prescriptions["stay"].null_count == len(hospital.prescriptions)


@pytest.mark.parametrize(
    "table", ["PATIENTS", "ADMISSIONS", "DIAGNOSES_ICD", "PROCEDURES_ICD", "PRESCRIPTIONS"]
)
def test_a_missing_table_is_named(table, hospitals, tmp_path):
    folder = hospitals.draw(1).write(tmp_path)
    (folder / f"{table}.csv").unlink()
    with pytest.raises(DataError, match=f"expected {table}.csv or {table}.csv.gz"):
        mimic3.locate(folder)


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        (
            "admissions",
            "admittime",
            "12/24/2101",
            "ADMISSIONS.csv: column admittime, row 3 .*a date",
        ),
        ("patients", "dob", "unknown", "PATIENTS.csv: column dob, row 3 .*a date"),
        ("prescriptions", "startdate", "tomorrow", "PRESCRIPTIONS.csv: column startdate, row 3 "),
        (
            "diagnoses",
            "seq_num",
            "first",
            "DIAGNOSES_ICD.csv: column seq_num, row 3 .*whole number",
        ),
        ("admissions", "hadm_id", "", "ADMISSIONS.csv: column hadm_id, row 3 .*a value"),
        ("admissions", "subject_id", "", "ADMISSIONS.csv: column subject_id, row 3 .*a value"),
    ],
)
def test_a_bad_cell_is_named(table, column, value, message, hospitals, tmp_path):
    hospital = hospitals.draw(1)
    getattr(hospital, table)[2][column] = value
    with pytest.raises(DataError, match=message):
        mimic3.read(hospital.write(tmp_path))


def test_an_admission_listed_twice_is_refused(hospitals, tmp_path):
    hospital = hospitals.draw(1)
    hospital.admissions.append(dict(hospital.admissions[0]))
    with pytest.raises(DataError, match="column hadm_id: expected every visit once, 1 are listed"):
        mimic3.read(hospital.write(tmp_path))


def test_the_real_demo_is_read_whole(real_data):
    records = mimic3.read(real_data / "mimic3-demo")
    assert records.visits.num_rows == 129
    assert records.diagnoses.num_rows == 1761
    assert records.procedures.num_rows == 506
    assert records.prescriptions.num_rows == 10398
