import gzip

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafemed.errors import DataError
from cafemed.sources import cells, reading

CSV = "Visit,CODE,when,n\n7,a,2101-01-02 03:04:05,1\n8,,2101-01-02,\n7,b,,3\n"


def test_reads_only_the_columns_asked_for_under_lower_case_names(table_file):
    table, source = reading.read(table_file(CSV), ("code", "visit"), ("n", "absent"))
    assert table.column_names == ["code", "visit", "n"]
    assert table["code"].to_pylist() == ["a", None, "b"]
    assert table["visit"].type == reading.TEXT
    assert source.num_rows == 3
    assert source.num_bytes == len(CSV)


@pytest.mark.parametrize("name", ["t.csv.gz", "T.CSV.GZ"])
def test_reads_packed_files(table_file, name):
    table, _ = reading.read(table_file(gzip.compress(CSV.encode()), name), ("visit",))
    assert table["visit"].to_pylist() == ["7", "8", "7"]


def test_reads_parquet_of_any_column_type(tmp_path):
    frame = pd.DataFrame(
        {
            "Visit": [7, 8, 7],
            "code": ["a", "", None],
            "when": pd.to_datetime(["2101-01-02 03:04:05.5", None, "2101-01-03"], format="ISO8601"),
            "n": [1.0, None, 3.0],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    file = reading.identify(tmp_path / "t.parquet")
    table, source = reading.read(file, ("visit", "code", "when", "n"))
    assert table["visit"].to_pylist() == ["7", "8", "7"]
    assert table["code"].to_pylist() == ["a", None, None]
    assert cells.integers(source, table, "n").to_pylist() == [1, None, 3]
    times = cells.times(source, table, "when")
    assert [str(t) for t in times.to_pylist()] == [
        "2101-01-02 03:04:05",
        "None",
        "2101-01-03 00:00:00",
    ]


def test_a_parquet_time_zone_becomes_utc(tmp_path):
    times = pa.array(pd.to_datetime(["2101-01-02 03:00:00"]).tz_localize("Europe/Paris"))
    pq.write_table(pa.table({"when": times}), tmp_path / "t.parquet")
    table, source = reading.read(reading.identify(tmp_path / "t.parquet"), ("when",))
    assert str(cells.times(source, table, "when")[0]) == "2101-01-02 02:00:00"


def test_a_parquet_column_that_is_no_cell_is_refused(tmp_path):
    pq.write_table(pa.table({"code": [["a"], ["b"]]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column code: expected text, numbers or dates, found list"):
        reading.read(reading.identify(tmp_path / "t.parquet"), ("code",))


def test_parquet_numbers_that_are_not_whole_stay_as_they_are(tmp_path):
    pq.write_table(pa.table({"code": [401.9, 250.0]}), tmp_path / "t.parquet")
    table, _ = reading.read(reading.identify(tmp_path / "t.parquet"), ("code",))
    assert table["code"].to_pylist() == ["401.9", "250"]


@pytest.mark.parametrize("name", ["admissions", "ADMISSIONS"])
@pytest.mark.parametrize("on_disk", ["ADMISSIONS.csv", "admissions.csv.gz", "Admissions.CSV"])
def test_finds_a_file_in_either_case(tmp_path, name, on_disk):
    (tmp_path / on_disk).touch()
    assert reading.find(tmp_path, name).name == on_disk


def test_a_missing_or_doubled_file_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"expected a.csv or a.csv.gz \(in either case\), found none"
    ):
        reading.find(tmp_path, "a")
    (tmp_path / "a.csv").touch()
    (tmp_path / "A.csv.gz").touch()
    with pytest.raises(DataError, match=r"expected one table a, found A.csv.gz, a.csv; keep one"):
        reading.find(tmp_path, "a")
    with pytest.raises(DataError, match="found no folder"):
        reading.find(tmp_path / "absent", "a")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "t.csv", "the file is empty"),
        ("visit,code\n", "t.csv", "expected rows below the header, found none"),
        ("visit,kode\n7,secret\n", "t.csv", "code missing among the header's 2 names"),
        ("visit,code,Code\n7,secret,b\n", "t.csv", "expected one column code, the header names it"),
        ("visit,code\n7,a\n8,secret,x\n", "t.csv", "expected 2 fields in every row, .* has 3"),
        (b"visit,code\n7,secret\xff\xfe\n", "t.csv", "expected UTF-8 text"),
        (b"\xff\xfe\n", "t.csv", "expected UTF-8 text"),
        ("visit,code\n7,secret\n", "t.csv.gz", "cannot be read"),
        (gzip.compress(b"visit,code\n7,secret\n" * 99, mtime=0)[:-20], "t.csv.gz", "truncated"),
        ("visit,code\n7,secret\n", "t.parquet", "not a readable Parquet file"),
    ],
)
def test_an_unreadable_table_is_one_line_without_its_content(table_file, content, name, message):
    file = table_file(content, name)
    with pytest.raises(DataError, match=message) as error:
        reading.read(file, ("visit", "code"))
    assert str(file.path) in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_file_that_went_away_is_refused(tmp_path, name):
    file = reading.InputFile(tmp_path / name, "", 0)
    with pytest.raises(DataError, match="found no file"):
        reading.read(file, ("visit",))
    with pytest.raises(DataError, match="cannot be read"):
        reading.identify(tmp_path / name)


def test_many_blocks_share_one_dictionary(table_file, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 64)
    lines = [f"{i},{i % 7}" for i in range(500)]
    table, _ = reading.read(table_file("\n".join(["id,code", *lines]) + "\n"), ("id", "code"))
    code = cells.text(table, "code")
    assert len(code.dictionary) == 7
    assert code.to_pylist() == [str(i % 7) for i in range(500)]
