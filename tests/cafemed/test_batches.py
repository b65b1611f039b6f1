"""Arrays and batches against plain loops over lists."""

import dataclasses

import numpy as np
import pytest
import torch

from cafemed import scaling as scalings
from cafemed import suppression
from cafemed.batches import (
    ModelInputs,
    cohort_arrays,
    collate,
    model_inputs,
    visit_arrays,
)
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError
from cafemed.graphs import ORPHAN, CausalGraph, EffectTable
from cafemed.laboratory import Laboratory
from cafemed.scaling import Scaling

VOCABULARIES = {
    "diagnosis": tuple(f"icd9:{i}" for i in range(14)),
    "procedure": tuple(f"icd9:{i}" for i in range(9)),
    "medication": tuple(f"atc:A{i:02}B" for i in range(7)),
    "laboratory": ("lab:1", "lab:2", "lab:3", "lab:4"),
}
SIZES = (14, 9, 7)
VISITS = (1, 4, 2, 1, 3)
LABORATORY = ("laboratory_items", "laboratory_values", "laboratory_counts")
TENSORS = ("codes", "counts", "classes", "lengths", "targets", "sex", "age", "slots", *LABORATORY)


def _lists(rng, size, low, high):
    return [rng.choice(size, rng.integers(low, high), replace=False).tolist() for _ in range(11)]


