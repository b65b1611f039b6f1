import dataclasses
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy import sparse

from cafemed.batches import Batch, collate, input_adjacencies, visit_arrays
from cafemed.bundle import Bundle
from cafemed.codes import KINDS, CodeLists
from cafemed.graphs import node_classes
from cafemed.scaling import Scaling
from serve.batching import Edges, batch_of, fillers_of, shape_of
from serve.encoding import EncodedPatient


def patient(sizes: list[tuple[int, int, int]]) -> EncodedPatient:
    known = tuple(tuple(tuple(range(size[k])) for size in sizes) for k in range(3))
    return EncodedPatient(
        known=known, taken=(), sex=0, age=50.0, laboratory=((),) * len(sizes), unknown=()
    )


RANDOM = np.random.default_rng(0)
PATIENTS = [
    [(0, 0, 0)],
    [(128, 128, 128)],
    [(1, 0, 0)],
    [(128, 0, 0)] * 256,
    [(128, 128, 128)] * 256,
    [(0, 0, 0)] * 256,
    *[
        [tuple(RANDOM.integers(0, most, 3).tolist()) for _ in range(RANDOM.integers(1, 40))]
        for most in RANDOM.integers(1, 129, 300)
    ],
]


def test_fillers_complete_visits_codes_and_positions_of_the_shape() -> None:
    for sizes in PATIENTS:
        shape = shape_of(patient(sizes))
        fillers = fillers_of(patient(sizes), shape)
        whole = np.concatenate([np.array(sizes), fillers])
        assert len(whole) == shape.steps
        assert whole.sum() == 7 * shape.positions // 4
        assert whole.max(1).clip(min=1).sum() == shape.positions
        assert fillers.min() >= 0
        assert fillers.max() <= shape.width


@pytest.mark.parametrize("kinds", [(0, 1, 2), (0, 2), (1, 2), (2,)])
def test_fillers_have_codes_of_kinds_with_a_vocabulary_alone(kinds: tuple[int, ...]) -> None:
    others = [k for k in range(3) if k not in kinds]
    totals = defaultdict(set)
    for sizes in PATIENTS:
        own = np.array(sizes)
        own[:, others] = 0
        chosen = patient([tuple(row) for row in own.tolist()])
        shape = shape_of(chosen, kinds)
        fillers = fillers_of(chosen, shape)
        whole = np.concatenate([own, fillers])
        assert fillers.min() >= 0
        assert fillers.max() <= shape.width
        assert not fillers[:, others].any()
        totals[shape].add((len(whole), whole.sum(), whole.max(1).clip(min=1).sum()))
    expected = {shape: {(shape.steps, shape.codes, shape.positions)} for shape in totals}
    assert totals == expected


def test_usual_patients_share_few_shapes_without_much_filling() -> None:
    usual = [patient([(12, 4, 0)] + [(12, 4, 15)] * visits) for visits in (0, 1, 2, 5)]
    shapes = [shape_of(each) for each in usual]
    assert [(shape.visits, shape.positions) for shape in shapes] == [
        (2, 32),
        (2, 32),
        (4, 64),
        (8, 128),
    ]
    assert shape_of(patient([(12, 4, 0), (16, 4, 18)])).positions == 48


def test_a_run_holds_fewer_patients_the_longer_they_are() -> None:
    assert shape_of(patient([(1, 1, 0)])).patients == 16
    assert shape_of(patient([(128, 128, 128)] * 256)).patients == 1


def test_a_run_of_few_patients_has_room_for_the_next_four() -> None:
    shape = shape_of(patient([(1, 1, 0)]))
    assert [shape.room(number) for number in (1, 4, 5, 12, 13, 16)] == [4, 4, 8, 12, 16, 16]
    assert shape_of(patient([(128, 128, 128)] * 256)).room(1) == 1


def batch(bundle: Bundle, *visits: list[tuple[int, int, int]]) -> Batch:
    patients = [patient(sizes) for sizes in visits]
    edges = [Edges.of(a) for a in input_adjacencies(bundle.graph, bundle.vocabularies)]
    shape = shape_of(patients[0])
    return batch_of(
        patients,
        shape,
        bundle.vocabularies,
        bundle.preprocessing.scaling,
        edges,
    )


