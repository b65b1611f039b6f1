import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafemed.errors import DataError
from cafemed.sources import names, reading

VOCABULARIES = {
    "diagnosis": ("icd9:3893", "icd9:4280", "icd10:I10"),
    "procedure": ("icd9:3893",),
    "medication": ("atc:C03C",),
    "laboratory": ("lab:50912",),
}


def read(folder, text):
    path = folder / "names.csv"
    path.write_text(text)
    return names.read(reading.identify(path), VOCABULARIES)


def test_codes_are_compared_without_dots_and_case(tmp_path):
    found, file, dropped = read(
        tmp_path,
        'Code,Name\nICD9:428.0,Heart failure\n icd10 : i10 ," High  blood\tpressure "\n'
        "atc:c03c,High-ceiling diuretics\nlab:50912,Creatinine\nicd9:V99,Nothing\n",
    )
    assert found == {
        "diagnosis": {"icd10:I10": "High blood pressure", "icd9:4280": "Heart failure"},
        "medication": {"atc:C03C": "High-ceiling diuretics"},
        "laboratory": {"lab:50912": "Creatinine"},
    }
    assert (file.path.name, file.num_rows) == ("names.csv", 5)
    assert [(d.reason, d.num_rows) for d in dropped] == [
        ("code not in the vocabularies", 1),
        ("another name for the same code", 0),
    ]


def test_a_code_of_two_kinds_has_two_names(tmp_path):
    rows = "code,name,kind\nicd9:38.93,Either,\nicd9:38.93,Catheter,procedure\n"
    found, _, dropped = read(tmp_path, rows)
    assert found == {
        "diagnosis": {"icd9:3893": "Either"},
        "procedure": {"icd9:3893": "Catheter"},
    }
    assert dropped[1].num_rows == 0
    found, _, dropped = read(tmp_path, "code,name\nicd9:38.93,Either\nicd9:3893,Or\n")
    assert found["procedure"] == found["diagnosis"] == {"icd9:3893": "Either"}
    assert dropped[1].num_rows == 1


def test_a_parquet_table_does_too(tmp_path):
    path = tmp_path / "names.parquet"
    pq.write_table(pa.table({"code": ["icd9:4280"], "name": ["Herzschwäche"]}), path)
    found, _, _ = names.read(reading.identify(path), VOCABULARIES)
    assert found == {"diagnosis": {"icd9:4280": "Herzschwäche"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code\nicd9:4280\n", "expected columns code, name"),
        ("code,name\n4280,Heart failure\n", "column code, row 1 .*such as icd9:428.0, got '4280'"),
        ("code,name\nicd9:.,Heart failure\n", "column code, row 1"),
        ("code,name\nicd9:4280,Heart\nicd9:4280,\n", "column name, row 2 .*got ''"),
        (f"code,name\nicd9:4280,{'x' * 201}\n", "a name of at most 200 characters"),
        ("code,name\nicd9:4280,a\x07b\n", "column name, row 1"),
        ("code,name,kind\nicd9:4280,Heart failure,drug\n", "column kind, row 1"),
    ],
)
def test_a_row_that_says_nothing_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)
