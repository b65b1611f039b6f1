import csv
import dataclasses
import datetime
import os

import numpy as np
import pandas as pd
import pytest
import yaml

from cafemed import artifacts, cohort, paths, preparation
from cafemed.codes import KINDS
from cafemed.config import from_mapping
from cafemed.errors import ConfigError, DataError
from cafemed.preparation import DataConfig
from cafemed.protocols import CohortConfig
from cafemed.sources.tables import Systems
from cafemed.synthetic import SyntheticConfig

SMALL = SyntheticConfig(
    num_patients=60,
    num_visits=140,
    num_diagnoses=40,
    num_procedures=20,
    num_medications=15,
    diagnoses_per_visit=6.0,
    medications_per_visit=5.0,
    effect_draws=10,
)


@pytest.fixture
def config(tmp_path, hospitals):
    """A drawn hospital on disk, and the configuration that reads it."""
    root = hospitals.draw(2, num_patients=40).write(tmp_path / "tables")
    drugs = hospitals.write_drugs(tmp_path / "drugs", smiles=hospitals.ATC)
    return DataConfig(source="mimic3", root=str(root), drugs=str(drugs))


def prepare(config, folder, force=False):
    inputs = preparation.locate(config, folder / "tables")
    return preparation.make_cohort(config, inputs, folder / "cohort", force)


def test_the_report_holds_every_file_and_filter(config, tmp_path, capsys):
    report = prepare(config, tmp_path / "exp")
    assert report == artifacts.read_manifest(tmp_path / "exp" / "cohort", "cohort").report
    files = {file["name"]: file for file in report["files"]}
    assert set(files) == {
        *("ADMISSIONS.csv", "PATIENTS.csv", "DIAGNOSES_ICD.csv", "PROCEDURES_ICD.csv"),
        *("PRESCRIPTIONS.csv", "ndc_to_atc3.csv", "ddi_atc3.csv", "atc3_smiles.csv"),
    }
    path = tmp_path / "drugs" / "ddi_atc3.csv"
    assert files["ddi_atc3.csv"] == {
        "name": "ddi_atc3.csv",
        "sha256": artifacts.sha256_of(path),
        "bytes": path.stat().st_size,
        "rows": 3,
    }
    assert {"table", "reason", "rows"} == set(report["dropped"][0])
    text = preparation.describe(report)
    assert f"patients       {report['summary']['patients']}" in text
    assert "drug code 0" in text
    assert capsys.readouterr().out.count("cohort ") == 2


def test_the_cohort_loads_and_is_private(config, tmp_path):
    report = prepare(config, tmp_path / "exp")
    folder = tmp_path / "exp" / "cohort"
    loaded = cohort.load(folder)
    assert loaded.num_visits == report["summary"]["visits"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "exp").stat().st_mode & 0o777 == 0o700


def test_nothing_at_patient_level_in_the_manifest(config, tmp_path):
    prepare(config, tmp_path / "exp")
    folder = tmp_path / "exp" / "cohort"
    text = (folder / artifacts.MANIFEST).read_text()
    loaded = cohort.load(folder)
    assert not [code for codes in loaded.vocabularies.values() for code in codes if code in text]
    assert not [name for name in loaded.visit_ids if f'"{name}"' in text]


def test_an_unchanged_stage_is_skipped_and_a_changed_one_redone(config, tmp_path, capsys):
    first = prepare(config, tmp_path / "exp")
    assert prepare(config, tmp_path / "exp") == first
    assert "skipped" in capsys.readouterr().out
    prepare(config, tmp_path / "exp", force=True)
    assert "skipped" not in capsys.readouterr().out
    changed = dataclasses.replace(config, cohort=CohortConfig(seed=1))
    prepare(changed, tmp_path / "exp")
    assert "skipped" not in capsys.readouterr().out
    table = tmp_path / "tables" / "DIAGNOSES_ICD.csv"
    table.write_text(table.read_text() + "0,0,0,1,4019\n")
    report = prepare(changed, tmp_path / "exp")
    assert "skipped" not in capsys.readouterr().out
    assert report["dropped"] != first["dropped"]


