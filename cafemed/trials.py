"""One trial of a sweep: `training.fit` in a Ray worker, reporting each epoch with a checkpoint."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune
from ray.tune.experiment import Trial
from torch import Tensor

from cafemed import checkpoints, search_space, sweep, training
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.errors import ArtifactError
from cafemed.sweep import EPOCH, HISTORY, OBJECTIVE, STARTED
from cafemed.training import Builder, EpochReport, FitConfig


@dataclasses.dataclass(frozen=True)
class TrialData:
    """What all trials share; it lies in the object store once and is read there without a copy.

    Attributes:
        build: passed to `training.fit`; pickled by reference.
        model_name: passed to `build`.
        model_options: those configured; a trial replaces the ones it varies.
        inputs: passed to `training.fit`.
        arrays: passed to `training.fit`.
        train_patients: indices.
        validation_patients: indices.
        config: as configured; a trial replaces what it varies, and the seed.
    """

    build: Builder
    model_name: str
    model_options: Mapping[str, Any]
    inputs: ModelInputs
    arrays: VisitArrays
    train_patients: NDArray[np.int64]
    validation_patients: NDArray[np.int64]
    config: FitConfig

    def varied(self, parameters: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], FitConfig]:
        """Model options and training configuration of a trial."""
        sections = search_space.split(parameters)
        options = {**self.model_options, **sections.get("model", {})}
        return options, dataclasses.replace(self.config, **sections.get("train", {}), seed=seed)


def suggest(
    space: search_space.SearchSpace, seed: int, trial: search_space.Suggests
) -> dict[str, Any]:
    """What a trial is given besides its parameters, which Optuna records as they are drawn."""
    space.suggest(trial)
    return {"trial": trial.number, "seed": trial_seed(seed, trial.number)}


def trial_seed(seed: int, number: int) -> int:
    """The seed of trial `number` in a sweep with this seed."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def run_trial(config: dict[str, Any], data: TrialData) -> None:
    """Trains one model; Ray Tune calls this in a worker.

    An interrupted trial goes on from its last checkpoint.

    Args:
        config: parameters ("train.learning_rate" → value), "trial" and "seed".
        data: see TrialData.
    """
    options, fit_config = data.varied(sweep.parameters_of(config), config["seed"])
    started = time.time()
    history: list[dict[str, Any]] = []
    # In Ray's own session folder, so that a killed worker leaves nothing behind when Ray ends.
    place = Path(tune.get_context().get_trial_dir())
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        earlier = tune.get_checkpoint()
        if earlier is not None:
            earlier.to_directory(folder)
            history += read_checkpoint(folder).history

        def report(epoch: EpochReport) -> None:
            history.append(epoch.as_dict())
            best = max(past["metrics"]["jaccard"] for past in history)
            tune.report(
                {EPOCH: epoch.epoch, OBJECTIVE: best, HISTORY: list(history), STARTED: started},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )

        training.fit(
            data.build,
            data.model_name,
            options,
            data.inputs,
            data.arrays,
            data.train_patients,
            data.validation_patients,
            fit_config,
            on_epoch=report,
            checkpoint_dir=folder,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )


def best_weights(folder: Path) -> dict[str, Tensor]:
    """State dict of the best epoch in a trial's checkpoint folder."""
    return read_checkpoint(folder).best_weights


def read_checkpoint(folder: Path) -> checkpoints.Checkpoint:
    """Reads the checkpoint of a trial.

    Raises:
        ArtifactError: if it is missing or damaged.
    """
    checkpoint = checkpoints.load(folder, None)
    if checkpoint is None:
        raise ArtifactError(f"{folder}: expected the checkpoint of a trial, found none")
    return checkpoint


class OnTrialEnd(tune.Callback):
    """Calls a function with every trial that ends, in the process that runs the sweep."""

    def __init__(self, function: Callable[[Trial], None]) -> None:
        self._function = function

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the function out: Ray Tune saves its callbacks, this may hold a terminal."""
        return {"_function": lambda _trial: None}

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        """Ray Tune calls this, by keyword, when a trial is done or was stopped."""
        self._function(info["trial"])

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        """Ray Tune calls this, by keyword, when a trial raised."""
        self._function(info["trial"])
