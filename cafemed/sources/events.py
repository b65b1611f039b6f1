"""The tables of `Records`, put together the same way by every source."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.codes import normalise
from cafemed.drugs import ndc
from cafemed.errors import DataError
from cafemed.records import SourceFile
from cafemed.sources import cells


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
        cells.present(file, table, name)
    visits = cells.text(table, visit)
    times_seen = np.bincount(cells.indices(visits))
    if times_seen.max() > 1:
        raise DataError(
            f"{file.path}: column {visit}: expected every visit once, "
            f"{int((times_seen > 1).sum())} are listed several times"
        )
    patients = cells.text(table, patient).cast(pa.string())
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


def code_name(system: str, code: str) -> str | None:
    """Writes a code as cohorts have it ("icd9:4019"); None for a blank cell."""
    if not code.strip():
        return None
    return ndc(code) if system == "ndc" else normalise(system, code)


def coded(
    system: NDArray[np.int64], systems: Sequence[str], code: pa.DictionaryArray
) -> pa.DictionaryArray:
    """Writes codes whose system differs from row to row; each distinct pair is written once.

    Args:
        system: int64 (n,), index into `systems`.
        systems: names of code systems.
        code: n cells.

    Returns:
        Null where the code is; the dictionary is sorted and without repetition.
    """
    values = code.dictionary.to_pylist()
    place = cells.indices(code)
    pair = np.where(place >= 0, system * len(values) + place, -1)
    distinct, index = np.unique(pair, return_inverse=True)
    names = [
        (code_name(systems[p // len(values)], values[p % len(values)]) or "") if p >= 0 else ""
        for p in distinct.tolist()
    ]
    written = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), pa.array(names))
    return cells.recode(written, lambda name: name or None)
