"""A user's own records: one table with a row for every code of every visit.

Columns: patient, visit, time, kind ("diagnosis", "procedure" or "medication") and code; optional
are sex (F or M), birth (a date) and system (of the row's code). A visit is admitted at the
earliest time of its rows. Laboratory values are in a table beside it: visit, item, value and
perhaps time. docs/data.md has examples.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.codes import KINDS
from cafemed.errors import DataError
from cafemed.records import Records, SourceFile
from cafemed.sources import cells, events, reading
from cafemed.sources.laboratory import LaboratoryTable
from cafemed.sources.reading import InputFile

REQUIRED = ("patient", "visit", "time", "kind", "code")
OPTIONAL = ("sex", "birth", "system")
LABORATORY = LaboratoryTable(
    name="laboratory",
    visit="visit",
    item="item",
    time="time",
    value="value",
    needs_time=False,
    knows_admission=False,
    suffixes=reading.TABLE_SUFFIXES,
)

ClinicalSystem = Literal["icd9", "icd10", "snomed", "local"]
DrugSystem = Literal["ndc", "atc"]

#: Code systems that a row may name, and the kinds that each is for.
_DRUG_SYSTEMS = ("ndc", "atc")
_SYSTEMS = ("icd9", "icd10", "snomed", "local", *_DRUG_SYSTEMS)


@dataclasses.dataclass(frozen=True)
class Systems:
    """Code systems of the rows that name none.

    Attributes:
        diagnosis, procedure: "local" stands for a system of the hospital's own.
        medication: "ndc" is mapped to ATC with the user's table; "atc" is cut to level 3.
    """

    diagnosis: ClinicalSystem = "icd10"
    procedure: ClinicalSystem = "icd10"
    medication: DrugSystem = "atc"


def locate(root: Path, *, laboratory: bool = False) -> dict[str, InputFile]:
    """Finds the table: the file `root`, or events.csv, .csv.gz or .parquet in the folder `root`.

    Args:
        root: see above.
        laboratory: find laboratory.csv, .csv.gz or .parquet in the same folder too.

    Raises:
        DataError: if there is none, or several.
    """
    folder = root if root.is_dir() else root.parent
    path = reading.find(root, "events", reading.TABLE_SUFFIXES) if root.is_dir() else root
    found = {"events": reading.identify(path)}
    return found | LABORATORY.locate(folder) if laboratory else found


def read(
    root: Path, systems: Systems | None = None, files: Mapping[str, InputFile] | None = None
) -> Records:
    """Reads a user's table of codes.

    Args:
        root: the table, or the folder that holds it as events.csv, .csv.gz or .parquet.
        systems: code systems of rows that name none.
        files: what `locate(root)` gave, where it was called already.

    Raises:
        DataError: if the file or a column is missing, empty or unreadable, a time does not parse,
            a kind or code system is unknown, a patient, visit or kind is empty, or a visit belongs
            to two patients.
    """
    columns = {"events": reading.Columns(REQUIRED, OPTIONAL)}
    table, file = reading.read_all(files or locate(root), columns)["events"]
    for name in ("patient", "visit", "kind"):
        cells.present(file, table, name)
    kind = cells.choice(file, table, "kind", KINDS)
    system = _system_of_rows(file, table, kind, systems or Systems())
    time = cells.times(file, table, "time")
    by_kind = {
        name: _codes(table, time, system, np.flatnonzero(kind == k)) for k, name in enumerate(KINDS)
    }
    return Records(
        visits=_visits(file, table, time),
        diagnoses=by_kind["diagnosis"].select(["visit", "code", "sequence"]),
        procedures=by_kind["procedure"].select(["visit", "code", "sequence"]),
        prescriptions=by_kind["medication"].select(["patient", "visit", "stay", "code", "start"]),
        files=(file,),
        dropped=(),
    )


def _system_of_rows(
    file: SourceFile, table: pa.Table, kind: NDArray[np.int64], systems: Systems
) -> NDArray[np.int64]:
    """The code system of each row, index into _SYSTEMS, int64 (n,)."""
    of_kind = np.array([_SYSTEMS.index(getattr(systems, name)) for name in KINDS])
    if "system" not in table.column_names:
        return of_kind[kind]
    named = cells.choice(file, table, "system", _SYSTEMS)
    system = np.where(named >= 0, named, of_kind[kind])
    for_drugs = np.array([name in _DRUG_SYSTEMS for name in _SYSTEMS])[system]
    wrong = for_drugs != (kind == KINDS.index("medication"))
    if wrong.any():
        row = int(np.argmax(wrong))
        expected = f"{' or '.join(_DRUG_SYSTEMS)} for a medication, and for no other kind"
        raise cells.bad_cell(file, "system", row, expected)
    return system


def _visits(file: SourceFile, table: pa.Table, time: pa.Array) -> pa.Table:
    patient, visit = cells.text(table, "patient"), cells.text(table, "visit")
    of_row, person = cells.indices(visit), cells.indices(patient)
    distinct, first = np.unique(of_row, return_index=True)
    owner = np.zeros(len(visit.dictionary), np.int64)
    owner[distinct] = person[first]
    shared = np.unique(of_row[owner[of_row] != person])
    if len(shared):
        raise DataError(
            f"{file.path}: column visit: expected identifiers that belong to one patient each, "
            f"{len(shared)} belong to several; put the patient into them"
        )
    seconds = pc.fill_null(time.cast(pa.int64()), np.iinfo(np.int64).max).to_numpy()
    earliest = np.full(len(visit.dictionary), np.iinfo(np.int64).max)
    np.minimum.at(earliest, of_row, seconds)
    admitted = earliest[distinct]
    rows = pa.array(first)
    return events.visit_table(
        file,
        pa.table({"patient": patient.take(rows), "visit": visit.take(rows)}),
        patient="patient",
        visit="visit",
        admitted=pa.array(admitted, pa.int64(), mask=admitted == np.iinfo(np.int64).max).cast(
            pa.timestamp("s")
        ),
        people=_people(file, table),
    )


def _people(file: SourceFile, table: pa.Table) -> events.People:
    """Sex and birth of each patient: the first cell that is not empty."""
    patient = cells.text(table, "patient")
    person, num_people = cells.indices(patient), len(patient.dictionary)
    nothing = pa.nulls(num_people, pa.timestamp("s"))
    sex, birth = pa.array(np.zeros(num_people, np.int8)), nothing
    if "sex" in table.column_names:
        of_row = cells.sexes(cells.text(table, "sex")).to_numpy()
        sex = pa.array(_first_known(of_row, of_row > 0, person, num_people))
    if "birth" in table.column_names:
        given = cells.times(file, table, "birth")
        seconds = pc.fill_null(given.cast(pa.int64()), 0).to_numpy()
        known = given.is_valid().to_numpy(zero_copy_only=False)
        has_birth = np.zeros(num_people, np.bool_)
        has_birth[person[known]] = True
        values = _first_known(seconds, known, person, num_people)
        birth = pa.array(values, mask=~has_birth).cast(pa.timestamp("s"))
    names = pa.DictionaryArray.from_arrays(
        pa.array(np.arange(num_people), pa.int32()), patient.dictionary
    )
    return events.People(names, sex, birth)


def _first_known(
    values: NDArray[Any], known: NDArray[np.bool_], person: NDArray[np.int64], num_people: int
) -> NDArray[Any]:
    rows = np.flatnonzero(known)
    people, first = np.unique(person[rows], return_index=True)
    result = np.zeros(num_people, values.dtype)
    result[people] = values[rows[first]]
    return result


def _codes(
    table: pa.Table, time: pa.Array, system: NDArray[np.int64], rows: NDArray[np.int64]
) -> pa.Table:
    """The rows of one kind, in the order of the file, with all columns that Records may want."""
    chosen = pa.array(rows)
    code = cells.text(table, "code").take(chosen)
    prescriptions = events.prescription_table(
        patient=cells.text(table, "patient").take(chosen),
        visit=cells.text(table, "visit").take(chosen),
        stay=None,
        code=events.coded(system[rows], _SYSTEMS, code),
        start=time.take(chosen),
    )
    return prescriptions.append_column("sequence", pa.array(rows, pa.int32()))
