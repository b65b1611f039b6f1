"""Hospitals of a few patients, drawn with everything that real tables have wrong with them."""

import csv
import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np

ATC = ("A02B", "B01A", "C03C", "C07A", "J01D", "N02B")
NDC_TO_ATC = {f"{11 * (i + 1):011d}": ATC[i % len(ATC)] for i in range(9)}
UNMAPPED_NDC = "99999999999"
DDI = (("A02B", "B01A"), ("B01A", "C07A"), ("J01D", "N02B"))
DIAGNOSES = tuple(f"{400 + i}{i}" for i in range(12))
PROCEDURES = tuple(f"{30 + i}" for i in range(8))

Row = dict[str, Any]


@dataclasses.dataclass
class Hospital:
    """Tables as lists of rows, cells as text, "" where empty; the columns are MIMIC-III's."""

    patients: list[Row]
    admissions: list[Row]
    diagnoses: list[Row]
    procedures: list[Row]
    prescriptions: list[Row]

    def write(self, folder: Path, *, upper: bool = True, packed: bool = False) -> Path:
        """Writes MIMIC-III's five tables and gives the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.mimic3_tables().items():
            write_rows(folder, name, rows, upper=upper, packed=packed)
        return folder

    def mimic3_tables(self) -> dict[str, list[Row]]:
        return {
            "PATIENTS": self.patients,
            "ADMISSIONS": self.admissions,
            "DIAGNOSES_ICD": self.diagnoses,
            "PROCEDURES_ICD": self.procedures,
            "PRESCRIPTIONS": self.prescriptions,
        }


def write_rows(
    folder: Path, name: str, rows: list[Row], *, upper: bool = True, packed: bool = False
) -> Path:
    """Writes one table; the header and the file's name are upper or lower case."""
    case = str.upper if upper else str.lower
    path = folder / f"{case(name)}.csv{'.gz' if packed else ''}"
    with gzip.open(path, "wt") if packed else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([case(column) for column in rows[0]])
        writer.writerows([list(row.values()) for row in rows])
    return path


def write_drugs(folder: Path, *, smiles: tuple[str, ...] | None = None) -> Path:
    """Writes the drug tables and gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"ndc": ndc, "atc3": atc} for ndc, atc in NDC_TO_ATC.items()]
    write_rows(folder, "ndc_to_atc3", rows, upper=False)
    write_rows(folder, "ddi_atc3", [{"atc3_a": a, "atc3_b": b} for a, b in DDI], upper=False)
    if smiles is not None:
        rows = [{"atc3": atc, "smiles": "CC(=O)O"} for atc in smiles]
        write_rows(folder, "atc3_smiles", rows, upper=False)
    return folder


def load(folder: Path) -> Hospital:
    """Reads a folder of real tables as they are, numbers as numbers."""
    tables = {}
    for name in ("PATIENTS", "ADMISSIONS", "DIAGNOSES_ICD", "PROCEDURES_ICD", "PRESCRIPTIONS"):
        with gzip.open(folder / f"{name}.csv.gz", "rt", newline="") as file:
            tables[name] = list(csv.DictReader(file))
        for row in tables[name]:
            for column in ("subject_id", "hadm_id", "seq_num"):
                if row.get(column):
                    row[column] = int(row[column])
    return Hospital(*tables.values())


def draw(seed: int, num_patients: int = 14) -> Hospital:
    """Draws a hospital: visits out of time order, empty cells, repeated rows, unknown visits."""
    rng = np.random.default_rng(seed)
    subjects = rng.choice(np.arange(2, 200), num_patients, replace=False)
    hadms = rng.choice(np.arange(900, 2000), 5 * num_patients, replace=False).tolist()
    hospital = Hospital([], [], [], [], [])
    for subject in subjects.tolist():
        hospital.patients.append(_patient(subject, rng))
        for _ in range(rng.integers(1, 5)):
            _draw_visit(hospital, subject, hadms.pop(), rng)
    order = rng.permutation(len(hospital.prescriptions))
    hospital.prescriptions = [hospital.prescriptions[i] for i in order]
    for rows in hospital.mimic3_tables().values():
        for i, row in enumerate(rows):
            row["row_id"] = i + 1
    return hospital


def _patient(subject: int, rng: np.random.Generator) -> Row:
    year = 1800 if rng.random() < 0.1 else int(rng.integers(2030, 2090))
    return {
        "row_id": 0,
        "subject_id": subject,
        "gender": rng.choice(["F", "M"]),
        "dob": f"{year}-03-05 00:00:00",
    }


def _draw_visit(hospital: Hospital, subject: int, hadm: int, rng: np.random.Generator) -> None:
    day = int(rng.integers(1, 20))
    # Midnight is often: prescriptions start at midnight too, and windows end there.
    clock = "00:00:00" if rng.random() < 0.3 else f"{int(rng.integers(0, 24)):02d}:30:00"
    year = int(rng.integers(2110, 2130))
    key = {"row_id": 0, "subject_id": subject, "hadm_id": hadm}
    admitted = "" if rng.random() < 0.05 else f"{year}-06-{day:02d} {clock}"
    hospital.admissions.append({**key, "admittime": admitted, "diagnosis": 'SEPSIS, "ACUTE"'})
    for table, codes in ((hospital.diagnoses, DIAGNOSES), (hospital.procedures, PROCEDURES)):
        chosen = rng.choice(codes, rng.integers(0, 6)).tolist()
        sequence = rng.permutation(len(chosen)) + 1
        for position, code in zip(sequence.tolist(), chosen, strict=True):
            empty = rng.random() < 0.05
            table.append(
                {
                    **key,
                    "seq_num": "" if empty else position,
                    "icd9_code": "" if empty else code,
                }
            )
    for _ in range(rng.integers(0, 8)):
        row = {
            **key,
            "icustay_id": int(rng.integers(20, 24)) if rng.random() < 0.5 else "",
            "startdate": _start(year, day, rng),
            "drug": "Aspirin, chewable",
            "ndc": rng.choice([*NDC_TO_ATC, UNMAPPED_NDC, "0", ""]),
        }
        hospital.prescriptions += [row, dict(row)] if rng.random() < 0.2 else [row]


def _start(year: int, day: int, rng: np.random.Generator) -> str:
    if rng.random() < 0.1:
        return ""
    return f"{year}-06-{day + int(rng.integers(0, 4)):02d} 00:00:00"
