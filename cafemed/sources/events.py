"""The tables of `Records`, put together the same way by every source."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cafemed.errors import DataError
from cafemed.records import SourceFile
from cafemed.sources import reading


@dataclasses.dataclass(frozen=True)
class People:
    """Patients: identifier (dictionary string), sex (int8), birth (timestamp[s]), one row each."""

    patient: pa.DictionaryArray
    sex: pa.Array
    birth: pa.Array


def visit_table(
    file: SourceFile,
    table: pa.Table,
    *,
    patient: str,
    visit: str,
    admitted: pa.Array,
    people: People,
) -> pa.Table:
    """Builds `Records.visits` from a table with one row a visit.

    Args:
        file, table: the admissions.
        patient, visit: the columns with the identifiers.
        admitted: timestamp[s], aligned with the table.
        people: sex and birth; a patient that is not there has neither.

    Raises:
        DataError: if an identifier is empty or a visit is listed twice.
    """
    for name in (patient, visit):
        reading.present(file, table, name)
    visits = reading.text(table, visit)
    times_seen = np.bincount(reading.indices(visits))
    if times_seen.max() > 1:
        raise DataError(
            f"{file.path}: column {visit}: expected every visit once, "
            f"{int((times_seen > 1).sum())} are listed several times"
        )
    patients = reading.text(table, patient).cast(pa.string())
    place = pc.index_in(patients, value_set=people.patient.cast(pa.string()))
    return pa.table(
        {
            "patient": patients,
            "visit": visits.cast(pa.string()),
            "admitted": admitted,
            "sex": pc.fill_null(pc.take(people.sex, place), 0),
            "birth": pc.take(people.birth, place),
        }
    )


def prescription_table(
    *,
    patient: pa.DictionaryArray,
    visit: pa.DictionaryArray,
    stay: pa.DictionaryArray | None,
    code: pa.DictionaryArray,
    start: pa.Array,
) -> pa.Table:
    """Builds `Records.prescriptions`; without ICU stays that column is null."""
    if stay is None:
        nothing = pa.nulls(len(code), pa.int32())
        stay = pa.DictionaryArray.from_arrays(nothing, pa.array([], pa.string()))
    return pa.table(
        {"patient": patient, "visit": visit, "stay": stay, "code": code, "start": start}
    )
