"""Many patients at once: the arrays and the bits of the endpoint, whatever the neighbours."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed.batches import input_adjacencies
from cafemed.bundle import Bundle
from cafemed.codes import CodeLists
from cafemed.laboratory import Laboratory
from serve import bulk
from serve.batching import Edges, Visits, lay
from serve.bulk import Patients, Scorer
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


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), number=st.integers(1, 12))
def test_what_the_model_is_given_is_the_endpoints(
    served_reading_all: Bundle, seed: int, number: int
):
    patients = draw(served_reading_all, number, seed)
    recommender = Recommender(served_reading_all, 1)
    scorer = Scorer(recommender)
    laid = scorer._laid(patients)
    chosen = np.random.default_rng(seed).permutation(number)[: number // 2 + 1]
    edges = Edges.of(input_adjacencies(served_reading_all.graph, served_reading_all.vocabularies))
    expected = lay([patients[p] for p in chosen], edges, served_reading_all.preprocessing.scaling)
    got = bulk._taken(laid, patients.offsets, chosen)
    for field in dataclasses.fields(Visits):
        mine, wanted = getattr(got, field.name), getattr(expected, field.name)
        assert mine.dtype == wanted.dtype
        np.testing.assert_array_equal(mine, wanted)


def test_runs_are_full(served: Bundle, monkeypatch: pytest.MonkeyPatch):
    recommender = Recommender(served, 1)
    patients = draw(served, 1200, 4)
    real, positions = recommender.score, []

    def score(visits: Visits, of_one: int) -> object:
        positions.append(int(visits.counts.max(1).clip(min=1).sum()))
        return real(visits, of_one)

    monkeypatch.setattr(recommender, "score", score)
    Scorer(recommender).probabilities(patients)
    assert len(positions) > 3
    assert max(positions) <= bulk._RUN_POSITIONS
    assert min(positions[:-1]) > 0.9 * bulk._RUN_POSITIONS


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
