"""Several workers on Ray that train one model: fits, lost workers, and sweeps of such trials."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from torch import nn

import models
from cafemed import checkpoints, cluster, distributed, placement, sweep_plan, training, tuning
from cafemed.batches import ModelInputs
from cafemed.conductor import Conductor
from cafemed.distributed import FitData, Workers
from cafemed.errors import ConfigError, TrainingError
from cafemed.experiment import Experiment
from cafemed.ledger import Header, Ledger
from cafemed.sweep import SweepResult
from cafemed.training import EpochReport, FitConfig, FitResult
from cafemed.trials import TrialData

# Ray's own and torch's own warnings; a group of workers is three processes that import torch.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

# The builders below are sent to workers, which cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONFIG = FitConfig(epochs=3, batch_size=13, learning_rate=0.01, seed=3)
PLAIN = {"dimension": 8, "dropout": 0.0}
DROPPING = {"dimension": 8, "dropout": 0.5}


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with cluster.ray_cluster(2):
            yield


def data_of(given: Experiment, build: Any = models.build) -> FitData:
    patients = (given.cohort.patients_of(split) for split in ("train", "validation"))
    return FitData(build, given.inputs, given.arrays, *patients)


def fit(given: Experiment, options: Mapping[str, Any], **more: Any) -> FitResult:
    shared = ray.put(data_of(given, more.pop("build", models.build)))
    config = more.pop("config", CONFIG)
    return distributed.fit(shared, "cafemed", options, config, Workers(2), **more)


def is_free() -> bool:
    """Whether no worker reserves anything; it takes Ray a moment to say so."""
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 2.0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def deadly(marks: Path, victims: Sequence[Callable[[], int]]) -> Any:
    """A builder whose model, in the second worker, kills a process in the middle of an epoch.

    One after another, each in an attempt of its own, in its second epoch.
    """

    def build(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        model, left = models.build(name, inputs, options, seed), 8  # of five an epoch

        def kill(*_: Any) -> None:
            nonlocal left
            left -= 1
            done = len(list(marks.iterdir()))
            if left == 0 and torch.distributed.get_rank() == 1 and done < len(victims):
                (marks / str(done)).touch()
                os.kill(victims[done](), signal.SIGKILL)

        model.register_forward_pre_hook(kill)
        return model

    return build


@pytest.mark.usefixtures("local_ray")
def test_two_workers_train_as_one_process_and_tell_every_epoch(given: Experiment, tmp_path: Path):
    data = data_of(given)
    one = training.fit(
        *(data.build, "cafemed", PLAIN, data.inputs, data.arrays),
        *(data.train_patients, data.validation_patients, CONFIG),
    )
    told: list[EpochReport] = []
    saved: list[int] = []

    def listen(report: EpochReport) -> bool:
        checkpoint = checkpoints.load(tmp_path / "c", None)
        assert checkpoint is not None
        told.append(report)
        saved.append(checkpoint.epoch)
        return False

    result = fit(given, PLAIN, on_epoch=listen, checkpoint_dir=tmp_path / "c")
    assert tuple(told) == result.history
    assert saved == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert result.best_epoch == one.best_epoch
    for got, wanted in zip(result.history, one.history, strict=True):
        assert got.losses == pytest.approx(wanted.losses, rel=1e-5)
        assert got.metrics.as_dict() == pytest.approx(wanted.metrics.as_dict(), rel=1e-5)
    assert is_free()


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_is_started_again_from_the_last_epoch(
    given: Experiment, group: Any, tmp_path: Path
):
    train = {name: getattr(CONFIG, name) for name in ("epochs", "batch_size", "learning_rate")}
    case = {"model": "cafemed", "options": DROPPING, "train": train | {"seed": CONFIG.seed}}
    given = dataclasses.replace(given, inputs=group.experiment().inputs)
    whole = group.together(tmp_path, [case])[0][0]
    (tmp_path / "marks").mkdir()
    build = deadly(tmp_path / "marks", [os.getpid])
    told: list[int] = []
    again = fit(
        given,
        DROPPING,
        build=build,
        on_epoch=lambda report: told.append(report.epoch),
        checkpoint_dir=tmp_path / "again",
        max_failures=1,
    )
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert told == [1, 2, 3]
    assert [e.losses for e in again.history] == [losses for losses, _ in whole["history"]]
    assert group.outcome(again)["weights"] == whole["weights"]
    (tmp_path / "marks" / "0").unlink()
    with pytest.raises(ray.exceptions.RayError):
        fit(given, DROPPING, build=build)


def in_the_second(harm: Callable[[], None]) -> Any:
    """A builder that does harm in the second worker when the first one has trained the model."""

    def build(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        real = training._Run.result

        def result(self: training._Run) -> FitResult:
            if self.group.rank == 1:
                harm()
            return real(self)

        training._Run.result = result  # type: ignore[method-assign]  of a process of its own
        return models.build(name, inputs, options, seed)

    return build


@pytest.mark.usefixtures("local_ray")
def test_a_worker_lost_after_the_first_one_told_the_result_keeps_nobody_waiting(
    given: Experiment, tmp_path: Path
):
    mark = tmp_path / "lost"

    def die() -> None:
        if not mark.exists():
            time.sleep(2)  # the first one tells meanwhile
            mark.touch()
            os._exit(137)

    config = dataclasses.replace(CONFIG, epochs=1)
    result = fit(given, PLAIN, build=in_the_second(die), config=config, max_failures=1)
    assert mark.exists()
    assert [epoch.epoch for epoch in result.history] == [1]
    assert is_free()


@pytest.mark.usefixtures("local_ray")
def test_what_one_worker_alone_refuses_ends_the_fit(given: Experiment):
    """The other one waits for it, for half an hour if nobody ended it."""

    def build(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        model = models.build(name, inputs, options, seed)

        def refuse(*_: Any) -> None:
            if torch.distributed.get_rank() == 1:
                raise TrainingError("only here")

        model.register_forward_pre_hook(refuse)
        return model

    with pytest.raises(TrainingError, match=r"^only here$"):
        fit(given, PLAIN, build=build, max_failures=1)
    assert is_free()


@pytest.mark.usefixtures("local_ray")
def test_what_the_caller_decides_and_what_training_refuses(given: Experiment):
    stopped = fit(given, PLAIN, on_epoch=lambda report: report.epoch == 2)
    assert len(stopped.history) == 2
    with pytest.raises(TrainingError, match=r"try a train\.learning_rate below 1e\+30"):
        fit(given, PLAIN, config=dataclasses.replace(CONFIG, learning_rate=1e30), max_failures=3)

    def refuse(_: EpochReport) -> None:
        raise KeyError("not this one")

    with pytest.raises(KeyError, match="not this one"):
        fit(given, PLAIN, on_epoch=refuse, number=5)
    assert not placement._groups_of(Workers(2), 5)


SPACE = {"train": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}}


def sweep_of(given: Experiment, storage: Path, build: Any, **search: Any) -> SweepResult:
    settings = {"space": SPACE, "num_samples": 3, "grace_period": 1, "seed": 7, "num_workers": 2}
    values = {
        "model": {"name": "cafemed", "dimension": 8, "dropout": 0.1},
        "train": {"epochs": 3, "batch_size": 13},
        "search": settings | search,
    }
    plan = sweep_plan.read(values, models.options_class, models.NAMES)
    shared = {field.name: getattr(data_of(given, build), field.name) for field in FIELDS}
    data = TrialData(model_name=plan.model_name, models=plan.models, config=plan.fit, **shared)
    ledger = Ledger(storage / "trials")
    if not ledger.exists():
        ledger.open(Header("f", {}, plan.settings(), {}))
    conductor = Conductor(plan, ledger)
    tuning.run(conductor, data)
    return conductor.result()


FIELDS = dataclasses.fields(FitData)


def trial_process() -> int:
    """The process of the trial that this worker belongs to; one trial runs at a time."""
    (found,) = (
        process.pid
        for process in psutil.Process(os.getppid()).children()
        if "ImplicitFunc" in " ".join(process.cmdline())
    )
    return int(found)


def outcome(result: SweepResult) -> list[Any]:
    return [
        (dict(t.parameters), t.seed, t.status, [(e["losses"], e["metrics"]) for e in t.history])
        for t in result.trials
    ]


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_of_two_workers_a_trial_survives_lost_workers_and_trials(
    given: Experiment, tmp_path: Path, sweeps: Any
):
    """There is room for one trial: a stopped or killed one that kept its place would end it all."""
    counted = sweeps.CountedBuilder(models.build)
    whole = sweep_of(given, tmp_path / "whole", counted)
    assert counted.pickled == 1  # all trials, and all their workers, read the same data
    assert {t.status for t in whole.trials} == {"finished", "stopped"}
    assert {t.cpus for t in whole.trials} == {2.0}
    (tmp_path / "marks").mkdir()
    build = deadly(tmp_path / "marks", [os.getpid, trial_process])
    harmed = sweep_of(given, tmp_path, build)
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert sorted(t.attempts for t in harmed.trials) == [1, 1, 3]
    assert outcome(harmed) == outcome(whole)


@pytest.mark.usefixtures("local_ray")
def test_more_workers_than_a_machine_has_room_for_are_refused(given: Experiment, tmp_path: Path):
    message = r"search\.num_workers: there is no room for 3 workers of 1 CPUs; reserve less"
    with pytest.raises(ConfigError, match=message):
        sweep_of(given, tmp_path, models.build, num_workers=3)
    with pytest.raises(ConfigError, match=r"search\.gpus: a worker reserves 1"):
        sweep_of(given, tmp_path, models.build, gpus=1.0)
