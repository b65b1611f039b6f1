"""MIMIC-III: the tables as PhysioNet ships them, or the synthetic tables of the same schema.

Columns and tables: https://mimic.mit.edu/docs/iii/tables. Birth dates of patients over 89 are
shifted there by some 300 years; the mended age is in `cafemed.protocols.visits`.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from cafemed.drugs import ndc
from cafemed.records import Records, SourceFile
from cafemed.sources import cells, events, reading
from cafemed.sources.laboratory import LaboratoryTable
from cafemed.sources.reading import Columns, InputFile

COLUMNS = {
    "ADMISSIONS": Columns(("subject_id", "hadm_id", "admittime")),
    "PATIENTS": Columns(("subject_id", "gender", "dob")),
    "DIAGNOSES_ICD": Columns(("hadm_id", "seq_num", "icd9_code")),
    "PROCEDURES_ICD": Columns(("hadm_id", "seq_num", "icd9_code")),
    "PRESCRIPTIONS": Columns(("subject_id", "hadm_id", "startdate", "ndc"), ("icustay_id",)),
}
LABORATORY = LaboratoryTable(
    name="LABEVENTS", visit="hadm_id", item="itemid", time="charttime", value="valuenum"
)


def locate(root: Path, *, laboratory: bool = False) -> dict[str, InputFile]:
    """Finds the five tables in the folder `root`, `.csv` or `.csv.gz`, names in either case.

    Args:
        root: the folder of the tables.
        laboratory: find LABEVENTS too.

    Raises:
        DataError: if a table is missing or there twice.
    """
    found = reading.locate(root, list(COLUMNS))
    return found | LABORATORY.locate(root) if laboratory else found


def read(root: Path, files: Mapping[str, InputFile] | None = None) -> Records:
    """Reads MIMIC-III's tables.

    Args:
        root: the folder of the tables.
        files: what `locate(root)` gave, where it was called already.

    Raises:
        DataError: if a table or column is missing, empty or unreadable, a date does not parse, or
            an admission is listed twice.
    """
    tables = reading.read_all(files or locate(root), COLUMNS)
    people, people_file = tables["PATIENTS"]
    admissions, admissions_file = tables["ADMISSIONS"]
    visits = events.visit_table(
        admissions_file,
        admissions,
        patient="subject_id",
        visit="hadm_id",
        admitted=cells.times(admissions_file, admissions, "admittime"),
        people=events.People(
            cells.text(people, "subject_id"),
            cells.sexes(cells.text(people, "gender")),
            cells.times(people_file, people, "dob"),
        ),
    )
    return Records(
        visits=visits,
        diagnoses=_codes(*tables["DIAGNOSES_ICD"]),
        procedures=_codes(*tables["PROCEDURES_ICD"]),
        prescriptions=_prescriptions(*tables["PRESCRIPTIONS"]),
        files=tuple(file for _, file in tables.values()),
        dropped=(),
    )


def _codes(table: pa.Table, file: SourceFile) -> pa.Table:
    code = cells.recode(cells.text(table, "icd9_code"), lambda c: events.code_name("icd9", c))
    sequence = cells.integers(file, table, "seq_num")
    return pa.table({"visit": cells.text(table, "hadm_id"), "code": code, "sequence": sequence})


def _prescriptions(table: pa.Table, file: SourceFile) -> pa.Table:
    return events.prescription_table(
        patient=cells.text(table, "subject_id"),
        visit=cells.text(table, "hadm_id"),
        stay=cells.text(table, "icustay_id") if "icustay_id" in table.column_names else None,
        code=cells.recode(cells.text(table, "ndc"), ndc),
        start=cells.times(file, table, "startdate"),
    )