def test_a_batch_has_the_same_numbers_whoever_is_in_it(served: Bundle) -> None:
    companies = [
        [[(5, 2, 0), (4, 1, 6)]],
        [[(5, 2, 0), (4, 1, 6)], [(0, 0, 0)]],
        [[(1, 0, 0)], [(6, 6, 0), (7, 6, 6)], [(2, 2, 0), (0, 0, 2)]],
    ]
    shape = shape_of(patient(companies[0][0]))
    for company in companies:
        assert {shape_of(patient(sizes)) for sizes in company} == {shape}
        made = batch(served, *company)
        assert made.codes.shape == (shape.patients * shape.steps, 3, shape.width)
        assert made.lengths.tolist() == [shape.steps] * shape.patients
        counts = made.counts.view(shape.patients, shape.steps, 3)
        assert counts.sum((1, 2)).tolist() == [7 * shape.positions // 4] * shape.patients
        assert counts.amax(2).clamp(min=1).sum(1).tolist() == [shape.positions] * shape.patients


def test_a_patients_own_visits_come_first_and_unchanged(served: Bundle) -> None:
    made = batch(served, [(5, 2, 0), (4, 1, 6)], [(1, 0, 0)])
    assert made.counts[:2].tolist() == [[5, 2, 0], [4, 1, 6]]
    assert made.codes[1, 2, :6].tolist() == list(range(6))
    steps = shape_of(patient([(1, 0, 0)])).steps
    assert made.counts[steps].tolist() == [1, 0, 0]


def measured(rows: list[tuple[tuple[int, float], ...]], age: float) -> EncodedPatient:
    plain = patient([(1, 1, 0)] * len(rows))
    return dataclasses.replace(plain, laboratory=tuple(rows), age=age)


def test_a_run_has_the_scaled_ages_and_laboratory_values_at_one_width(served: Bundle) -> None:
    scaling = Scaling(60.0, 10.0, (100.0, 7.0, 1.0, 0.0), (20.0, 0.5, 1.0, 1.0))
    patients = [
        measured([((1, 7.5), (0, 120.0)), ()], 70.0),
        measured([((2, -3.0),), ((0, 1e9), (1, 6.0), (2, 1.0))], math.nan),
    ]
    shape = shape_of(patients[0])
    edges = [Edges.of(a) for a in input_adjacencies(served.graph, served.vocabularies)]
    made = batch_of(patients, shape, served.vocabularies, scaling, edges)
    steps = shape.steps
    assert made.laboratory_items.shape == (shape.patients * steps, 4)
    expected = {0: {1: 1.0, 0: 1.0}, 1: {}, steps: {2: -4.0}, steps + 1: {0: 10.0, 1: -2.0, 2: 0.0}}
    counts = np.zeros(2 * steps, int)
    for row, values in expected.items():
        counts[row] = len(values)
        found = zip(made.laboratory_items[row], made.laboratory_values[row], strict=True)
        pairs = [(int(item), float(value)) for item, value in found][: len(values)]
        assert pairs == list(values.items())
        assert torch.isnan(made.laboratory_values[row, len(values) :]).all()
    assert made.laboratory_counts[: 2 * steps].tolist() == counts.tolist()
    assert made.age[:steps].tolist() == [1.0] * steps
    assert torch.isnan(made.age[steps : 2 * steps]).all()
    # A patient alone gets the same rows as beside another.
    alone = batch_of(patients[:1], shape, served.vocabularies, scaling, edges)
    for name in ("laboratory_items", "laboratory_values", "laboratory_counts", "age"):
        ours, theirs = getattr(alone, name)[:steps], getattr(made, name)[:steps]
        assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))


def test_classes_are_those_of_the_graph_of_a_visits_codes_alone() -> None:
    """Against the sparse products that training uses."""
    rng = np.random.default_rng(5)
    size = 60
    pairs = np.array([(i, j) for i in range(size) for j in range(size) if i < j])
    chosen = pairs[rng.random(len(pairs)) < 0.05]
    adjacency = sparse.csr_array(
        (np.ones(len(chosen), np.float32), (chosen[:, 0], chosen[:, 1])), shape=(size, size)
    )
    visits = [rng.permutation(size)[: rng.integers(0, 25)].tolist() for _ in range(40)]
    edges = Edges.of(adjacency)
    mine = [c for visit in visits for c in edges.classes(visit)]
    assert mine == node_classes(CodeLists.of(visits), adjacency).tolist()
    assert set(mine) == {0, 1, 2, 3}


def test_a_batch_is_what_training_would_be_given(served: Bundle) -> None:
    """Fillers apart, the arrays are those of cafemed.batches for the same visits."""
    vocabularies = served.vocabularies
    rng = np.random.default_rng(2)
    patients = []
    for i in range(3):
        known = tuple(
            tuple(
                tuple(rng.permutation(len(vocabularies[kind]))[: rng.integers(0, 5)].tolist())
                for _ in range(2)
            )
            for kind in KINDS
        )
        patients.append(EncodedPatient(known, (), i, 60.0 + i, laboratory=((), ()), unknown=()))
    adjacencies = input_adjacencies(served.graph, vocabularies)
    [shape] = {shape_of(one) for one in patients}
    edges = [Edges.of(adjacency) for adjacency in adjacencies]
    made = batch_of(patients, shape, vocabularies, served.preprocessing.scaling, edges)
    diagnoses, procedures, medications = (
        CodeLists.of([ids for one in patients for ids in one.known[k]]) for k in range(3)
    )
    arrays = visit_arrays(
        (diagnoses, procedures, medications),
        None,
        np.arange(4) * 2,
        served.graph,
        vocabularies,
        np.array([one.sex for one in patients], np.int8),
        np.repeat(np.array([one.age for one in patients], np.float32), 2),
        served.preprocessing.scaling,
    )
    expected = collate(arrays, np.arange(3))
    rows = [p * shape.steps + t for p in range(3) for t in range(2)]
    width = expected.codes.shape[2]
    assert torch.equal(made.codes[rows][:, :, :width], expected.codes)
    assert torch.equal(made.classes[rows][:, :, :width], expected.classes)
    assert torch.equal(made.counts[rows], expected.counts)
    assert torch.equal(made.age[rows], expected.age)
    assert made.sex[:3].tolist() == expected.sex.tolist()
