"""Sweeps on Ray: Ray Tune runs trials and restarts them, the conductor decides everything else.

Nothing here needs a cluster to be imported; Ray is loaded when a sweep runs, and has to be up then
(`cafemed/cluster.py`).
"""

import errno
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafemed import cluster, console, placement, shared_storage, sweep
from cafemed.conductor import Conductor
from cafemed.errors import TrainingError, UserError
from cafemed.sweep_plan import SearchConfig

if TYPE_CHECKING:
    from ray.tune import Tuner
    from ray.tune.experiment import Trial

    from cafemed.trials import TrialData

_BYTES_PER_GB = 1e9
#: That a busy cluster may take to start a process and run a task that does nothing.
_ANSWER_S = 60.0
#: What a machine refuses to every trial alike; such a trial did not fail, it waits to go on.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(conductor: Conductor, data: "TrialData") -> None:
    """Runs a sweep's trials on the Ray that this process is connected to, until it is over.

    The data goes to the object store once. Every trial reports each epoch with a checkpoint. One
    that raises, or whose process or node is lost, is started again from its checkpoint, and after
    `search.max_failures` times recorded as failed.

    Args:
        conductor: says which trials run, and is told what comes of them.
        data: what all trials share.

    Raises:
        ConfigError: if the cluster's nodes do not share the storage, or a local Ray has less than
            one trial reserves.
    """
    search = conductor.plan.search
    shared_storage.require_shared(conductor.ledger.storage, _storage_key(search))
    require_resources(search)
    if conductor.remaining == 0 or conductor.over():
        return
    # What goes wrong in a trial is in its record.
    with console.silenced("ray", "ray.tune", "ray.train"):
        try:
            _tuner(conductor, data).fit()
        except Exception as err:
            # Its own files are on a disk, too: it notes there what a trial raised.
            refused = _refused_by_disk(err)
            if refused is None:
                raise
            conductor.broken = refused


def require_resources(search: SearchConfig) -> None:
    """Refuses trials that reserve more than a local Ray has; see cafemed/cluster.py.

    Raises:
        ConfigError: naming the setting.
    """
    if search.num_workers > 1:
        placement.require_room(
            search.workers,
            {
                "num": "search.num_workers",
                "CPU": "search.cpus",
                "GPU": "search.gpus",
                "memory": "search.memory_gb",
            },
        )
        return
    wanted = {"CPU": ("search.cpus", search.cpus), "GPU": ("search.gpus", search.gpus)}
    if search.memory_gb is not None:
        wanted["memory"] = ("search.memory_gb", search.memory_gb)
    cluster.require_resources("a trial", wanted)


def _storage_key(search: SearchConfig) -> str:
    return "paths.root" if search.storage is None else "search.storage"


def _tuner(conductor: Conductor, data: "TrialData") -> "Tuner":
    from ray import tune

    from cafemed import tuning_hooks

    search, ledger = conductor.plan.search, conductor.ledger
    run = ledger.next_run()
    return tune.Tuner(
        _trainable(search, data),
        tune_config=tune.TuneConfig(
            search_alg=tuning_hooks.Search(conductor, _storage_key(search), run),
            scheduler=tuning_hooks.Schedule(conductor),
            num_samples=conductor.remaining,
            max_concurrent_trials=search.max_concurrent,
            # A worker imports torch once, not once a trial. That of a trial with workers of its own
            # has to end with it, so that they do.
            reuse_actors=search.num_workers == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=run,
            storage_path=ledger.storage,
            stop=tuning_hooks.Stop(conductor),
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[tuning_hooks.Events(conductor, ended)],
            verbose=0,
        ),
    )


def _trainable(search: SearchConfig, data: "TrialData") -> Any:
    """What Ray Tune runs as a trial, with what it reserves."""
    import ray
    from ray import tune

    from cafemed import trials

    if search.num_workers > 1:
        # The workers reserve. A trial itself looks on, but Ray Tune takes none without resources.
        shared = [ray.put(data)]
        run = tune.with_parameters(trials.run_trial_of_workers, data=shared)
        return tune.with_resources(run, {"cpu": 0, "memory": 1})
    resources = {"cpu": search.cpus, "gpu": search.gpus}
    if search.memory_gb is not None:
        resources["memory"] = int(search.memory_gb * _BYTES_PER_GB)
    return tune.with_resources(tune.with_parameters(trials.run_trial, data=data), resources)


def ended(conductor: Conductor, trial: "Trial", failed: bool) -> None:
    """Tells the conductor what Ray Tune knows of a trial that ended."""
    number, found = trial.config["trial"], trial.last_result or {}
    # A trial that did not fail in the end still has the error of an earlier attempt.
    cause = _cause(trial) if failed else None
    # A trial raises no error of a user's but that its node does not see the storage.
    if isinstance(cause, UserError) or (isinstance(cause, OSError) and cause.errno in _DISK):
        conductor.broken = cause
        return
    if _is_of_the_cluster(cause) and not _cluster_answers():
        conductor.broken = TrainingError(
            "the cluster that the sweep runs on does not answer any more; its trials wait"
        )
        return
    conductor.end(
        number,
        found.get(sweep.HISTORY, ()),
        error=found.get(sweep.ERROR) if cause is None else _first_line(cause),
        **sweep.whereabouts(found),
    )


def _cause(trial: "Trial") -> Exception:
    """What a failed trial raised, without Ray's wrapping.

    `Trial.get_pickled_error` looks in the storage, where Ray Tune copies its file some time later.
    """
    try:
        error: Exception = pickle.loads(Path(trial.pickled_error_file).read_bytes())  # noqa: S301
    except Exception as err:  # noqa: BLE001  an exception's own class decides what unpickling does
        return RuntimeError(f"its error cannot be read ({type(err).__name__})")
    return getattr(error, "cause", None) or error


def _is_of_the_cluster(cause: Exception | None) -> bool:
    """Whether a trial failed by what it ran on: a process, a node or a connection was lost."""
    from ray.exceptions import RayError

    return isinstance(cause, RayError)


def _cluster_answers() -> bool:
    """Whether a task still runs; without the driver's own node none does, and each trial fails."""
    import ray

    try:
        return bool(ray.get(ray.remote(num_cpus=0)(lambda: True).remote(), timeout=_ANSWER_S))
    except (ray.exceptions.RayError, OSError, RuntimeError):
        return False


def _trial_name(trial: "Trial") -> str:
    from cafemed import tuning_hooks

    return tuning_hooks.trial_name(trial.config["trial"])


def _refused_by_disk(err: BaseException | None) -> OSError | None:
    """What a full disk raised, if that is behind an error."""
    while err is not None and not (isinstance(err, OSError) and err.errno in _DISK):
        err = err.__cause__ or err.__context__
    return err


def _first_line(cause: Any) -> str:
    """Type and first line of what a trial raised, without Ray's wrapping."""
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"
