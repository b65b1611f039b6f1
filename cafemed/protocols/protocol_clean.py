"""The default protocol: visits in time order, nothing filled in, learned from training patients.

Steps, each counted: rows without a code or a known visit go, drugs become ATC level 3; visits that
have the required kinds are usable; patients with enough usable visits stay; patients are split;
the vocabularies are those of the training patients; the others' unseen codes map to nothing.
"""

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.codes import KINDS, CodeLists
from cafemed.cohort import SPLITS, Cohort
from cafemed.drugs import NO_NDC, DrugKnowledge
from cafemed.errors import DataError
from cafemed.protocols import visits as rows_of
from cafemed.protocols.config import CohortConfig
from cafemed.protocols.visits import CodeRows, Ints, Ledger, Mask, Visits
from cafemed.records import Dropped, Records
from cafemed.sources import cells

_LISTS = {"diagnosis": "diagnoses", "procedure": "procedures", "medication": "medications"}


def clean(
    records: Records, drugs: DrugKnowledge, config: CohortConfig
) -> tuple[Cohort, list[Dropped]]:
    """Makes the cohort of the protocol "clean".

    Returns:
        The cohort and what each filter dropped.

    Raises:
        DataError: if too few patients are left, or split=time meets an unknown time.
    """
    ledger = Ledger((*records.dropped, *drugs.dropped))
    visits = Visits.of(records.visits)
    rows = {
        "diagnosis": _known(rows_of.code_rows(records.diagnoses, visits), "diagnoses", ledger),
        "procedure": _known(rows_of.code_rows(records.procedures, visits), "procedures", ledger),
        "medication": _medications(records, visits, drugs, ledger),
    }
    selected = _select(visits, rows, config, ledger)
    patient = visits.patient[selected]
    offsets = rows_of.patient_starts(patient)
    split = _split(visits.admitted[selected[offsets[1:] - 1]], config, ledger)
    in_training = np.repeat(split == SPLITS.index("train"), np.diff(offsets))

    position = rows_of.position_of(selected, len(visits.patient))
    raw = {_LISTS[kind]: rows_of.code_lists(rows[kind], position, len(selected)) for kind in KINDS}
    in_window = _in_window(rows["medication"], visits, config.target_window_h)
    raw["targets"] = rows_of.code_lists(
        rows["medication"].filter(in_window), position, len(selected)
    )
    limits = (config.max_diagnoses, config.max_procedures, config.max_medications)
    vocabularies, lists = {}, {}
    for kind, limit in zip(KINDS, limits, strict=True):
        name = _LISTS[kind]
        new_index, vocabularies[kind] = _vocabulary(raw[name], in_training, limit, rows[kind].names)
        lists[name] = rows_of.remap(raw[name], new_index)
        _count_unmapped(name, raw[name], lists[name], in_training, ledger)
        if kind == "medication":
            lists["targets"] = rows_of.remap(raw["targets"], new_index)
    cohort = rows_of.assemble(visits, selected, lists, vocabularies, drugs, split, config)
    return cohort, ledger.dropped


def _known(rows: CodeRows, table: str, ledger: Ledger) -> CodeRows:
    rows = rows.filter(ledger.keep(table, "no code", rows.code >= 0))
    return rows.filter(ledger.keep(table, "visit not among the admissions", rows.visit >= 0))


def _medications(
    records: Records, visits: Visits, drugs: DrugKnowledge, ledger: Ledger
) -> CodeRows:
    table = records.prescriptions
    given = cells.text(table, "code")
    none = pc.fill_null(pc.equal(given.cast("string"), NO_NDC), False).to_numpy(
        zero_copy_only=False
    )
    code, names = rows_of.medication_of(given, drugs)
    rows = CodeRows(
        rows_of.visit_rows(cells.text(table, "visit"), visits),
        np.where(none, -1, code),
        (rows_of.start_times(table), code),
        names,
    )
    empty = given.is_null().to_numpy(zero_copy_only=False)
    ledger.count("prescriptions", "no drug code", int(empty.sum()))
    ledger.count("prescriptions", "drug code 0", int(none.sum()))
    keep = ledger.keep("prescriptions", "no ATC code known", (rows.code >= 0) | empty | none)
    rows = rows.filter(keep & ~empty & ~none)
    return rows.filter(
        ledger.keep("prescriptions", "visit not among the admissions", rows.visit >= 0)
    )


