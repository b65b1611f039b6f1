"""What several workers reserve, how many groups of them have room, and when a trial may start."""

from pathlib import Path
from typing import Any

import pytest

import models
from cafemed import placement, reproduction, sweep_plan, tuning_hooks
from cafemed.conductor import Conductor
from cafemed.errors import ConfigError
from cafemed.ledger import Ledger
from cafemed.placement import Workers

NODE = {"CPU": 4.0, "memory": 10e9}


@pytest.mark.parametrize(
    ("workers", "nodes", "expected"),
    [
        (Workers(2), [NODE], 2),
        (Workers(2), [NODE, NODE], 4),
        (Workers(3), [NODE, NODE], 2),  # six of eight CPUs, some group on both nodes
        (Workers(5), [NODE], 0),
        (Workers(2, cpus=0.1), [NODE], 20),
        (Workers(2, cpus=3.0), [NODE, NODE], 1),  # a worker is on one node
        (Workers(2, gpus=1.0), [NODE], 0),
        (Workers(2, gpus=1.0), [NODE | {"GPU": 2.0}, NODE | {"GPU": 3.0}], 2),
        (Workers(2, memory_gb=5.0), [NODE], 1),
        (Workers(2, memory_gb=5.1), [NODE], 0),
    ],
)
def test_as_many_groups_have_room_as_nodes_hold(
    workers: Workers, nodes: list[dict[str, float]], expected: int
):
    assert workers.groups_on(nodes) == expected


def test_what_a_worker_reserves_tells_its_trial():
    plain, counted = Workers(2), Workers(2, memory_gb=2.0)
    assert plain.reserved(0) == {"CPU": 1.0, "GPU": 0.0, "memory": 1}
    assert counted.reserved(6) == {"CPU": 1.0, "GPU": 0.0, "memory": 2_000_000_007}
    assert len({plain.reserved(number)["memory"] for number in range(50)}) == 50


def plan_of(**search: Any) -> sweep_plan.SweepPlan:
    space = {"train": {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1}}}
    values = {"model": {"name": "cafemed"}, "train": {}, "search": {"space": space} | search}
    return sweep_plan.read(values, models.options_class, models.NAMES)


def test_shared_gpus_are_refused_for_several_workers():
    assert plan_of(num_workers=2, gpus=1.0).search.workers == Workers(2, 1.0, 1.0)
    assert plan_of(gpus=0.25).search.num_workers == 1
    with pytest.raises(ConfigError, match=r"search\.gpus: .* expected 0 or 1, got 0\.5"):
        plan_of(num_workers=2, gpus=0.5)


@pytest.mark.parametrize("gpus", [0.0, 0.25, 1.0, 2.0])
def test_a_worker_reserves_whole_gpus_or_a_part_of_one(gpus: float):
    assert plan_of(gpus=gpus).search.gpus == gpus


@pytest.mark.parametrize("gpus", [1.5, 2.25, float("inf")])
def test_gpus_and_a_part_of_one_are_refused(gpus: float):
    with pytest.raises(ConfigError, match=rf"search\.gpus: .* or a whole number, got {gpus:g}"):
        plan_of(gpus=gpus)


def test_a_local_ray_gets_the_cpus_of_all_workers():
    assert plan_of(num_workers=2, cpus=3.0, max_concurrent=4).search.total_cpus == 24


def suggest(search: tuning_hooks.Search, names: str) -> list[bool]:
    return [isinstance(search.suggest(name), dict) for name in names]


def test_trials_of_several_workers_start_when_their_workers_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray Tune, which counts what the trial itself reserves, would draw all of them at once."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = [{"CPU": 4.0}]
    monkeypatch.setattr(placement, "_nodes", lambda: nodes)
    conductor = Conductor(plan_of(num_workers=2, num_samples=8), Ledger(tmp_path / "trials"))
    search = tuning_hooks.Search(conductor, "paths.root", "run-001")
    assert suggest(search, "abc") == [True, True, False]
    search.on_trial_complete("a")
    assert suggest(search, "cd") == [True, False]
    nodes.append({"CPU": 2.0})
    assert suggest(search, "de") == [True, False]
    # A cluster that may grow is shown one trial more, and an empty one the first.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert suggest(search, "ef") == [True, False]
    nodes.clear()
    for name in "bcde":
        search.on_trial_complete(name)
    assert suggest(search, "fg") == [True, False]


def test_trials_of_one_worker_are_left_to_ray_tune(tmp_path: Path):
    conductor = Conductor(plan_of(num_samples=3), Ledger(tmp_path / "trials"))
    assert suggest(tuning_hooks.Search(conductor, "paths.root", "run-001"), "abc") == [True] * 3


def test_the_command_that_trains_a_trial_again_has_its_workers():
    for search, expected in (({"num_workers": 2}, ["num_workers=2"]), ({}, [])):
        plan = plan_of(**search)
        configured = reproduction.configuration(plan.settings(), {}, seed=1)
        command = reproduction.command("x", configured)
        assert [part for part in command if part.startswith("num_workers")] == expected
