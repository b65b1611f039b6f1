"""The cells of a column: recoded, converted and checked by their distinct values.

No message holds a value of a cell: it may be a patient's.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.cohort import SEXES
from cafemed.errors import DataError
from cafemed.records import SourceFile
from cafemed.sources.reading import InputFile

_TIME = re.compile(r"(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?)?)(?:\.\d+)?Z?")
_SEX_OF = {"f": "female", "female": "female", "m": "male", "male": "male"}


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
    return _convert(file, table, name, time_of, pa.timestamp("s"), "a date (2101-07-04 13:30:00)")


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


def bad_cell(file: SourceFile | InputFile, name: str, row: int, expected: str) -> DataError:
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


def time_of(value: str) -> datetime.datetime:
    """Reads a date, with or without a time of day; fractions of a second are cut off.

    Raises:
        ValueError: if it is none, or names a time zone other than UTC.
    """
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError
    return datetime.datetime.fromisoformat(match[1])


def _integer(value: str) -> int:
    number = int(value.removesuffix(".0"))
    if abs(number) >= 1 << 31:
        raise ValueError
    return number
