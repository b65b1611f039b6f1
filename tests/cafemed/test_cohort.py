import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from cafemed import artifacts
from cafemed import cohort as cohorts
from cafemed.codes import KINDS, CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError
from cafemed.laboratory import Laboratory

PATIENTS = [3, 1, 2]  # visits of each
FIELDS = dataclasses.fields(Cohort)


def draw(seed=0, inputs="current"):
    rng = np.random.default_rng(seed)
    num_visits = sum(PATIENTS)

    def lists(size):
        return CodeLists.of(
            [
                rng.choice(size, rng.integers(0, 4), replace=False).tolist()
                for _ in range(num_visits)
            ]
        )

    upper = np.triu(rng.random((5, 5)) < 0.4, 1)
    items = lists(3)
    return Cohort(
        patient_offsets=np.concatenate([[0], np.cumsum(PATIENTS)]),
        patient_ids=("10", "20", "30"),
        visit_ids=tuple(str(v) for v in range(num_visits)),
        admitted=np.array(["2101-01-01T10:00:00"] * 5 + ["NaT"], "datetime64[s]"),
        diagnoses=lists(7),
        procedures=lists(4),
        medications=lists(5),
        targets=lists(5),
        vocabularies={
            kind: tuple(f"x:{kind}{i}" for i in range(size))
            for kind, size in zip((*KINDS, "laboratory"), (7, 4, 5, 3), strict=True)
        },
        laboratory=Laboratory(items, rng.normal(7, 3, len(items.ids)).astype(np.float32)),
        molecules={"x:medication1": ("C", "CO"), "x:medication4": ("CO",)},
        names={"diagnosis": {"x:diagnosis0": "Élan"}, "laboratory": {"x:laboratory2": "an item"}},
        ddi=upper | upper.T,
        split=np.array([0, 2, 1], np.int8),
        sex=np.array([0, 1, 2], np.int8),
        age=np.array([1.5, 2, 3, 4, 5, np.nan], np.float32),
        inputs=inputs,
    )


def save(cohort, folder, inputs="current"):
    with artifacts.new_folder(folder, "cohort", {"x": "1"}, {"inputs": inputs}, private=True) as (
        partial,
        _,
    ):
        cohorts.write(cohort, partial)
    return folder


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_a_saved_cohort_comes_back(tmp_path, inputs):
    cohort = draw(inputs=inputs)
    loaded = cohorts.load(save(cohort, tmp_path / "cohort", inputs))
    assert loaded.fingerprint == artifacts.fingerprint("cohort", {"x": "1"}, {"inputs": inputs})
    pairs = {f.name: (getattr(cohort, f.name), getattr(loaded, f.name)) for f in FIELDS}
    ours, theirs = pairs.pop("laboratory")
    pairs |= {"items": (ours.items, theirs.items), "values": (ours.values, theirs.values)}
    for name, (ours, theirs) in pairs.items():
        if isinstance(ours, CodeLists):
            assert ours.offsets.dtype == theirs.offsets.dtype
            assert ours.ids.dtype == theirs.ids.dtype
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.offsets, theirs.offsets)
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours, theirs)
        elif name != "fingerprint":
            assert ours == theirs


