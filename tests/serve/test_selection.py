import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed import metrics
from serve import selection


def problem(
    number: int, density: float, seed: int, digits: int | None = None
) -> tuple[list[float], list[int]]:
    """Weights and conflicts of a random table in which some medications interact with many."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(1.0, number)
    common = rng.gamma(0.7, 1.0, number)
    chance = np.outer(common, common)
    pairs = np.triu(rng.random((number, number)) < chance / chance.mean() * density, 1)
    pairs |= pairs.T
    rounded = weights if digits is None else np.round(weights, digits)
    return rounded.tolist(), [sum(1 << int(j) for j in np.flatnonzero(row)) for row in pairs]


def pairs_of(kept: tuple[int, ...], conflicts: list[int]) -> int:
    return sum(conflicts[a] >> b & 1 for a, b in itertools.combinations(kept, 2))


def best_by_trying_all(
    weights: list[float], conflicts: list[int], max_rate: float, max_size: int
) -> float:
    """The largest sum of weights of all subsets, all of them tried at once."""
    number = len(weights)
    subsets = (np.arange(1 << number)[:, None] >> np.arange(number) & 1).astype(np.float64)
    table = np.array([[row >> j & 1 for j in range(number)] for row in conflicts], np.float64)
    pairs = ((subsets @ table) * subsets).sum(1) / 2
    sizes = subsets.sum(1)
    all_pairs = sizes * (sizes - 1) / 2
    rates = np.divide(pairs, all_pairs, out=np.zeros_like(pairs), where=all_pairs > 0)
    sums: np.ndarray = subsets @ np.array(weights)
    return float(sums[(rates <= max_rate) & (sizes <= max_size)].max())


RATES = st.sampled_from([0.0, 0.05, 0.1, 1 / 3, 0.5, 1.0]) | st.floats(0, 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from([0.1, 0.3, 0.6, 3.0]),
    st.integers(0, 10**6),
    RATES,
    st.integers(1, 13),
    st.sampled_from([None, 0]),
)
def test_no_other_choice_is_better(
    number: int, density: float, seed: int, max_rate: float, max_size: int, digits: int | None
) -> None:
    weights, conflicts = problem(number, density, seed, digits)
    kept, optimal = selection.choose(weights, conflicts, max_rate, max_size)
    assert optimal
    assert len(kept) <= max_size
    assert selection.rate(pairs_of(kept, conflicts), len(kept)) <= max_rate
    expected = best_by_trying_all(weights, conflicts, max_rate, max_size)
    assert math.isclose(sum(weights[i] for i in kept), expected, abs_tol=1e-9)


@pytest.mark.parametrize("max_rate", [0.0, 0.03, 0.06, 0.12, 0.25])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_no_other_choice_of_fifteen_is_better(density: float, max_rate: float) -> None:
    weights, conflicts = problem(15, density, seed=15)
    kept, optimal = selection.choose(weights, conflicts, max_rate, 15)
    assert optimal
    expected = best_by_trying_all(weights, conflicts, max_rate, 15)
    assert math.isclose(sum(weights[i] for i in kept), expected, abs_tol=1e-9)


def test_a_hospital_patient_gets_the_best_choice() -> None:
    # Up to forty candidates, of whose pairs 8 % interact, as papers report of MIMIC-III.
    for number, seed in itertools.product((20, 30, 40), range(5)):
        weights, conflicts = problem(number, 0.08, seed)
        assert selection.choose(weights, conflicts, 0.03, number, max_seconds=9).optimal


@pytest.mark.parametrize("limits", [{"max_steps": 0}, {"max_steps": 30}, {"max_seconds": 0.0}])
def test_a_search_cut_short_keeps_to_the_rate_and_says_so(limits: dict[str, float]) -> None:
    weights, conflicts = problem(60, 0.3, seed=1)
    choice = selection.choose(weights, conflicts, 0.05, 60, **limits)  # type: ignore[arg-type]
    assert not choice.optimal
    pairs = pairs_of(choice.kept, conflicts)
    assert selection.rate(pairs, len(choice.kept)) <= 0.05
    for other in set(range(60)).difference(choice.kept):
        more = pairs_of((*choice.kept, other), conflicts)
        assert selection.rate(more, len(choice.kept) + 1) > 0.05


def test_a_hard_search_ends_within_its_time() -> None:
    weights, conflicts = problem(200, 0.3, seed=2)
    began = time.thread_time()
    choice = selection.choose(weights, conflicts, 0.05, 200)
    assert time.thread_time() - began < 4 * selection.MAX_SECONDS
    assert selection.rate(pairs_of(choice.kept, conflicts), len(choice.kept)) <= 0.05


def test_the_choice_does_not_hang_on_the_order_of_the_candidates() -> None:
    weights, conflicts = problem(25, 0.2, seed=3)
    kept, _ = selection.choose(weights, conflicts, 0.05, 25)
    for shuffle in range(5):
        order = list(range(25))
        random.Random(shuffle).shuffle(order)
        place = {i: at for at, i in enumerate(order)}
        shuffled = [sum(1 << place[j] for j in range(25) if conflicts[i] >> j & 1) for i in order]
        other, _ = selection.choose([weights[i] for i in order], shuffled, 0.05, 25)
        assert {order[at] for at in other} == set(kept)


def test_what_does_not_interact_is_kept_even_without_weight() -> None:
    assert selection.choose([0.0, 0.0, 0.0], [0b010, 0b001, 0], 0.0, 3).kept in ((0, 2), (1, 2))
    assert selection.choose([], [], 0.0, 3) == ((), True)
    assert selection.choose([1.0, 2.0, 3.0], [0, 0, 0], 0.0, 2) == ((1, 2), True)
    assert selection.choose([1.0, 2.0], [0b10, 0b01], 1.0, 2) == ((0, 1), True)


@pytest.mark.parametrize("max_rate", [0.0, 0.1, 1 / 3, 0.7, 1.0])
def test_the_rate_is_the_one_that_models_are_measured_by(max_rate: float) -> None:
    weights, conflicts = problem(14, 0.5, seed=4)
    kept, _ = selection.choose(weights, conflicts, max_rate, 14)
    ddi = np.array([[row >> j & 1 for j in range(14)] for row in conflicts], np.bool_)
    probabilities = np.zeros((1, 14), np.float32)
    probabilities[0, list(kept)] = 1
    targets, one_visit = np.ones((1, 14), np.bool_), np.array([0, 1])
    measured = metrics.evaluate(probabilities, targets, one_visit, ddi, 0.5)
    rate = selection.rate(pairs_of(kept, conflicts), len(kept))
    assert rate == measured.ddi_rate
    assert rate <= max_rate


def test_of_every_size_as_many_pairs_as_the_rate_allows() -> None:
    for size, max_rate in itertools.product(range(40), (0.0, 0.05, 0.1, 1 / 3, 0.29, 1.0)):
        allowed = selection.most_interactions(size, max_rate)
        assert selection.rate(allowed, size) <= max_rate
        pairs = size * (size - 1) // 2
        assert allowed == pairs or selection.rate(allowed + 1, size) > max_rate
