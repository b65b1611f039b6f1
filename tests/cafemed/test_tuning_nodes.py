"""A sweep on two nodes with fake GPUs, one of which is lost while it runs."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from torch import nn

import models
from cafemed import cluster, sweep_plan, tuning
from cafemed.batches import ModelInputs
from cafemed.conductor import Conductor
from cafemed.experiment import Experiment
from cafemed.ledger import Header, Ledger
from cafemed.sweep import SweepResult, TrialRecord
from cafemed.training import Builder
from cafemed.trials import TrialData

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = {"train": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}}
MODEL = {"name": "cafemed", "dimension": 8, "dropout": 0.1}
EPOCHS = 60

# The builder below is sent to workers, which cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def held_until(lost: Path) -> Builder:
    """Models that need 2 s an epoch, so that all processes start before a trial ends.

    When the node is lost they need a tenth of it.
    """

    def build(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        model = models.build(name, inputs, options, seed)
        model.register_forward_pre_hook(lambda *_: time.sleep(0.03 if lost.exists() else 0.3))
        return model

    return build


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A cluster, and its second node; each has two CPUs and a fake GPU."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size)
    try:
        second = nodes.add_node(**size)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes, second
    finally:
        nodes.shutdown()


def losing_a_node(
    given: Experiment,
    folder: Path,
    two_nodes: tuple[Any, Any],
    at_once: int,
    epochs: int,
    **search: Any,
) -> tuple[list[int], list[TrialRecord], SweepResult]:
    """Runs a sweep whose second node is lost when so many trials have had three epochs.

    Returns:
        Numbers of the trials that ran then, the trials as they ended, and the sweep's result.
    """
    nodes, second = two_nodes
    train = {"epochs": epochs, "patience": epochs, "batch_size": 8}
    search |= {"space": SPACE, "scheduler": "none"}
    values = {"model": MODEL, "train": train, "search": search}
    plan = sweep_plan.read(values, models.options_class, models.NAMES)
    data = TrialData.of(plan, given, held_until(folder / "lost"))
    ledger = Ledger(folder / "trials")
    ledger.open(Header("f", {}, plan.settings(), {}))
    ended: list[TrialRecord] = []
    lost: list[int] = []

    class Losing(Conductor):
        """Takes the node away."""

        def stops(self, number: int, history: Any, **told: Any) -> bool:
            stop = super().stops(number, history, **told)
            begun = [n for n, epochs in self.histories.items() if len(epochs) >= 3]
            if not lost and len(begun) == at_once:
                lost.extend(begun)
                nodes.remove_node(second, allow_graceful=False)
                (folder / "lost").touch()
            return stop

    with cluster.ray_cluster(4) as where:
        assert where.endswith("4 CPUs, 2 GPUs")
        conductor = Losing(plan, ledger, (), ended.append)
        tuning.run(conductor, data)
    assert len(lost) == at_once
    return lost, ended, conductor.result()


def test_trials_of_a_lost_node_go_on_elsewhere_from_their_checkpoints(
    given: Experiment, tmp_path: Path, two_nodes: tuple[Any, Any]
):
    lost, ended, result = losing_a_node(
        given, tmp_path, two_nodes, 4, EPOCHS, num_samples=6, gpus=0.5
    )
    assert sorted(trial.number for trial in ended) == list(range(6))
    assert {trial.status for trial in result.trials} == {"finished"}
    assert [len(trial.history) for trial in result.trials] == [EPOCHS] * 6
    # Two of the four were on that node; they went on, and did not begin again.
    moved = [trial for trial in result.trials if trial.attempts > 1]
    assert len(moved) == 2
    assert {trial.number for trial in moved} <= set(lost)
    epochs_s = {t.number: sum(e["seconds"] for e in t.history) for t in result.trials}
    assert all(trial.seconds >= 0.9 * epochs_s[trial.number] for trial in moved)
    assert result.best in result.trials


def test_workers_of_a_lost_node_are_started_again_where_there_is_room(
    given: Experiment, tmp_path: Path, two_nodes: tuple[Any, Any]
):
    """Two trials of two workers have room on two nodes, one at a time on the node that is left."""
    lost, ended, result = losing_a_node(
        given, tmp_path, two_nodes, 2, 25, num_samples=2, num_workers=2
    )
    assert sorted(trial.number for trial in ended) == [0, 1]
    assert {trial.status for trial in result.trials} == {"finished"}
    assert [[e["epoch"] for e in t.history] for t in result.trials] == [list(range(1, 26))] * 2
    # Of a trial, its workers may have been there, or the process that looks on.
    moved = {trial.number for trial in result.trials if trial.attempts > 1}
    assert moved
    assert moved <= set(lost)
