"""Patients in an Arrow table, looked up by columns: what serve/encoding.py does for a request.

    patient     string or integer: whatever the results are to be joined by
    visits      list of visits, the earliest first, the current one last; each a struct of
                `diagnoses`, `procedures`, `medications` (lists of {system, code}) and `laboratory`
                (list of {item, value}), any of which may be left out or null
    sex         "female", "male" or "unknown"; may be left out or null
    age         years at the current visit, may be left out or null

Names, order, limits and meaning are those of a request (serve/schema.py). What is wrong is told
with its column and row, counted from 1, and never with its content.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cafemed.bundle import Preprocessing
from cafemed.codes import CodeLists
from cafemed.cohort import SEXES
from cafemed.errors import DataError
from cafemed.laboratory import Laboratory
from serve.bulk import Patients
from serve.encoding import Encoder, RefusedError
from serve.schema import MAX_AGE, MAX_CODES, MAX_CODES_OF_REQUEST, MAX_VALUE, MAX_VISITS

COLUMNS = ("patient", "visits", "sex", "age")
_LISTS = ("diagnoses", "procedures", "medications")
_VISIT = (*_LISTS, "laboratory")
#: Spellings whose index is remembered; a table of nothing but strange codes must not fill memory.
_MAX_REMEMBERED = 1_000_000


class TableReader:
    """Encodes tables for one model."""

    def __init__(self, encoder: Encoder, preprocessing: Preprocessing, source: str) -> None:
        """Prepares for the tables of a source, which messages name."""
        self._encoder = encoder
        self._uses_current = preprocessing.inputs == "current"
        self._source = source
        self._known: dict[tuple[int, str, str], int] = {}

    def require_schema(self, schema: pa.Schema) -> None:
        """Checks names and types.

        Raises:
            DataError: naming the first column that is missing, unknown or of another type.
        """
        for name in schema.names:
            if name not in COLUMNS:
                raise self._error(name, f"unknown column; known ones: {', '.join(COLUMNS)}")
        for name in COLUMNS[:2]:
            if name not in schema.names:
                raise self._error(name, "the table has no such column")
        patient, visits = schema.field("patient").type, schema.field("visits").type
        if not (pa.types.is_integer(patient) or _is_text(patient)):
            raise self._error("patient", f"expected strings or integers, got {patient}")
        if not (_is_list(visits) and pa.types.is_struct(visits.value_type)):
            raise self._error("visits", "expected lists of structs")
        for field in visits.value_type:
            self._require_list(field)
        if "sex" in schema.names and not _is_text(schema.field("sex").type):
            raise self._error("sex", f"expected strings, got {schema.field('sex').type}")
        if "age" in schema.names and not _is_number(schema.field("age").type):
            raise self._error("age", f"expected numbers, got {schema.field('age').type}")

    def read(self, table: pa.Table, first_row: int) -> Patients:
        """Encodes the rows of a table.

        Args:
            table: of a schema that `require_schema` has passed, at least one row.
            first_row: number of its first row, from 1.

        Raises:
            DataError: naming column and row.
        """
        column = _one(table["visits"])
        self._refuse(_nulls(table["patient"]), first_row, "patient", "expected a value, got none")
        num_visits = _lengths(column)
        self._refuse(num_visits == 0, first_row, "visits", "expected at least one visit")
        self._refuse(num_visits > MAX_VISITS, first_row, "visits", f"more than {MAX_VISITS} visits")
        offsets = np.concatenate([[0], np.cumsum(num_visits)]).astype(np.int64)
        rows = np.repeat(np.arange(first_row, first_row + len(table)), num_visits)
        visits = column.flatten()
        self._refuse(_nulls(visits), rows, "visits", "expected a visit, got none")
        fields = dict(zip(visits.type.names, visits.flatten(), strict=True))
        num_codes = sum(map(_lengths, fields.values()), np.zeros(len(rows), np.int64))
        self._refuse(
            np.add.reduceat(num_codes, offsets[:-1]) > MAX_CODES_OF_REQUEST,
            first_row,
            "visits",
            f"more than {MAX_CODES_OF_REQUEST} codes and laboratory values",
        )
        unknown = np.zeros(len(rows), np.int64)
        distinct = np.zeros((len(_LISTS), len(rows)), np.int64)  # unknown ones
        lists = [
            self._codes(k, fields.get(name), rows, unknown, distinct[k])
            for k, name in enumerate(_LISTS)
        ]
        laboratory = self._laboratory(fields.get("laboratory"), rows, unknown)
        diagnoses, procedures, medications = lists
        if not self._uses_current:
            diagnoses, procedures = _shifted(diagnoses, offsets), _shifted(procedures, offsets)
            laboratory = _shifted_laboratory(laboratory, offsets)
        known = (diagnoses, procedures, _shifted(medications, offsets))
        current = offsets[1:] - 1
        distinct[2 if self._uses_current else slice(None), current] = 0  # no inputs of the model
        num_known = sum(np.diff(one.offsets) for one in known)
        num_known, num_unknown = (
            np.add.reduceat(x, offsets[:-1]) for x in (num_known, distinct.sum(axis=0))
        )
        return Patients(
            offsets=offsets,
            known=known,
            sex=self._sex(table, first_row),
            age=self._age(table, first_row),
            laboratory=laboratory,
            unknown=np.add.reduceat(unknown, offsets[:-1]),
            unknown_share=num_unknown / np.maximum(num_known + num_unknown, 1),
        )

    def _codes(
        self,
        k: int,
        column: pa.Array | None,
        rows: NDArray[np.int64],
        unknown: NDArray[np.int64],
        distinct: NDArray[np.int64],
    ) -> CodeLists:
        """Indices of a kind at each visit, in the table's order, repeated codes once.

        Adds to each visit's unknown codes: all of them, and distinct ones.
        """
        if column is None:
            return CodeLists(np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64))
        name = _LISTS[k]
        visit, codes = self._entries(column, rows, name)
        system, code = codes.flatten() if codes.type.names[0] == "system" else codes.flatten()[::-1]
        found = self._index(rows[visit], name, (system, code), lambda s, c: self._lookup(k, s, c))
        strange = np.stack([visit, found])[:, found < 0]
        np.add.at(unknown, strange[0], 1)
        np.add.at(distinct, np.unique(strange, axis=1)[0], 1)
        visit, found = visit[found >= 0], found[found >= 0]
        first = _first_of_each(visit * (int(found.max(initial=0)) + 1) + found)
        first.sort()
        visit, found = visit[first], found[first]
        return CodeLists(found.astype(np.int32), _offsets(visit, len(rows)))

    def _laboratory(
        self, column: pa.Array | None, rows: NDArray[np.int64], unknown: NDArray[np.int64]
    ) -> Laboratory:
        """Values of each visit, by item; of an item that is listed again the first."""
        if column is None:
            return Laboratory.none(len(rows))
        visit, entries = self._entries(column, rows, "laboratory")
        items, values = (
            entries.flatten() if entries.type.names[0] == "item" else entries.flatten()[::-1]
        )
        where = "laboratory.value"
        self._refuse(_nulls(values), rows[visit], where, "expected a number, got none")
        amounts = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        wrong = ~(np.abs(amounts) <= MAX_VALUE)  # NaN too
        self._refuse(wrong, rows[visit], where, f"expected a number up to {MAX_VALUE:g} in size")
        lab = pa.array(["lab"]).take(pa.array(np.zeros(len(items), np.int64)))
        found = self._index(
            rows[visit], "laboratory", (lab, items), lambda _, item: self._encoder.item(item)
        )
        np.add.at(unknown, visit[found < 0], 1)
        kept = np.flatnonzero(found >= 0)
        visit, found, amounts = visit[kept], found[kept], amounts[kept]
        # By visit, and by item within it.
        first = _first_of_each(visit * (int(found.max(initial=0)) + 1) + found)
        lists = CodeLists(found[first].astype(np.int32), _offsets(visit[first], len(rows)))
        return Laboratory(lists, amounts[first].astype(np.float32))

    def _entries(
        self, column: pa.Array, rows: NDArray[np.int64], name: str
    ) -> tuple[NDArray[np.int64], pa.StructArray]:
        """The entries of all visits' lists, and the visit of each."""
        sizes = _lengths(column)
        self._refuse(sizes > MAX_CODES, rows, name, f"more than {MAX_CODES} in one visit")
        entries = column.flatten()
        visit = np.repeat(np.arange(len(sizes)), sizes)
        self._refuse(_nulls(entries), rows[visit], name, "expected an entry, got none")
        return visit, entries

    def _index(
        self,
        rows: NDArray[np.int64],
        name: str,
        texts: tuple[pa.Array, pa.Array],
        lookup: Callable[[str, str], int],
    ) -> NDArray[np.int64]:
        """Looks up each distinct pair of texts once; negative where the vocabulary has none."""
        pairs, spellings = np.zeros(len(rows), np.int64), []
        for text in texts:
            self._refuse(_nulls(text), rows, name, "expected a text, got none")
            encoded = _one(pc.dictionary_encode(text.cast(pa.string())))
            spellings.append(encoded.dictionary.to_pylist())
            indices = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            pairs = pairs * max(len(spellings[-1]), 1) + indices
        distinct, place, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        found = np.empty(len(distinct), np.int64)
        for i, pair in enumerate(distinct.tolist()):
            first, second = divmod(pair, len(spellings[1]))
            try:
                found[i] = lookup(spellings[0][first], spellings[1][second])
            except RefusedError as err:
                raise self._error(name, str(err), rows[place[i]]) from err
        return found[inverse]

    def _lookup(self, k: int, system: str, code: str) -> int:
        key = (k, system, code)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            found, name = self._encoder.index(k, system, code)
            if found < 0:  # a number of the name's own, so that its spellings count once
                digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
                found = -1 - int.from_bytes(digest, "big")
            self._known[key] = found
        return found

    def _sex(self, table: pa.Table, first_row: int) -> NDArray[np.int8]:
        unknown = SEXES.index("unknown")
        if "sex" not in table.column_names:
            return np.full(len(table), unknown, np.int8)
        texts = _one(table["sex"]).cast(pa.string()).fill_null("unknown")
        found = pc.index_in(texts, pa.array(SEXES))
        message = f"expected one of {', '.join(SEXES)}"
        self._refuse(_nulls(found), first_row, "sex", message)
        return np.asarray(found.to_numpy(zero_copy_only=False), np.int8)

    def _age(self, table: pa.Table, first_row: int) -> NDArray[np.float32]:
        if "age" not in table.column_names:
            return np.full(len(table), np.nan, np.float32)
        years = _one(table["age"]).cast(pa.float64()).to_numpy(zero_copy_only=False)
        message = f"expected years from 0 to {MAX_AGE:g}"
        self._refuse((years < 0) | (years > MAX_AGE), first_row, "age", message)
        return np.asarray(years, np.float32)

    def _require_list(self, field: pa.Field) -> None:
        if field.name not in _VISIT:
            known = ", ".join(_VISIT)
            raise self._error(f"visits.{field.name}", f"unknown field; known ones: {known}")
        texts = ("item",) if field.name == "laboratory" else ("system", "code")
        names = ("item", "value") if field.name == "laboratory" else texts
        struct = field.type.value_type if _is_list(field.type) else None
        if struct is None or not pa.types.is_struct(struct) or {*struct.names} != {*names}:
            wanted = " and ".join(names)
            raise self._error(f"visits.{field.name}", f"expected lists of structs of {wanted}")
        for part in struct:
            right = _is_text(part.type) if part.name in texts else _is_number(part.type)
            if not right:
                kind = "strings" if part.name in texts else "numbers"
                where = f"visits.{field.name}.{part.name}"
                raise self._error(where, f"expected {kind}, got {part.type}")

    def _refuse(
        self, wrong: NDArray[np.bool_], rows: NDArray[np.int64] | int, column: str, message: str
    ) -> None:
        """Refuses the first row that is wrong; `rows` are their numbers, or the first one's."""
        if not wrong.any():
            return
        place = int(np.argmax(wrong))
        row = rows + place if isinstance(rows, int) else int(rows[place])
        raise self._error(column, message, row)

    def _error(self, column: str, message: str, row: int | None = None) -> DataError:
        if column in _VISIT or column.startswith("laboratory"):
            column = f"visits.{column}"
        where = "" if row is None else f"row {row}: "
        return DataError(f"{self._source}: {where}column {column}: {message}")


