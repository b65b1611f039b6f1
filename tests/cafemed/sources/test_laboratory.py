"""The first values of visits against a plain loop over the rows, whatever the pieces."""

import csv
import datetime
import math

import numpy as np
import pandas as pd
import pytest

from cafemed.errors import DataError
from cafemed.sources import laboratory, mimic3, mimic4, reading, tables

VISITS = ("7", "9", "11", "12", "no-time")
ADMITTED = np.array(
    ["2101-03-04T10:00", "2101-03-05T00:00", "2101-07-01T08:30", "2102-01-01T12:00", "NaT"],
    "datetime64[s]",
)
COLUMNS = ("hadm_id", "itemid", "charttime", "valuenum")


def draw(seed: int, num_rows: int = 600) -> list[dict[str, str]]:
    """Rows with everything that a hospital's table has wrong with it."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        visit = int(rng.integers(0, len(VISITS)))
        start = ADMITTED[visit] if visit < 4 else ADMITTED[0]
        # Few distinct minutes, so that ties are common; some are before admission.
        time = start + np.timedelta64(int(rng.integers(-2, 8)) * 1800, "s")
        if rng.random() < 0.15:
            time = time.astype("datetime64[D]").astype("datetime64[s]")
        rows.append(
            {
                "row_id": str(len(rows)),
                "subject_id": "3",
                "hadm_id": str(rng.choice([VISITS[visit], VISITS[visit], "404", ""])),
                "itemid": str(rng.choice(["50912", "50.912", "51221", "7", "", "x9", "X9"])),
                "charttime": "" if rng.random() < 0.1 else str(time).replace("T", " "),
                "valuenum": str(rng.choice([f"{rng.normal(5, 2):.3f}", "", "nan", "-inf", "1e99"])),
                "flag": "abnormal, high",
            }
        )
    return rows


def write(folder, rows, name="LABEVENTS.csv"):
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(folder / name)
    else:
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


OUTSIDE = "not measured within the target window"


def expected(rows, window_h=None, admitted=ADMITTED):
    """Visit and item → value, and how many rows went for which reason."""
    first, dropped = {}, dict.fromkeys(laboratory._REASONS, 0)
    if window_h is None:
        del dropped[OUTSIDE]
    for number, row in enumerate(rows):
        item = "lab:" + row["itemid"].replace(".", "").upper()
        if not row["hadm_id"]:
            dropped["no visit"] += 1
        elif row["hadm_id"] not in VISITS:
            dropped["visit not in the cohort"] += 1
        elif not row["itemid"]:
            dropped["no item"] += 1
        elif not math.isfinite(np.float32(float(row["valuenum"] or "nan"))):
            dropped["no finite number"] += 1
        else:
            time = row["charttime"] and datetime.datetime.fromisoformat(row["charttime"])
            at = admitted.astype("datetime64[s]")[VISITS.index(row["hadm_id"])].astype(object)
            if time and at:
                since = at
                if time.time() == datetime.time():
                    since = datetime.datetime.combine(at, datetime.time())
                if time < since:
                    dropped["measured before admission"] += 1
                    continue
            if window_h is not None:
                window = datetime.timedelta(hours=window_h)
                if not time or not at or time >= at + window:
                    dropped[OUTSIDE] += 1
                    continue
            found = first.setdefault((row["hadm_id"], item), [])
            found.append((time or datetime.datetime.max, number, row["valuenum"]))
            dropped["not the first of its item and visit"] += len(found) > 1
    return {key: np.float32(min(found)[2]) for key, found in first.items()}, dropped


def read(folder, table=mimic3.LABORATORY, window_h=None):
    file = table.locate(folder)[table.name]
    return laboratory.read(file, table, VISITS, ADMITTED, window_h)


def as_dict(found):
    triples = zip(found.visit, found.item, found.value, strict=True)
    return {(VISITS[v], found.names[i]): value for v, i, value in triples}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("window_h", [None, 1.5])
def test_the_first_value_since_admission_is_found(seed, in_pieces, window_h, tmp_path, monkeypatch):
    if in_pieces:  # many small ones, merged often
        monkeypatch.setattr(reading, "_BLOCK_BYTES", 700)
        monkeypatch.setattr(laboratory, "_PENDING", 5)
    rows = draw(seed)
    values, dropped = expected(rows, window_h)
    assert min(dropped.values()) > 0
    found = read(write(tmp_path, rows), window_h=window_h)
    assert as_dict(found) == values
    assert {d.reason: d.num_rows for d in found.dropped} == dropped
    assert {d.table for d in found.dropped} == {"laboratory"}
    assert found.file.num_rows == len(rows) == sum(dropped.values()) + len(values)
    keys = list(zip(found.visit.tolist(), found.item.tolist(), strict=True))
    assert keys == sorted(set(keys))
    assert (
        found.names == tuple(sorted(found.names)) == ("lab:50912", "lab:51221", "lab:7", "lab:X9")
    )
    assert (found.visit.dtype, found.item.dtype, found.value.dtype) == (
        np.int64,
        np.int64,
        np.float32,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_other_spellings_of_a_table_read_the_same(tmp_path):
    rows = draw(9)
    upper = [{name.upper(): cell for name, cell in row.items()} for row in rows]
    expected_values = as_dict(read(write(tmp_path, upper)))
    hosp = tmp_path / "iv" / "hosp"
    hosp.mkdir(parents=True)
    write(hosp, rows, "labevents.csv")
    assert as_dict(read(hosp, mimic4.LABORATORY)) == expected_values
    names = dict(zip(COLUMNS, ("visit", "item", "time", "value"), strict=True))
    own = [{new: row[old] for old, new in names.items()} for row in rows]
    expected_values = expected(rows, admitted=ADMITTED.astype("datetime64[D]"))[0]
    for name in ("laboratory.csv", "laboratory.parquet"):
        (tmp_path / name.replace(".", "_")).mkdir()
        folder = write(tmp_path / name.replace(".", "_"), own, name)
        assert as_dict(read(folder, tables.LABORATORY)) == expected_values


def test_a_users_values_from_before_the_first_code_of_its_day_count(tmp_path):
    # Visit 7 has its first code at 10:00; the source says nothing of its admission.
    cells = (("2101-03-03 23:59:59", "1"), ("2101-03-04 06:00:00", "2"), ("2101-03-04 11:00", "3"))
    rows = [{"visit": "7", "item": "hb", "time": time, "value": value} for time, value in cells]
    found = read(write(tmp_path, rows, "laboratory.csv"), tables.LABORATORY)
    assert as_dict(found) == {("7", "lab:HB"): 2.0}
    assert {d.reason: d.num_rows for d in found.dropped}["measured before admission"] == 1


def test_a_parquet_table_may_have_numbers_and_times(tmp_path):
    frame = pd.DataFrame(
        {
            "visit": [7, 7, 9],
            "item": ["hb", "HB", "hb"],
            "value": [1.25, 0.1, 7.0],
            "time": pd.to_datetime(["2101-03-04 12:00:00.5", "2101-03-04 11:00:00.0", None]),
        }
    )
    frame.to_parquet(tmp_path / "laboratory.parquet")
    found = as_dict(read(tmp_path, tables.LABORATORY))
    assert found == {("7", "lab:HB"): np.float32(0.1), ("9", "lab:HB"): np.float32(7)}


def test_times_may_be_absent_in_a_users_table_and_the_first_row_counts(tmp_path):
    rows = [{"visit": "7", "item": "hb", "value": v} for v in ("", "3", "2")]
    found = as_dict(read(write(tmp_path, rows, "laboratory.csv"), tables.LABORATORY))
    assert found == {("7", "lab:HB"): 3.0}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("valuenum", "high", "LABEVENTS.csv: column valuenum, row 3 .*: expected a number"),
        ("charttime", "noon", "LABEVENTS.csv: column charttime, row 3 .*: expected a date"),
    ],
)
@pytest.mark.parametrize("block", [40, 16 << 20])
def test_a_bad_cell_is_named_but_not_shown(column, cell, message, block, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block)
    good = {"hadm_id": "7", "itemid": "1", "charttime": "2101-03-04 12:00:00", "valuenum": " 1 "}
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path, [good, good, good | {column: cell}, good]))
    assert cell not in str(caught.value).replace("holds", "")
    # What is wrong with rows of other visits does not matter: they are never parsed.
    other = good | {column: cell, "hadm_id": "404"}
    assert as_dict(read(write(tmp_path, [good, other]))) == {("7", "lab:1"): 1.0}


def test_fractions_of_a_second_and_utc_are_read(tmp_path):
    rows = [
        {"hadm_id": "7", "itemid": "1", "charttime": time, "valuenum": value}
        for time, value in (("2101-03-04 12:00:00.25", "1"), ("2101-03-04T11:00:00Z", "2"))
    ]
    assert as_dict(read(write(tmp_path, rows))) == {("7", "lab:1"): 2.0}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(column, tmp_path):
    rows = [{name: "1" for name in COLUMNS if name != column}]
    with pytest.raises(DataError, match=f"LABEVENTS.csv: expected columns .*; {column} missing"):
        read(write(tmp_path, rows))


def test_a_missing_or_empty_table_is_refused(tmp_path):
    message = r"expected LABEVENTS.csv or .* found none; data.cohort.max_laboratory=0 does without"
    with pytest.raises(DataError, match=message):
        mimic3.LABORATORY.locate(tmp_path)
    (tmp_path / "LABEVENTS.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(DataError, match="expected rows below the header, found none"):
        read(tmp_path)


def test_a_truncated_table_is_refused(tmp_path):
    rows = draw(1)
    write(tmp_path, rows)
    path = tmp_path / "LABEVENTS.csv"
    text = path.read_text()
    path.write_text(text[: text.rindex(',"abnormal')])
    with pytest.raises(DataError, match=r"LABEVENTS\.csv: expected 7 fields in every row"):
        read(tmp_path)


def test_whole_numbers_saved_as_floats_are_the_same_visits(tmp_path):
    frame = pd.DataFrame({"hadm_id": [7, None, 9], "itemid": 1, "charttime": "", "valuenum": 2.5})
    frame.to_csv(tmp_path / "LABEVENTS.csv", index=False)
    assert "7.0," in (tmp_path / "LABEVENTS.csv").read_text()
    table = mimic3.LABORATORY
    file = table.locate(tmp_path)["LABEVENTS"]
    found = laboratory.read(file, table, ("7", "9"), ADMITTED[:2])
    assert (found.visit.tolist(), found.value.tolist()) == ([0, 1], [2.5, 2.5])
    # Identifiers that are no numbers are left as they are.
    found = laboratory.read(file, table, ("7", "9.0", "x"), ADMITTED[:3])
    assert found.visit.tolist() == [1]


def test_every_source_finds_its_table_only_when_asked(tmp_path, hospitals):
    row = dict.fromkeys((*COLUMNS, "visit", "item", "value"), "1")
    hosp = tmp_path / "iv" / "hosp"
    hosp.mkdir(parents=True)
    for name in mimic4.COLUMNS:
        write(hosp, [row], f"{name}.csv")
    write(hosp, [row], "labevents.csv")
    assert "labevents" not in mimic4.locate(tmp_path / "iv")
    assert mimic4.locate(tmp_path / "iv", laboratory=True)["labevents"].path.parent == hosp
    folder = write(hospitals.draw(1).write(tmp_path / "iii"), [row], "labevents.csv")
    assert "LABEVENTS" not in mimic3.locate(folder)
    assert mimic3.locate(folder, laboratory=True)["LABEVENTS"].path.name == "labevents.csv"
    write(tmp_path, [row], "mine.csv")
    write(tmp_path, [row], "laboratory.csv")
    assert set(tables.locate(tmp_path / "mine.csv")) == {"events"}
    found = tables.locate(tmp_path / "mine.csv", laboratory=True)
    assert found["laboratory"].path == tmp_path / "laboratory.csv"
