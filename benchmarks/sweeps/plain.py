"""The same fixed trials without this project's sweeps: plain Optuna, joblib's processes."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import optuna
from joblib.externals.loky import get_reusable_executor  # type: ignore[import-untyped]
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cafemed import training
from cafemed.search_space import SearchSpace
from cafemed.trials import TrialData


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A trial to run.

    Attributes:
        parameters: "train.learning_rate" → value.
        seed: of its training.
    """

    parameters: Mapping[str, Any]
    seed: int


@dataclasses.dataclass(frozen=True)
class Study:
    """What came of the trials.

    Attributes:
        wall_s: from an empty study to the end of the last trial; starts of processes included.
        jaccard: of each trial's best epoch.
        training_s: of each trial: all its epochs, training and validation.
    """

    wall_s: float
    jaccard: tuple[float, ...]
    training_s: tuple[float, ...]


def run(fixed: Sequence[Fixed], space: SearchSpace, data: TrialData, processes: int) -> Study:
    """Runs the trials, each `training.fit` without checkpoints, as processes come free.

    Args:
        fixed: the trials, in this order.
        space: that their parameters are from.
        data: what they share; joblib maps its large arrays into the processes.
        processes: of joblib, with its default backend.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        from_s = time.perf_counter()
        journal = str(Path(name) / "journal")
        study = optuna.create_study(storage=_storage(journal), direction="maximize")
        for trial in fixed:
            study.enqueue_trial(dict(trial.parameters))
        seeds = [trial.seed for trial in fixed]
        joblib.Parallel(n_jobs=processes)(
            joblib.delayed(_one)(journal, study.study_name, space, data, seeds) for _ in fixed
        )
        wall_s = time.perf_counter() - from_s
        get_reusable_executor().shutdown(wait=True)  # joblib would keep the processes, torch loaded
        done = study.get_trials(deepcopy=False)
    return Study(
        wall_s,
        tuple(float(trial.value or 0.0) for trial in done),
        tuple(float(trial.user_attrs["seconds"]) for trial in done),
    )


def _storage(journal: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(journal))


def _one(
    journal: str, name: str, space: SearchSpace, data: TrialData, seeds: Sequence[int]
) -> None:
    """The study's next trial, in a process of joblib's."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        parameters = space.suggest(trial)
        options, config = data.varied(parameters, seeds[trial.number])
        fitted = training.fit(
            data.build,
            data.model_of(parameters),
            options,
            data.inputs,
            data.arrays,
            data.train_patients,
            data.validation_patients,
            config,
        )
        trial.set_user_attr("seconds", sum(epoch.seconds for epoch in fitted.history))
        return fitted.metrics.jaccard

    study = optuna.load_study(study_name=name, storage=_storage(journal))
    study.optimize(objective, n_trials=1)