def _shifted(lists: CodeLists, offsets: NDArray[np.int64]) -> CodeLists:
    """Each visit gets the list of the visit before; a patient's first gets none."""
    kept, moved = _before(lists, offsets)
    return CodeLists(lists.ids[kept], moved)


def _shifted_laboratory(laboratory: Laboratory, offsets: NDArray[np.int64]) -> Laboratory:
    kept, moved = _before(laboratory.items, offsets)
    return Laboratory(CodeLists(laboratory.items.ids[kept], moved), laboratory.values[kept])


def _before(
    lists: CodeLists, offsets: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which entries are not of a last visit, and the offsets that they get one visit later."""
    counts = lists.counts
    before = np.concatenate([[0], counts[:-1]])
    before[offsets[:-1]] = 0
    is_last = np.zeros(len(counts), np.bool_)
    is_last[offsets[1:] - 1] = True
    return np.repeat(~is_last, counts), np.concatenate([[0], np.cumsum(before)]).astype(np.int64)


def _first_of_each(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each distinct key comes first, by key."""
    return np.unique(keys, return_index=True)[1]


def _offsets(visits: NDArray[np.int64], num_visits: int) -> NDArray[np.int64]:
    counts = np.bincount(visits, minlength=num_visits)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    """Entries of each list; 0 where it is null."""
    return np.asarray(
        pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False), np.int64
    )


def _nulls(array: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    array = _one(array)
    if not array.null_count:
        return np.zeros(len(array), np.bool_)
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False), np.bool_)


def _one(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
