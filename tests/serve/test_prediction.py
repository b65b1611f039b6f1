"""Batch scoring of files: the endpoint's answers, whole or not at all, for the owner alone."""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafemed import artifacts, cohort
from cafemed.bundle import Bundle
from cafemed.codes import CodeLists
from cafemed.errors import ArtifactError, ConfigError, DataError
from cafemed.laboratory import Laboratory
from serve import prediction, selection
from serve.prediction import PredictConfig
from serve.recommender import Recommender
from serve.schema import RecommendRequest


@pytest.fixture(scope="module")
def recommender(served: Bundle) -> Recommender:
    return Recommender(served, 7)


def invent(bundle: Bundle, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Patients of a request; some codes are unknown."""
    rng = np.random.default_rng(seed)

    def codes(kind: str, most: int) -> list[dict[str, str]]:
        names = [*bundle.vocabularies[kind], "atc:Z99Z" if kind == "medication" else "icd9:V99"]
        chosen = rng.permutation(len(names))[: rng.integers(0, most + 1)]
        return [dict(zip(("system", "code"), names[i].split(":"), strict=True)) for i in chosen]

    return [
        {
            "sex": ["female", "male", "unknown"][i % 3],
            "age": float(rng.integers(20, 90)),
            "visits": [
                {
                    "diagnoses": codes("diagnosis", 9),
                    "procedures": codes("procedure", 4),
                    "medications": codes("medication", 9),
                }
                for _ in range(rng.integers(1, 5))
            ],
        }
        for i in range(number)
    ]


def write(path: Path, patients: list[dict[str, Any]], rows_of_a_group: int = 100) -> Path:
    rows = [{"patient": f"p{i}", **patient} for i, patient in enumerate(patients)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_of_a_group)
    return path


def config(tmp_path: Path, **changed: Any) -> PredictConfig:
    settings = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out.parquet")}
    return PredictConfig(**(settings | changed))


def assert_answered(path: Path, recommender: Recommender, patients: list[dict[str, Any]]) -> None:
    """Compares a result with what the endpoint answers to each patient alone."""
    found = pq.read_table(path)
    names = json.loads(found.schema.metadata[b"medications"])
    assert names == list(recommender.bundle.vocabularies["medication"])
    rows = found.to_pylist()
    assert [row["patient"] for row in rows] == [f"p{i}" for i in range(len(patients))]
    for row, patient in zip(rows, patients, strict=True):
        request = RecommendRequest.model_validate({"patients": [patient]})
        if recommender.encode(request)[0].unknown_share > 0.5:
            assert row["medications"] is None
            continue
        (answer,) = recommender.recommend(request)
        assert row["medications"] == [
            {"system": m.system, "code": m.code, "probability": m.probability}
            for m in answer.medications
        ]
        assert row["ddi_rate"] == answer.ddi_rate
        assert row["unknown_codes"] == len(answer.unknown_codes)
        if "probabilities" in row:
            (encoded,) = recommender.encode(request)
            scores = recommender.probabilities([encoded])[0]
            assert np.float32(row["probabilities"]).tobytes() == scores.tobytes()


@pytest.mark.parametrize("size", [1000, 17])
def test_the_answers_are_those_of_the_endpoint_bit_for_bit(
    recommender: Recommender, tmp_path: Path, size: int
):
    patients = invent(recommender.bundle, 130)
    write(tmp_path / "in.parquet", patients, 50)
    asked = config(tmp_path, batch_size=size, probabilities=True)
    assert prediction.predict(recommender, asked) == 130
    assert_answered(tmp_path / "out.parquet", recommender, patients)
    assert stat.S_IMODE((tmp_path / "out.parquet").stat().st_mode) == 0o600
    metadata = pq.read_schema(tmp_path / "out.parquet").metadata
    assert (metadata[b"model"], metadata[b"version"]) == (b"cafemed", b"7")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_a_bad_row_late_in_the_file_leaves_the_output_as_it_was(
    recommender: Recommender, tmp_path: Path
):
    patients = invent(recommender.bundle, 30)
    patients[21]["age"] = 999.0
    write(tmp_path / "in.parquet", patients, 8)
    (tmp_path / "out.parquet").write_text("before")
    with pytest.raises(DataError, match="row 22: column age: expected years") as told:
        prediction.predict(recommender, config(tmp_path, batch_size=5))
    assert "999" not in str(told.value)
    assert (tmp_path / "out.parquet").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_what_is_no_table_of_patients_is_refused(recommender: Recommender, tmp_path: Path):
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as told:
            prediction.predict(recommender, config(tmp_path))
        assert "\n" not in str(told.value)
        assert not (tmp_path / "out.parquet").exists()

    refused("expected a Parquet file or a cohort folder, found none")
    (tmp_path / "in.parquet").write_text("no Parquet")
    refused("not a Parquet file")
    pq.write_table(pa.table({"patient": ["a"], "allergies": ["x"]}), tmp_path / "in.parquet")
    refused("column allergies: unknown column")
    whole = write(tmp_path / "in.parquet", invent(recommender.bundle, 3))
    pq.write_table(pq.read_table(whole).slice(0, 0), whole)
    refused("holds no patient")
    write(whole, invent(recommender.bundle, 400), 100)
    content = bytearray(whole.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    whole.write_bytes(content)
    refused("damaged after row|row")


def test_a_patient_who_is_mostly_unknown_gets_no_recommendation(
    recommender: Recommender, tmp_path: Path
):
    strange = [{"system": "icd9", "code": f"V{i}"} for i in range(3)]
    known = [{"system": "icd9", "code": f"401{i}"} for i in range(3)]
    codes = [strange, strange + known, strange + known[:2], []]
    write(tmp_path / "in.parquet", [{"visits": [{"diagnoses": each}]} for each in codes])
    prediction.predict(recommender, config(tmp_path, probabilities=True))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["medications"] is None for row in rows] == [True, False, True, False]
    assert [row["ddi_rate"] is None for row in rows] == [True, False, True, False]
    assert [row["probabilities"] is None for row in rows] == [True, False, True, False]
    assert [row["unknown_codes"] for row in rows] == [3, 3, 3, 0]
    prediction.predict(recommender, config(tmp_path, max_unknown_share=1.0))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert all(row["medications"] is not None for row in rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": None}, "predict.input: expected an absolute path, got None"),
        ({"output": "out.parquet"}, "predict.output: expected an absolute path, got out.parquet"),
    ],
)
def test_paths_are_absolute(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        prediction.checked_paths(config(tmp_path, **changed))


def test_an_output_that_cannot_be_is_refused(recommender: Recommender, tmp_path: Path):
    source = write(tmp_path / "in.parquet", invent(recommender.bundle, 2))
    (tmp_path / "file").write_text("")
    for output in (source, tmp_path, tmp_path / "file" / "out.parquet"):
        with pytest.raises(ConfigError, match=r"predict\.output: "):
            prediction.predict(recommender, config(tmp_path, output=str(output)))
    assert pq.read_table(source).num_rows == 2


def test_a_full_disk_leaves_nothing(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "in.parquet", invent(recommender.bundle, 2))

    def full(*_given: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(ConfigError, match=r"cannot write .*out.parquet: No space left on device"):
        prediction.predict(recommender, config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_only_a_batch_is_in_memory_at_a_time(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One row group of many patients is read and written piece by piece."""
    patients = invent(recommender.bundle, 40)
    write(tmp_path / "in.parquet", patients * 10, 400)
    sizes, real = [], prediction.Scorer.probabilities

    def probabilities(self: prediction.Scorer, some: Any) -> Any:
        sizes.append(len(some))
        return real(self, some)

    monkeypatch.setattr(prediction.Scorer, "probabilities", probabilities)
    assert prediction.predict(recommender, config(tmp_path, batch_size=64)) == 400
    assert max(sizes) == 64
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == len(sizes)


def test_the_rate_of_interactions_is_that_of_the_selection(
    recommender: Recommender, tmp_path: Path
):
    write(tmp_path / "in.parquet", invent(recommender.bundle, 1))
    asked = config(tmp_path)
    source = prediction.open_source(tmp_path / "in.parquet", recommender, 10)
    predictor = prediction.Predictor(recommender, source, asked)
    chosen = np.random.default_rng(0).random((50, 12)) < 0.4
    chosen[:2] = False
    chosen[1, 3] = True
    ddi = recommender.bundle.ddi
    expected = [
        selection.rate(int(np.triu(ddi[np.ix_(row, row)], 1).sum()), int(row.sum()))
        for row in chosen
    ]
    assert predictor._rates(chosen).tolist() == expected


def make_cohort(bundle: Bundle, patients: list[dict[str, Any]], folder: Path) -> str:
    """A cohort of the same patients, all of whose codes are known; gives its fingerprint."""
    visits = [visit for patient in patients for visit in patient["visits"]]

    def lists(kind: str, field: str) -> CodeLists:
        names = bundle.vocabularies[kind]
        written = [[f"{c['system']}:{c['code']}" for c in visit[field]] for visit in visits]
        return CodeLists.of([[names.index(name) for name in names_] for names_ in written])

    medications = lists("medication", "medications")
    made = cohort.Cohort(
        patient_offsets=np.concatenate([[0], np.cumsum([len(p["visits"]) for p in patients])]),
        patient_ids=tuple(f"p{i}" for i in range(len(patients))),
        visit_ids=tuple(f"v{i}" for i in range(len(visits))),
        admitted=np.full(len(visits), "2101-01-01T10:00:00", "datetime64[s]"),
        diagnoses=lists("diagnosis", "diagnoses"),
        procedures=lists("procedure", "procedures"),
        medications=medications,
        targets=medications,
        vocabularies=bundle.vocabularies,
        laboratory=Laboratory.none(len(visits)),
        ddi=bundle.ddi,
        split=np.zeros(len(patients), np.int8),
        sex=np.array([cohort.SEXES.index(p["sex"]) for p in patients], np.int8),
        age=np.array([p["age"] for p in patients for _ in p["visits"]], np.float32),
    )
    with artifacts.new_folder(folder, "cohort", {"x": "1"}, {"inputs": "current"}) as (partial, _):
        cohort.write(made, partial)
    return artifacts.read_manifest(folder, "cohort").fingerprint


def test_a_cohort_is_answered_as_the_requests_of_its_patients(served: Bundle, tmp_path: Path):
    patients = invent(served, 45, seed=3)
    for visit in (visit for patient in patients for visit in patient["visits"]):
        for codes in visit.values():
            codes[:] = [code for code in codes if code["code"] not in ("V99", "Z99Z")]
    fingerprint = make_cohort(served, patients, tmp_path / "cohort")
    recommender = Recommender(dataclasses.replace(served, sources={"cohort": fingerprint}), 1)
    asked = config(tmp_path, input=str(tmp_path / "cohort"), batch_size=16, probabilities=True)
    assert prediction.predict(recommender, asked) == 45
    assert_answered(tmp_path / "out.parquet", recommender, patients)
    with pytest.raises(ArtifactError, match="made from an input with fingerprint"):
        prediction.predict(Recommender(served, 1), asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data's own settings
def test_workers_on_ray_give_the_same_file(
    served: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cafemed import cluster, registry

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = registry.resolve(root / "registry" / "tiny", 1)
    recommender = Recommender.load(folder, 1)
    patients = invent(served, 90)
    write(tmp_path / "in.parquet", patients, 20)
    asked = config(tmp_path, batch_size=16, workers=2, num_cpus=0.5, probabilities=True)
    with cluster.ray_cluster(2):
        assert prediction.predict_on_ray(recommender, folder, asked) == 90
        assert_answered(tmp_path / "out.parquet", recommender, patients)
