#!/usr/bin/env python3
"""Measures jobs/prepare.py on made-up tables of MIMIC-III's size: CPU time, peak memory, wall time.

    OMP_NUM_THREADS=1 python benchmarks/prepare.py --quick
    OMP_NUM_THREADS=1 python benchmarks/prepare.py --json benchmarks/results/prepare.json

The tables have all columns of MIMIC-III's and the same numbers of rows (4.16 million
prescriptions); the values are drawn, the texts about as long as real ones. They are made and read
in processes of their own, so that neither's memory counts for the other. --quick takes a tenth of
the rows.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from cafemed import paths

#: Rows of MIMIC-III v1.4.
ROWS = {
    "patients": 46_520,
    "admissions": 58_976,
    "diagnoses": 651_047,
    "procedures": 240_095,
    "prescriptions": 4_156_450,
}
#: Ceilings that the project promises for the whole job on the full size.
MAX_CPU_S, MAX_PEAK_GB = 20.0, 1.5

_NUM_NDC, _NUM_ATC = 4_204, 131
_NO_NDC_SHARE, _EMPTY_NDC_SHARE, _MAPPED_SHARE = 0.11, 0.001, 0.8
_CASES = {"csv": ("csv", "clean"), "csv.gz": ("csv.gz", "clean"), "published": ("csv", "published")}


def make_tables(folder: Path, scale: float, seed: int) -> None:
    """Writes the five tables as `.csv` and `.csv.gz` into folders of their own, and drug tables."""
    rng = np.random.default_rng(seed)
    rows = {name: max(int(count * scale), 100) for name, count in ROWS.items()}
    subject = np.arange(rows["patients"]) + 2
    owner = np.concatenate([subject, rng.choice(subject, rows["admissions"] - rows["patients"])])
    hadm = rng.permutation(rows["admissions"]) + 100_000
    admitted = _days(rng, len(hadm))
    tables = {
        "PATIENTS": _patients(subject, rng),
        "ADMISSIONS": _admissions(owner, hadm, admitted, rng),
        "DIAGNOSES_ICD": _codes(owner, hadm, rows["diagnoses"], 6_984, rng),
        "PROCEDURES_ICD": _codes(owner, hadm, rows["procedures"], 2_009, rng),
        "PRESCRIPTIONS": _prescriptions(owner, hadm, admitted, rows["prescriptions"], rng),
    }
    for suffix in ("csv", "csv.gz"):
        (folder / suffix).mkdir()
        for name, table in tables.items():
            with pa.output_stream(str(folder / suffix / f"{name}.{suffix}")) as stream:
                pacsv.write_csv(table, stream)
    _write_drugs(folder / "drugs", rng)


def _days(rng: np.random.Generator, size: int) -> NDArray[np.datetime64]:
    return np.datetime64("2100-01-01", "s") + rng.integers(0, 100 * 365, size) * np.timedelta64(
        24 * 3600, "s"
    )


def _pick(rng: np.random.Generator, words: list[str], size: int) -> pa.Array:
    return pa.array(words).take(pa.array(rng.integers(0, len(words), size)))


def _words(stem: str, size: int) -> list[str]:
    return [f"{stem} {i:04d}" for i in range(size)]


def _patients(subject: NDArray[np.int64], rng: np.random.Generator) -> pa.Table:
    births = _days(rng, len(subject)) - np.timedelta64(40 * 365, "D")
    return pa.table(
        {
            "ROW_ID": np.arange(len(subject)),
            "SUBJECT_ID": subject,
            "GENDER": _pick(rng, ["F", "M"], len(subject)),
            "DOB": pa.array(births),
            "DOD": pa.nulls(len(subject), pa.timestamp("s")),
            "EXPIRE_FLAG": np.zeros(len(subject), np.int64),
        }
    )


def _admissions(
    owner: NDArray[np.int64],
    hadm: NDArray[np.int64],
    admitted: NDArray[np.datetime64],
    rng: np.random.Generator,
) -> pa.Table:
    seconds = rng.integers(0, 24 * 3600, len(hadm)) * np.timedelta64(1, "s")
    return pa.table(
        {
            "ROW_ID": np.arange(len(hadm)),
            "SUBJECT_ID": owner,
            "HADM_ID": hadm,
            "ADMITTIME": pa.array(admitted + seconds),
            "DISCHTIME": pa.array(admitted + np.timedelta64(9, "D")),
            "ADMISSION_TYPE": _pick(rng, ["EMERGENCY", "ELECTIVE", "URGENT"], len(hadm)),
            "DIAGNOSIS": _pick(rng, _words("SHORTNESS OF BREATH;", 900), len(hadm)),
        }
    )


def _codes(
    owner: NDArray[np.int64],
    hadm: NDArray[np.int64],
    size: int,
    num_codes: int,
    rng: np.random.Generator,
) -> pa.Table:
    place = np.sort(rng.integers(0, len(hadm), size))
    starts = np.searchsorted(place, place)
    common = rng.geometric(10 / num_codes, size) % num_codes
    return pa.table(
        {
            "ROW_ID": np.arange(size),
            "SUBJECT_ID": owner[place],
            "HADM_ID": hadm[place],
            "SEQ_NUM": np.arange(size) - starts + 1,
            "ICD9_CODE": pa.array([str(1000 + i) for i in range(num_codes)]).take(pa.array(common)),
        }
    )


def _ndcs() -> list[str]:
    return [f"{37_000_000 + 7919 * i:011d}" for i in range(_NUM_NDC)]


def _prescriptions(
    owner: NDArray[np.int64],
    hadm: NDArray[np.int64],
    admitted: NDArray[np.datetime64],
    size: int,
    rng: np.random.Generator,
) -> pa.Table:
    place = rng.integers(0, len(hadm), size)
    start = admitted[place] + rng.integers(0, 10, size) * np.timedelta64(24 * 3600, "s")
    draw = rng.random(size)
    code = np.where(draw < _NO_NDC_SHARE, 0, rng.geometric(0.002, size) % _NUM_NDC + 1)
    empty = draw > 1 - _EMPTY_NDC_SHARE
    has_stay = rng.random(size) < 0.65
    drugs = pa.array(_words("Potassium Chloride", 3_000))
    return pa.table(
        {
            "ROW_ID": np.arange(size),
            "SUBJECT_ID": owner[place],
            "HADM_ID": hadm[place],
            "ICUSTAY_ID": pa.array(place + 200_000, mask=~has_stay),
            "STARTDATE": pa.array(start),
            "ENDDATE": pa.array(start + np.timedelta64(48 * 3600, "s")),
            "DRUG_TYPE": _pick(rng, ["MAIN", "BASE", "ADDITIVE"], size),
            "DRUG": drugs.take(pa.array(code % 3_000)),
            "DRUG_NAME_POE": drugs.take(pa.array(code % 3_000)),
            "DRUG_NAME_GENERIC": drugs.take(pa.array(code % 2_999)),
            "FORMULARY_DRUG_CD": _pick(rng, _words("KCL", 3_000), size),
            "GSN": _pick(rng, [f"{i:06d}" for i in range(3_000)], size),
            "NDC": pa.array(["0", *_ndcs()]).take(pa.array(code, mask=empty)),
            "PROD_STRENGTH": _pick(rng, _words("20mEq/50mL Premix", 500), size),
            "DOSE_VAL_RX": _pick(rng, ["1", "2.5", "40", "1000"], size),
            "DOSE_UNIT_RX": _pick(rng, ["mg", "mL", "UNIT"], size),
            "FORM_VAL_DISP": _pick(rng, ["1", "2", "0.5"], size),
            "FORM_UNIT_DISP": _pick(rng, ["TAB", "BAG", "VIAL"], size),
            "ROUTE": _pick(rng, ["PO", "IV", "IV DRIP"], size),
        }
    )


def _write_drugs(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir()
    atc = [f"{'ABCDGHJLMNPRSV'[i % 14]}{i // 26:02d}{chr(65 + i % 26)}" for i in range(_NUM_ATC)]
    mapped = [ndc for ndc in _ndcs() if rng.random() < _MAPPED_SHARE]
    lines = ["ndc,atc3", *(f"{ndc},{atc[rng.integers(_NUM_ATC)]}" for ndc in mapped)]
    (folder / "ndc_to_atc3.csv").write_text("\n".join(lines) + "\n")
    pairs = {tuple(sorted(rng.choice(atc, 2, replace=False).tolist())) for _ in range(448)}
    lines = ["atc3_a,atc3_b", *(f"{a},{b}" for a, b in sorted(pairs))]
    (folder / "ddi_atc3.csv").write_text("\n".join(lines) + "\n")


def measure(folder: Path, case: str) -> list[dict[str, Any]]:
    """Runs the job once in a process of its own."""
    form, protocol = _CASES[case]
    command = [
        *(sys.executable, str(paths.PROJECT_DIR / "jobs" / "prepare.py"), "data=mimic3"),
        f"data.root={folder / form}",
        f"data.drugs={folder / 'drugs'}",
        f"data.cohort.protocol={protocol}",
        f"paths.root={folder / 'root'}",
        f"name={case.replace('.', '_')}",
    ]
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{case}: the job ended with status {process.returncode}")
    return [
        {"case": case, "metric": "cpu", "value": usage.ru_utime + usage.ru_stime, "unit": "s"},
        {"case": case, "metric": "wall", "value": wall_s, "unit": "s"},
        {"case": case, "metric": "peak memory", "value": usage.ru_maxrss / 1e6, "unit": "GB"},
    ]


def main() -> None:
    """Makes the tables, measures the cases, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"load {load} on {os.cpu_count()} cores; OMP_NUM_THREADS={os.getenv('OMP_NUM_THREADS')}")
    versions = (
        f"Python {platform.python_version()}, pyarrow {pa.__version__}, numpy {np.__version__}"
    )
    print(versions)
    scale = 0.1 if arguments.quick else 1.0
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        maker = multiprocessing.get_context("spawn").Process(
            target=make_tables, args=(folder, scale, arguments.seed)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the tables could not be made")
        size_mb = (folder / "csv" / "PRESCRIPTIONS.csv").stat().st_size / 1e6
        print(f"{ROWS['prescriptions'] * scale:,.0f} prescription rows, {size_mb:.0f} MB of text")
        for case in _CASES:
            results += measure(folder, case)
            line = ", ".join(f"{r['metric']} {r['value']:.2f} {r['unit']}" for r in results[-3:])
            print(f"{case:<10} {line}", flush=True)
    print(f"promised for the full size: {MAX_CPU_S:g} CPU seconds, {MAX_PEAK_GB:g} GB")
    if arguments.json:
        # When and with what, so that a figure in a document can be traced.
        stamp = {"date": datetime.date.today().isoformat(), "versions": versions}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([r | stamp for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
