"""Molecules of medications by RDKit's canonical SMILES."""

import builtins
import sys

import pytest

from cafemed import drugs, molecules
from cafemed.errors import ConfigError

KNOWN = ("atc:A02B", "atc:B01A", "atc:C03C", "atc:N02B")


def rows(*pairs):
    return [(row, f"atc:{code}", smiles) for row, (code, smiles) in enumerate(pairs)]


def test_equal_molecules_are_one_and_sorted():
    pytest.importorskip("rdkit")
    given = rows(
        ("N02B", "OC(=O)C1=CC=CC=C1OC(C)=O"),  # aspirin, three times
        ("N02B", "CC(=O)Oc1ccccc1C(O)=O"),
        ("B01A", "CC(=O)Oc1ccccc1C(=O)O"),
        ("B01A", "OCC"),
        ("A02B", "CCO"),
        ("N02B", "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]"),  # its salt
        ("Z99Z", "C"),
    )
    found, dropped = molecules.canonical(given, KNOWN)
    aspirin = "CC(=O)Oc1ccccc1C(=O)O"
    assert found == {
        "atc:A02B": ("CCO",),
        "atc:B01A": (aspirin, "CCO"),
        "atc:N02B": (aspirin, "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]"),
    }
    assert [d.num_rows for d in dropped] == [1, 1, 0]
    assert all(list(smiles) == sorted(smiles) for smiles in found.values())


def test_the_order_of_the_rows_does_not_matter():
    pytest.importorskip("rdkit")
    given = rows(("A02B", "CCO"), ("A02B", "C"), ("B01A", "c1ccccc1"), ("A02B", "N#N"))
    assert molecules.canonical(given, KNOWN)[0] == molecules.canonical(given[::-1], KNOWN)[0]


def test_unreadable_smiles_are_dropped_and_named_by_line(capfd):
    pytest.importorskip("rdkit")
    given = rows(("A02B", "CCO"), ("A02B", "C(("), ("B01A", "Xx"), ("B01A", "c1cc"))
    found, dropped = molecules.canonical(given, KNOWN)
    assert found == {"atc:A02B": ("CCO",)}
    assert (dropped[2].num_rows, dropped[2].reason) == (3, "unreadable SMILES: line 3, 4, 5")
    many = rows(*[("A02B", "C((")] * 40)
    reason = molecules.canonical(many, KNOWN)[1][2].reason
    assert reason == "unreadable SMILES: line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …"
    assert capfd.readouterr() == ("", "")  # RDKit is quiet


def test_without_rdkit_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    usual = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "rdkit":
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        ConfigError, match=r"needs RDKit.*pip install 'cafemed\[molecules\]'"
    ) as err:
        molecules.canonical(rows(("A02B", "C")), KNOWN)
    assert "\n" not in str(err.value)
    with pytest.raises(ConfigError, match="needs RDKit"):
        molecules.require_rdkit()


def test_the_real_table_is_read_whole(real_data):
    pytest.importorskip("rdkit")
    known = drugs.read(drugs.locate(real_data / "drug-knowledge"))
    codes = {code for _, code, _ in known.molecules}
    found, dropped = molecules.canonical(known.molecules, codes)
    assert len(found) == 112
    assert [d.num_rows for d in dropped] == [0, 0, 0]
