"""Baselines, against a few visits worked out by hand."""

import numpy as np
import pytest

from cafemed import baselines
from cafemed.batches import VisitArrays

# Four medications. Patients 0 and 1 train: medication 0 at every visit, 1 at half, 2 at a quarter.
TARGETS = [[0, 1], [0], [0, 1], [0, 2], [3], [2], [0, 3]]
PREVIOUS = [[], [0, 1], [], [0, 1], [], [3], [2]]
OFFSETS = np.array([0, 2, 4, 7])
TRAIN, TEST = np.array([0, 1]), np.array([2])


@pytest.fixture
def arrays() -> VisitArrays:
    num_visits = len(TARGETS)
    codes = np.zeros((num_visits, 3, 2), np.int32)
    counts = np.zeros((num_visits, 3), np.int32)
    targets = np.zeros((num_visits, 4), np.bool_)
    for v, (now, before) in enumerate(zip(TARGETS, PREVIOUS, strict=True)):
        targets[v, now] = True
        codes[v, 2, : len(before)] = before
        counts[v, 2] = len(before)
    return VisitArrays(
        codes=codes,
        counts=counts,
        classes=np.zeros((num_visits, 3, 2), np.int8),
        targets=targets,
        patient_offsets=OFFSETS,
        sex=np.zeros(3, np.int8),
        age=np.zeros(num_visits, np.float32),
        laboratory_items=np.zeros((num_visits, 0), np.int32),
        laboratory_values=np.zeros((num_visits, 0), np.float32),
        laboratory_counts=np.zeros(num_visits, np.int32),
        sizes=(1, 1, 4),
    )


def recommended(scores: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row >= 0.5).tolist() for row in scores]


def test_most_frequent_recommends_as_many_as_training_visits_have(arrays: VisitArrays):
    scores = baselines.most_frequent(arrays, TRAIN, TEST)
    # 7 medications in 4 training visits: two on average.
    assert recommended(scores) == [[0, 1]] * 3
    assert np.argsort(-scores[0]).tolist() == [0, 1, 2, 3]
    assert scores.dtype == np.float32
    assert scores.max() <= 1


def test_last_visit_repeats_it_and_falls_back_at_the_first(arrays: VisitArrays):
    scores = baselines.last_visit(arrays, TRAIN, TEST)
    assert recommended(scores) == [[0, 1], [3], [2]]
    # Within the rest, by how often it is given to training patients.
    assert np.argsort(-scores[1]).tolist() == [3, 0, 1, 2]


def test_what_everybody_gets_is_not_recommended_when_it_was_not_given(arrays: VisitArrays):
    assert arrays.targets[:4, 0].all()
    assert (baselines.last_visit(arrays, TRAIN, TEST)[1:, 0] < 0.5).all()
