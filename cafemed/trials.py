"""One trial of a sweep: `training.fit` in a Ray worker, or several, reporting each epoch."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch._dynamo  # the first optimiser of a process would import it, for two seconds
from numpy.typing import NDArray
from ray import tune
from torch import Tensor

from cafemed import checkpoints, search_space, shared_storage, training
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.checkpoints import OtherRunError
from cafemed.errors import ArtifactError, UserError
from cafemed.experiment import Experiment
from cafemed.sweep import EPOCH, ERROR, HISTORY, SECONDS, STARTED
from cafemed.sweep_plan import SweepPlan
from cafemed.training import Builder, EpochReport, FitConfig


@dataclasses.dataclass(frozen=True)
class TrialData:
    """What all trials share; it lies in the object store once and is read there without a copy.

    Attributes:
        build: passed to `training.fit`; pickled by reference.
        model_name: the configured model; a trial that varies the model has its own.
        models: name → options, of every model that a trial may have; a trial replaces the ones it
            varies.
        inputs: passed to `training.fit`.
        arrays: passed to `training.fit`.
        train_patients: indices.
        validation_patients: indices.
        config: as configured; a trial replaces what it varies, and the seed.
    """

    build: Builder
    model_name: str
    models: Mapping[str, Mapping[str, Any]]
    inputs: ModelInputs
    arrays: VisitArrays
    train_patients: NDArray[np.int64]
    validation_patients: NDArray[np.int64]
    config: FitConfig

    @classmethod
    def of(cls, plan: SweepPlan, given: Experiment, build: Builder) -> "TrialData":
        """What the trials of a sweep over a cohort share."""
        return cls(
            build=build,
            model_name=plan.model_name,
            models=plan.models,
            inputs=given.inputs,
            arrays=given.arrays,
            train_patients=given.cohort.patients_of("train"),
            validation_patients=given.cohort.patients_of("validation"),
            config=plan.fit,
        )

    def model_of(self, parameters: Mapping[str, Any]) -> str:
        """The name of a trial's model."""
        return str(parameters.get(search_space.MODEL, self.model_name))

    def varied(self, parameters: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], FitConfig]:
        """Model options and training configuration of a trial."""
        sections = search_space.split(parameters)
        options = {**self.models[self.model_of(parameters)], **sections.get("model", {})}
        options.pop("name", None)
        return options, dataclasses.replace(self.config, **sections.get("train", {}), seed=seed)


#: Trains a trial's model: data, model, options, configuration, what to call after every epoch, and
#: the checkpoint's folder.
_Fit = Callable[
    [TrialData, str, Mapping[str, Any], FitConfig, Callable[[EpochReport], None], Path], object
]


def run_trial(config: dict[str, Any], data: TrialData) -> None:
    """Trains one model; Ray Tune calls this in a worker.

    An interrupted trial goes on from its last checkpoint; one that another version of the program
    left begins anew. What it would do again, such as a model that cannot be built or a loss that is
    not finite, is reported instead of raised, so that it is not tried again.

    Args:
        config: "trial", "seed", "parameters" ("train.learning_rate" → value); "checkpoint", where
            it goes on from if it was interrupted in another run of the sweep; "folder", where it
            keeps its own, None if Ray Tune has to carry it to an object store; "ledger", the file
            of the sweep that every node has to see, and "storage_key", which setting says where;
            "workers", what is reserved for it.
        data: see TrialData.

    Raises:
        ConfigError: if this node does not see the storage.
    """
    device = _device(config["workers"].gpus)

    def fit(
        data: TrialData,
        name: str,
        options: Mapping[str, Any],
        fit_config: FitConfig,
        on_epoch: Callable[[EpochReport], None],
        folder: Path,
    ) -> object:
        return training.fit(
            data.build,
            name,
            options,
            data.inputs,
            data.arrays,
            data.train_patients,
            data.validation_patients,
            fit_config,
            on_epoch=on_epoch,
            checkpoint_dir=folder,
            device=device,
            flush=False,  # a damaged one is passed over, and waiting would take as long as writing
        )

    _run(config, data, fit)


