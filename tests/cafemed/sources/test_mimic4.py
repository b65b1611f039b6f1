import pytest

from cafemed.errors import DataError
from cafemed.sources import mimic4


@pytest.fixture
def write(hospitals, tmp_path):
    """Rewrites a drawn hospital as MIMIC-IV's hosp/ folder: the folder above it."""

    def write_hosp(hospital):
        hosp = tmp_path / "hosp"
        hosp.mkdir(parents=True, exist_ok=True)
        for name, rows in mimic4_tables(hospital).items():
            hospitals.write_rows(hosp, name, rows, upper=False, packed=True)
        return tmp_path

    return write_hosp


def mimic4_tables(hospital):
    for i, row in enumerate(hospital.patients):
        row |= {"anchor_age": 50 + i, "anchor_year": 2120}
    for rows in (hospital.diagnoses, hospital.procedures):
        for i, row in enumerate(rows):
            row.setdefault("icd_version", "9" if i % 2 else "10")
            row["icd_code"] = row.pop("icd9_code")
    for row in hospital.prescriptions:
        if "startdate" in row:
            row["starttime"] = row.pop("startdate")
    return {name.lower(): rows for name, rows in hospital.mimic3_tables().items()}


def test_icd_versions_stay_distinct(hospitals, write):
    hospital = hospitals.draw(1)
    for row, version in zip(hospital.diagnoses[:3], ("9", "10", "9"), strict=True):
        row |= {"icd9_code": "E8881", "icd_version": version, "seq_num": 1}
    records = mimic4.read(write(hospital))
    codes = records.diagnoses["code"].to_pylist()
    assert codes[:3] == ["icd9:E8881", "icd10:E8881", "icd9:E8881"]
    expected = [
        f"icd{row['icd_version']}:{row['icd_code']}" if row["icd_code"] else None
        for row in hospital.diagnoses
    ]
    assert codes == expected


def test_birth_is_that_of_the_anchor_year(hospitals, write):
    hospital = hospitals.draw(1)
    visits = mimic4.read(write(hospital)).visits.to_pylist()
    births = {str(p["subject_id"]): 2120 - p["anchor_age"] for p in hospital.patients}
    assert all(visit["birth"].year == births[visit["patient"]] for visit in visits)


def test_there_are_no_icu_stays(hospitals, write):
    records = mimic4.read(write(hospitals.draw(1)))
    assert records.prescriptions["stay"].null_count == records.prescriptions.num_rows
    starts = records.prescriptions["start"]
    assert starts.null_count < records.prescriptions.num_rows


def test_the_hosp_folder_itself_will_do(hospitals, write):
    root = write(hospitals.draw(1))
    assert mimic4.locate(root) == mimic4.locate(root / "hosp")


@pytest.mark.parametrize("version", ["11", ""])
def test_an_unknown_icd_version_is_refused(version, hospitals, write):
    hospital = hospitals.draw(1)
    hospital.diagnoses[4]["icd_version"] = version
    with pytest.raises(DataError, match=r"diagnoses_icd.csv.gz: column icd_version, row 5 "):
        mimic4.read(write(hospital))
