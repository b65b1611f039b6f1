import numpy as np
import pyarrow as pa
import pytest

from cafemed.errors import DataError
from cafemed.sources import cells, reading

CSV = "Visit,CODE,when,n\n7,a,2101-01-02 03:04:05,1\n8,,2101-01-02,\n7,b,,3\n"


def test_times_and_integers_keep_empty_cells(table_file):
    table, source = reading.read(table_file(CSV), ("when", "n"))
    times = [str(t) for t in cells.times(source, table, "when").to_pylist()]
    assert times == ["2101-01-02 03:04:05", "2101-01-02 00:00:00", "None"]
    assert cells.integers(source, table, "n").to_pylist() == [1, None, 3]


@pytest.mark.parametrize(
    ("value", "convert"),
    [
        ("05/06/2101", cells.times),
        ("2101-13-01", cells.times),
        ("2101", cells.times),
        ("2101-01-02 03:04:05+02:00", cells.times),
        ("one", cells.integers),
        ("1.5", cells.integers),
        ("99999999999", cells.integers),
    ],
)
def test_a_bad_cell_is_named_by_its_row_and_not_shown(table_file, value, convert):
    file = table_file(
        f"x,y\n,0\n2101-01-01,0\n{value},0\n".replace(
            "2101-01-01", "" if convert is cells.integers else "2101-01-01"
        )
    )
    table, source = reading.read(file, ("x", "y"))
    with pytest.raises(DataError, match=r"column x, row 3 below the header: expected") as error:
        convert(source, table, "x")
    assert value not in str(error.value).replace("(2101-07-04 13:30:00)", "")


def test_choice_and_present_name_the_row(table_file):
    table, source = reading.read(table_file("kind,y\nDrug,0\n,0\nfood,0\n"), ("kind", "y"))
    with pytest.raises(
        DataError, match="column kind, row 3 below the header: expected one of drug"
    ):
        cells.choice(source, table, "kind", ("drug",))
    assert cells.choice(source, table, "kind", ("food", "drug")).tolist() == [1, -1, 0]
    with pytest.raises(DataError, match="column kind, row 2 below the header: expected a value"):
        cells.present(source, table, "kind")


def test_recode_sorts_merges_and_drops():
    column = pa.array(["b", "A", None, "a", "x"]).dictionary_encode()
    recoded = cells.recode(column, lambda v: None if v == "x" else v.lower())
    assert recoded.to_pylist() == ["b", "a", None, "a", None]
    assert recoded.dictionary.to_pylist() == ["a", "b"]
    assert cells.indices(recoded).tolist() == [1, 0, -1, 0, -1]


def test_sexes_are_known_words():
    column = pa.array(["F", "male", None, "x", "M"]).dictionary_encode()
    assert np.array(cells.sexes(column)).tolist() == [1, 2, 0, 0, 2]
