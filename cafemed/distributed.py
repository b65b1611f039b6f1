"""One model trained by several workers: `training.fit` in each one of a Ray Train `TorchTrainer`.

Ray Train places and starts the workers, on one node or several, and joins them: through NCCL where
each has a GPU, else through gloo. What they do together is in `cafemed/process_group.py` and
`cafemed/stepping.py`; here is what the caller sees of it, which is what it sees of `training.fit`:
after every epoch the checkpoint is in the caller's folder and the caller is asked whether to go on.
The first worker sends both to a relay, an actor beside the caller, and waits there for the answer;
any worker tells it the error that ends the fit.
So the workers need no folder in common with the caller, nor with each other.
"""

import asyncio
import contextlib
import dataclasses
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cafemed import checkpoints, cluster, console, placement, process_group, training
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.errors import TrainingError, UserError
from cafemed.placement import Workers as Workers
from cafemed.training import Builder, EpochReport, FitConfig, FitResult

#: Seconds between two looks at whether the workers ended; Ray Train's own are 2 s apart.
_LOOK_S = 0.2
#: Seconds that workers have to end by themselves, and to be started again once more if one was lost
#: meanwhile, when the caller knows what came of the fit.
_END_S = 20.0
#: How often the workers of a single fit are started again; a sweep has a setting for its own.
_MAX_FAILURES = 3


@dataclasses.dataclass(frozen=True)
class FitData:
    """What `training.fit` is given besides the model's options and the configuration.

    Attributes:
        build: passed to `training.fit`; pickled by reference.
        inputs: passed to `training.fit`.
        arrays: passed to `training.fit`.
        train_patients: indices.
        validation_patients: indices.
    """

    build: Builder
    inputs: ModelInputs
    arrays: VisitArrays
    train_patients: NDArray[np.int64]
    validation_patients: NDArray[np.int64]


def fit(
    data: "ray.ObjectRef[Any]",
    model_name: str,
    model_options: Mapping[str, Any],
    config: FitConfig,
    workers: Workers,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    checkpoint_dir: Path | None = None,
    *,
    max_failures: int = 0,
    number: int = 0,
) -> FitResult:
    """Trains one model with several workers; Ray has to be up.

    Args:
        data: reference to FitData, or to what has its fields, as TrialData; `ray.put` once, it is
            read on every node without another copy.
        model_name: see `training.fit`.
        model_options: see `training.fit`.
        config: see FitConfig; `batch_size` is of all workers together, `num_threads` of each.
        workers: see Workers.
        on_epoch: see `training.fit`; called in this process.
        checkpoint_dir: see `training.fit`; a folder of this process.
        max_failures: how often the workers are started again, from the last checkpoint, when one
            of them, or its node, is lost.
        number: of the trial; tells its workers from those of other fits that this job runs.

    Raises:
        UserError, OSError: what `training.fit` raises in the workers.
        Exception: the first cause, if the workers fail more often than they may.
    """
    # Ray Train hands this on to the process that looks after the workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_LOOK_S))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    files = {} if checkpoint_dir is None else checkpoints.read_files(checkpoint_dir)
    relay = ray.remote(num_cpus=0)(_Relay).options(scheduling_strategy=here).remote(files)
    told = {
        "data": data,
        "relay": relay,
        "model": (model_name, dict(model_options)),
        "config": config,
        "gpus": workers.gpus,
    }
    beside = None if checkpoint_dir is None else checkpoint_dir.parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config=told,
            torch_config=TorchConfig(backend=process_group.backend(_devices(workers))),
            scaling_config=train.ScalingConfig(
                num_workers=workers.num,
                use_gpu=workers.gpus > 0,
                resources_per_worker=workers.reserved(number),
            ),
            run_config=train.RunConfig(
                name="fit",
                storage_path=scratch,  # of Ray Train's notes; checkpoints go through the relay
                failure_config=train.FailureConfig(max_failures=max_failures),
            ),
        )
        running = _Running(trainer)
        try:
            outcome = _follow(relay, running, on_epoch, checkpoint_dir)
            if not running.join(_END_S):
                # One waits for another that gave up, or for room to be started again.
                running.end(relay)
                placement.release(workers, number)
        except BaseException:
            running.end(relay)
            placement.release(workers, number)
            raise
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def fit_alone(
    data: FitData,
    model_name: str,
    model_options: Mapping[str, Any],
    config: FitConfig,
    num_workers: int,
    device: str,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    checkpoint_dir: Path | None = None,
) -> FitResult:
    """Trains one model as `fit` does, on the cluster at `RAY_ADDRESS` or a Ray of its own.

    Args:
        data: see FitData.
        model_name: see `training.fit`.
        model_options: see `training.fit`.
        config: see FitConfig; a worker has a CPU for each of `num_threads`.
        num_workers: at least 2.
        device: what each worker trains on: "cuda", "cpu", or "auto": a GPU, if there is one for
            each.
        on_epoch: see `training.fit`.
        checkpoint_dir: see `training.fit`.

    Raises:
        ConfigError: if a local Ray has no room for the workers.
        UserError, OSError: what `training.fit` raises.
    """
    keys = {"num": "num_workers", "CPU": "train.num_threads", "GPU": "device"}
    cpus = float(config.num_threads)
    wanted = 0.0 if device == "cpu" else 1.0
    with cluster.ray_cluster(num_workers * cpus, wanted) as where:
        workers = Workers(num_workers, cpus, wanted)
        if device == "auto" and placement.room(workers) == 0:
            workers = Workers(num_workers, cpus)
        console.say("ray", f"{where}; {num_workers} workers on {'cuda' if workers.gpus else 'cpu'}")
        placement.require_room(workers, keys)
        with console.silenced("ray", "ray.train"):
            return fit(
                ray.put(data),
                model_name,
                model_options,
                config,
                workers,
                on_epoch,
                checkpoint_dir,
                max_failures=_MAX_FAILURES,
            )