@pytest.fixture(scope="module")
def plain():
    """Diagnoses, procedures, medications and targets of eleven visits as lists."""
    rng = np.random.default_rng(2)
    lists = {
        "diagnoses": _lists(rng, 14, 1, 8),
        "procedures": _lists(rng, 9, 0, 5),
        "medications": _lists(rng, 7, 1, 6),
    }
    lists["targets"] = [codes[: 1 + len(codes) // 2] for codes in lists["medications"]]
    return lists


@pytest.fixture(scope="module")
def cohort(plain):
    offsets = np.concatenate([[0], np.cumsum(VISITS)])
    rng = np.random.default_rng(3)
    return Cohort(
        patient_offsets=offsets,
        patient_ids=tuple(f"p{i}" for i in range(5)),
        visit_ids=tuple(f"v{i}" for i in range(11)),
        admitted=np.arange(11).astype("datetime64[s]"),
        vocabularies=VOCABULARIES,
        ddi=np.zeros((7, 7), np.bool_),
        split=np.zeros(5, np.int8),
        sex=np.array([0, 1, 2, 1, 2], np.int8),
        age=rng.uniform(20, 80, 11).astype(np.float32),
        **{name: CodeLists.of(lists) for name, lists in plain.items()},
    )


@pytest.fixture(scope="module")
def graph():
    """Random edges within and between kinds, some undirected; not every code is a node."""
    rng = np.random.default_rng(4)
    kinds = ("diagnosis", "procedure", "previous_medication", "medication")
    codes = {**VOCABULARIES, "previous_medication": VOCABULARIES["medication"]}
    nodes = sorted(f"{kind}/{code}" for kind in kinds for code in codes[kind][:-1])
    a, b = np.nonzero(np.triu(rng.random((len(nodes), len(nodes))) < 0.25, 1))
    return CausalGraph(
        nodes=tuple(nodes),
        source=a.astype(np.int32),
        target=b.astype(np.int32),
        directed=rng.random(len(a)) < 0.8,
        stability=np.full(len(a), np.nan, np.float32),
        support=np.ones(len(a), np.int64),
        strength=np.full(len(a), np.nan, np.float32),
    )


@pytest.fixture(scope="module")
def measured():
    """Laboratory values of eleven visits: item → value."""
    rng = np.random.default_rng(8)
    numbers = [2, 0, 3, 4, 0, 0, 1, 2, 3, 0, 1]
    return [
        {int(i): float(np.float32(rng.normal(10 * i, 1 + i))) for i in rng.permutation(4)[:n]}
        for n in numbers
    ]


@pytest.fixture(scope="module")
def measured_cohort(cohort, measured):
    values = [x for visit in measured for x in visit.values()]
    laboratory = Laboratory(CodeLists.of([list(v) for v in measured]), np.array(values, np.float32))
    return dataclasses.replace(
        cohort, laboratory=laboratory, split=np.array([0, 0, 1, 2, 0], np.int8)
    )


@pytest.mark.parametrize("patients", [[0], [3], [1, 3], [4, 2, 0, 1]])
@pytest.mark.parametrize("inputs", ["current", "history"])
def test_a_batch_has_scaled_ages_and_laboratory_values(
    patients, inputs, measured_cohort, measured, graph, monkeypatch
):
    monkeypatch.setattr(suppression, "FEWEST", 2)  # so that ages are scaled
    cohort = dataclasses.replace(measured_cohort, inputs=inputs)
    scaling = scalings.fit(cohort)
    batch = collate(cohort_arrays(cohort, graph), np.array(patients))
    visits = cohort.visits_of(np.array(patients))
    starts = cohort.patient_offsets.tolist()
    expected = [
        measured[v] if inputs == "current" else {} if v in starts else measured[v - 1]
        for v in visits.tolist()
    ]
    width = max(len(visit) for visit in expected)
    assert batch.laboratory_items.shape == batch.laboratory_values.shape == (len(visits), width)
    assert batch.laboratory_counts.tolist() == [len(visit) for visit in expected]
    for row, visit in enumerate(expected):
        assert batch.laboratory_items[row, : len(visit)].tolist() == list(visit)
        for place, (item, value) in enumerate(visit.items()):
            z = (value - scaling.laboratory_mean[item]) / scaling.laboratory_sd[item]
            z = min(max(z, -10), 10)
            assert batch.laboratory_values[row, place].item() == pytest.approx(z, rel=1e-6)
        assert torch.isnan(batch.laboratory_values[row, len(visit) :]).all()
        assert not batch.laboratory_items[row, len(visit) :].any()
        z = (float(cohort.age[visits[row]]) - scaling.age_mean) / scaling.age_sd
        assert batch.age[row].item() == pytest.approx(z, rel=1e-6)
    assert batch.laboratory_items.dtype == batch.laboratory_counts.dtype == torch.int64
    assert batch.laboratory_values.dtype == torch.float32


def test_what_was_measured_has_no_influence_on_the_other_arrays(cohort, measured_cohort, graph):
    ours, theirs = cohort_arrays(cohort, graph), cohort_arrays(measured_cohort, graph)
    for name in ("codes", "counts", "classes", "targets", "patient_offsets", "sex"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.laboratory_items.shape == (11, 0)


def test_laboratory_items_outside_the_scaling_are_refused(graph):
    empty = CodeLists.of([[]])
    laboratory = Laboratory(CodeLists.of([[1]]), np.ones(1, np.float32))
    arguments = (np.array([0, 1]), graph, VOCABULARIES, np.array([0]), np.array([np.nan]))
    scaling = Scaling(0.0, 1.0, (0.0,), (1.0,))
    with pytest.raises(ArtifactError, match=r"laboratory codes: expected indices in 0 \.\. 0"):
        visit_arrays((empty, empty, empty), None, *arguments, scaling, laboratory)
    two = Laboratory.none(2)
    with pytest.raises(ArtifactError, match="expected 1 laboratory lists, one a visit, got 2"):
        visit_arrays((empty, empty, empty), None, *arguments, scaling, two)


def _seen(plain, visit):
    """What a model may see at a visit: ids of the three modalities."""
    starts = np.concatenate([[0], np.cumsum(VISITS)])
    previous = [] if visit in starts else plain["medications"][visit - 1]
    return plain["diagnoses"][visit], plain["procedures"][visit], previous


def _class(graph, kind, codes, code):
    edges = {
        (graph.nodes[s], graph.nodes[t])
        for s, t, d in zip(graph.source, graph.target, graph.directed, strict=True)
        if d
    }
    names = [f"{kind}/{VOCABULARIES[kind.removeprefix('previous_')][c]}" for c in codes]
    own = f"{kind}/{VOCABULARIES[kind.removeprefix('previous_')][code]}"
    incoming = any((other, own) in edges for other in names)
    outgoing = any((own, other) in edges for other in names)
    return {(False, True): 0, (False, False): 1, (True, True): 2, (True, False): 3}[
        (incoming, outgoing)
    ]


def test_arrays_hold_what_each_visit_may_see(cohort, graph, plain):
    arrays = cohort_arrays(cohort, graph)
    assert (arrays.num_patients, arrays.num_visits, arrays.sizes) == (5, 11, SIZES)
    found = set()
    for visit in range(11):
        for k, codes in enumerate(_seen(plain, visit)):
            kind = ("diagnosis", "procedure", "previous_medication")[k]
            assert arrays.counts[visit, k] == len(codes)
            assert arrays.codes[visit, k, : len(codes)].tolist() == codes
            classes = [_class(graph, kind, codes, code) for code in codes]
            assert arrays.classes[visit, k, : len(codes)].tolist() == classes
            assert not arrays.codes[visit, k, len(codes) :].any()
            assert (arrays.classes[visit, k, len(codes) :] == ORPHAN).all()
            found.update(classes)
        assert np.flatnonzero(arrays.targets[visit]).tolist() == sorted(plain["targets"][visit])
    assert found == {0, 1, 2, 3}


def test_types_are_those_stated(cohort, graph):
    arrays = cohort_arrays(cohort, graph)
    types = {f.name: getattr(arrays, f.name).dtype for f in dataclasses.fields(arrays)[:-1]}
    assert types == {
        "codes": np.int32,
        "counts": np.int32,
        "classes": np.int8,
        "targets": np.bool_,
        "patient_offsets": np.int64,
        "sex": np.int8,
        "age": np.float32,
        "laboratory_items": np.int32,
        "laboratory_values": np.float32,
        "laboratory_counts": np.int32,
    }


def test_own_medications_never_enter_the_classes(cohort, graph):
    arrays = cohort_arrays(cohort, graph)
    last = cohort.patient_offsets[1:] - 1
    lists = [cohort.medications[v].tolist() for v in range(11)]
    for v in last:
        lists[v] = [(c + 1) % 7 for c in lists[v]]
    other = dataclasses.replace(
        cohort, medications=CodeLists.of(lists), targets=CodeLists.of(lists)
    )
    changed = cohort_arrays(other, graph)
    for name in ("codes", "counts", "classes"):
        assert np.array_equal(getattr(arrays, name), getattr(changed, name))
    assert not np.array_equal(arrays.targets, changed.targets)


def test_history_inputs_shift_all_modalities(cohort, graph, plain):
    arrays = cohort_arrays(dataclasses.replace(cohort, inputs="history"), graph)
    assert arrays.counts[0].tolist() == [0, 0, 0]
    assert arrays.codes[2, 0, : arrays.counts[2, 0]].tolist() == plain["diagnoses"][1]


@pytest.mark.parametrize("patients", [[0], [1], [3, 1], [4, 0, 2, 1, 3], [2, 2]])
def test_batch_holds_the_visits_of_its_patients_in_order(patients, cohort, graph, plain):
    arrays = cohort_arrays(cohort, graph)
    batch = collate(arrays, np.array(patients))
    visits = [(b, v) for b, p in enumerate(patients) for v in cohort.visits_of(np.array([p]))]
    assert batch.num_visits == len(visits)
    assert batch.lengths.tolist() == [VISITS[p] for p in patients]
    assert batch.num_steps == max(VISITS[p] for p in patients)
    longest = 1
    for row, (_, visit) in enumerate(visits):
        for k, codes in enumerate(_seen(plain, visit)):
            assert batch.counts[row, k] == len(codes)
            assert batch.codes[row, k, : len(codes)].tolist() == codes
            longest = max(longest, len(codes))
        assert batch.targets[row].nonzero().flatten().tolist() == sorted(plain["targets"][visit])
        assert batch.age[row] == arrays.age[visit]
        assert bool(batch.is_first[row]) == (visit in cohort.patient_offsets)
    assert batch.codes.shape == (len(visits), 3, longest)
    assert batch.sex.tolist() == cohort.sex[patients].tolist()
    for name in ("codes", "counts", "classes", "lengths", "sex", "slots"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.targets.dtype == batch.age.dtype == torch.float32


def test_pad_and_flatten_are_inverse(cohort, graph):
    batch = collate(cohort_arrays(cohort, graph), np.array([1, 0, 4]))
    rows = torch.arange(1.0, 17.0).view(8, 2)
    padded = batch.pad(rows)
    assert padded.shape == (3, 4, 2)
    expected = iter(rows)
    for b, length in enumerate((4, 1, 3)):
        for t in range(4):
            wanted = next(expected) if t < length else torch.zeros(2)
            assert torch.equal(padded[b, t], wanted)
    assert torch.equal(batch.flatten(padded), rows)


def test_pad_passes_gradients(cohort, graph):
    batch = collate(cohort_arrays(cohort, graph), np.array([1, 0]))
    rows = torch.ones(5, 2, requires_grad=True)
    (batch.flatten(batch.pad(rows)) * torch.arange(10.0).view(5, 2)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(10.0).view(5, 2))


def test_read_only_arrays_collate_without_a_warning_and_stay_as_they_are(cohort, graph):
    arrays = cohort_arrays(cohort, graph)
    for field in dataclasses.fields(arrays)[:-1]:
        getattr(arrays, field.name).flags.writeable = False
    before = arrays.targets.copy()
    batch = collate(arrays, np.arange(5))
    for name in TENSORS:
        getattr(batch, name).zero_()
    assert np.array_equal(arrays.targets, before)
    assert arrays.codes.any()


def test_a_batch_moves_whole(cohort, graph):
    batch = collate(cohort_arrays(cohort, graph), np.array([1, 0]))
    moved = batch.to("meta")
    assert (moved.num_steps, moved.sizes) == (4, SIZES)
    assert all(getattr(moved, name).is_meta for name in TENSORS)


def test_a_request_has_no_targets_and_may_have_no_codes(graph):
    empty = CodeLists.of([[]])
    arrays = visit_arrays(
        (empty, empty, empty),
        None,
        np.array([0, 1]),
        graph,
        VOCABULARIES,
        np.array([0]),
        np.array([np.nan]),
        Scaling(),
    )
    batch = collate(arrays, np.array([0]))
    assert batch.codes.shape == (1, 3, 1)
    assert batch.counts.tolist() == [[0, 0, 0]]
    assert not batch.targets.any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0], [14]], "diagnosis codes: expected indices in 0 .. 13, .* got indices from 0 to 14"),
        ([[-1], [2]], "diagnosis codes: expected indices in 0 .. 13, .* got indices from -1 to 2"),
        ([[1]], "expected 2 diagnosis lists, one a visit, got 1"),
    ],
)
def test_codes_outside_the_vocabulary_are_refused(ids, message, graph):
    good = CodeLists.of([[1], [2]])
    with pytest.raises(ArtifactError, match=message):
        visit_arrays(
            (CodeLists.of(ids), good, good),
            good,
            np.array([0, 2]),
            graph,
            VOCABULARIES,
            np.array([0]),
            np.array([40.0, 41.0]),
            Scaling(),
        )