def test_sizes_and_visits_of_a_split():
    cohort = draw()
    assert cohort.sizes == (7, 4, 5)
    assert (cohort.num_patients, cohort.num_visits) == (3, 6)
    assert cohort.patients_of("validation").tolist() == [2]
    assert cohort.visits_of(np.array([2, 0])).tolist() == [4, 5, 0, 1, 2]
    assert cohort.visits_of(np.array([], np.int64)).tolist() == []
    assert cohort.patient_of_visit().tolist() == [0, 0, 0, 1, 2, 2]
    assert cohort.is_first_visit().tolist() == [True, False, False, True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_previous_shifts_within_a_patient(seed):
    cohort = draw(seed)
    previous = cohort.previous(cohort.medications)
    first = cohort.is_first_visit()
    for visit in range(cohort.num_visits):
        expected = [] if first[visit] else cohort.medications[visit - 1].tolist()
        assert previous[visit].tolist() == expected


def test_known_inputs_hide_the_current_visit_only_where_asked():
    current, history = draw(), draw(inputs="history")
    assert current.known_inputs()[0] is current.diagnoses
    shifted = history.known_inputs()
    assert shifted[1].ids.tolist() == history.previous(history.procedures).ids.tolist()
    assert shifted[2].ids.tolist() == history.previous(history.medications).ids.tolist()


def test_laboratory_values_are_seen_when_the_codes_are():
    current, history = draw(), draw(inputs="history")
    assert current.known_laboratory() is current.laboratory
    seen, first = history.known_laboratory(), history.is_first_visit()

    def measured(laboratory, visit):
        start, end = laboratory.items.offsets[visit : visit + 2]
        pairs = zip(laboratory.items.ids[start:end], laboratory.values[start:end], strict=True)
        return list(pairs)

    for visit in range(history.num_visits):
        expected = [] if first[visit] else measured(history.laboratory, visit - 1)
        assert measured(seen, visit) == expected


def test_a_cohort_without_laboratory_has_an_empty_list_a_visit():
    given = draw()
    left_out = {"vocabularies": {k: given.vocabularies[k] for k in KINDS}}
    cohort = dataclasses.replace(given, laboratory=Laboratory.none(0), molecules={}, **left_out)
    assert cohort.vocabularies["laboratory"] == ()
    assert cohort.laboratory.items.counts.tolist() == [0] * 6
    assert len(cohort.laboratory.values) == 0


def test_a_cohort_of_an_earlier_version_is_refused(tmp_path):
    with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {}) as (partial, _):
        cohorts.write(draw(), partial)
        visits = pq.read_table(partial / "visits.parquet")
        visits = visits.drop_columns(["laboratory_items", "laboratory_values"])
        pq.write_table(visits, partial / "visits.parquet")
    with pytest.raises(ArtifactError, match=r"made by an earlier version.*run jobs/prepare\.py"):
        cohorts.load(tmp_path / "cohort")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x:other": ["C"]}', "x:other is not in the medication vocabulary"),
        ('{"x:medication1": [3]}', "x:medication1: expected SMILES strings"),
        ('{"x:medication1": []}', "x:medication1: expected SMILES strings"),
        ('["C"]', "expected SMILES strings by medication"),
        ("{", "expected SMILES strings by medication"),
    ],
)
def test_molecules_that_are_none_are_refused(tmp_path, content, message):
    with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {}) as (partial, _):
        cohorts.write(draw(), partial)
        (partial / "molecules.json").write_text(content)
    with pytest.raises(ArtifactError, match=rf"molecules\.json: {message}"):
        cohorts.load(tmp_path / "cohort")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"diagnosis": {"x:medication1": "one"}}', "x:medication1 is not in the diagnosis voc"),
        ('{"drug": {"x:medication1": "one"}}', "unknown kind 'drug'"),
        ('{"medication": {"x:medication1": 1}}', "x:medication1: expected a name of at most 200"),
        ('{"medication": {"x:medication1": ""}}', "x:medication1: expected a name of at most 200"),
        ('{"medication": ["x:medication1"]}', "expected names by kind and code"),
        ("[", "expected names by kind and code"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, content, message):
    with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {}) as (partial, _):
        cohorts.write(draw(), partial)
        (partial / "names.json").write_text(content)
    with pytest.raises(ArtifactError, match=rf"names\.json: {message}"):
        cohorts.load(tmp_path / "cohort")


def test_a_cohort_that_was_made_before_there_were_names_has_none(tmp_path):
    with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {}) as (partial, _):
        cohorts.write(draw(), partial)
        (partial / "names.json").unlink()
    assert cohorts.load(tmp_path / "cohort").names == {}


@pytest.mark.parametrize(
    "name",
    [
        "visits.parquet",
        "vocabulary.json",
        "ddi.parquet",
        "split.parquet",
        "molecules.json",
        "names.json",
    ],
)
def test_a_truncated_or_edited_or_missing_file_is_refused(tmp_path, name):
    path = save(draw(), tmp_path / "cohort") / name
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(ArtifactError, match=rf"{name}: expected {len(content)} bytes, found"):
        cohorts.load(path.parent)
    path.write_bytes(content[:-7] + b"edited!")
    with pytest.raises(ArtifactError, match=rf"{name}: expected SHA-256 .* the file was edited"):
        cohorts.load(path.parent)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: listed in manifest.json but missing"):
        cohorts.load(path.parent)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    def save_with(change):
        with artifacts.new_folder(tmp_path / "cohort", "cohort", {}, {}) as (partial, _):
            cohorts.write(draw(), partial)
            change(partial)
        return tmp_path / "cohort"

    def other_patients(folder):
        patients = pq.read_table(folder / "split.parquet")
        pq.write_table(patients.slice(1), folder / "split.parquet")

    with pytest.raises(ArtifactError, match=r"visits\.parquet and split\.parquet list other"):
        cohorts.load(save_with(other_patients))

    def fewer_medications(folder):
        vocabulary = json.loads((folder / "vocabulary.json").read_text())
        vocabulary["medication"] = vocabulary["medication"][:1]
        (folder / "vocabulary.json").write_text(json.dumps(vocabulary))

    with pytest.raises(ArtifactError, match="is not in the medication vocabulary"):
        cohorts.load(save_with(fewer_medications))

    def no_vocabulary(folder):
        (folder / "vocabulary.json").write_text("{}")

    with pytest.raises(ArtifactError, match="expected a list of codes for each of"):
        cohorts.load(save_with(no_vocabulary))


def test_a_folder_of_another_stage_is_refused(tmp_path):
    with artifacts.new_folder(tmp_path / "graph", "graph", {}, {}):
        pass
    with pytest.raises(ArtifactError, match="expected stage 'cohort', got 'graph'"):
        cohorts.load(tmp_path / "graph")
