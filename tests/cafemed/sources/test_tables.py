import pandas as pd
import pytest

from cafemed.errors import DataError
from cafemed.sources import tables
from cafemed.sources.tables import Systems

ROWS = [
    # patient, visit, time, kind, code, sex, birth, system
    ("p1", "a", "2101-01-02 10:00:00", "diagnosis", "i10", "", "", ""),
    ("p1", "a", "2101-01-02 09:00:00", "Medication", "a02bc01", "F", "2050-01-01", ""),
    ("p1", "a", "2101-01-03", "procedure", "0DB6.4ZX", "", "", "icd10"),
    ("p2", "b", "", "diagnosis", "4019", "M", "", "icd9"),
    ("p2", "b", "", "medication", "0002-3229-30", "", "2060-01-01", "NDC"),
    ("p1", "c", "2102-01-02", "diagnosis", "", "M", "2051-01-01", ""),
]
COLUMNS = ["patient", "visit", "time", "kind", "code", "sex", "birth", "system"]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, columns=COLUMNS, name="events.csv"):
        frame = pd.DataFrame(rows, columns=COLUMNS)[columns]
        if name.endswith(".parquet"):
            frame.to_parquet(tmp_path / name)
        else:
            frame.to_csv(tmp_path / name, index=False)
        return tmp_path

    return write_rows


def changed(row, **cells):
    rows = [dict(zip(COLUMNS, cells_of_row, strict=True)) for cells_of_row in ROWS]
    rows[row] |= cells
    return rows


@pytest.mark.parametrize("name", ["events.csv", "EVENTS.CSV", "events.csv.gz", "events.parquet"])
def test_every_row_becomes_a_code(write, name):
    records = tables.read(write(ROWS, name=name))
    assert records.diagnoses.to_pylist() == [
        {"visit": "a", "code": "icd10:I10", "sequence": 0},
        {"visit": "b", "code": "icd9:4019", "sequence": 3},
        {"visit": "c", "code": None, "sequence": 5},
    ]
    assert records.procedures["code"].to_pylist() == ["icd10:0DB64ZX"]
    rows = records.prescriptions.to_pylist()
    assert [(row["patient"], row["code"]) for row in rows] == [
        ("p1", "atc:A02BC01"),
        ("p2", "ndc:00002322930"),
    ]
    assert [str(row["start"]) for row in rows] == ["2101-01-02 09:00:00", "None"]


def test_a_visit_is_admitted_at_its_earliest_time(write):
    visits = tables.read(write(ROWS)).visits.to_pylist()
    admitted = {visit["visit"]: str(visit["admitted"]) for visit in visits}
    assert admitted == {"a": "2101-01-02 09:00:00", "b": "None", "c": "2102-01-02 00:00:00"}


def test_sex_and_birth_are_the_first_that_a_patient_has(write):
    visits = tables.read(write(ROWS)).visits.to_pylist()
    people = {v["visit"]: (v["sex"], str(v["birth"])[:10]) for v in visits}
    assert people == {"a": (1, "2050-01-01"), "b": (2, "2060-01-01"), "c": (1, "2050-01-01")}


def test_sex_birth_and_system_may_be_absent(write):
    folder = write(ROWS, COLUMNS[:5])
    records = tables.read(folder / "events.csv", Systems(diagnosis="local", medication="ndc"))
    assert records.diagnoses["code"].to_pylist() == ["local:I10", "local:4019", None]
    assert records.prescriptions["code"].to_pylist() == ["ndc:a02bc01", "ndc:00002322930"]
    assert {(v["sex"], v["birth"]) for v in records.visits.to_pylist()} == {(0, None)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(2, kind="food"), "column kind, row 3 .*: expected one of diagnosis, procedure"),
        (changed(2, kind=""), "column kind, row 3 .*: expected a value"),
        (changed(1, visit=""), "column visit, row 2 .*: expected a value"),
        (changed(1, patient=""), "column patient, row 2 .*: expected a value"),
        (changed(1, time="noon"), "column time, row 2 .*: expected a date"),
        (changed(1, birth="noon"), "column birth, row 2 .*: expected a date"),
        (changed(3, system="icd8"), "column system, row 4 .*: expected one of icd9, icd10"),
        (changed(3, system="atc"), "column system, row 4 .*: expected ndc or atc for a medication"),
        (
            changed(4, system="icd9"),
            "column system, row 5 .*: expected ndc or atc for a medication",
        ),
        (changed(5, visit="b"), "column visit: expected identifiers that belong to one patient"),
    ],
)
def test_a_bad_cell_is_named(write, rows, message):
    with pytest.raises(DataError, match=message):
        tables.read(write(rows))


def test_a_missing_column_is_named(write):
    with pytest.raises(DataError, match="time missing among the header's 7 names"):
        tables.read(write(ROWS, [name for name in COLUMNS if name != "time"]))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected events.csv or events.csv.gz or events.parquet"):
        tables.locate(tmp_path)
    with pytest.raises(DataError, match=r"mine.csv: cannot be read"):
        tables.locate(tmp_path / "mine.csv")
