"""Laboratory events: the first value of every item at every visit of a cohort.

Such a table is by far the largest of a hospital (118 million rows in MIMIC-IV), so it is read after
the cohort is known, piece by piece, and of each piece only the first values of the cohort's visits
stay. What is held grows with the visits and their items, not with the rows.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed import console
from cafemed.codes import LABORATORY_SYSTEM, normalise
from cafemed.errors import DataError
from cafemed.records import Dropped, SourceFile
from cafemed.sources import cells, reading
from cafemed.sources.reading import InputFile

TABLE = "laboratory"

_DAY_S = 24 * 3600
#: Values waiting to be merged into those found so far; 20 bytes each.
_PENDING = 4_000_000
#: Why rows are not used, in the order in which they are looked at.
_LATER = "not the first of its item and visit"
_OUTSIDE = "not measured within the target window"
_REASONS = (
    "no visit",
    "visit not in the cohort",
    "no item",
    "no finite number",
    "measured before admission",
    _OUTSIDE,
    _LATER,
)
_UNKNOWN_TIME, _LONG_AGO = np.iinfo(np.int64).max, -(1 << 60)


@dataclasses.dataclass(frozen=True)
class LaboratoryTable:
    """Where a source has its laboratory events.

    Attributes:
        name: of the file, without its suffix.
        visit, item, time, value: lower-case names of columns.
        needs_time: the column `time` must be there.
        knows_admission: the source has times of admission; without, a visit's first coded row
            stands for it, and values from earlier that day are of the visit too.
        suffixes: of the file.
    """

    name: str
    visit: str
    item: str
    time: str
    value: str
    needs_time: bool = True
    knows_admission: bool = True
    suffixes: tuple[str, ...] = reading.CSV_SUFFIXES

    def locate(self, folder: Path) -> dict[str, InputFile]:
        """Finds the file in a folder: its name → file.

        Raises:
            DataError: if it is missing or there twice.
        """
        try:
            return reading.locate(folder, [self.name], self.suffixes)
        except DataError as err:
            raise DataError(f"{err}; data.cohort.max_laboratory=0 does without it") from err


@dataclasses.dataclass(frozen=True)
class Measured:
    """The first value of an item at a visit; n of them, by visit and item.

    Attributes:
        visit: int64 (n,), index of the visit in the cohort, ascending.
        item: int64 (n,), index into names; each once a visit.
        value: float32 (n,), finite.
        names: items as vocabularies have them ("lab:50912"), sorted.
        file: the table.
        dropped: rows that were not used, and why.
    """

    visit: NDArray[np.int64]
    item: NDArray[np.int64]
    value: NDArray[np.float32]
    names: tuple[str, ...]
    file: SourceFile
    dropped: tuple[Dropped, ...]


def read(
    file: InputFile,
    table: LaboratoryTable,
    visit_ids: Sequence[str],
    admitted: NDArray[np.datetime64],
    window_h: float | None = None,
) -> Measured:
    """Reads the first value of each item and visit: the earliest since admission, ties by row.

    A value without a time comes after all others of its visit; a time at midnight stands for its
    whole day, since dates without a time of day are read so. With a window only what was measured
    within it is read, and nothing without a time: a later value may follow from the medications
    that are to be recommended.

    Args:
        file: a table with a row a measurement.
        table: its columns.
        visit_ids: the cohort's visits.
        admitted: datetime64[s] (V,), NaT where unknown.
        window_h: hours from admission; None: all of the stay.

    Raises:
        DataError: if the file is missing, empty or unreadable, a column is missing, or a time or
            value of one of these visits does not parse.
    """
    found = _Found(table, visit_ids, admitted, window_h)
    with console.waiting(f"reading {file.path.name}"):
        for rows in _pieces(file, table):
            found.add(file, rows)
        first = found.merged()
    names = sorted(set(found.items.values()))
    place = {name: i for i, name in enumerate(names)}
    renumbered = np.array([place[name] for name in found.names], np.int64)
    item = renumbered[first.item]
    order = np.lexsort((item, first.visit))
    return Measured(
        visit=first.visit[order].astype(np.int64),
        item=item[order],
        value=first.value[order],
        names=tuple(names),
        file=SourceFile(file.path, file.sha256, file.num_bytes, found.num_rows),
        dropped=tuple(Dropped(TABLE, reason, n) for reason, n in found.dropped.items()),
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Values in the order of the file, or the first of them by visit and item."""

    visit: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    value: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.visit)

    def first(self) -> "_Rows":
        """The earliest value of each visit and item; of equally early ones the first."""
        key = (self.visit.astype(np.int64) << 32) | self.item
        order = np.lexsort((self.time, key))  # stable
        key = key[order]
        starts = np.ones(len(key), np.bool_)
        starts[1:] = key[1:] != key[:-1]
        return self.take(order[starts])

    def take(self, rows: NDArray[np.int64]) -> "_Rows":
        return _Rows(self.visit[rows], self.item[rows], self.time[rows], self.value[rows])

    @classmethod
    def joined(cls, parts: Sequence["_Rows"]) -> "_Rows":
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(part.visit for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.item for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.time for part in parts)]),
            np.concatenate([np.zeros(0, np.float32), *(part.value for part in parts)]),
        )


