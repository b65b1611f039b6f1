"""The protocol of the literature (SafeDrug, COGNet, MoleRec, CausalMed), for comparing with papers.

It leaks: visits are ordered by HADM_ID, which is random, so that "history" may lie in the future;
missing cells are filled from the row above, which may be another patient's; the vocabularies and
the most frequent codes are those of all patients. docs/data.md lists all of its leaks.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.codes import KINDS, CodeLists
from cafemed.cohort import SPLITS, Cohort
from cafemed.drugs import NO_NDC, DrugKnowledge
from cafemed.errors import DataError
from cafemed.protocols import visits as rows_of
from cafemed.protocols.config import CohortConfig
from cafemed.protocols.visits import CodeRows, Ints, Ledger, Visits
from cafemed.records import Dropped, Records
from cafemed.sources import cells

#: Most frequent codes kept. MIMIC-III's scripts have no limit for procedures, MIMIC-IV's 1,500.
MAX_DIAGNOSES, MAX_MEDICATIONS = 2000, 300
MAX_PROCEDURES_MIMIC4 = 1500

_MAX_KEY = 1 << 62


def published(
    records: Records, drugs: DrugKnowledge, config: CohortConfig
) -> tuple[Cohort, list[Dropped]]:
    """Makes the cohort of the protocol "published".

    Procedures are limited to 1,500 where the records hold ICD-10 codes (MIMIC-IV). Ties among
    equally frequent codes, which the published scripts leave to the sorting routine, go to the
    smaller code. Molecules, where given, restrict the medications to those that have one.

    Returns:
        The cohort and what each filter dropped.

    Raises:
        DataError: if fewer than four patients are left.
    """
    ledger = Ledger((*records.dropped, *drugs.dropped))
    visits = Visits.of(records.visits)
    diagnoses = rows_of.code_rows(records.diagnoses, visits)
    # A diagnosis with any missing cell goes; SEQ_NUM is not used, the file's order stays.
    complete = dataclasses.replace(
        diagnoses,
        code=np.where(diagnoses.keys[0] == rows_of.NO_TIME, -1, diagnoses.code),
        keys=diagnoses.keys[1:],
    )
    procedures = rows_of.code_rows(records.procedures, visits)
    is_mimic4 = any(name.startswith("icd10:") for name in diagnoses.names)
    max_procedures = MAX_PROCEDURES_MIMIC4 if is_mimic4 else None
    rows = {
        "diagnosis": _most_frequent(complete, MAX_DIAGNOSES, "diagnoses", ledger),
        "procedure": _most_frequent(procedures, max_procedures, "procedures", ledger),
        "medication": _medications(records.prescriptions, visits, drugs, ledger),
    }
    selected = _join(visits, rows, ledger)
    split = _split(len(np.unique(visits.patient[selected])), ledger)
    position = rows_of.position_of(selected, len(visits.patient))
    lists, vocabularies = {}, {}
    for kind in KINDS:
        raw = rows_of.code_lists(rows[kind], position, len(selected))
        lists[kind], vocabularies[kind] = _in_order_of_appearance(raw, rows[kind].names)
    cohort = rows_of.assemble(
        visits,
        selected,
        {
            "diagnoses": lists["diagnosis"],
            "procedures": lists["procedure"],
            "medications": lists["medication"],
            "targets": lists["medication"],
        },
        vocabularies,
        drugs,
        split,
        config,
    )
    return cohort, ledger.dropped


def _most_frequent(rows: CodeRows, limit: int | None, table: str, ledger: Ledger) -> CodeRows:
    """Rows of the codes in most visits of all patients."""
    rows = rows.filter(ledger.keep(table, "missing cell", rows.code >= 0))
    rows = rows.filter(ledger.keep(table, "visit not among the admissions", rows.visit >= 0))
    if limit is None:
        return rows
    pairs = np.unique(rows.visit * len(rows.names) + rows.code)
    frequent = _top(pairs % max(len(rows.names), 1), len(rows.names), limit)
    keep = ledger.keep(table, f"not among the {limit} most frequent codes", frequent[rows.code])
    return rows.filter(keep)


def _medications(table: pa.Table, visits: Visits, drugs: DrugKnowledge, ledger: Ledger) -> CodeRows:
    """Prescriptions filled forward, of patients with two admissions, as ATC level 3."""
    table = _filled(table, ledger)
    given, visit_column = cells.text(table, "code"), cells.text(table, "visit")
    stay, start = _stay_ranks(cells.text(table, "stay")), rows_of.start_times(table)
    admission = cells.indices(visit_column)
    person = cells.indices(cells.text(table, "patient"))

    first = _first_of_equal(admission, person, stay, start, cells.indices(given))
    keep = ledger.keep("prescriptions", "repeated row", first)
    enough = _has_two_admissions(person, admission)
    keep = keep & ledger.keep("prescriptions", "patient with one admission", enough | ~keep)
    # A visit filled in from another patient's row joins nothing.
    visit = rows_of.visit_rows(visit_column, visits)
    patient = rows_of.patients_in(cells.text(table, "patient"), visits)
    belongs = (visit >= 0) & (visits.patient[visit] == patient)
    keep = keep & ledger.keep("prescriptions", "visit not of this patient", belongs | ~keep)

    code, names = rows_of.medication_of(given, drugs)
    keep = keep & ledger.keep("prescriptions", "no ATC code known", (code >= 0) | ~keep)
    if drugs.molecules is not None:
        known = {medication for _, medication, _ in drugs.molecules}
        has_molecule = np.array([name in known for name in names] + [False])[code]
        keep = keep & ledger.keep("prescriptions", "no molecule known", has_molecule | ~keep)
    rows = CodeRows(visit, code, (stay, start, np.arange(len(code))), names).filter(keep)
    first = _first_of_equal(rows.visit, *rows.keys[:2], rows.code)
    rows = rows.filter(ledger.keep("prescriptions", "same drug and start again", first))
    frequent = _top(rows.code, len(names), MAX_MEDICATIONS)[rows.code]
    reason = f"not among the {MAX_MEDICATIONS} most frequent medications"
    return rows.filter(ledger.keep("prescriptions", reason, frequent))


def _has_two_admissions(person: Ints, admission: Ints) -> NDArray[np.bool_]:
    """Which rows are of a patient with two admissions among these rows, bool (n,)."""
    size = int(admission.max(initial=0)) + 1
    pairs = np.unique(person * size + admission)
    per_person = np.bincount(pairs // size, minlength=int(person.max(initial=0)) + 1)
    two: NDArray[np.bool_] = (per_person >= 2)[person]
    return two


def _filled(table: pa.Table, ledger: Ledger) -> pa.Table:
    """Drops rows with drug code 0, then fills every missing cell from the row above it."""
    zero = pc.fill_null(pc.equal(cells.text(table, "code").cast("string"), NO_NDC), False)
    ledger.count("prescriptions", "drug code 0", pc.sum(zero).as_py() or 0)
    table = table.filter(pc.invert(zero))
    # Where there is no ICU stay at all (MIMIC-IV) the scripts do not read that column.
    optional = {"stay"} if table["stay"].null_count == table.num_rows else set()
    names = [name for name in table.column_names if name not in optional]
    for name in names:
        filled = _fill_forward(table[name].combine_chunks())
        table = table.set_column(table.column_names.index(name), name, filled)
    missing = np.zeros(table.num_rows, np.bool_)
    for name in names:
        missing |= table[name].is_null().to_numpy()
    ledger.count("prescriptions", "missing cell with no row above", int(missing.sum()))
    return table.filter(pa.array(~missing))


def _fill_forward(column: pa.Array) -> pa.Array:
    if not pa.types.is_dictionary(column.type):
        return pc.fill_null_forward(column)
    return pa.DictionaryArray.from_arrays(pc.fill_null_forward(column.indices), column.dictionary)


def _stay_ranks(stay: pa.DictionaryArray) -> Ints:
    ranks = np.append(rows_of.rank_ids(stay.dictionary), -1)
    result: Ints = ranks[cells.indices(stay)]
    return result


def _join(visits: Visits, rows: dict[str, CodeRows], ledger: Ledger) -> Ints:
    """Visits with codes of all three kinds, by patient and HADM_ID."""
    joined = np.ones(len(visits.patient), np.bool_)
    for kind in ("medication", "diagnosis", "procedure"):
        has_kind = np.zeros(len(joined), np.bool_)
        has_kind[rows[kind].visit] = True
        ledger.count("visits", f"no {kind}", int((joined & ~has_kind).sum()))
        joined &= has_kind
    selected = np.flatnonzero(joined)
    return selected[np.lexsort((visits.rank[selected], visits.patient[selected]))]


def _split(num_patients: int, ledger: Ledger) -> NDArray[np.int8]:
    """The first two thirds train, the next sixth tests, the last sixth validates. int8 (P,)."""
    num_train = num_patients * 2 // 3
    num_test = (num_patients - num_train) // 2
    num_validation = num_patients - num_train - num_test
    if not num_train or not num_test:
        raise DataError(
            "cohort: expected at least 4 patients with two admissions that have diagnoses, "
            f"procedures and medications, {num_patients} are left; dropped were {ledger}"
        )
    order = [SPLITS.index(name) for name in ("train", "test", "validation")]
    return np.repeat(np.array(order, np.int8), [num_train, num_test, num_validation])


def _in_order_of_appearance(
    lists: CodeLists, names: tuple[str, ...]
) -> tuple[CodeLists, tuple[str, ...]]:
    codes, first = np.unique(lists.ids, return_index=True)
    order = codes[np.argsort(first)].astype(np.int64)
    new_index = rows_of.position_of(order, len(names))
    return rows_of.remap(lists, new_index), tuple(names[i] for i in order)


def _top(codes: Ints, num_codes: int, limit: int) -> NDArray[np.bool_]:
    """Which codes are the `limit` most frequent, ties to the smaller; bool (num_codes,)."""
    counts = np.bincount(codes, minlength=num_codes)
    chosen = np.zeros(num_codes, np.bool_)
    chosen[np.lexsort((np.arange(num_codes), -counts))[:limit]] = True
    return chosen


def _first_of_equal(*columns: Ints) -> NDArray[np.bool_]:
    """Marks the first of equal rows, bool (n,)."""
    key = np.zeros(len(columns[0]), np.int64)
    size = 1
    for column in columns:
        low = int(column.min(initial=0))
        num_values = int(column.max(initial=0)) - low + 1
        if size * num_values >= _MAX_KEY:
            key = np.unique(key, return_inverse=True)[1]
            size = len(key)
        key = key * num_values + (column - low)
        size *= num_values
    first = np.zeros(len(key), np.bool_)
    first[np.unique(key, return_index=True)[1]] = True
    return first
