import dataclasses

import numpy as np
import pytest

from cafemed import drugs
from cafemed.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    """Writes drug tables given as text and reads them."""

    def write_and_read(
        ndc_to_atc="ndc,atc3\n00000000011,A02B\n", ddi="atc3_a,atc3_b\nA02B,B01A\n", smiles=None
    ):
        (tmp_path / "ndc_to_atc3.csv").write_text(ndc_to_atc)
        (tmp_path / "ddi_atc3.csv").write_text(ddi)
        if smiles is not None:
            (tmp_path / "atc3_smiles.csv").write_text(smiles)
        return drugs.read(drugs.locate(tmp_path))

    return write_and_read


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("00002322930", "ndc:00002322930"),
        ("2322930", "ndc:00002322930"),
        (" 2322930.0 ", "ndc:00002322930"),
        ("0002-3229-30", "ndc:00002322930"),
        ("50242-040-62", "ndc:50242004062"),
        ("60505-0123-1", "ndc:60505012301"),
        ("0", "ndc:00000000000"),
        ("123456789012", "ndc:123456789012"),
        ("unknown", "ndc:unknown"),
    ],
)
def test_an_ndc_is_written_one_way(value, written):
    assert drugs.ndc(value) == written


def test_medications_are_atc_level_3(write):
    known = write("ndc,atc3\n11,A02BC01\n12,a02b\n")
    assert known.medication("ndc:00000000011") == "atc:A02B"
    assert known.medication("ndc:00000000012") == "atc:A02B"
    assert known.medication("ndc:00000000013") is None
    assert known.medication("atc:C07AB02") == "atc:C07A"
    assert known.medication("atc:C07") is None


def test_the_first_code_of_an_ndc_wins_and_others_are_counted(write):
    known = write("ndc,atc3\n11,A02B\n0011,B01A\n11,A02B\n")
    assert known.medication("ndc:00000000011") == "atc:A02B"
    assert [dataclasses.astuple(d)[0::2] for d in known.dropped] == [("ndc_to_atc3", 1)]


def test_pairs_are_unordered_and_never_of_one_drug(write):
    known = write(ddi="atc3_a,atc3_b\nB01A,A02B\nA02B,B01A\nC07A,C07AB02\n")
    assert known.interactions == {("atc:A02B", "atc:B01A")}
    assert [d.num_rows for d in known.dropped] == [1]
    matrix = known.ddi_matrix(("atc:B01A", "atc:J01D", "atc:A02B"))
    expected = np.zeros((3, 3), np.bool_)
    expected[0, 2] = expected[2, 0] = True
    np.testing.assert_array_equal(matrix, expected)


def test_molecules_are_collected(write):
    assert write().molecules is None
    known = write(smiles="atc3,smiles\nA02B,CC\nA02B,CO\nB01A,C\n")
    assert known.molecules is not None
    by_code: dict[str, list[str]] = {}
    for _, code, smiles in known.molecules:
        by_code.setdefault(code, []).append(smiles)
    assert by_code == {"atc:A02B": ["CC", "CO"], "atc:B01A": ["C"]}
    assert [row for row, _, _ in known.molecules] == [0, 1, 2]
    assert [file.num_rows for file in known.files] == [1, 1, 3]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"ndc_to_atc": "ndc,atc3\nX1,A02B\n"}, "column ndc, row 1 .*an NDC of up to 11 .*'X1'"),
        ({"ndc_to_atc": "ndc,atc3\n1,A02B\n2,A2\n"}, "column atc3, row 2 .*such as A02B, got 'A2'"),
        ({"ndc_to_atc": "ndc,atc3\n1,\n"}, "column atc3, row 1 .*, got None"),
        ({"ndc_to_atc": "ndc,atc4\n1,A02B\n"}, "expected columns ndc, atc3"),
        ({"ddi": "atc3_a,atc3_b\nA02B,7\n"}, "ddi_atc3.csv: column atc3_b, row 1 .*got '7'"),
        ({"ddi": "atc3_a,atc3_b\n"}, "ddi_atc3.csv: expected rows below the header"),
        ({"smiles": "atc3,smiles\nA02B,\n"}, "column smiles, row 1 .*a SMILES string"),
    ],
)
def test_a_bad_table_is_named(write, tables, message):
    with pytest.raises(DataError, match=message):
        write(**tables)


def test_single_files_stand_for_the_folders(write, tmp_path):
    write()
    other = tmp_path / "mine.csv"
    other.write_text("ndc,atc3\n11,B01A\n")
    known = drugs.read(drugs.locate(tmp_path, ndc_to_atc=other))
    assert known.medication("ndc:00000000011") == "atc:B01A"
    known = drugs.read(drugs.locate(None, ddi=tmp_path / "ddi_atc3.csv"))
    assert known.atc_of_ndc == {}


def test_interactions_are_required(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.drugs: expected a folder"):
        drugs.locate(None)
    with pytest.raises(DataError, match=r"expected ddi_atc3\.csv"):
        drugs.locate(tmp_path)
    with pytest.raises(DataError, match="found no folder"):
        drugs.locate(tmp_path / "absent")


def test_the_real_tables_are_read(real_data):
    known = drugs.read(drugs.locate(real_data / "drug-knowledge"))
    assert len(known.atc_of_ndc) == 2549
    assert len(known.interactions) == 448
    assert len({code for _, code, _ in known.molecules}) == 112
