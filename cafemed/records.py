"""What every source gives and every protocol takes: a hospital's records as four Arrow tables."""

import dataclasses
from pathlib import Path

import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that was read: where from, and what identifies it."""

    path: Path
    sha256: str
    num_bytes: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Rows that a filter removed, and why."""

    table: str
    reason: str
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Records:
    """Records as read: cleaned of nothing but what cannot be read at all.

    Attributes:
        visits: patient (string), visit (string), admitted (timestamp[s], null if unknown),
            sex (int8, index into cohort.SEXES), birth (timestamp[s], null if unknown); one row
            a visit.
        diagnoses: visit (dictionary string), code (dictionary string, "icd9:4019"), sequence
            (int32, the SEQ_NUM; the row number where the source has none).
        procedures: the same.
        prescriptions: patient, visit, stay (ICU stay; null column where there is none), code (all
            dictionary strings; "ndc:00002322930" or "atc:A02B", null where the cell was empty),
            start (timestamp[s], null where empty); rows in the order of the file.
        files: every file read.
        dropped: rows that no protocol could use.
    """

    visits: pa.Table
    diagnoses: pa.Table
    procedures: pa.Table
    prescriptions: pa.Table
    files: tuple[SourceFile, ...]
    dropped: tuple[Dropped, ...]