class _Found:
    """What was found so far, piece by piece."""

    def __init__(
        self,
        table: LaboratoryTable,
        visit_ids: Sequence[str],
        admitted: NDArray[np.datetime64],
        window_h: float | None,
    ) -> None:
        self.items: dict[str, str] = {}  # as written in the file → as in vocabularies
        self.names: list[str] = []  # in order of appearance
        self.num_rows = 0
        self.dropped = {r: 0 for r in _REASONS if r != _OUTSIDE or window_h is not None}
        self._table = table
        self._visit_ids = pa.array(visit_ids, pa.string())
        self._are_numbers = all(name.isdigit() for name in visit_ids)
        self._admitted = np.where(np.isnat(admitted), _LONG_AGO, admitted.astype(np.int64))
        self._window_s = None if window_h is None else window_h * 3600
        self._index: dict[str, int] = {}
        self._parts: list[_Rows] = []
        self._num_merged = 0

    def add(self, file: InputFile, rows: pa.Table) -> None:
        """Takes one piece of the table."""
        rows = self._with_whole_numbers(rows)
        known = self._of_the_cohort(rows)
        part = self._parsed(file, rows, known).first()
        self.dropped[_LATER] -= len(part)
        self._parts.append(part)
        self.num_rows += rows.num_rows
        waiting = sum(map(len, self._parts)) - self._num_merged
        if waiting > max(_PENDING, self._num_merged):
            self.merged()

    def merged(self) -> _Rows:
        """The first values of all pieces so far."""
        rows = _Rows.joined(self._parts)
        first = rows.first()
        self.dropped[_LATER] += len(rows) - len(first)
        self._parts, self._num_merged = [first], len(first)
        return first

    def _with_whole_numbers(self, rows: pa.Table) -> pa.Table:
        """Writes visits "145834.0" as "145834": a column with gaps that was saved as floats."""
        visit = rows[self._table.visit]
        if not self._are_numbers or not pc.any(pc.ends_with(visit, ".0")).as_py():
            return rows
        whole = pc.replace_substring_regex(visit, r"\.0$", "")
        return rows.set_column(rows.column_names.index(self._table.visit), self._table.visit, whole)

    def _of_the_cohort(self, rows: pa.Table) -> NDArray[np.int64]:
        """Which rows are of a visit of the cohort and name an item."""
        visit = rows[self._table.visit]
        empty = visit.is_null().to_numpy()
        known = pc.is_in(visit, value_set=self._visit_ids).to_numpy()
        named = pc.fill_null(
            pc.not_equal(pc.utf8_trim_whitespace(rows[self._table.item]), ""), False
        )
        self.dropped["no visit"] += int(empty.sum())
        self.dropped["visit not in the cohort"] += int((~known & ~empty).sum())
        has_item = named.to_numpy()
        self.dropped["no item"] += int((known & ~has_item).sum())
        return np.flatnonzero(known & has_item)

    def _parsed(self, file: InputFile, rows: pa.Table, known: NDArray[np.int64]) -> _Rows:
        names = self._table
        line = known + self.num_rows
        chosen = rows.take(pa.array(known))
        value = _converted(file, names.value, chosen, line, pa.float64(), float, "a number")
        with np.errstate(over="ignore"):
            value = pc.fill_null(value, np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
        time = self._times(file, chosen, line)
        visit = pc.index_in(chosen[names.visit], value_set=self._visit_ids).to_numpy()
        finite, admitted = np.isfinite(value), self._admitted[visit]
        early = finite & (time < self._since(time, admitted))
        self.dropped["no finite number"] += int((~finite).sum())
        self.dropped["measured before admission"] += int(early.sum())
        usable = finite & ~early
        if self._window_s is not None:
            outside = usable & (time >= admitted + self._window_s)
            self.dropped[_OUTSIDE] += int(outside.sum())
            usable &= ~outside
        kept = np.flatnonzero(usable)
        self.dropped[_LATER] += len(kept)
        item = self._numbers(chosen[names.item].take(pa.array(kept)))
        return _Rows(visit[kept].astype(np.int32), item, time[kept], value[kept])

    def _since(self, time: NDArray[np.int64], admitted: NDArray[np.int64]) -> NDArray[np.int64]:
        """The earliest time that is not before admission, int64 seconds (n,)."""
        day = admitted - admitted % _DAY_S
        if not self._table.knows_admission:
            return day
        # A date without a time of day is read as its midnight, and is not before that day.
        return np.where(time % _DAY_S == 0, day, admitted)

    def _times(self, file: InputFile, rows: pa.Table, line: NDArray[np.int64]) -> NDArray[np.int64]:
        """Seconds since 1970, int64; _UNKNOWN_TIME where there is none."""
        if self._table.time not in rows.column_names:
            return np.full(rows.num_rows, _UNKNOWN_TIME)
        kind = pa.timestamp("s")
        time = _converted(
            file, self._table.time, rows, line, kind, cells.time_of, "a date (2101-07-04 13:30:00)"
        )
        seconds: NDArray[np.int64] = pc.fill_null(time.cast(pa.int64()), _UNKNOWN_TIME).to_numpy()
        return seconds

    def _numbers(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        """Numbers of items, in order of their first appearance."""
        encoded = column.combine_chunks().dictionary_encode()
        of_value = []
        for text in encoded.dictionary.to_pylist():
            name = self.items.setdefault(text, normalise(LABORATORY_SYSTEM, text))
            if name not in self._index:
                self._index[name] = len(self.names)
                self.names.append(name)
            of_value.append(self._index[name])
        result: NDArray[np.int32] = np.array(of_value, np.int32)[encoded.indices.to_numpy()]
        return result


def _pieces(file: InputFile, table: LaboratoryTable) -> Iterator[pa.Table]:
    required = (table.visit, table.item, table.value)
    columns = (
        reading.Columns((*required, table.time))
        if table.needs_time
        else reading.Columns(required, (table.time,))
    )
    yield from reading.pieces(file, columns)


def _converted(
    file: InputFile,
    name: str,
    rows: pa.Table,
    line: NDArray[np.int64],
    kind: pa.DataType,
    parse: Callable[[str], object],
    expected: str,
) -> pa.Array:
    """Converts a column of text; where a cell resists, cell by cell, so that its row is named."""
    column = rows[name].combine_chunks()
    try:
        return pc.cast(column, kind)
    except pa.ArrowInvalid:
        pass
    converted: list[object] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            converted.append(parse(text.strip()) if text and text.strip() else None)
        except ValueError:
            raise cells.bad_cell(file, name, int(line[row]), expected) from None
    return pa.array(converted, kind)
