"""Writing a population as hospital tables in MIMIC-III's schema, with drug tables and its truth."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from cafemed.codes import CodeLists
from cafemed.synthetic import laboratory, molecules, truth
from cafemed.synthetic.generator import TABLE_STREAM, Population, stream
from cafemed.synthetic.stays import DAILY_DISCHARGE, DAY, Stays

Ints = NDArray[np.int64]

#: A medication not yet started is started the next day with this probability, until discharge.
DAILY_START = 0.5
_MOST_NDCS = 5
#: Rows that no medication stands behind, as shares of the others: NDC "0", and unmapped NDCs.
_NO_NDC_SHARE, _UNMAPPED_SHARE = 0.05, 0.03
#: Low: the tables are written often and read once.
_GZIP_LEVEL = 1


def write_tables(population: Population, folder: Path) -> dict[str, int]:
    """Writes the tables of a population into an existing folder.

    Files: PATIENTS, ADMISSIONS, DIAGNOSES_ICD, PROCEDURES_ICD, PRESCRIPTIONS and, unless
    config.num_laboratory is 0, LABEVENTS (.csv.gz); drugs/ndc_to_atc3.csv, drugs/ddi_atc3.csv,
    drugs/atc3_smiles.csv, and what `truth.write` puts into truth/. The same population gives the
    same bytes.

    Returns:
        Table → number of rows.
    """
    rng = stream(population.seed, TABLE_STREAM)
    stays = Stays(population, rng)
    ndcs, owner = _draw_ndcs(len(population.model.medications), rng)
    tables = {
        "PATIENTS": _patients(stays, rng),
        "ADMISSIONS": _admissions(stays),
        "DIAGNOSES_ICD": _codes(stays, population.diagnoses, population.model.diagnoses),
        "PROCEDURES_ICD": _codes(stays, population.procedures, population.model.procedures),
        "PRESCRIPTIONS": _prescriptions(population, stays, ndcs, owner, rng),
    }
    if population.config.num_laboratory:
        tables["LABEVENTS"] = laboratory.events(population, stays)
    for name, table in tables.items():
        _write_csv(table, folder / f"{name}.csv.gz")
    (folder / "drugs").mkdir()
    _write_drugs(population, folder / "drugs", ndcs, owner)
    _write_csv(molecules.table(population), folder / "drugs" / "atc3_smiles.csv")
    (folder / "truth").mkdir()
    truth.write(population, start_shares(), folder / "truth")
    return {name: table.num_rows for name, table in tables.items()}


def start_shares() -> NDArray[np.float64]:
    """Distribution of the day on which a medication starts, 0 the day of admission.

    A medication of a stay of L days starts on day min(K, L), K geometric; L is 1 + geometric, so
    that P(day >= k) = (1 - DAILY_START)^k P(L >= k).

    Returns:
        float64 (days,), P(day = k); the rest of the tail is in the last entry.
    """
    day = np.arange(60)
    at_least = (1 - DAILY_START) ** day * (1 - DAILY_DISCHARGE) ** np.maximum(day - 1, 0)
    shares: NDArray[np.float64] = at_least - np.append(at_least[1:], 0.0)
    return shares


def _patients(stays: Stays, rng: np.random.Generator) -> pa.Table:
    size = len(stays.subject_id)
    age_days = rng.integers(18 * 365, 90 * 365, size)
    birth = (stays.day[stays.first] - age_days * DAY).astype("datetime64[s]")
    return pa.table(
        {
            "ROW_ID": np.arange(1, size + 1),
            "SUBJECT_ID": stays.subject_id,
            "GENDER": pa.array(np.array(["F", "M"])[rng.integers(0, 2, size)]),
            "DOB": pa.array(birth),
        }
    )


def _admissions(stays: Stays) -> pa.Table:
    order = np.lexsort((stays.hadm_id, stays.patient))
    return pa.table(
        {
            "ROW_ID": np.arange(1, len(order) + 1),
            "SUBJECT_ID": stays.subject_id[stays.patient[order]],
            "HADM_ID": stays.hadm_id[order],
            "ADMITTIME": pa.array(stays.admitted[order]),
            "DISCHTIME": pa.array(stays.discharged[order]),
        }
    )


def _codes(stays: Stays, lists: CodeLists, names: tuple[str, ...]) -> pa.Table:
    visit = np.repeat(np.arange(len(lists)), lists.counts)
    sequence = np.arange(len(visit)) - np.repeat(lists.offsets[:-1], lists.counts) + 1
    order = np.lexsort((sequence, stays.hadm_id[visit], stays.patient[visit]))
    bare = pa.array([name.split(":")[1] for name in names])
    return pa.table(
        {
            "ROW_ID": np.arange(1, len(order) + 1),
            "SUBJECT_ID": stays.subject_id[stays.patient[visit[order]]],
            "HADM_ID": stays.hadm_id[visit[order]],
            "SEQ_NUM": sequence[order],
            "ICD9_CODE": bare.take(pa.array(lists.ids[order])),
        }
    )


def _draw_ndcs(num_medications: int, rng: np.random.Generator) -> tuple[pa.Array, Ints]:
    """Invented NDCs, sorted, and the medication of each; -1 for those that no table maps."""
    counts = rng.integers(1, _MOST_NDCS + 1, num_medications)
    owner = np.concatenate([np.repeat(np.arange(num_medications), counts), np.full(20, -1)])
    numbers = rng.choice(10**9, len(owner), replace=False) + 1
    order = np.argsort(numbers)
    return pa.array([f"{n:011d}" for n in numbers[order]]), owner[order].astype(np.int64)


def _prescriptions(
    population: Population,
    stays: Stays,
    ndcs: pa.Array,
    owner: Ints,
    rng: np.random.Generator,
) -> pa.Table:
    """One or more rows for each medication of a visit, and rows without a known medication."""
    lists = population.medications
    visit = np.repeat(np.arange(len(lists)), lists.counts)
    starts = np.minimum(rng.geometric(DAILY_START, len(visit)) - 1, stays.days[visit])
    repeats = rng.poisson(1.0, len(visit))
    again = np.repeat(np.arange(len(visit)), repeats)
    later = rng.integers(starts[again], stays.days[visit[again]] + 1)
    more = round((_NO_NDC_SHARE + _UNMAPPED_SHARE) * (len(visit) + len(again)))
    noise = rng.integers(0, len(lists), more)
    noise_start = rng.integers(0, stays.days[noise] + 1)
    ndc = np.concatenate(
        [
            _pick(lists.ids, owner, rng),
            _pick(lists.ids[again], owner, rng),
            _no_drug(noise, owner, rng),
        ]
    )
    visit = np.concatenate([visit, visit[again], noise])
    day = np.concatenate([starts, later, noise_start])
    order = np.lexsort((ndc, day, stays.hadm_id[visit], stays.patient[visit]))
    return _prescription_table(population, stays, ndcs, owner, visit[order], day[order], ndc[order])


def _pick(medication: NDArray[np.int32], owner: Ints, rng: np.random.Generator) -> Ints:
    """One of each medication's NDCs, indices into the sorted NDCs."""
    by_owner = np.argsort(owner, kind="stable")
    counts = np.bincount(owner + 1)
    first = np.cumsum(counts) - counts
    within = rng.integers(0, counts[medication + 1])
    picked: Ints = by_owner[first[medication + 1] + within].astype(np.int64)
    return picked


