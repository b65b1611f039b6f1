"""Ray for the length of a block: the cluster that was named, or one of our own that ends with it.

A Ray that happens to run on the machine is never attached to by chance: without `RAY_ADDRESS` a
private one is started, with its own temporary folder, and everything of it is removed at the end,
also after an exception or Ctrl-C.
"""

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import psutil

from cafemed import cluster_access, console
from cafemed.errors import ConfigError

# A socket's path has at most 107 characters; Ray appends "/session_<time>_<pid>/sockets/…".
_MAX_TEMP_CHARS = 40
_BYTES_PER_GB = 1e9
#: Of the processes of a Ray of our own: its temporary folder.
_FOLDER = "CAFEMED_RAY_FOLDER"
#: Times that what is left of a Ray is looked for and ended, and seconds until it has to be gone.
_ROUNDS = 5
_KILL_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C has to reach us, not end in a half-made result
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the sweep's own table holds what they would write
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table even when told to be silent
}


@contextlib.contextmanager
def ray_cluster(num_cpus: float, num_gpus: float = 0.0) -> Iterator[str]:
    """Connects to the cluster at `RAY_ADDRESS`, or starts a local one; leaves it at the end.

    Where the process is connected already, that connection is used and kept.

    Args:
        num_cpus: CPUs that can be used at once; a local Ray gets that many, at most the machine's.
        num_gpus: whether a local Ray looks for the machine's GPUs.

    Yields:
        A line that says where the work runs.

    Raises:
        ConfigError: if no cluster answers at `RAY_ADDRESS`, or it refuses the token.
    """
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield _describe("the Ray of this process")
        return
    address = os.environ.get("RAY_ADDRESS")
    temp = None if address else _temp_folder()
    try:
        what = "starting Ray" if temp else "connecting to Ray"
        with _interrupts_deferred(), console.waiting(what):
            if temp is None:
                _connect(str(address))
            else:
                _start_local(num_cpus, num_gpus, temp)
        yield _describe(f"the cluster at {address}" if address else "a local Ray")
    finally:
        ray.shutdown()
        if temp is not None:
            _end_processes_of(temp)
            shutil.rmtree(temp, ignore_errors=True)


def require_resources(what: str, wanted: Mapping[str, tuple[str, float]]) -> None:
    """Refuses what no node of a local Ray can hold; of a cluster, which may grow, it says so.

    Args:
        what: that which reserves resources, for instance "a trial".
        wanted: "CPU", "GPU" or "memory" → the configuration key, and how much it reserves; memory
            in units of 1e9 bytes.

    Raises:
        ConfigError: if the Ray is of this process and its node has less: it would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, (key, amount) in wanted.items():
        most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        most, unit = (most / _BYTES_PER_GB, "GB") if kind == "memory" else (most, kind)
        if amount <= most:
            continue
        lack = f"{key}: {what} reserves {amount:g}, but the largest node has {most:g} {unit}"
        if not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"{lack}; reserve less")
        console.say("ray", f"{lack} now; waiting for a node that has them")


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """An interrupt while Ray starts is raised when it has; a second one at once.

    Interrupted in its middle, ray.init leaves a half-made connection, which ends the process by a
    segmentation fault. It also replaces SIGTERM's handler, by one that exits, and beneath Python by
    one that aborts the process three seconds later.
    """
    import ray

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        signal.alarm(0)
        if before[signal.Signals(number)] is signal.SIG_IGN:
            return  # as shells want it of what they run by &
        if received:
            raise KeyboardInterrupt
        received = True

    for number in before:
        signal.signal(number, note)
    utils = ray._private.utils
    rays_own, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays_own
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            raise KeyboardInterrupt


def _connect(address: str) -> None:
    import ray

    cluster_access.require_answer(address)
    try:
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as err:
        lines = str(err).strip().splitlines() or [type(err).__name__]
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers: {lines[0]}") from err


def _start_local(num_cpus: float, num_gpus: float, temp: Path) -> None:
    import ray

    if os.environ.get("RAY_AUTH_MODE") != "disabled" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # One secret a process: Ray would otherwise write one to the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ[_FOLDER] = str(temp)
    try:
        ray.init(
            address="local",
            num_cpus=math.ceil(min(num_cpus, len(os.sched_getaffinity(0)))),
            num_gpus=None if num_gpus else 0,
            include_dashboard=False,
            _temp_dir=str(temp),
            logging_level=logging.CRITICAL,
            log_to_driver=False,
        )
    finally:
        del os.environ[_FOLDER]  # what this process starts itself is not Ray's


def _end_processes_of(temp: Path) -> None:
    """Ends what is left of a Ray of our own.

    After an interrupt while it starts, its agents would look for its store for another minute.
    """
    for _ in range(_ROUNDS):  # a process may have been starting another one
        left = [process for process in psutil.process_iter() if _is_of(process, temp)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_KILL_S)


def _is_of(process: psutil.Process, temp: Path) -> bool:
    """Whether a process is of the Ray with this folder: so its environment or an open log says.

    Ray's agents have written their title over their environment; their logs are in the folder.
    """
    if process.pid == os.getpid():
        return False
    with contextlib.suppress(psutil.Error):
        if process.environ().get(_FOLDER) == str(temp):
            return True
    with contextlib.suppress(psutil.Error):
        return any(temp in Path(file.path).parents for file in process.open_files())
    return False


def _describe(where: str) -> str:
    import ray

    resources = ray.cluster_resources()
    kinds = [f"{resources[kind]:g} {kind}s" for kind in ("CPU", "GPU") if resources.get(kind)]
    return f"{where}: {', '.join(kinds)}"


def _temp_folder() -> Path:
    preferred = Path(tempfile.gettempdir())
    parent = preferred if len(str(preferred)) <= _MAX_TEMP_CHARS else Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="cafemed-", dir=parent))
