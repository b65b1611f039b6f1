import math

import numpy as np
import pytest

from cafemed.drift import FLOOR, ScoreWindow, population_stability_index
from cafemed.reference import ScoreHistogram, score_histogram


def test_index_of_a_worked_example() -> None:
    """Three bins by hand: (0.2-0.5) ln(0.2/0.5) + (0.3-0.3) ln 1 + (0.5-0.2) ln(0.5/0.2)."""
    index = population_stability_index(np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]))
    assert index == pytest.approx(2 * 0.3 * math.log(2.5), abs=1e-12)


def test_index_is_the_sum_of_both_divergences() -> None:
    """Against scipy's relative entropy, a program of others."""
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    for _ in range(5):
        expected, observed = rng.dirichlet(np.full(20, 2.0), 2)
        both = entropy(observed, expected) + entropy(expected, observed)
        assert population_stability_index(expected, observed) == pytest.approx(both, rel=1e-9)


def test_an_empty_bin_counts_as_the_floor() -> None:
    index = population_stability_index(np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.25, 0.25]))
    by_hand = -0.25 * math.log(0.5) + (0.25 - FLOOR) * math.log(0.25 / FLOOR)
    assert index == pytest.approx(by_hand)


def test_the_window_counts_as_the_reference_does() -> None:
    """The same scores give 0, edges of bins included."""
    scores = np.concatenate([np.arange(21) / 20, np.random.default_rng(1).random(979)])
    window = ScoreWindow(score_histogram(scores), patients=20)
    for row in scores.reshape(10, 100):
        window.add(row.astype(np.float64))
    assert window.index == pytest.approx(0.0, abs=1e-12)


def test_the_window_forgets() -> None:
    reference = ScoreHistogram(np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.5]))
    window = ScoreWindow(reference, patients=100)
    low, both = np.full(4, 0.1), np.array([0.1, 0.1, 0.9, 0.9])
    for _ in range(9):
        window.add(low)
    assert window.index is None  # less than a tenth
    window.add(low)
    first = window.index
    assert first is not None
    assert first > 1
    for _ in range(89):
        window.add(both)
    mixed = window.index
    assert mixed is not None
    assert 0 < mixed < first
    for _ in range(10):
        window.add(both)
    assert window.index == pytest.approx(0.0, abs=1e-12)