@pytest.fixture
def effects():
    rows = [f"diagnosis/{c}" for c in VOCABULARIES["diagnosis"]]
    rows += [f"procedure/{c}" for c in VOCABULARIES["procedure"]]
    columns = [f"medication/{c}" for c in VOCABULARIES["medication"]]
    values = np.random.default_rng(0).normal(size=(23, 7)).astype(np.float32)
    return EffectTable.known(tuple(rows), tuple(columns), values, np.zeros_like(values), "raw")


def test_model_inputs_take_effects_of_this_vocabulary(effects):
    ddi = np.eye(7, k=1, dtype=np.bool_)
    inputs = model_inputs(VOCABULARIES, effects, ddi)
    assert isinstance(inputs, ModelInputs)
    assert inputs.sizes == SIZES
    assert np.array_equal(inputs.effects, effects.effect)
    assert inputs.ddi is ddi
    assert (inputs.num_laboratory_items, inputs.molecules) == (4, None)


def with_previous(effects, seed=1):
    """The table with rows of the previous medications too."""
    values = np.random.default_rng(seed).normal(size=(7, 7)).astype(np.float32)
    values = np.concatenate([effects.effect, values])
    previous = tuple(f"previous_medication/{c}" for c in VOCABULARIES["medication"])
    return EffectTable.known(
        (*effects.codes, *previous), effects.medications, values, np.zeros_like(values), "raw"
    )


