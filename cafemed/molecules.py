"""Molecules of medications: SMILES written one way, by RDKit.

RDKit is not among the program's requirements; it is the extra "molecules" and imported here alone.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from cafemed.errors import ConfigError
from cafemed.records import Dropped

#: Rows named in a message.
_MAX_NAMED = 10


def require_rdkit() -> None:
    """Refuses at once where RDKit is not installed.

    Raises:
        ConfigError: with what to install.
    """
    with _rdkit():
        pass


def canonical(
    rows: Iterable[tuple[int, str, str]], medications: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], list[Dropped]]:
    """Gives each medication its distinct molecules.

    Two SMILES are one molecule where their canonical SMILES are equal; a salt is another molecule
    than its acid or base.

    Args:
        rows: row below the header from 0, medication ("atc:A02B") and SMILES.
        medications: of the vocabulary; rows of others are left out.

    Returns:
        Medication → canonical SMILES, sorted; a medication without any is not in it. And the rows
        dropped, those that RDKit cannot read named by their line.

    Raises:
        ConfigError: if RDKit is not installed.
    """
    found: dict[str, set[str]] = {}
    unreadable: list[int] = []
    others = repeated = 0
    with _rdkit() as write:
        for row, medication, smiles in rows:
            if medication not in medications:
                others += 1
                continue
            molecule = write(smiles)
            if molecule is None:
                unreadable.append(row + 2)  # lines count from 1, the first is the header
                continue
            known = found.setdefault(medication, set())
            repeated += molecule in known
            known.add(molecule)
    dropped = [
        Dropped("atc3_smiles", "medication not in the vocabulary", others),
        Dropped("atc3_smiles", "the same molecule again", repeated),
        Dropped("atc3_smiles", _named("unreadable SMILES", unreadable), len(unreadable)),
    ]
    return {code: tuple(sorted(found[code])) for code in sorted(found)}, dropped


def _named(reason: str, lines: list[int]) -> str:
    if not lines:
        return reason
    more = ", …" if len(lines) > _MAX_NAMED else ""
    return f"{reason}: line {', '.join(map(str, lines[:_MAX_NAMED]))}{more}"


@contextlib.contextmanager
def _rdkit() -> Iterator[Callable[[str], str | None]]:
    """A function from SMILES to canonical SMILES, None where they are not readable."""
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise ConfigError(
            "data.molecules: reading SMILES needs RDKit, which is not installed; run "
            "pip install 'cafemed[molecules]', or leave data.molecules=false"
        ) from None

    def write(smiles: str) -> str | None:
        molecule: Any = Chem.MolFromSmiles(smiles)
        if molecule is None or not molecule.GetNumAtoms():
            return None
        return str(Chem.MolToSmiles(molecule))

    with rdBase.BlockLogs():  # it says on standard error what it cannot read
        yield write
