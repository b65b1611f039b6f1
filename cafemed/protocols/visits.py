"""Records as integers: rows of codes by visit, patients in order, ages, and lists of codes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.drugs import DrugKnowledge
from cafemed.protocols.config import CohortConfig
from cafemed.records import Dropped
from cafemed.sources import cells

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: `start` of a prescription that has none: later than any.
NO_TIME = np.iinfo(np.int64).max

_SECONDS_A_YEAR = 365.2425 * 24 * 3600
#: MIMIC-III shifts the birth of patients over 89, so that they seem 300 years old; the published
#: reading of such an age is 90.
_OLDEST, _AGE_OF_SHIFTED = 130.0, 90.0


class Ledger:
    """Counts the rows that each filter drops, in the order of the filters."""

    def __init__(self, already: Sequence[Dropped] = ()) -> None:
        self.dropped = list(already)

    def count(self, table: str, reason: str, num_rows: int) -> None:
        """Notes rows dropped; none is noted too, so that a filter is seen to have run."""
        self.dropped.append(Dropped(table, reason, int(num_rows)))

    def keep(self, table: str, reason: str, keep: Mask) -> Mask:
        """Notes the rows that a mask leaves out and gives the mask back."""
        self.count(table, reason, int((~keep).sum()))
        return keep

    def __str__(self) -> str:
        counts = [f"{d.num_rows} {d.table} ({d.reason})" for d in self.dropped if d.num_rows]
        return ", ".join(counts) or "no rows"


@dataclasses.dataclass(frozen=True)
class Visits:
    """`Records.visits` as integers; V rows.

    Attributes:
        ids: visit identifiers.
        patient_ids: distinct patients, in order (numbers as numbers).
        patient: int64 (V,), index into patient_ids; ascending index = patient order.
        rank: int64 (V,), position of the visit among all by identifier (numbers as numbers).
        admitted: datetime64[s] (V,), NaT where unknown.
        sex: int8 (V,). age: float32 (V,), years at admission, NaN where unknown.
    """

    ids: pa.Array
    patient_ids: pa.Array
    patient: Ints
    rank: Ints
    admitted: NDArray[np.datetime64]
    sex: NDArray[np.int8]
    age: NDArray[np.float32]

    @classmethod
    def of(cls, table: pa.Table) -> "Visits":
        """Reads `Records.visits`."""
        patients = table["patient"].combine_chunks().dictionary_encode()
        order = np.argsort(rank_ids(patients.dictionary))
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        ids = table["visit"].combine_chunks()
        admitted = table["admitted"].to_numpy().astype("datetime64[s]")
        birth = table["birth"].to_numpy().astype("datetime64[s]")
        return cls(
            ids=ids,
            patient_ids=patients.dictionary.take(pa.array(order)),
            patient=position[patients.indices.to_numpy()],
            rank=rank_ids(ids),
            admitted=admitted,
            sex=table["sex"].to_numpy(),
            age=ages(birth, admitted),
        )


@dataclasses.dataclass(frozen=True)
class CodeRows:
    """Codes of one kind, one row each.

    Attributes:
        visit: int64 (n,), row of `Visits`; -1 for a visit that is not there.
        code: int64 (n,), index into names; -1 where the record has none.
        keys: what orders the codes of a visit, most important first, each int64 (n,).
        names: sorted.
    """

    visit: Ints
    code: Ints
    keys: tuple[Ints, ...]
    names: tuple[str, ...]

    def filter(self, mask: Mask) -> "CodeRows":
        """The rows of a mask."""
        keys = tuple(key[mask] for key in self.keys)
        return CodeRows(self.visit[mask], self.code[mask], keys, self.names)


def rank_ids(ids: pa.Array) -> Ints:
    """Ranks identifiers: as numbers where all are whole numbers, else as text. int64, stable."""
    texts = ids.to_numpy(zero_copy_only=False).astype(np.str_)
    try:
        keys = texts.astype(np.int64)
    except (ValueError, OverflowError):
        keys = texts
    ranks: Ints = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return ranks


def ages(birth: NDArray[np.datetime64], admitted: NDArray[np.datetime64]) -> NDArray[np.float32]:
    """Age at admission in years, float32; NaN where a date is missing or birth comes later."""
    years = (admitted - birth).astype("timedelta64[s]").astype(np.float64) / _SECONDS_A_YEAR
    years[np.isnat(admitted) | np.isnat(birth)] = np.nan
    years[years < 0] = np.nan
    return np.where(years > _OLDEST, _AGE_OF_SHIFTED, years).astype(np.float32)


def visit_rows(column: pa.DictionaryArray, visits: Visits) -> Ints:
    """Rows of `Visits` for a column of visit identifiers, int64, -1 for an unknown visit."""
    places = pc.index_in(column.dictionary, value_set=visits.ids)
    return _take(pc.fill_null(places, -1).to_numpy().astype(np.int64), column)


def patients_in(column: pa.DictionaryArray, visits: Visits) -> Ints:
    """Indices into visits.patient_ids for a column of patients, int64, -1 if not there."""
    places = pc.index_in(column.dictionary, value_set=visits.patient_ids)
    return _take(pc.fill_null(places, -1).to_numpy().astype(np.int64), column)


def code_rows(table: pa.Table, visits: Visits) -> CodeRows:
    """Diagnoses or procedures of `Records`, ordered by SEQ_NUM, then as in the file."""
    code = cells.text(table, "code")
    sequence = pc.fill_null(table["sequence"].cast(pa.int64()), NO_TIME).to_numpy()
    return CodeRows(
        visit_rows(cells.text(table, "visit"), visits),
        cells.indices(code),
        (sequence, np.arange(len(sequence))),
        tuple(code.dictionary.to_pylist()),
    )


def medication_of(column: pa.DictionaryArray, drugs: DrugKnowledge) -> tuple[Ints, tuple[str, ...]]:
    """Medications (ATC level 3) of a column of drug codes: indices (-1: none) and sorted names."""
    mapped = cells.recode(column, drugs.medication)
    return cells.indices(mapped), tuple(mapped.dictionary.to_pylist())


def start_times(table: pa.Table) -> Ints:
    """Starts of prescriptions, int64 seconds since 1970, NO_TIME where there is none."""
    seconds: Ints = pc.fill_null(table["start"].cast(pa.int64()), NO_TIME).to_numpy()
    return seconds


def code_lists(rows: CodeRows, position: Ints, num_visits: int) -> CodeLists:
    """Collects each visit's codes in the order of the keys, each code once, the first staying.

    Args:
        rows: codes of visits.
        position: int64 (rows of Visits,); place of a visit among num_visits, -1: leave out.
        num_visits: how many lists to make.

    Returns:
        Indices into rows.names.
    """
    visit = position[rows.visit]
    keep = (rows.visit >= 0) & (visit >= 0) & (rows.code >= 0)
    visit, code = visit[keep], rows.code[keep]
    keys = [key[keep] for key in reversed(rows.keys)]
    order = np.lexsort((*keys, visit))
    visit, code = visit[order], code[order]
    _, first = np.unique(visit * len(rows.names) + code, return_index=True)
    first.sort()
    offsets = np.zeros(num_visits + 1, np.int64)
    np.cumsum(np.bincount(visit[first], minlength=num_visits), out=offsets[1:])
    return CodeLists(code[first].astype(np.int32), offsets)


def remap(lists: CodeLists, new_index: Ints) -> CodeLists:
    """Replaces each index i by new_index[i]; -1 removes it."""
    ids = new_index[lists.ids]
    kept = np.concatenate([[0], np.cumsum(ids >= 0)])
    return CodeLists(ids[ids >= 0].astype(np.int32), kept[lists.offsets])


def position_of(selected: Ints, size: int) -> Ints:
    """The inverse of a selection: int64 (size,), place in `selected`, -1 if not there."""
    position = np.full(size, -1, np.int64)
    position[selected] = np.arange(len(selected))
    return position


def patient_starts(patient: Ints) -> Ints:
    """Offsets of runs of equal values, int64 (runs + 1,)."""
    starts = np.flatnonzero(np.concatenate([[True], patient[1:] != patient[:-1]])[: len(patient)])
    return np.concatenate([starts, [len(patient)]]).astype(np.int64)


def assemble(
    visits: Visits,
    selected: Ints,
    lists: Mapping[str, CodeLists],
    vocabularies: Mapping[str, tuple[str, ...]],
    drugs: DrugKnowledge,
    split: NDArray[np.int8],
    config: CohortConfig,
) -> Cohort:
    """Puts a cohort together.

    Args:
        visits: all visits of the records.
        selected: int64 (V,), rows of `visits`, patient by patient, in visit order.
        lists: "diagnoses", "procedures", "medications", "targets".
        vocabularies, split: see Cohort.
        drugs: the interacting pairs.
        config: the setting `inputs`.
    """
    offsets = patient_starts(visits.patient[selected])
    patients = visits.patient[selected][offsets[:-1]]
    return Cohort(
        patient_offsets=offsets,
        patient_ids=tuple(visits.patient_ids.take(pa.array(patients)).to_pylist()),
        visit_ids=tuple(visits.ids.take(pa.array(selected)).to_pylist()),
        admitted=visits.admitted[selected],
        vocabularies=vocabularies,
        ddi=drugs.ddi_matrix(vocabularies["medication"]),
        split=split,
        sex=visits.sex[selected][offsets[:-1]],
        age=visits.age[selected],
        inputs=config.inputs,
        diagnoses=lists["diagnoses"],
        procedures=lists["procedures"],
        medications=lists["medications"],
        targets=lists["targets"],
    )


def _take(of_value: Ints, column: pa.DictionaryArray) -> Ints:
    # A null cell has index -1, which picks the -1 appended here.
    result: Ints = np.append(of_value, -1)[cells.indices(column)]
    return result
