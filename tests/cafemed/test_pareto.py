"""The Pareto front against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cafemed import pareto

COORDINATES = st.one_of(st.integers(0, 4).map(float), st.just(float("nan")), st.floats(0, 1))


def is_beaten(point: tuple[float, float], other: tuple[float, float]) -> bool:
    at_least = other[0] >= point[0] and other[1] <= point[1]
    return at_least and (other[0] > point[0] or other[1] < point[1])


@given(st.lists(st.tuples(COORDINATES, COORDINATES), max_size=30))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]):
    found = pareto.front([p[0] for p in points], [p[1] for p in points])
    known = [p for p in points if not any(np.isnan(p))]
    for point, on_front in zip(points, found.tolist(), strict=True):
        assert on_front == (point in known and not any(is_beaten(point, q) for q in known))


def test_none_stands_for_a_trial_without_metrics():
    values = np.array([0.5, None, 0.4], np.float64)
    assert pareto.front(values, [0.1, 0.0, 0.2]).tolist() == [True, False, False]