def test_model_inputs_are_the_same_with_and_without_previous_medications(effects):
    ddi = np.zeros((7, 7), np.bool_)
    without = model_inputs(VOCABULARIES, effects, ddi).effects
    found = model_inputs(VOCABULARIES, with_previous(effects), ddi).effects
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((23, 7), np.float32, True)
    assert found.tobytes() == without.tobytes()
    found += 1  # of its own: no change of the table
    assert not (with_previous(effects).effect[:23] == found).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"codes": e.codes[:-1]}, "expected 30 rows, got 29"),
        (
            lambda e: {"codes": (*e.codes[:23], *e.codes[:22:-1])},
            r"rows\[23\]: expected previous_medication/atc:A00B, got previous_medication/atc:A06B",
        ),
        (
            lambda e: {"codes": (*e.codes[:23], *e.medications)},
            r"rows\[23\]: expected previous_medication/atc:A00B, got medication/atc:A00B",
        ),
        (lambda e: {"codes": (*e.codes[23:], *e.codes[:23])}, r"rows\[0\]: expected diagnosis"),
        (lambda e: {"codes": (*e.codes, "diagnosis/x")}, "expected 30 rows, got 31"),
        (lambda e: {"effect": e.effect[:23]}, r"expected shape \(30, 7\), got \(23, 7\)"),
        (lambda e: {"effect": np.where(np.arange(30)[:, None] > 28, np.inf, e.effect)}, "finite"),
    ],
)
def test_model_inputs_refuse_strange_rows_of_previous_medications(change, message, effects):
    table = with_previous(effects)
    other = dataclasses.replace(table, **change(table))
    with pytest.raises(ArtifactError, match=message):
        model_inputs(VOCABULARIES, other, np.zeros((7, 7), np.bool_))


