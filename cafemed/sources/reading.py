"""Reading tables: files found in either case, needed columns only, every text dictionary-encoded.

Each column is read as text and its distinct values are converted once: a table of four million
prescriptions has a few thousand drug codes and days. No message here holds a value of a cell.
"""

import csv
import dataclasses
import datetime
import gzip
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cafemed import artifacts, console
from cafemed.cohort import SEXES
from cafemed.errors import DataError
from cafemed.records import SourceFile

CSV_SUFFIXES = (".csv", ".csv.gz")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".parquet")

TEXT = pa.dictionary(pa.int32(), pa.string())

# Larger blocks than Arrow's 1 MiB: each block builds dictionaries of its own. 8 MiB read 4.2
# million rows with the least CPU time of 1, 4, 8, 16 and 32 MiB.
_BLOCK_BYTES = 8 << 20

_TIME = re.compile(r"(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?)(?:\.\d+)?Z?")
_SEX_OF = {"f": "female", "female": "female", "m": "male", "male": "male"}


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read, and what identifies it."""

    path: Path
    sha256: str
    num_bytes: int


def find(folder: Path, stem: str, suffixes: Sequence[str] = CSV_SUFFIXES) -> Path:
    """Finds `stem` + one of the suffixes in a folder, upper and lower case being the same.

    Raises:
        DataError: if the folder or the file is missing, or several files fit.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with {stem}{suffixes[0]}, found no folder")
    wanted = {f"{stem}{suffix}".lower() for suffix in suffixes}
    found = sorted(path for path in folder.iterdir() if path.name.lower() in wanted)
    if not found:
        names = " or ".join(f"{stem}{suffix}" for suffix in suffixes)
        raise DataError(f"{folder}: expected {names} (in either case), found none")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: expected one table {stem}, found {names}; keep one of them")
    return found[0]


def identify(path: Path) -> InputFile:
    """Takes a file's SHA-256 and size.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return InputFile(path, artifacts.sha256_of(path), path.stat().st_size)
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror or type(err).__name__})") from err


def locate(
    folder: Path, stems: Sequence[str], suffixes: Sequence[str] = CSV_SUFFIXES
) -> dict[str, InputFile]:
    """Finds and identifies the tables of a folder: stem → file.

    Raises:
        DataError: see `find` and `identify`.
    """
    paths = {stem: find(folder, stem, suffixes) for stem in stems}
    return {stem: identify(path) for stem, path in paths.items()}


def read(
    file: InputFile, required: Sequence[str], optional: Sequence[str] = ()
) -> tuple[pa.Table, SourceFile]:
    """Reads the named columns of a CSV or Parquet file as dictionary-encoded text.

    Args:
        file: `.csv`, `.csv.gz` or `.parquet`, the suffix in either case.
        required: lower-case names of columns that must be there.
        optional: columns read where they are there.

    Returns:
        A table with those columns under their lower-case names, one chunk each, empty cells null;
        and the file with its number of rows.

    Raises:
        DataError: if the file is missing, empty, truncated or not UTF-8, or a column is missing.
    """
    if file.path.suffix.lower() == ".parquet":
        table = _read_parquet(file.path, required, optional)
    else:
        table = _read_csv(file.path, required, optional)
    if table.num_rows == 0:
        raise DataError(f"{file.path}: expected rows below the header, found none")
    table = table.unify_dictionaries().combine_chunks()
    return table, SourceFile(file.path, file.sha256, file.num_bytes, table.num_rows)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Lower-case names of a table's columns: those that must be there, and those that may."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def read_all(
    files: Mapping[str, InputFile], columns: Mapping[str, Columns]
) -> dict[str, tuple[pa.Table, SourceFile]]:
    """Reads several tables with a progress bar: name → what `read` gives.

    Raises:
        DataError: see `read`.
    """
    return {
        name: read(files[name], columns[name].required, columns[name].optional)
        for name in console.progress(list(columns), "reading tables")
    }


def text(table: pa.Table, name: str) -> pa.DictionaryArray:
    """One column as a single dictionary array."""
    return table[name].combine_chunks()


def recode(column: pa.DictionaryArray, rename: Callable[[str], str | None]) -> pa.DictionaryArray:
    """Renames the distinct values of a column; None makes the cells null.

    Returns:
        A dictionary array whose dictionary is sorted and without repetition, so that the order of
        the indices is the order of the values.
    """
    renamed = [rename(value) for value in column.dictionary.to_pylist()]
    names = sorted({name for name in renamed if name is not None})
    position = {name: i for i, name in enumerate(names)}
    places = pa.array([None if n is None else position[n] for n in renamed], pa.int32())
    indices = pc.take(places, column.indices)
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))


def indices(column: pa.DictionaryArray) -> NDArray[np.int64]:
    """The indices of a dictionary array, int64, -1 where a cell is null."""
    filled = pc.fill_null(column.indices.cast(pa.int64()), -1)
    result: NDArray[np.int64] = filled.to_numpy(zero_copy_only=False)
    return result


def times(file: SourceFile, table: pa.Table, name: str) -> pa.Array:
    """Converts a column to timestamp[s]; null stays null.

    Raises:
        DataError: naming file, column and row of the first cell that is no date.
    """
    return _convert(file, table, name, _time, pa.timestamp("s"), "a date (2101-07-04 13:30:00)")


def integers(file: SourceFile, table: pa.Table, name: str) -> pa.Array:
    """Converts a column to int32; null stays null.

    Raises:
        DataError: naming file, column and row of the first cell that is no whole number.
    """
    return _convert(file, table, name, _integer, pa.int32(), "a whole number")


def choice(
    file: SourceFile, table: pa.Table, name: str, allowed: Sequence[str]
) -> NDArray[np.int64]:
    """Gives the position of each cell's word (in either case) in `allowed`; -1 where empty.

    Raises:
        DataError: naming file, column and row of the first cell that holds another word.
    """
    column = _convert(
        file,
        table,
        name,
        lambda value: list(allowed).index(value.lower()),
        pa.int64(),
        "one of " + ", ".join(allowed),
    )
    positions: NDArray[np.int64] = pc.fill_null(column, -1).to_numpy()
    return positions


def present(file: SourceFile, table: pa.Table, name: str) -> None:
    """Refuses empty cells in a column.

    Raises:
        DataError: naming file, column and row of the first empty cell.
    """
    column = text(table, name)
    if column.null_count:
        raise bad_cell(file, name, int(np.argmax(column.is_null())), "a value")


def sexes(column: pa.DictionaryArray) -> pa.Array:
    """Converts F, M, female and male (in either case) to indices into SEXES; else 0, unknown."""
    of_value = [
        SEXES.index(_SEX_OF.get(value.strip().lower(), "unknown"))
        for value in column.dictionary.to_pylist()
    ]
    taken = pc.take(pa.array(of_value, pa.int8()), column.indices)
    return pc.fill_null(taken, SEXES.index("unknown"))


def bad_cell(file: SourceFile, name: str, row: int, expected: str) -> DataError:
    """The error for a cell, which it does not show: it may be a patient's."""
    return DataError(
        f"{file.path}: column {name}, row {row + 1} below the header: expected {expected}, "
        "the cell holds something else or nothing"
    )