def _devices(workers: Workers) -> torch.device:
    """What the workers train on; GPUs of clusters under test are numbers, and torch has no NCCL."""
    there = workers.gpus > 0 and torch.distributed.is_nccl_available()
    return torch.device("cuda" if there else "cpu")


class _Running:
    """A trainer at work, in a thread: this process listens to the relay meanwhile."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as err:  # noqa: BLE001  raised by the thread that listens
            self._error = err

    @property
    def over(self) -> bool:
        """Whether the workers are gone."""
        return not self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Waits until the workers are gone and what they reserved is free; says whether it is."""
        self._thread.join(seconds)
        return self.over

    def end(self, relay: Any) -> None:
        """Ends the trainer's controller, known by the owner that it shares with the relay.

        Else it would start the workers again; and were Ray shut down while the thread waits for it,
        Ray would end this process on the spot.
        """
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ConnectionError, KeyError):
            actors = ray._private.state.actors()
            owner = actors[relay._actor_id.hex()]["OwnerAddress"]
            worker: Any = ray._private.worker.global_worker
            for name, actor in actors.items():
                if actor["ActorClassName"] == "TrainController" and actor["OwnerAddress"] == owner:
                    worker.core_worker.kill_actor(ray.ActorID.from_hex(name), True)
        self._thread.join(_END_S)

    def error(self) -> Exception:
        """Why the workers ended before they said what came of the fit."""
        failures = getattr(self._error, "worker_failures", None)
        if not failures:
            return self._error or TrainingError("the workers ended without a result")
        # One that died makes the others fail, who lose the connection to it.
        causes = [_unwrapped(cause) for _, cause in sorted(failures.items())]
        lost = [cause for cause in causes if isinstance(cause, ray.exceptions.RayError)]
        cause: Exception = (lost or causes)[0]
        return cause