def test_where_the_tables_lie_does_not_matter(config, tmp_path):
    prepare(config, tmp_path / "exp")
    moved = tmp_path / "moved"
    os.rename(tmp_path / "tables", moved)  # noqa: PTH104
    prepare(dataclasses.replace(config, root=str(moved)), tmp_path / "other")
    fingerprints = [
        artifacts.read_manifest(tmp_path / name / "cohort", "cohort").fingerprint
        for name in ("exp", "other")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_a_failed_run_leaves_the_cohort_before_it(config, tmp_path):
    prepare(config, tmp_path / "exp")
    before = cohort.load(tmp_path / "exp" / "cohort").fingerprint
    table = tmp_path / "tables" / "ADMISSIONS.csv"
    table.write_text(table.read_text().replace("21", "xx"))
    with pytest.raises(DataError, match="column"):
        prepare(config, tmp_path / "exp")
    assert cohort.load(tmp_path / "exp" / "cohort").fingerprint == before
    assert [path.name for path in (tmp_path / "exp").iterdir()] == ["cohort"]


def test_synthetic_tables_are_made_once_and_prepared(tmp_path, capsys):
    config = DataConfig(generator=SMALL)
    folder = tmp_path / "exp"
    preparation.make_tables(config, folder / "tables", force=False)
    report = prepare(config, folder)
    assert report["summary"]["patients"] == 60
    assert report["summary"]["visits"] == 140
    preparation.make_tables(config, folder / "tables", force=False)
    assert "skipped" in capsys.readouterr().out
    preparation.make_tables(dataclasses.replace(config, seed=1), folder / "tables", force=False)
    assert "skipped" not in capsys.readouterr().out
    assert prepare(config, folder)["summary"] != report["summary"]
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o600}


def lab_rows(root):
    """A laboratory row for every second admission of a drawn hospital."""
    with (root / "ADMISSIONS.csv").open() as file:
        admissions = list(csv.DictReader(file))
    return [
        f"{i},{row['SUBJECT_ID']},{row['HADM_ID']},50912,{row['ADMITTIME']},{i % 7}.5"
        for i, row in enumerate(admissions)
        if i % 2
    ]


def test_laboratory_values_are_read_only_when_asked(config, tmp_path):
    root = tmp_path / "tables"
    without = prepare(config, tmp_path / "exp")
    rows = lab_rows(root)
    header = "ROW_ID,SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUENUM"
    (root / "LABEVENTS.csv").write_text("\n".join([header, *rows]) + "\n")
    assert prepare(config, tmp_path / "exp") == without  # unchanged: the table is no input
    asked = dataclasses.replace(config, cohort=CohortConfig(max_laboratory=5))
    report = prepare(asked, tmp_path / "exp")
    made = cohort.load(tmp_path / "exp" / "cohort")
    assert made.vocabularies["laboratory"] == ("lab:50912",)
    values = {row.split(",")[2]: float(row.split(",")[-1]) for row in rows}
    found = {
        made.visit_ids[v]: made.laboratory.values[made.laboratory.items.offsets[v]]
        for v in np.flatnonzero(made.laboratory.items.counts)
    }
    assert found == {visit: values[visit] for visit in made.visit_ids if visit in values}
    assert found
    numbers = report["summary"]["laboratory"]
    assert numbers == {
        "items": 1,
        "values_per_visit": round(len(found) / made.num_visits, 2),
        "visits_without": made.num_visits - len(found),
    }
    files = {file["name"]: file for file in report["files"]}
    assert files["LABEVENTS.csv"]["rows"] == len(rows)
    manifest = artifacts.read_manifest(tmp_path / "exp" / "cohort", "cohort")
    assert manifest.inputs["LABEVENTS"] == artifacts.sha256_of(root / "LABEVENTS.csv")
    text = preparation.describe(report)
    assert "laboratory     1 items" in text
    assert "visit not in the cohort" in text
    (root / "LABEVENTS.csv").unlink()
    with pytest.raises(DataError, match=r"expected LABEVENTS.csv .*max_laboratory=0 does without"):
        prepare(asked, tmp_path / "exp")


def test_laboratory_values_from_after_the_target_window_are_not_read(config, tmp_path):
    root = tmp_path / "tables"
    header = "ROW_ID,SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUENUM"
    late = []
    for cells in (row.split(",") for row in lab_rows(root) if row.split(",")[4]):
        time = datetime.datetime.fromisoformat(cells[4]) + datetime.timedelta(hours=24)
        late.append(",".join([*cells[:3], "50913", str(time), cells[5]]))
    (root / "LABEVENTS.csv").write_text("\n".join([header, *lab_rows(root), *late]) + "\n")
    items = {}
    for window in (None, 24.0, 24.5):
        settings = CohortConfig(max_laboratory=5, target_window_h=window)
        report = prepare(dataclasses.replace(config, cohort=settings), tmp_path / "exp")
        items[window] = cohort.load(tmp_path / "exp" / "cohort").vocabularies["laboratory"]
        lost = {row["reason"]: row["rows"] for row in report["dropped"]}
        outside = lost.get("not measured within the target window")
        assert (outside or 0) > 0 if window == 24.0 else outside in (None, 0)
    both = ("lab:50912", "lab:50913")
    assert items == {None: both, 24.0: both[:1], 24.5: both}


