"""What a trial does in its worker, without Ray's processes."""

import contextlib
import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cafemed import artifacts, sweep, trials, tuning_hooks
from cafemed.conductor import Conductor
from cafemed.ledger import Ledger
from cafemed.training import FitConfig


@pytest.mark.parametrize(
    ("gpus", "visible", "device"), [(0.0, True, "cpu"), (0.5, True, "cuda"), (1.0, False, "cpu")]
)
def test_a_trial_trains_where_it_reserved(
    sweeps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    visible: bool,
    device: str,
):
    conductor = Conductor(sweeps.plan_of(gpus=gpus), Ledger(tmp_path / "trials"))
    config = tuning_hooks.Search(conductor, "paths.root", "run-001").suggest("") | {"ledger": None}
    used: list[str] = []
    context = SimpleNamespace(get_trial_dir=lambda: str(tmp_path))
    monkeypatch.setattr(trials.tune, "get_context", lambda: context)
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trials.tune, "report", lambda *_, **__: None)
    monkeypatch.setattr(trials.torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(trials.training, "fit", lambda *_, **more: used.append(more["device"]))
    missing = ("build", "inputs", "arrays", "train_patients", "validation_patients")
    nothing: dict[str, Any] = dict.fromkeys(missing)
    plan = conductor.plan
    data = trials.TrialData(
        model_name=plan.model_name, models=plan.models, config=plan.fit, **nothing
    )
    trials.run_trial(config, data)
    assert used == [device]


class Cut(BaseException):
    """Stands for a process that is gone."""


class Trial:
    """A trial of six epochs in this process, and what it tells Ray Tune."""

    def __init__(self, data: trials.TrialData, config: dict[str, Any]) -> None:
        self._data, self._config = data, config
        self.told: list[list[float]] = []
        self.checkpoints: list[Any] = []
        self.errors: list[str] = []
        self._cut_at = 0

    def report(self, found: dict[str, Any], checkpoint: Any) -> None:
        if found["epoch"] == self._cut_at:
            raise Cut
        self.told.append([epoch["losses"]["loss"] for epoch in found["history"]])
        self.checkpoints.append(checkpoint)
        self.errors += [found[sweep.ERROR]] if sweep.ERROR in found else []

    def run(self, cut_at: int = 0, **more: Any) -> "Trial":
        """Trains, and dies when it would tell of an epoch: that one is saved."""
        self.told, self._cut_at = [], cut_at
        with contextlib.suppress(Cut):
            trials.run_trial(self._config | more, self._data)
        return self


@pytest.fixture
def trial(
    sweeps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build_bag: Any,
    small_inputs: Any,
    small_arrays: Any,
) -> Trial:
    plan = sweeps.plan_of(space={"train": sweeps.SPACE["train"]})
    data = trials.TrialData(
        build=build_bag,
        model_name="bag",
        models={"bag": {"dropout": 0.3}},
        inputs=small_inputs,
        arrays=small_arrays,
        train_patients=np.arange(28),
        validation_patients=np.arange(28, 40),
        config=FitConfig(epochs=6, patience=6, batch_size=8),
    )
    conductor = Conductor(plan, Ledger(tmp_path / "trials"))
    config = tuning_hooks.Search(conductor, "paths.root", "run-001").suggest("")
    made = Trial(data, config | {"ledger": None, "parameters": {"train.learning_rate": 0.1}})
    context = SimpleNamespace(get_trial_dir=lambda: str(tmp_path / "session"))
    monkeypatch.setattr(trials.tune, "get_context", lambda: context)
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trials.tune, "report", made.report)
    return made


def test_a_trial_started_again_goes_on_from_the_checkpoint_that_it_kept(
    trial: Trial, tmp_path: Path
):
    whole = trial.run(folder=str(tmp_path / "whole")).told
    assert [len(losses) for losses in whole] == [1, 2, 3, 4, 5, 6]
    assert trial.run(cut_at=3).told == whole[:2]
    # The third epoch, which nobody was told of, counts for the scheduler too.
    assert trial.run(cut_at=6).told == whole[2:5]
    assert trial.run().told == whole[5:]
    assert trial.run().told == whole[5:]  # interrupted when it was over
    assert trial.checkpoints == [None] * len(trial.checkpoints)
    found = Ledger(tmp_path / "trials").checkpoint(0)
    assert found is not None
    assert found[0].endswith("run-001/trial-00000/checkpoint_kept")
    assert found[1].epoch == 6


def test_a_trial_goes_on_in_another_run_of_the_sweep_with_a_folder_of_its_own(
    trial: Trial, tmp_path: Path
):
    whole = trial.run(folder=str(tmp_path / "whole")).told
    trial.run(cut_at=3)
    path, _ = Ledger(tmp_path / "trials").checkpoint(0)  # type: ignore[misc]
    before = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    again = str(tmp_path / "trials" / "run-002" / "trial-00000" / tuning_hooks.KEPT)
    assert trial.run(cut_at=5, folder=again, checkpoint=path).told == whole[2:4]
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == before
    # Its own is the newer one, until a node's loss damages it.
    assert trial.run(cut_at=6, folder=again, checkpoint=path).told == whole[4:5]
    next(Path(again).glob("*.safetensors")).write_bytes(b"half")
    assert trial.run(folder=again, checkpoint=path).told == whole[2:]
    next(Path(again).glob("*.safetensors")).write_bytes(b"half")
    assert trial.run(folder=again).told == whole


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_lost(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = trial.run(folder=str(tmp_path / "whole")).told
    trial.run(cut_at=3)

    def stale(_: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "sha256_of", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            trial.run()
    assert trial.run().told == whole[2:]


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_of_another_version_of_the_program_is_not_the_trials_failure(
    trial: Trial, tmp_path: Path, kept: bool
):
    whole = trial.run(folder=str(tmp_path / "whole")).told
    trial.run(cut_at=3)
    path, _ = Ledger(tmp_path / "trials").checkpoint(0)  # type: ignore[misc]
    file = Path(path) / "checkpoint.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"identity": "0" * 64}))
    again = {"folder": str(tmp_path / "again") if kept else None, "checkpoint": path}
    told = trial.run(**again).told
    assert told == [whole[2], *whole]  # what it had, and then from the first epoch
    assert trial.errors == []
    assert content["epoch"] == 3


def test_ray_tune_carries_the_checkpoint_to_an_object_store(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = trial.run().told
    report = trial.report

    def carry(found: dict[str, Any], checkpoint: Any) -> None:
        report(found, checkpoint)
        shutil.copytree(checkpoint.path, tmp_path / "store" / str(found["epoch"]))

    monkeypatch.setattr(trials.tune, "report", carry)
    trial.run(cut_at=5, folder=None)
    assert not list((tmp_path / "session").iterdir())
    shutil.copytree(tmp_path / "store" / "3", tmp_path / "three")
    shutil.rmtree(tmp_path / "store")
    assert trial.run(folder=None, checkpoint=str(tmp_path / "three")).told == whole[2:]