def _unwrapped(cause: Exception) -> Exception:
    """What a worker raised, or how it was lost, without Ray Train's wrapping."""
    for name in ("_base_exc", "health_check_failure"):
        cause = getattr(cause, name, cause)
    return cause


def _follow(
    relay: Any,
    running: _Running,
    on_epoch: Callable[[EpochReport], bool | None] | None,
    checkpoint_dir: Path | None,
) -> FitResult | Exception:
    """Takes what the workers tell, and answers, until one tells what came of the fit."""
    while True:
        heard = relay.hear.remote()
        while not ray.wait([heard], timeout=_LOOK_S)[0]:
            if running.over:
                raise running.error()
        ticket, what, files = ray.get(heard)
        if isinstance(what, EpochReport):
            if checkpoint_dir is not None:
                checkpoints.write_files(checkpoint_dir, files)
            stop = on_epoch is not None and bool(on_epoch(what))
            ray.get(relay.answer.remote(ticket, stop))
            continue
        ray.get(relay.finish.remote())
        outcome: FitResult | Exception = what
        return outcome


class _Relay:
    """Stands between the workers and the caller; both ask it.

    Args:
        files: of the checkpoint that the fit goes on from.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._told: asyncio.Queue[tuple[int, Any, dict[str, bytes]]] = asyncio.Queue()
        self._answers: list[asyncio.Future[bool]] = []
        self._over = False

    async def over(self) -> bool:
        """Whether the caller knows what came of the fit, and hears no more."""
        return self._over

    async def finish(self) -> None:
        """Says that the caller hears no more: what is told from now on ends training at once."""
        self._over = True
        for ticket in range(len(self._answers)):
            await self.answer(ticket, True)

    async def checkpoint(self) -> dict[str, bytes]:
        """The files of the newest checkpoint; workers that are started again go on from it."""
        return self._files

    async def tell(self, what: Any, files: dict[str, bytes]) -> bool:
        """Takes an epoch's report, or what came of the fit; gives whether training ends."""
        if self._over:
            return True
        if files:
            self._files = files
        answer = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        await self._told.put((len(self._answers) - 1, what, files))
        return bool(await answer)

    async def hear(self) -> tuple[int, Any, dict[str, bytes]]:
        """What was told next, with the number under which it is to be answered."""
        return await self._told.get()

    async def answer(self, ticket: int, stop: bool) -> None:
        """Says whether training ends; nobody may be waiting for it any more."""
        if not self._answers[ticket].done():
            self._answers[ticket].set_result(stop)


def _work(told: Mapping[str, Any]) -> None:
    """What each worker does; Ray Train calls this when all of them are joined."""
    relay, (name, options) = told["relay"], told["model"]
    if ray.get(relay.over.remote()):
        return  # started again for one that was lost after the others had told
    data = ray.get(told["data"])
    first = train.get_context().get_world_rank() == 0
    has_gpu = told["gpus"] > 0 and torch.cuda.is_available()
    device = get_device() if has_gpu else torch.device("cpu")
    # Ray Train put the worker in a folder of Ray's session: nothing is left when Ray ends.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        if first:
            checkpoints.write_files(folder, ray.get(relay.checkpoint.remote()))

        def after_epoch(report: EpochReport) -> bool:
            return bool(ray.get(relay.tell.remote(report, checkpoints.read_files(folder))))

        outcome: FitResult | Exception
        try:
            outcome = training.fit(
                data.build,
                name,
                options,
                data.inputs,
                data.arrays,
                data.train_patients,
                data.validation_patients,
                told["config"],
                on_epoch=after_epoch,
                checkpoint_dir=folder,
                device=device,
                flush=False,
            )
        except ConnectionError:
            raise
        except (UserError, OSError) as err:  # would come again: not a worker that failed
            outcome = err
        # An error of one that is not the first is its own: the others wait for it meanwhile.
        if first or isinstance(outcome, Exception):
            ray.get(relay.tell.remote(outcome, {}))