def _select(
    visits: Visits, rows: dict[str, CodeRows], config: CohortConfig, ledger: Ledger
) -> Ints:
    """Rows of usable visits of the patients that stay, by patient and admission time."""
    has_time = ledger.keep("visits", "no admission time", ~np.isnat(visits.admitted))
    usable = has_time.copy()
    for kind in config.require:
        has_kind = np.zeros(len(usable), np.bool_)
        has_kind[rows[kind].visit] = True
        ledger.count("visits", f"no {kind}", int((usable & ~has_kind).sum()))
        usable &= has_kind
    per_patient = np.bincount(visits.patient[usable], minlength=len(visits.patient_ids))
    enough = per_patient[visits.patient] >= config.min_visits
    too_few = f"patient with under {config.min_visits} usable visits"
    ledger.count("visits", too_few, int((usable & ~enough).sum()))
    selected = np.flatnonzero(usable & enough)
    admitted = visits.admitted[selected].astype(np.int64)
    return selected[np.lexsort((visits.rank[selected], admitted, visits.patient[selected]))]


def _split(
    last_admission: NDArray[np.datetime64], config: CohortConfig, ledger: Ledger
) -> NDArray[np.int8]:
    """Assigns patients to SPLITS; each part gets at least one. int8 (P,)."""
    num_patients, parts = len(last_admission), config.split_parts
    if num_patients < len(parts):
        raise DataError(
            f"cohort: expected at least {len(parts)} patients with {config.min_visits} or more "
            f"usable visits (training, validation, test), {num_patients} are left; dropped were "
            f"{ledger}"
        )
    held_out = [max(1, round(num_patients * part / sum(parts))) for part in parts[1:]]
    sizes = [max(1, num_patients - sum(held_out)), *held_out]
    if config.split == "time":
        order = np.argsort(last_admission, kind="stable")
    else:
        order = np.random.default_rng(config.seed).permutation(num_patients)
    split = np.empty(num_patients, np.int8)
    split[order] = np.repeat(np.arange(len(parts), dtype=np.int8), sizes)[:num_patients]
    return split


def _in_window(rows: CodeRows, visits: Visits, window_h: float | None) -> Mask:
    """Which prescriptions start early enough to be targets; one without a start never does."""
    start = rows.keys[0]
    if window_h is None:
        return np.ones(len(start), np.bool_)
    admitted = visits.admitted.astype(np.int64)[rows.visit]
    early: Mask = start < admitted + window_h * 3600  # NO_TIME is later than any
    return early


def _vocabulary(
    lists: CodeLists, in_training: Mask, limit: int | None, names: tuple[str, ...]
) -> tuple[Ints, tuple[str, ...]]:
    """Codes of the training visits, the `limit` in most visits, ties by code; sorted by code."""
    of_training = np.repeat(in_training, lists.counts)
    counts = np.bincount(lists.ids[of_training], minlength=len(names))
    kept = np.sort(np.lexsort((np.arange(len(counts)), -counts))[: limit or len(counts)])
    kept = kept[counts[kept] > 0]
    return rows_of.position_of(kept, len(counts)), tuple(names[i] for i in kept)


def _count_unmapped(
    name: str, before: CodeLists, after: CodeLists, in_training: Mask, ledger: Ledger
) -> None:
    lost = before.counts - after.counts
    ledger.count(name, "code not frequent enough (training visits)", int(lost[in_training].sum()))
    ledger.count(name, "code unseen in training (other visits)", int(lost[~in_training].sum()))