def _no_drug(noise: Ints, owner: Ints, rng: np.random.Generator) -> Ints:
    """For rows without a known medication: -1, "no NDC", or an NDC that no table maps."""
    none = rng.random(len(noise)) < _NO_NDC_SHARE / (_NO_NDC_SHARE + _UNMAPPED_SHARE)
    return np.where(none, -1, rng.choice(np.flatnonzero(owner < 0), len(noise)))


def _prescription_table(
    population: Population,
    stays: Stays,
    ndcs: pa.Array,
    owner: Ints,
    visit: Ints,
    day: Ints,
    ndc: Ints,
) -> pa.Table:
    start = (stays.day[visit] + day * DAY).astype("datetime64[s]")
    drugs = [f"Drug {name.split(':')[1]}" for name in population.model.medications]
    place = pa.array(ndc, mask=ndc < 0)
    drug = np.where((ndc < 0) | (owner[ndc] < 0), len(drugs), owner[ndc])
    stay = stays.icustay_id[visit]
    return pa.table(
        {
            "ROW_ID": np.arange(1, len(visit) + 1),
            "SUBJECT_ID": stays.subject_id[stays.patient[visit]],
            "HADM_ID": stays.hadm_id[visit],
            "ICUSTAY_ID": pa.array(stay, mask=stay < 0),
            "STARTDATE": pa.array(start),
            "ENDDATE": pa.array(start + np.timedelta64(24 * 3600, "s")),
            "DRUG_TYPE": pa.repeat("MAIN", len(visit)),
            "DRUG": pa.array([*drugs, "Other"]).take(pa.array(drug)),
            "NDC": ndcs.take(place).fill_null("0"),
        }
    )


def _write_drugs(population: Population, folder: Path, ndcs: pa.Array, owner: Ints) -> None:
    bare = np.array([name.split(":")[1] for name in population.model.medications])
    known = np.flatnonzero(owner >= 0)
    mapping = {"ndc": ndcs.take(pa.array(known)), "atc3": bare[owner[known]]}
    _write_csv(pa.table(mapping), folder / "ndc_to_atc3.csv")
    a, b = np.nonzero(np.triu(population.model.ddi, 1))
    _write_csv(pa.table({"atc3_a": bare[a], "atc3_b": bare[b]}), folder / "ddi_atc3.csv")


def _write_csv(table: pa.Table, path: Path) -> None:
    options: Any = pacsv.WriteOptions(quoting_style="needed")
    with path.open("wb") as raw:
        if path.suffix != ".gz":
            pacsv.write_csv(table, raw, options)
            return
        # No time of writing in the header: the same population gives the same bytes.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as packed:
            pacsv.write_csv(table, packed, options)
