"""Many patients at once: the tensors and the bits of the endpoint, whatever the neighbours."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed.batches import input_adjacencies
from cafemed.bundle import Bundle
from cafemed.codes import CodeLists
from cafemed.laboratory import Laboratory
from serve import bulk
from serve.batching import Edges, batch_of, kinds_of, shape_of
from serve.bulk import Patients, Scorer
from serve.encoding import EncodedPatient
from serve.recommender import Recommender


def draw(bundle: Bundle, number: int, seed: int, most_visits: int = 6) -> Patients:
    """Patients with many and few visits and codes; some visits and lists are empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most_visits + 1, number) * rng.choice([1, 1, 1, 3], number)
    sizes = [len(bundle.vocabularies[k]) for k in ("diagnosis", "procedure", "medication")]
    num_items = bundle.preprocessing.scaling.num_items
    lists: list[list[list[int]]] = [[], [], []]
    items: list[list[int]] = []
    for length in lengths:
        for t in range(length):
            for k, size in enumerate(sizes):
                most = int(rng.choice([0, 3, size])) if k < 2 or t else 0
                lists[k].append(rng.permutation(size)[: rng.integers(0, most + 1)].tolist())
            items.append(sorted(rng.permutation(num_items)[: rng.integers(0, 4)].tolist()))
    measured = CodeLists.of(items)
    known = (CodeLists.of(lists[0]), CodeLists.of(lists[1]), CodeLists.of(lists[2]))
    return Patients(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        known=known,
        sex=rng.integers(0, 3, number).astype(np.int8),
        age=rng.choice([np.nan, 71.0, 30.5], number).astype(np.float32),
        laboratory=Laboratory(measured, rng.normal(80, 30, len(measured.ids)).astype(np.float32)),
        unknown=np.zeros(number, np.int64),
        unknown_share=np.zeros(number),
    )


def test_the_bits_of_the_endpoint_for_every_model(served_model: Bundle):
    recommender = Recommender(served_model, 1)
    patients = draw(served_model, 150, 1)
    expected = recommender.probabilities([patients[p] for p in range(len(patients))])
    np.testing.assert_array_equal(Scorer(recommender).probabilities(patients), expected)


def test_and_where_a_kind_has_no_codes(served_without: Bundle):
    recommender = Recommender(served_without, 1)
    patients = draw(served_without, 20, 2)
    expected = recommender.probabilities([patients[p] for p in range(len(patients))])
    np.testing.assert_array_equal(Scorer(recommender).probabilities(patients), expected)


def test_large_runs_are_made_and_checked(served: Bundle, monkeypatch: pytest.MonkeyPatch):
    recommender = Recommender(served, 1)
    sizes = []
    real = recommender.score

    def score(batch: object, last: torch.Tensor) -> object:
        sizes.append(len(last))
        return real(batch, last)  # type: ignore[arg-type]

    patients = draw(served, 260, 3, most_visits=1)
    expected = recommender.probabilities([patients[p] for p in range(len(patients))])
    monkeypatch.setattr(recommender, "score", score)
    np.testing.assert_array_equal(Scorer(recommender).probabilities(patients), expected)
    assert max(sizes) == 64  # four times the endpoint's 16
    assert sizes.count(16) >= 4  # which the first of them was compared with


def test_large_runs_with_other_bits_are_not_used(served: Bundle, monkeypatch: pytest.MonkeyPatch):
    """A torch build whose larger products round differently."""
    recommender = Recommender(served, 1)
    patients = draw(served, 400, 4, most_visits=1)
    expected = recommender.probabilities([patients[p] for p in range(len(patients))])
    real, large = recommender.score, []

    def score(batch: object, last: torch.Tensor) -> object:
        rows = real(batch, last)  # type: ignore[arg-type]
        if len(last) > 16:
            large.append(len(last))
            rows[-1, -1] = np.nextafter(rows[-1, -1], np.float32(1))
        return rows

    monkeypatch.setattr(recommender, "score", score)
    scorer = Scorer(recommender)
    for _ in range(2):
        np.testing.assert_array_equal(scorer.probabilities(patients), expected)
    assert len(large) == len(set(scorer._times)) > 0  # tried once a shape, and never again
    assert set(scorer._times.values()) == {1}


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), number=st.integers(1, 12))
def test_shapes_and_tensors_are_those_of_the_endpoint(served: Bundle, seed: int, number: int):
    patients = draw(served, number, seed)
    kinds = kinds_of(served.vocabularies)
    adjacencies = input_adjacencies(served.graph, served.vocabularies)
    scorer = Scorer(Recommender(served, 1))
    seen = []

    arrays = bulk.visit_arrays(
        patients.known,
        None,
        patients.offsets,
        served.graph,
        served.vocabularies,
        patients.sex,
        np.repeat(patients.age, np.diff(patients.offsets)),
        served.preprocessing.scaling,
        patients.laboratory,
        adjacencies,
    )
    table = bulk._Table(arrays, *bulk._used(arrays))
    for shape, members in bulk._by_shape(table, scorer._kinds):
        seen += members.tolist()
        one_by_one: list[EncodedPatient] = [patients[p] for p in members]
        assert {shape_of(patient, kinds) for patient in one_by_one} == {shape}
        run = members[: shape.patients]
        expected = batch_of(
            one_by_one[: shape.patients],
            shape,
            served.vocabularies,
            served.preprocessing.scaling,
            [Edges.of(adjacency) for adjacency in adjacencies],
        )
        repeated = np.concatenate([run, np.repeat(run[:1], shape.patients - len(run))])
        batch = bulk._batch(table, shape, repeated, served.preprocessing.scaling.num_items)
        for field in dataclasses.fields(batch):
            got, wanted = getattr(batch, field.name), getattr(expected, field.name)
            if field.name == "classes":  # what lies in the padding means nothing
                exists = torch.arange(shape.width) < batch.counts[..., None]
                own = torch.arange(shape.steps) < torch.tensor(
                    [patients[p].num_visits for p in repeated]
                ).view(-1, 1)
                exists &= own.reshape(-1, 1, 1)
                got, wanted = got[exists], wanted[exists]
            if isinstance(got, torch.Tensor):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
            else:
                assert got == wanted
    assert sorted(seen) == list(range(number))


def test_one_patient_as_the_endpoint_has_it():
    patients = Patients(
        offsets=np.array([0, 1, 3]),
        known=(
            CodeLists.of([[3], [1, 0], []]),
            CodeLists.of([[], [2], [1]]),
            CodeLists.of([[], [], [5, 4]]),
        ),
        sex=np.array([1, 0], np.int8),
        age=np.array([50, np.nan], np.float32),
        laboratory=Laboratory(CodeLists.of([[], [0, 2], []]), np.array([1.5, 2], np.float32)),
        unknown=np.zeros(2, np.int64),
        unknown_share=np.zeros(2),
    )
    assert len(patients) == 2
    found = patients[1]
    assert found.known == (((1, 0), ()), ((2,), (1,)), ((), (5, 4)))
    assert (found.sex, math.isnan(found.age)) == (0, True)
    assert found.laboratory == (((0, 1.5), (2, 2.0)), ())
