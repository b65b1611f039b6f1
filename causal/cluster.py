"""Where blocks run: processes on this machine, Ray's nodes, or a Dask scheduler that is up already.

Every choice gives a `distributed.Client`, so that discovery is written once and gives the same
result to the bit.
"""

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.gc import disable_gc_diagnosis

from cafemed import console
from cafemed.cluster import ray_cluster
from cafemed.errors import ConfigError

#: Schemes of a Dask scheduler's address.
SCHEMES = ("tcp://", "tls://", "ucx://", "ws://", "wss://")

_CONNECT_TIMEOUT_S = 3

#: Dask makes its processes give freed memory back at 64 kB, which also keeps them from reusing
#: blocks of over 128 kB; small searches then spend a third of their time on fresh pages.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": 64 << 20, "MALLOC_MMAP_THRESHOLD_": 32 << 20}


#: Dask looks at every thread's frame a hundred times a second; where that meets Python's garbage
#: collector, the process may wait for itself for ever (CPython issue 106883, in 3.11).
_NO_PROFILE = {"distributed.worker.profile.enabled": False}


def check(where: str) -> None:
    """Refuses a value of `causal.cluster` that names nothing.

    Raises:
        ConfigError: unless it is "local", "ray" or a scheduler's address.
    """
    if where not in ("local", "ray") and not where.startswith(SCHEMES):
        raise ConfigError(
            "cluster: expected 'local', 'ray' or a scheduler's address such as "
            f"'tcp://host:8786', got {where!r}"
        )


def usable_cores() -> int:
    """Cores that this process may use (a container's or a batch system's share counts)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connect(where: str, workers: int | None = None) -> Iterator[Client]:
    """Opens a Dask client, and closes at the end whatever it started.

    Args:
        where: "local": processes on this machine; "ray": a scheduler and workers inside Ray actors,
            on the cluster that `RAY_ADDRESS` names or else on one started for this; else the
            address of a running scheduler.
        workers: processes or actors to start; None: one for each core. A running scheduler keeps
            its own.

    Raises:
        ConfigError: if `where` names nothing or no scheduler answers there.
    """
    check(where)
    if where == "local":
        opened = _local(workers or usable_cores())
    elif where == "ray":
        opened = _ray(workers)
    else:
        opened = _running(where)
    # Discovery itself reports, in one line, what a user can act on.
    with console.silenced("distributed", "distributed.client"), opened as client:
        yield client


@contextlib.contextmanager
def _local(workers: int) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        with _interrupts_deferred():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cafemed-dask-"))
            settings: dict[str, Any] = {
                f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in _MALLOC.items()
            }
            settings |= {"temporary-directory": folder, **_NO_PROFILE}
            stack.enter_context(dask.config.set(settings))
            processes = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=":0",  # any free port; None would be the fixed 8787
                local_directory=folder,
                silence_logs=logging.CRITICAL,  # in the workers
            )
            client = Client(processes)
            # Python swallows a Ctrl-C that falls into a callback of the garbage collector.
            disable_gc_diagnosis(force=True)
            stack.callback(_close, client, processes)
        yield client


def _close(client: Client, processes: LocalCluster) -> None:
    with _interrupts_deferred():
        client.close()
        processes.close()


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait until the block ends: nothing is left half started or closed.

    Processes that start meanwhile never see a Ctrl-C: a terminal sends it to every process of a
    job, but they are ended by this one, by SIGTERM, without a traceback from each.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands interrupts to the main thread alone
        return
    came = False

    def remember(_signal: int, _frame: object) -> None:
        nonlocal came
        came = True

    resource_tracker.ensure_running()  # it unblocks the signal in the thread that starts it
    handlers = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _running(address: str) -> Iterator[Client]:
    try:
        client = Client(address, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"causal.cluster: no Dask scheduler answered at {address} within "
            f"{_CONNECT_TIMEOUT_S} s; start one with `dask scheduler`, or set causal.cluster=local"
        ) from err
    with client:
        if not client.scheduler_info()["workers"]:
            raise ConfigError(
                f"causal.cluster: the scheduler at {address} has no workers; start one with "
                f"`dask worker {address}` in an environment that has this project"
            )
        yield client


@contextlib.contextmanager
def _ray(workers: int | None) -> Iterator[Client]:
    import ray  # slow to import, and needed here only

    with ray_cluster(workers or usable_cores()):
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        actors: list[Any] = [ray.remote(_SchedulerActor).options(num_cpus=0).remote()]
        try:
            address = ray.get(actors[0].start.remote())
            actors += [ray.remote(_WorkerActor).options(num_cpus=1).remote() for _ in range(count)]
            ray.get([worker.start.remote(address) for worker in actors[1:]])
            with Client(address, timeout=_CONNECT_TIMEOUT_S) as client:
                yield client
        finally:
            for actor in reversed(actors):
                ray.kill(actor)


class _SchedulerActor:
    """A Dask scheduler in a Ray actor's event loop."""

    async def start(self) -> str:
        from distributed import Scheduler

        dask.config.set(_NO_PROFILE)
        self.scheduler = await Scheduler(port=0, dashboard=False, dashboard_address=":0")
        return str(self.scheduler.address)


class _WorkerActor:
    """A Dask worker in a Ray actor's event loop; tasks run in its one thread."""

    async def start(self, scheduler: str) -> None:
        from distributed import Worker

        dask.config.set(_NO_PROFILE)
        self.folder = tempfile.TemporaryDirectory(prefix="cafemed-dask-")
        self.worker = await Worker(
            scheduler,
            nthreads=1,
            local_directory=self.folder.name,
            dashboard=False,
            dashboard_address=":0",
        )
