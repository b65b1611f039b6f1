"""Ray for the length of a block: the cluster that was named, or one of our own that ends with it.

A Ray that happens to run on the machine is never attached to by chance: without `RAY_ADDRESS` a
private one is started, with its own temporary folder, and everything of it is removed at the end,
also after an exception or Ctrl-C.
"""

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cafemed.errors import ConfigError

# A socket's path has at most 107 characters; Ray appends "/session_<time>_<pid>/sockets/…".
_MAX_TEMP_CHARS = 40
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C has to reach us, not end in a half-made result
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the sweep's own table holds what they would write
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextlib.contextmanager
def ray_cluster(num_cpus: float, num_gpus: float = 0.0) -> Iterator[None]:
    """Connects to the cluster at `RAY_ADDRESS`, or starts a local one; leaves it at the end.

    Where the process is connected already, that connection is used and kept.

    Args:
        num_cpus: CPUs that can be used at once; a local Ray gets that many, at most the machine's.
        num_gpus: the same for GPUs; a local Ray gets those that it finds.

    Raises:
        ConfigError: if nothing answers at `RAY_ADDRESS`, or more is asked than the machine has.
    """
    import ray

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    temp = None if address else _temp_folder()
    try:
        if address:
            _connect(address)
        else:
            _start_local(num_cpus, num_gpus, Path(str(temp)))
        yield
    finally:
        ray.shutdown()
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ray.exceptions.RaySystemError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {reason}") from err


def _start_local(num_cpus: float, num_gpus: float, temp: Path) -> None:
    import ray

    available = len(os.sched_getaffinity(0))
    if num_cpus > available:
        num_cpus = available
    ray.init(
        address="local",
        num_cpus=math.ceil(num_cpus),
        num_gpus=None if num_gpus else 0,
        include_dashboard=False,
        _temp_dir=str(temp),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _temp_folder() -> Path:
    preferred = Path(tempfile.gettempdir())
    parent = preferred if len(str(preferred)) <= _MAX_TEMP_CHARS else Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="cafemed-", dir=parent))
