"""A user's table of the names of codes."""

from collections.abc import Collection, Mapping

from cafemed.codes import KINDS, LABORATORY, normalise
from cafemed.errors import DataError
from cafemed.names import MAX_LENGTH
from cafemed.records import Dropped, SourceFile
from cafemed.sources import cells, reading
from cafemed.sources.reading import InputFile

_KINDS = (*KINDS, LABORATORY)


def read(
    file: InputFile, vocabularies: Mapping[str, Collection[str]]
) -> tuple[dict[str, dict[str, str]], SourceFile, list[Dropped]]:
    """Reads a table of names: columns code ("icd9:428.0") and name, perhaps kind.

    A row without a kind names the code in every vocabulary that has it. Of a code that is named
    twice the first name counts; a row with a kind goes before one without.

    Args:
        file: CSV or Parquet.
        vocabularies: kind → codes; names of others are left out.

    Returns:
        The names, the file, and the rows dropped.

    Raises:
        DataError: if a column is missing, a code names no system, or a kind is unknown.
    """
    table, source = reading.read(file, ("code", "name"), ("kind",))
    codes, names = (cells.text(table, column).to_pylist() for column in ("code", "name"))
    if "kind" in table.column_names:
        kinds = cells.choice(source, table, "kind", _KINDS).tolist()
    else:
        kinds = [-1] * len(codes)
    known = {kind: frozenset(vocabularies.get(kind, ())) for kind in _KINDS}
    found: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
    others = repeated = 0
    # Rows with a kind first, in the order of the file.
    for row in sorted(range(len(codes)), key=lambda row: kinds[row] < 0):
        code, name = _code(source, row, codes[row]), _name(source, row, names[row])
        asked = _KINDS if kinds[row] < 0 else (_KINDS[kinds[row]],)
        fitting = [kind for kind in asked if code in known[kind]]
        new = [kind for kind in fitting if code not in found[kind]]
        others += not fitting
        repeated += bool(fitting) and not new
        for kind in new:
            found[kind][code] = name
    dropped = [
        Dropped("names", "code not in the vocabularies", others),
        Dropped("names", "another name for the same code", repeated),
    ]
    return {kind: dict(sorted(of.items())) for kind, of in found.items() if of}, source, dropped


# A table of names holds no patient: its cells may be shown.


def _code(file: SourceFile, row: int, value: str | None) -> str:
    system, colon, code = (value or "").partition(":")
    if not (colon and system.strip() and code.strip(". ")):
        raise DataError(
            f"{file.path}: column code, row {row + 1} below the header: expected a code with its "
            f"system, such as icd9:428.0, got {value!r}"
        )
    return normalise(system, code)


def _name(file: SourceFile, row: int, value: str | None) -> str:
    name = " ".join((value or "").split())
    if not name or not name.isprintable() or len(name) > MAX_LENGTH:
        raise DataError(
            f"{file.path}: column name, row {row + 1} below the header: expected a name of at most "
            f"{MAX_LENGTH} characters, got {(value or '')[:40]!r}"
        )
    return name
