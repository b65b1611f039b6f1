"""Names of codes, which the user supplies: what is shown to people beside a code."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from cafemed.codes import KINDS, LABORATORY
from cafemed.errors import ArtifactError

#: Kind → code → name; a kind without any may be missing.
Names = Mapping[str, Mapping[str, str]]

MAX_LENGTH = 200


def read_names(
    path: Path, vocabularies: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Reads `names.json`: kind → code → name; none where an earlier version wrote no such file.

    Raises:
        ArtifactError: if it is not of this form, or names a code that the vocabularies lack.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        names = {str(kind): dict(of.items()) for kind, of in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise ArtifactError(f"{path}: expected names by kind and code") from err
    for kind, of in names.items():
        if kind not in (*KINDS, LABORATORY):
            raise ArtifactError(f"{path}: unknown kind {kind!r}")
        codes = frozenset(vocabularies.get(kind, ()))
        for code, name in of.items():
            if code not in codes:
                raise ArtifactError(f"{path}: {code} is not in the {kind} vocabulary")
            if not isinstance(name, str) or not 0 < len(name) <= MAX_LENGTH:
                raise ArtifactError(
                    f"{path}: {code}: expected a name of at most {MAX_LENGTH} characters"
                )
    return names


def write_names(names: Names, path: Path) -> None:
    """Writes `names.json`."""
    content = {kind: dict(of) for kind, of in names.items()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
