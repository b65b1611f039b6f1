"""The rules decide as Ray Tune's schedulers do, and a replay is where the first telling was."""

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from cafemed.stopping import Asha, Median, Never, make_rule

EPOCHS = 27


class FakeTrial(SimpleNamespace):
    __hash__ = object.__hash__


class RayRule:
    """A scheduler of Ray Tune, asked as a rule."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.trials: dict[int, FakeTrial] = {}
        self.controller = SimpleNamespace(get_live_trials=list)

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        if trial not in self.trials:
            self.trials[trial] = FakeTrial(trial_id=str(trial), status="RUNNING")
            self.scheduler.on_trial_add(self.controller, self.trials[trial])
        result = {"epoch": epoch, "value": value}
        answer = self.scheduler.on_trial_result(self.controller, self.trials[trial], result)
        return answer == TrialScheduler.STOP


def events(seed: int, slots: int = 4, trials: int = 40) -> Any:
    """Random trials, `slots` at a time: yields an epoch, and is sent whether its trial stops."""
    random = np.random.default_rng(seed)
    running, number = [], 0
    while running or number < trials:
        while len(running) < slots and number < trials:
            gains = random.exponential(random.uniform(0.001, 0.05), EPOCHS)
            running.append((number, iter(enumerate(np.cumsum(gains).tolist(), 1))))
            number += 1
        place = int(random.integers(len(running)))
        trial, epochs = running[place]
        epoch, value = next(epochs)
        stop = yield trial, epoch, value
        if stop or epoch == EPOCHS:
            del running[place]


def decisions(rule: Any, seed: int) -> list[tuple[int, int, float, bool]]:
    told, found = events(seed), []
    event = next(told)
    try:
        while True:
            stop = rule.stops(*event)
            found.append((*event, stop))
            event = told.send(stop)
    except StopIteration:
        return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("grace", "factor"), [(1, 3.0), (5, 3.0), (2, 2.5), (27, 4.0)])
def test_asha_decides_as_ray_tunes_does(seed: int, grace: int, factor: float):
    # One epoch more: at its max_t Ray Tune's stops every trial, which has ended here anyway.
    ours = decisions(Asha(EPOCHS, grace, factor), seed)
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric="value",
        mode="max",
        max_t=EPOCHS,
        grace_period=grace,
        reduction_factor=factor,
    )
    theirs = decisions(RayRule(scheduler), seed)
    assert [event for event in ours if event[1] < EPOCHS] == [
        event for event in theirs if event[1] < EPOCHS
    ]
    assert any(stop for _, epoch, _, stop in ours if epoch < EPOCHS) == (grace < EPOCHS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grace", [1, 5])
def test_median_decides_as_ray_tunes_does(seed: int, grace: int):
    scheduler = MedianStoppingRule(
        time_attr="epoch", metric="value", mode="max", grace_period=grace, min_samples_required=3
    )
    ours = decisions(Median(grace), seed)
    assert ours == decisions(RayRule(scheduler), seed)
    assert any(stop for *_, stop in ours)


def asha_of_those_that_keep(earlier: list[Any], trial: int, epoch: int, value: float) -> bool:
    """With grace period 2 and factor 3."""
    others = [v for t, e, v, keeps in earlier if e == epoch and t != trial and keeps]
    at_rung = epoch in (2, 6, 18)
    return at_rung and bool(others) and value < np.quantile(others, 2 / 3)


def median_of_those_that_keep(earlier: list[Any], trial: int, epoch: int, value: float) -> bool:
    """With grace period 2."""
    if epoch < 2:
        return False
    others = {t for t, e, _, keeps in earlier if e == epoch and t != trial and keeps}
    means = [np.mean([v for t, e, v, _ in earlier if t == o and 2 <= e <= epoch]) for o in others]
    return len(means) >= 3 and value < np.median(means)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Asha(EPOCHS, 2, 3.0), asha_of_those_that_keep),
        (lambda: Median(2), median_of_those_that_keep),
    ],
)
def test_trials_are_compared_with_those_that_keep_the_limit(make: Any, expected: Any, seed: int):
    rule, random, told = make(), np.random.default_rng(seed), events(seed)
    earlier: list[tuple[int, int, float, bool]] = []
    stopped = dict.fromkeys([True, False], 0)
    event = next(told)
    with contextlib.suppress(StopIteration):
        while True:
            # Some never keep it, some from an epoch on, or until one.
            keeps = bool(random.random() < (0.1, 0.9, 0.5)[event[0] % 3])
            stop = rule.stops(*event, keeps)
            assert stop == expected(earlier, *event)
            earlier.append((*event, keeps))
            stopped[keeps] += stop
            event = told.send(stop)
    assert min(stopped.values()) > 3  # a poor trial is stopped, whether it keeps the limit or not


@pytest.mark.parametrize("make", [lambda: Asha(EPOCHS, 2, 3.0), lambda: Median(2), Never])
@pytest.mark.parametrize("cut", [1, 30, 200])
def test_after_a_replay_by_trial_decisions_are_those_without_it(make: Any, cut: int):
    first = decisions(make(), 1)
    again = make()
    for trial, epoch, value, _ in sorted(first[:cut]):
        again.stops(trial, epoch, value)
    assert [again.stops(*event[:3]) for event in first[cut:]] == [stop for *_, stop in first[cut:]]


@pytest.mark.parametrize("make", [lambda: Asha(EPOCHS, 2, 3.0), lambda: Median(2)])
def test_an_epoch_told_again_counts_once(make: Any):
    first, repeating, again = decisions(make(), 2), make(), make()
    told = []
    for event in first:
        repeating.stops(*event[:3])
        told.append(event[:3])
        for earlier in told[-5:]:
            repeating.stops(*earlier)
    for event in first:
        again.stops(*event[:3])
    later = [(1000, epoch, value / 2) for _, epoch, value, _ in first[:EPOCHS]]
    assert [repeating.stops(*e) for e in later] == [again.stops(*e) for e in later]


def test_the_rule_that_the_configuration_names(sweeps: Any):
    kinds = {"asha": Asha, "median": Median, "none": Never}
    for name, kind in kinds.items():
        assert isinstance(make_rule(sweeps.plan_of(scheduler=name).search, 5), kind)
    # A grace period beyond the epochs is all of them: nothing is stopped.
    rule = make_rule(sweeps.plan_of(grace_period=50).search, 5)
    assert not any(rule.stops(t, e, -t * e) for t in range(9) for e in range(1, 5))
