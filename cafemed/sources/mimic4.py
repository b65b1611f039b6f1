"""MIMIC-IV: the tables of its `hosp/` folder.

Columns and tables: https://mimic.mit.edu/docs/iv/modules/hosp. It gives an age in an anchor year
instead of a birth date: birth is taken as the first of January of anchor_year - anchor_age, so
that ages are right to a year. Patients over 89 have anchor_age 91 there, and keep it.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from cafemed.drugs import ndc
from cafemed.records import Records, SourceFile
from cafemed.sources import cells, events, reading
from cafemed.sources.laboratory import LaboratoryTable
from cafemed.sources.reading import Columns, InputFile

COLUMNS = {
    "admissions": Columns(("subject_id", "hadm_id", "admittime")),
    "patients": Columns(("subject_id", "gender", "anchor_age", "anchor_year")),
    "diagnoses_icd": Columns(("hadm_id", "seq_num", "icd_code", "icd_version")),
    "procedures_icd": Columns(("hadm_id", "seq_num", "icd_code", "icd_version")),
    "prescriptions": Columns(("subject_id", "hadm_id", "starttime", "ndc")),
}
LABORATORY = LaboratoryTable(
    name="labevents", visit="hadm_id", item="itemid", time="charttime", value="valuenum"
)


def locate(root: Path, *, laboratory: bool = False) -> dict[str, InputFile]:
    """Finds the five tables in `root/hosp` (or in `root` itself), names in either case.

    Args:
        root: the folder that holds `hosp/`.
        laboratory: find labevents too.

    Raises:
        DataError: if a table is missing or there twice.
    """
    folder = root / "hosp" if (root / "hosp").is_dir() else root
    found = reading.locate(folder, list(COLUMNS))
    return found | LABORATORY.locate(folder) if laboratory else found


def read(root: Path, files: Mapping[str, InputFile] | None = None) -> Records:
    """Reads MIMIC-IV's tables; ICD-9 and ICD-10 codes stay distinct.

    Args:
        root: the folder that holds `hosp/`.
        files: what `locate(root)` gave, where it was called already.

    Raises:
        DataError: if a table or column is missing, empty or unreadable, a date or number does not
            parse, an ICD version is neither 9 nor 10, or an admission is listed twice.
    """
    tables = reading.read_all(files or locate(root), COLUMNS)
    people, people_file = tables["patients"]
    admissions, admissions_file = tables["admissions"]
    visits = events.visit_table(
        admissions_file,
        admissions,
        patient="subject_id",
        visit="hadm_id",
        admitted=cells.times(admissions_file, admissions, "admittime"),
        people=events.People(
            cells.text(people, "subject_id"),
            cells.sexes(cells.text(people, "gender")),
            _births(people, people_file),
        ),
    )
    return Records(
        visits=visits,
        diagnoses=_codes(*tables["diagnoses_icd"]),
        procedures=_codes(*tables["procedures_icd"]),
        prescriptions=_prescriptions(*tables["prescriptions"]),
        files=tuple(file for _, file in tables.values()),
        dropped=(),
    )


def _births(people: pa.Table, file: SourceFile) -> pa.Array:
    ages = cells.integers(file, people, "anchor_age").to_pylist()
    years = cells.integers(file, people, "anchor_year").to_pylist()
    births = [
        None if age is None or year is None else datetime.datetime(year - age, 1, 1)
        for age, year in zip(ages, years, strict=True)
    ]
    return pa.array(births, pa.timestamp("s"))


def _codes(table: pa.Table, file: SourceFile) -> pa.Table:
    cells.present(file, table, "icd_version")
    version = cells.choice(file, table, "icd_version", ("9", "10"))
    return pa.table(
        {
            "visit": cells.text(table, "hadm_id"),
            "code": events.coded(version, ("icd9", "icd10"), cells.text(table, "icd_code")),
            "sequence": cells.integers(file, table, "seq_num"),
        }
    )


def _prescriptions(table: pa.Table, file: SourceFile) -> pa.Table:
    return events.prescription_table(
        patient=cells.text(table, "subject_id"),
        visit=cells.text(table, "hadm_id"),
        stay=None,
        code=cells.recode(cells.text(table, "ndc"), ndc),
        start=cells.times(file, table, "starttime"),
    )
