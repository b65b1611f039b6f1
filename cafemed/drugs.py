"""Drug knowledge, which the user supplies: NDC → ATC, interacting pairs, molecules.

Medications are compared at ATC level 3 (four characters, "A02B"), the level of the published
benchmarks.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cafemed.errors import ConfigError, DataError
from cafemed.records import Dropped, SourceFile
from cafemed.sources import cells, reading
from cafemed.sources.reading import InputFile

#: The tables' names in a folder of drug tables.
FILES = {"ndc_to_atc": "ndc_to_atc3", "ddi": "ddi_atc3", "smiles": "atc3_smiles"}

_ATC = re.compile(r"[A-Z]\d\d[A-Z]\w*")
_NDC = re.compile(r"\d{1,11}(\.0+)?")
_NDC_SEGMENTS = re.compile(r"(\d{1,5})-(\d{1,4})-(\d{1,2})")


@dataclasses.dataclass(frozen=True)
class DrugKnowledge:
    """What is known of drugs, by codes as in a cohort ("ndc:00002322930", "atc:A02B").

    Attributes:
        atc_of_ndc: NDC → ATC level 3; empty if no such table was given.
        interactions: unordered pairs of ATC codes, each sorted and once.
        molecules: row below the header from 0, ATC code and SMILES; None if no such table was
            given.
        files: every file read.
        dropped: rows of these tables that say nothing new.
    """

    atc_of_ndc: Mapping[str, str]
    interactions: frozenset[tuple[str, str]]
    molecules: tuple[tuple[int, str, str], ...] | None
    files: tuple[SourceFile, ...]
    dropped: tuple[Dropped, ...]

    def medication(self, code: str) -> str | None:
        """The medication at ATC level 3 of an NDC or a finer ATC code; None if unknown."""
        if code.startswith("atc:"):
            return code[:8] if _ATC.fullmatch(code[4:]) else None
        return self.atc_of_ndc.get(code)

    def ddi_matrix(self, medications: tuple[str, ...]) -> NDArray[np.bool_]:
        """Interacting pairs among these medications, bool (M, M), symmetric, zero diagonal."""
        index = {code: i for i, code in enumerate(medications)}
        matrix = np.zeros((len(index), len(index)), np.bool_)
        for a, b in self.interactions:
            if a in index and b in index:
                matrix[index[a], index[b]] = matrix[index[b], index[a]] = True
        return matrix


def ndc(value: str) -> str:
    """Writes an NDC as "ndc:" and 11 digits.

    Leading zeros lost by reading the column as a number come back; "0002-3229-30" is padded
    segment by segment to 5-4-2. Anything else is kept as it is and maps to nothing.
    """
    value = value.strip()
    if segments := _NDC_SEGMENTS.fullmatch(value):
        return f"ndc:{segments[1]:0>5}{segments[2]:0>4}{segments[3]:0>2}"
    if _NDC.fullmatch(value):
        return f"ndc:{value.split('.')[0]:0>11}"
    return f"ndc:{value}"


#: How MIMIC writes "no NDC is known".
NO_NDC = ndc("0")


def locate(
    folder: Path | None,
    *,
    ndc_to_atc: Path | None = None,
    ddi: Path | None = None,
    smiles: Path | None = None,
) -> dict[str, InputFile]:
    """Finds the drug tables: in a folder, each replaced by a single path where one is given.

    Args:
        folder: holds ndc_to_atc3.csv, ddi_atc3.csv and, where molecules are used, atc3_smiles.csv.
        ndc_to_atc, ddi, smiles: single tables.

    Returns:
        "ndc_to_atc", "ddi", "smiles" → file; NDC and SMILES tables only where there are any.

    Raises:
        ConfigError: if there is no table of interactions.
        DataError: if a table that was named is missing.
    """
    single = {"ndc_to_atc": ndc_to_atc, "ddi": ddi, "smiles": smiles}
    paths = {name: path for name, path in single.items() if path is not None}
    if folder is not None:
        for name, stem in FILES.items():
            if name not in paths and (name == "ddi" or _has(folder, stem)):
                paths[name] = reading.find(folder, stem)
    if "ddi" not in paths:
        raise ConfigError(
            "data.drugs: expected a folder with ndc_to_atc3.csv and ddi_atc3.csv (or data.ddi, a "
            "single file), got neither; docs/data.md says where to get them"
        )
    return {name: reading.identify(path) for name, path in paths.items()}


def read(files: Mapping[str, InputFile]) -> DrugKnowledge:
    """Reads the drug tables that `locate` gave.

    Raises:
        DataError: if a column is missing, or a cell is no NDC or ATC code.
    """
    dropped: list[Dropped] = []
    sources: list[SourceFile] = []
    atc_of_ndc: dict[str, str] = {}
    if "ndc_to_atc" in files:
        rows = _rows(files["ndc_to_atc"], "ndc", "atc3", sources)
        repeated = 0
        for row, code, atc in rows:
            key = _checked(rows.file, "ndc", row, code, "an NDC of up to 11 digits", _known_ndc)
            value = _checked(rows.file, "atc3", row, atc, "an ATC code such as A02B", _atc3)
            # One ATC code a drug, the first row's, as in the published pipelines.
            repeated += atc_of_ndc.setdefault(key, value) != value
        if repeated:
            dropped.append(Dropped("ndc_to_atc3", "another ATC code for the same NDC", repeated))
    return DrugKnowledge(
        atc_of_ndc=atc_of_ndc,
        interactions=_read_interactions(files["ddi"], sources, dropped),
        molecules=_read_molecules(files["smiles"], sources) if "smiles" in files else None,
        files=tuple(sources),
        dropped=tuple(dropped),
    )


def _read_interactions(
    file: InputFile, sources: list[SourceFile], dropped: list[Dropped]
) -> frozenset[tuple[str, str]]:
    pairs = set()
    rows = _rows(file, "atc3_a", "atc3_b", sources)
    expected = "an ATC code such as A02B"
    same = 0
    for row, first, second in rows:
        a = _checked(rows.file, "atc3_a", row, first, expected, _atc3)
        b = _checked(rows.file, "atc3_b", row, second, expected, _atc3)
        same += a == b
        if a != b:
            pairs.add((min(a, b), max(a, b)))
    if same:
        dropped.append(Dropped("ddi_atc3", "both drugs of one ATC code", same))
    return frozenset(pairs)


def _read_molecules(file: InputFile, sources: list[SourceFile]) -> tuple[tuple[int, str, str], ...]:
    molecules = []
    rows = _rows(file, "atc3", "smiles", sources)
    for row, atc, smiles in rows:
        code = _checked(rows.file, "atc3", row, atc, "an ATC code such as A02B", _atc3)
        text = _checked(rows.file, "smiles", row, smiles, "a SMILES string", str.strip)
        molecules.append((row, code, text))
    return tuple(molecules)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Two columns of a drug table, row by row."""

    file: SourceFile
    first: list[str | None]
    second: list[str | None]

    def __iter__(self) -> Iterator[tuple[int, str | None, str | None]]:
        yield from zip(range(len(self.first)), self.first, self.second, strict=True)