def test_laboratory_values_leave_the_rest_of_the_cohort_alone(config, tmp_path):
    root = tmp_path / "tables"
    header = "SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUENUM"
    rows = [row.partition(",")[2] for row in lab_rows(root)]
    (root / "LABEVENTS.csv").write_text("\n".join([header, *rows]) + "\n")
    for protocol in ("clean", "published"):
        made = []
        for number in (0, 3):
            settings = CohortConfig(protocol=protocol, max_laboratory=number)
            prepare(dataclasses.replace(config, cohort=settings), tmp_path / "exp")
            made.append(cohort.load(tmp_path / "exp" / "cohort"))
        ours, theirs = made
        assert ours.visit_ids == theirs.visit_ids
        assert len(ours.laboratory.values) == 0
        assert len(theirs.laboratory.values) > 0
        for name in ("diagnoses", "procedures", "medications", "targets"):
            assert getattr(ours, name).ids.tolist() == getattr(theirs, name).ids.tolist()
        for kind in KINDS:
            assert ours.vocabularies[kind] == theirs.vocabularies[kind]


def test_molecules_come_into_the_cohort_when_asked(config, tmp_path):
    pytest.importorskip("rdkit")
    without = prepare(config, tmp_path / "exp")
    assert cohort.load(tmp_path / "exp" / "cohort").molecules == {}
    table = tmp_path / "drugs" / "atc3_smiles.csv"
    table.write_text("atc3,smiles\nA02B,OCC\nA02B,C((\nB01A,CCO\nB01A,CN\nH05A,C\n")
    report = prepare(dataclasses.replace(config, molecules=True), tmp_path / "exp")
    made = cohort.load(tmp_path / "exp" / "cohort")
    assert made.molecules == {"atc:A02B": ("CCO",), "atc:B01A": ("CCO", "CN")}
    assert report["summary"]["molecules"] == {"molecules": 2, "medications": 2}
    assert report["summary"]["codes"] == without["summary"]["codes"]
    text = preparation.describe(report)
    assert "molecules      2; 2 medications have one" in text
    assert "unreadable SMILES: line 3" in text
    fingerprint = made.fingerprint
    table.write_text(table.read_text().replace("CN", "CNC"))
    prepare(dataclasses.replace(config, molecules=True), tmp_path / "exp")
    assert cohort.load(tmp_path / "exp" / "cohort").fingerprint != fingerprint


def test_molecules_need_a_table_of_them(config, tmp_path):
    (tmp_path / "drugs" / "atc3_smiles.csv").unlink()
    with pytest.raises(
        ConfigError, match=r"data.molecules: expected atc3_smiles.csv in data.drugs"
    ):
        preparation.locate(dataclasses.replace(config, molecules=True), tmp_path)


def test_names_come_into_the_cohort_when_given(config, tmp_path):
    without = prepare(config, tmp_path / "exp")
    assert cohort.load(tmp_path / "exp" / "cohort").names == {}
    table = tmp_path / "names.csv"
    table.write_text("code,name\natc:A02B,Drugs for ulcer\natc:Z99Z,Nothing\n")
    config = dataclasses.replace(config, names=str(table))
    report = prepare(config, tmp_path / "exp")
    made = cohort.load(tmp_path / "exp" / "cohort")
    assert made.names == {"medication": {"atc:A02B": "Drugs for ulcer"}}
    assert report["files"][-1]["name"] == "names.csv"
    assert "names          1 medication" in preparation.describe(report)
    assert report["summary"].pop("names") == {"medication": 1}
    assert report["summary"] == without["summary"]
    table.write_text("code,name\natc:A02B,Ulcer\n")
    prepare(config, tmp_path / "exp")
    assert cohort.load(tmp_path / "exp" / "cohort").fingerprint != made.fingerprint


def test_the_table_of_names_must_be_there(config, tmp_path):
    config = dataclasses.replace(config, names=str(tmp_path / "no.csv"))
    with pytest.raises(DataError, match=r"no\.csv: cannot be read"):
        preparation.locate(config, tmp_path)