def test_model_inputs_say_which_medication_has_which_molecule(effects):
    names = VOCABULARIES["medication"]
    molecules = {names[4]: ("CO", "N"), names[1]: ("C", "CO"), names[6]: ("N",)}
    inputs = model_inputs(VOCABULARIES, effects, np.zeros((7, 7), np.bool_), molecules)
    expected = {(1, 0), (1, 1), (4, 1), (4, 2), (6, 2)}  # columns: C, CO, N
    assert inputs.molecules.shape == (7, 3)
    assert inputs.molecules.dtype == np.bool_
    assert set(zip(*np.nonzero(inputs.molecules), strict=True)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: {"codes": (e.codes[1], e.codes[0], *e.codes[2:])},
            r"rows\[0\]: expected diagnosis/icd9:0, got diagnosis/icd9:1; run discover again",
        ),
        (lambda e: {"codes": e.codes[:-1]}, "expected 23 rows, got 22"),
        (
            lambda e: {"medications": (*e.medications[:-1], "medication/atc:X")},
            r"columns\[6\]: expected medication/atc:A06B, got medication/atc:X",
        ),
        (lambda e: {"effect": e.effect[:5]}, r"expected shape \(23, 7\), got \(5, 7\)"),
        (lambda e: {"effect": e.effect * np.nan}, "expected finite numbers, got NaN"),
    ],
)
def test_model_inputs_refuse_effects_of_another_vocabulary(change, message, effects):
    other = dataclasses.replace(effects, **change(effects))
    with pytest.raises(ArtifactError, match=message):
        model_inputs(VOCABULARIES, other, np.zeros((7, 7), np.bool_))


def test_model_inputs_refuse_interactions_of_another_size(effects):
    with pytest.raises(ArtifactError, match=r"ddi: expected shape \(7, 7\), got \(6, 6\)"):
        model_inputs(VOCABULARIES, effects, np.zeros((6, 6), np.bool_))