def _rows(file: InputFile, first: str, second: str, sources: list[SourceFile]) -> _Pairs:
    table, source = reading.read(file, (first, second))
    sources.append(source)
    columns: list[pa.DictionaryArray] = [cells.text(table, name) for name in (first, second)]
    return _Pairs(source, columns[0].to_pylist(), columns[1].to_pylist())


def _checked(
    file: SourceFile,
    column: str,
    row: int,
    value: str | None,
    expected: str,
    parse: Callable[[str], str | None],
) -> str:
    parsed = parse(value) if value is not None else None
    if not parsed:
        # A drug table holds no patient: its cell may be shown.
        raise DataError(
            f"{file.path}: column {column}, row {row + 1} below the header: expected {expected}, "
            f"got {value!r}"
        )
    return parsed


def _known_ndc(value: str) -> str | None:
    written = ndc(value)
    return written if re.fullmatch(r"ndc:\d{11}", written) else None


def _atc3(value: str) -> str | None:
    code = value.strip().upper()
    return f"atc:{code[:4]}" if _ATC.fullmatch(code) else None


def _has(folder: Path, stem: str) -> bool:
    names = {f"{stem}{suffix}" for suffix in reading.CSV_SUFFIXES}
    return folder.is_dir() and any(path.name.lower() in names for path in folder.iterdir())