def run_trial_of_workers(config: dict[str, Any], data: list[Any]) -> None:
    """Trains one model with several workers; Ray Tune calls this in a process that looks on.

    Args:
        config: see `run_trial`.
        data: a reference to TrialData.

    Raises:
        ConfigError: if this node does not see the storage.
        Exception: why a worker was lost; the trial goes on from its checkpoint.
    """
    (shared,) = data

    def fit(
        _: TrialData,
        name: str,
        options: Mapping[str, Any],
        fit_config: FitConfig,
        on_epoch: Callable[[EpochReport], None],
        folder: Path,
    ) -> object:
        from cafemed import distributed

        return distributed.fit(
            shared,
            name,
            options,
            fit_config,
            config["workers"],
            on_epoch=on_epoch,
            checkpoint_dir=folder,
            number=config["trial"],
        )

    _run(config, ray.get(shared), fit)


def _run(config: dict[str, Any], data: TrialData, fit: _Fit) -> None:
    """Runs a trial around its fit: from where it goes on to what Ray Tune is told."""
    started, parameters = time.time(), config["parameters"]
    if config["ledger"] is not None:
        shared_storage.require_seen(Path(config["ledger"]), config["storage_key"])
    options, fit_config = data.varied(parameters, config["seed"])
    with _checkpoint_folder(config) as (folder, is_kept):
        history = list(found.history) if (found := checkpoints.load(folder, None)) else []
        before_s = sum(epoch["seconds"] for epoch in history)

        def report(**more: Any) -> None:
            told = {
                EPOCH: len(history),
                HISTORY: list(history),
                STARTED: started,
                SECONDS: before_s + time.time() - started,
                **more,
            }
            carried = None if is_kept else tune.Checkpoint.from_directory(folder)
            tune.report(told, checkpoint=carried)

        def after_epoch(epoch: EpochReport) -> None:
            history.append(epoch.as_dict())
            report()

        if history:  # it may have been interrupted between its last epoch and the report of it
            report()

        def train() -> None:
            fit(data, data.model_of(parameters), options, fit_config, after_epoch, folder)

        try:
            try:
                train()
            except OtherRunError:  # what an earlier version of the program left: it begins anew
                checkpoints.remove(folder)
                history.clear()
                before_s = 0.0
                train()
        except UserError as err:
            lines = str(err).splitlines() or [""]
            report(**{ERROR: f"{type(err).__name__}: {lines[0]}"})


@contextlib.contextmanager
def _checkpoint_folder(config: Mapping[str, Any]) -> Iterator[tuple[Path, bool]]:
    """Where a trial's checkpoint is while it trains, and whether it is kept there.

    It holds the one to go on from, if there is one: of this run of the sweep, else of the run
    before.
    """
    if config["folder"] is not None:
        folder = Path(config["folder"])
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if config["checkpoint"] is not None:
                checkpoints.write_files(folder, checkpoints.read_files(Path(config["checkpoint"])))
        yield folder, True
        return
    # In Ray's own session folder, so that a killed worker leaves nothing behind when Ray ends.
    place = Path(tune.get_context().get_trial_dir())
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        found: tune.Checkpoint | None = tune.get_checkpoint()
        if found is None and config["checkpoint"] is not None:
            found = tune.Checkpoint(config["checkpoint"])
        if found is not None:
            found.to_directory(folder)
        yield folder, False


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a checkpoint; one that a node's loss damaged is none.

    Raises:
        OSError: if that cannot be found out now; the trial is started again.
    """
    try:
        return checkpoints.load(folder, None) is not None
    except ArtifactError as err:
        cause = err.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None
        return False


def _device(gpus: float) -> str:
    """Where a trial trains: Ray hides no GPU from one that reserves none."""
    return "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"


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