def test_synthetic_patients_get_names_too(tmp_path):
    settings = DataConfig(generator=SMALL, cohort=CohortConfig())
    preparation.make_tables(settings, tmp_path / "tables", force=False)
    prepare(settings, tmp_path)
    vocabulary = cohort.load(tmp_path / "cohort").vocabularies
    code = vocabulary["diagnosis"][0]
    (tmp_path / "names.csv").write_text(f"kind,code,name\ndiagnosis,{code.lower()},A disease\n")
    prepare(dataclasses.replace(settings, names=str(tmp_path / "names.csv")), tmp_path)
    assert cohort.load(tmp_path / "cohort").names == {"diagnosis": {code: "A disease"}}


def test_a_users_table_is_prepared(tmp_path, hospitals):
    rows = []
    for patient in range(6):
        for visit in range(3):
            key = (patient, f"{patient}-{visit}", f"210{visit}-01-01")
            rows += [
                (*key, "diagnosis", "I10"),
                (*key, "medication", "B01AC06"),
                (*key, "medication", "A02BC01"),
            ]
    frame = pd.DataFrame(rows, columns=["patient", "visit", "time", "kind", "code"])
    frame.to_parquet(tmp_path / "mine.parquet")
    drugs = hospitals.write_drugs(tmp_path / "drugs")
    config = DataConfig(
        source="tables", root=str(tmp_path / "mine.parquet"), ddi=str(drugs / "ddi_atc3.csv")
    )
    numbers = prepare(config, tmp_path / "exp")["summary"]
    assert (numbers["patients"], numbers["visits"]) == (6, 18)
    assert numbers["codes"] == {"diagnosis": 1, "procedure": 0, "medication": 2}
    assert numbers["ddi_rate"] == 1.0
    assert cohort.load(tmp_path / "exp" / "cohort").procedures.counts.tolist() == [0] * 18


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "mimic3"}, r"data.root: expected where the mimic3 tables are, got null"),
        ({"source": "mimic5"}, r"data.source: expected one of 'synthetic', 'mimic3'"),
        (
            {"source": "tables", "root": "x", "cohort": {"protocol": "published"}},
            "published is defined on MIMIC's tables alone",
        ),
        (
            {"source": "tables", "systems": {"diagnosis": "icd8"}},
            "data.systems.diagnosis: expected",
        ),
        ({"source": "mimic3", "root": "/nowhere"}, r"/nowhere: expected a folder with ADMISSIONS"),
    ],
)
def test_bad_settings_are_refused(values, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        preparation.locate(from_mapping(DataConfig, values, "data"), tmp_path)


def test_other_code_systems_of_a_users_table_make_the_cohort_anew(hospitals, tmp_path, capsys):
    rows = [
        f"{p},{p}-{v},2020-0{v + 1}-01,{kind},{code}"
        for p in range(6)
        for v in range(3)
        for kind, code in (("diagnosis", "I10"), ("medication", "A02BC01"))
    ]
    events = tmp_path / "events.csv"
    events.write_text("\n".join(["patient,visit,time,kind,code", *rows]) + "\n")
    drugs = hospitals.write_drugs(tmp_path / "drugs")
    given = DataConfig(source="tables", root=str(events), drugs=str(drugs))
    changed = dataclasses.replace(given, systems=Systems(diagnosis="icd9"))
    for config, code in ((given, "icd10:I10"), (changed, "icd9:I10")):
        prepare(config, tmp_path / "exp")
        assert "skipped" not in capsys.readouterr().out
        made = cohort.load(tmp_path / "exp" / "cohort")
        assert made.vocabularies["diagnosis"] == (code,)


def test_medications_in_ndc_need_a_table_of_them(config, tmp_path):
    (tmp_path / "drugs" / "ndc_to_atc3.csv").unlink()
    message = r"drugs: expected ndc_to_atc3.csv .* because medications are in NDC"
    with pytest.raises(ConfigError, match=message):
        preparation.locate(config, tmp_path)


@pytest.mark.parametrize("source", ["synthetic", "mimic3", "mimic4", "tables"])
def test_the_yaml_spells_the_defaults_out(source):
    folder = paths.CONF_DIR / "data"
    values = yaml.safe_load((folder / f"{source}.yaml").read_text())
    assert values.pop("defaults") == [{"cohort": "default"}]
    spelled = yaml.safe_load((folder / "cohort" / "default.yaml").read_text())
    assert set(spelled) == {field.name for field in dataclasses.fields(CohortConfig)}
    built = from_mapping(DataConfig, values | {"cohort": spelled}, "data")
    assert built == DataConfig(source=source)
    if source == "synthetic":
        names = {field.name for field in dataclasses.fields(SyntheticConfig)}
        assert set(values["generator"]) == names
