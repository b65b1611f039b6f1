import dataclasses

import numpy as np
import pytest

from cafemed import artifacts, cohort, experiment, graphs
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError
from cafemed.laboratory import Laboratory


def _cohort():
    lists = CodeLists.of([[0], [1], [0, 1]])
    return Cohort(
        patient_offsets=np.array([0, 2, 3]),
        patient_ids=("p1", "p2"),
        visit_ids=("v1", "v2", "v3"),
        admitted=np.array(["2020-01-01", "2020-02-01", "2020-01-01"], "datetime64[s]"),
        diagnoses=lists,
        procedures=CodeLists.of([[0], [0], []]),
        medications=lists,
        targets=lists,
        vocabularies={
            "diagnosis": ("icd9:1", "icd9:2"),
            "procedure": ("icd9:3",),
            "medication": ("atc:A01A", "atc:B02B"),
            "laboratory": ("lab:1",),
        },
        ddi=np.array([[False, True], [True, False]]),
        split=np.array([0, 1], np.int8),
        sex=np.array([1, 2], np.int8),
        age=np.array([50, 51, 60], np.float32),
        laboratory=Laboratory(CodeLists.of([[0], [], [0]]), np.array([7.1, 7.5], np.float32)),
        molecules={"atc:B02B": ("C", "CO")},
    )


ROWS = ("diagnosis/icd9:1", "diagnosis/icd9:2", "procedure/icd9:3")
EFFECTS = graphs.EffectTable.known(
    codes=ROWS,
    medications=("medication/atc:A01A", "medication/atc:B02B"),
    effect=np.arange(6, dtype=np.float32).reshape(3, 2) / 10,
    standard_error=np.full((3, 2), np.nan, np.float32),
    estimator="raw",
)
GRAPH = graphs.CausalGraph(
    nodes=ROWS,
    source=np.array([0], np.int32),
    target=np.array([1], np.int32),
    directed=np.array([True]),
    stability=np.array([np.nan], np.float32),
    support=np.array([1], np.int64),
    strength=np.array([np.nan], np.float32),
)


def _write(folder, effects=EFFECTS):
    with artifacts.new_folder(folder / "cohort", "cohort", {}, {}, private=True) as (partial, _):
        cohort.write(_cohort(), partial)
    sources = {"cohort": artifacts.read_manifest(folder / "cohort", "cohort").fingerprint}
    with artifacts.new_folder(folder / "graph", "graph", sources, {}) as (partial, _):
        graphs.write_graph(GRAPH, partial / "graph.parquet")
        graphs.write_effects(effects, partial / "effects.npz")


def test_everything_of_the_earlier_stages_comes_together(tmp_path):
    _write(tmp_path)
    got = experiment.load_inputs(tmp_path)
    assert got.cohort.patient_ids == ("p1", "p2")
    assert got.graph.num_edges == 1
    assert got.arrays.num_visits == 3
    # Visit 3 has both ends of the edge.
    assert got.arrays.classes[2, 0].tolist() == [graphs.CAUSE, graphs.EFFECT]
    np.testing.assert_array_equal(got.inputs.effects, EFFECTS.effect)
    assert got.inputs.sizes == (2, 1, 2)
    assert got.inputs.num_laboratory_items == 1
    assert got.inputs.molecules.tolist() == [[False, False], [True, True]]
    assert got.arrays.laboratory_counts.tolist() == [1, 0, 1]
    assert got.sources == experiment.read_sources(tmp_path)
    assert got.sources["cohort"] == got.cohort.fingerprint


def test_a_graph_of_another_cohort_is_refused_with_both_fingerprints(tmp_path):
    _write(tmp_path)
    old = artifacts.read_manifest(tmp_path / "cohort", "cohort").fingerprint
    with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {"seed": 1}) as (partial, _):
        cohort.write(_cohort(), partial)
    new = artifacts.read_manifest(tmp_path / "cohort", "cohort").fingerprint
    with pytest.raises(ArtifactError, match=f"graph: .*{old[:12]}.*{new[:12]}"):
        experiment.load_inputs(tmp_path)


@pytest.mark.parametrize("stage", ["cohort", "graph"])
def test_a_missing_stage_is_named(tmp_path, stage):
    _write(tmp_path)
    (tmp_path / stage).rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"{stage}/manifest.json: .* found no file"):
        experiment.load_inputs(tmp_path)


@pytest.mark.parametrize("name", ["graph.parquet", "effects.npz"])
def test_an_edited_file_is_refused(tmp_path, name):
    _write(tmp_path)
    path = tmp_path / "graph" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=f"{name}: .* truncated or edited"):
        experiment.load_inputs(tmp_path)


def test_effects_of_another_vocabulary_are_refused(tmp_path):
    other = (ROWS[1], ROWS[0], ROWS[2])
    _write(tmp_path, dataclasses.replace(EFFECTS, codes=other))
    with pytest.raises(ArtifactError, match="effects do not belong to this vocabulary"):
        experiment.load_inputs(tmp_path)
