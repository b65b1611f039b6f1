"""Sweeps: Ray Tune runs trials, Optuna proposes their parameters, ASHA stops the poor ones early.

Nothing here needs a cluster to be imported; Ray is loaded when a sweep runs, and has to be up then
(`cafemed/cluster.py`).
"""

import datetime
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafemed import cluster, console, sweep
from cafemed.sweep import Status, SweepResult, TrialRecord
from cafemed.sweep_plan import SweepPlan
from cafemed.training import FitConfig

if TYPE_CHECKING:
    from ray.tune import Tuner
    from ray.tune.experiment import Trial

    from cafemed.trials import TrialData


def run(
    plan: SweepPlan,
    data: "TrialData",
    storage: Path,
    on_trial: Callable[[TrialRecord], None] | None = None,
) -> SweepResult:
    """Runs a sweep on the Ray that this process is connected to.

    The data goes to the object store once. The first trial has the configured values, if the space
    holds them. Every trial reports each epoch with a checkpoint; one that raises is recorded as
    failed, and the sweep goes on.

    Args:
        plan: see SweepPlan.
        data: what all trials share.
        storage: absolute folder for the trials' checkpoints, which every node has to see;
            replaced if it exists.
        on_trial: called with every trial as it ends.

    Raises:
        ConfigError: if a local Ray has less than one trial reserves.
    """
    reserved = {"CPU": ("search.cpus", plan.search.cpus), "GPU": ("search.gpus", plan.search.gpus)}
    cluster.require_resources("a trial", reserved)
    shutil.rmtree(storage, ignore_errors=True)
    record = functools.partial(_record, plan=plan)

    def ended(trial: "Trial") -> None:
        if on_trial is not None:
            error = trial.get_pickled_error() or trial.get_error()
            on_trial(record(trial.config, trial.last_result, error, trial.checkpoint))

    import optuna  # sets its logger's level when it is first imported

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    # What goes wrong in a trial is in its record.
    with console.silenced("ray", "ray.tune", "ray.train"):
        results = _tuner(plan, data, storage, ended).fit()
    found = [
        record(result.config or {}, result.metrics or {}, result.error, result.checkpoint)
        for result in (results[i] for i in range(len(results)))
    ]
    return SweepResult(tuple(sorted(found, key=lambda trial: trial.number)))


def _tuner(
    plan: SweepPlan, data: "TrialData", storage: Path, ended: Callable[["Trial"], None]
) -> "Tuner":
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from cafemed import trials

    search, epochs = plan.search, plan.fit.epochs
    searcher = OptunaSearch(
        space=functools.partial(trials.suggest, plan.space, search.seed),
        metric=sweep.OBJECTIVE,
        mode="max",
        points_to_evaluate=None if plan.start is None else [plan.start],
        seed=search.seed,
    )
    scheduler = ASHAScheduler(
        time_attr=sweep.EPOCH,
        metric=sweep.OBJECTIVE,
        mode="max",
        max_t=epochs,
        grace_period=min(search.grace_period, epochs),
        reduction_factor=search.reduction_factor,
    )
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trials.run_trial, data=data),
            {"cpu": search.cpus, "gpu": search.gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=search.num_samples,
            max_concurrent_trials=search.max_concurrent,
            reuse_actors=True,  # a worker imports torch once, not once a trial
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[trials.OnTrialEnd(ended)],
            verbose=0,
        ),
    )


def _trial_name(trial: "Trial") -> str:
    return f"trial-{trial.config['trial']:05d}"


def _record(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    error: Exception | None,
    checkpoint: Any,
    *,
    plan: SweepPlan,
) -> TrialRecord:
    """What Ray Tune knows of a trial, as our record."""
    history = tuple(metrics.get(sweep.HISTORY, ()))
    started = metrics.get(sweep.STARTED)
    return TrialRecord(
        number=config["trial"],
        parameters=sweep.parameters_of(config),
        seed=config["seed"],
        status=_status(error, history, plan.fit),
        error=None if error is None else _first_line(error),
        history=history,
        started=None if started is None else datetime.datetime.fromtimestamp(started, datetime.UTC),
        seconds=float(metrics.get("time_total_s", 0.0)) if history else 0.0,
        host=str(metrics.get("hostname", "")) if history else "",
        cpus=plan.search.cpus,
        gpus=plan.search.gpus,
        checkpoint=None if checkpoint is None else Path(checkpoint.path),
    )


def _status(
    error: Exception | None, history: tuple[Mapping[str, Any], ...], fit: FitConfig
) -> Status:
    if error is not None or not history:
        return "failed"
    jaccard = [epoch["metrics"]["jaccard"] for epoch in history]
    since_best = len(jaccard) - 1 - jaccard.index(max(jaccard))
    done = len(history) >= fit.epochs or since_best >= fit.patience
    return "finished" if done else "stopped"


def _first_line(error: Exception) -> str:
    """Type and first line of what a trial raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"