def _convert(
    file: SourceFile,
    table: pa.Table,
    name: str,
    parse: Callable[[str], Any],
    kind: pa.DataType,
    expected: str,
) -> pa.Array:
    column = text(table, name)
    parsed: list[Any] = []
    for position, value in enumerate(column.dictionary.to_pylist()):
        try:
            parsed.append(parse(value.strip()) if value.strip() else None)
        except ValueError:
            row = int(np.argmax(indices(column) == position))
            raise bad_cell(file, name, row, expected) from None
    return pc.take(pa.array(parsed, kind), column.indices)


def _time(value: str) -> datetime.datetime:
    # Fractions of a second are cut off; a time zone other than UTC is no date here.
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError
    return datetime.datetime.fromisoformat(match[1])


def _integer(value: str) -> int:
    number = int(value.removesuffix(".0"))
    if abs(number) >= 1 << 31:
        raise ValueError
    return number


def _read_csv(path: Path, required: Sequence[str], optional: Sequence[str]) -> pa.Table:
    names = _header(path)
    wanted = _wanted(path, names, required, optional)
    packing = "gzip" if path.suffix.lower() == ".gz" else None
    try:
        return pacsv.read_csv(
            pa.input_stream(str(path), compression=packing),
            read_options=pacsv.ReadOptions(
                column_names=names, skip_rows=1, block_size=_BLOCK_BYTES, use_threads=True
            ),
            convert_options=pacsv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, TEXT),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except (pa.ArrowInvalid, OSError, EOFError) as err:
        raise DataError(f"{path}: {_csv_problem(str(err))}") from err


def _header(path: Path) -> list[str]:
    try:
        unpack = gzip.open if path.suffix.lower() == ".gz" else io.FileIO
        with unpack(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as lines:
            names = [name.strip().lower() for name in next(csv.reader(lines), [])]
    except FileNotFoundError:
        raise DataError(f"{path}: expected a table, found no file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text, found other bytes") from None
    except (OSError, EOFError, zlib.error, csv.Error) as err:
        raise DataError(f"{path}: cannot be read ({type(err).__name__})") from err
    if not names:
        raise DataError(f"{path}: expected a header and rows, the file is empty")
    return names


def _csv_problem(message: str) -> str:
    # Arrow quotes the offending row, which may be a patient's: only its numbers are passed on.
    if fields := re.search(r"Expected (\d+) columns, got (\d+)", message):
        row = re.search(r"Row #(\d+)", message)
        where = f"row {row[1]}" if row else "a row"
        return f"expected {fields[1]} fields in every row, {where} has {fields[2]}"
    if "UTF8" in message:
        return "expected UTF-8 text, found other bytes"
    if "Empty CSV" in message:
        return "expected rows below the header, found none"
    return "not a readable table (truncated, or not what its suffix says)"


def _read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        raw_names = list(schema.names)
        names = [name.strip().lower() for name in raw_names]
        wanted = _wanted(path, names, required, optional)
        table = pq.read_table(path, columns=[raw_names[names.index(name)] for name in wanted])
        columns = {name: _as_text(table.column(i)) for i, name in enumerate(wanted)}
    except FileNotFoundError:
        raise DataError(f"{path}: expected a table, found no file") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as err:
        raise DataError(f"{path}: not a readable Parquet file ({type(err).__name__})") from err
    return pa.table(columns)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("s", kind.tz), safe=False).cast(pa.timestamp("s"))
    elif pa.types.is_floating(kind):  # whole numbers with gaps, as pandas writes them
        column = column.cast(pa.int64())
    column = column.cast(pa.string())
    column = pc.if_else(pc.equal(column, ""), None, column)
    return column.dictionary_encode()


def _wanted(
    path: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> list[str]:
    missing = [name for name in required if name not in names]
    if missing:
        # The names found are not listed: in a file without a header they are a patient's row.
        raise DataError(
            f"{path}: expected columns {', '.join(required)} (in either case); "
            f"{', '.join(missing)} missing among the header's {len(names)} names"
        )
    wanted = [*required, *(name for name in optional if name in names)]
    twice = [name for name in wanted if list(names).count(name) > 1]
    if twice:
        raise DataError(f"{path}: expected one column {twice[0]}, the header names it twice")
    return wanted
