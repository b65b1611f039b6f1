"""Whether every node of a cluster sees the same storage: found out by writing and looking.

A path that is private to a node looks like any other; its sweep would fail with the first trial
that another node runs, or, worse, find an older folder of the same name there.
"""

import contextlib
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafemed.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# A network disk may show a new file a moment later; a worker process takes seconds to start.
_PATIENCE_S = 5.0
_ANSWER_S = 120.0
_ADVICE = "choose a folder that all nodes mount, or a URL such as s3://bucket/folder"


def require_shared(storage: str | Path, key: str) -> None:
    """Refuses a storage that some node of the connected cluster does not share with this process.

    This process writes a marker; a task on every other node, which reserves nothing, looks for it
    and leaves one of its own. All are removed again, and nothing else is made: of a folder that is
    not there yet, the one that it would be made in is asked about. A local path is not looked at
    where the cluster has one node; a URL always is.

    Args:
        storage: absolute folder, or URL that pyarrow knows (`s3://`, `gs://`, …).
        key: the configuration key that chose it.

    Raises:
        ConfigError: if a node does not see what this process writes, or may not write itself.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and "://" not in str(storage):
        return
    place = _existing(storage)
    name = f".shared-{secrets.token_hex(8)}"
    try:
        _write(place, name)
    except (OSError, ValueError) as err:
        raise ConfigError(f"{key}: cannot write to {storage}: {_first_line(err)}") from err
    try:
        problem = look(place, name)
        if problem is not None:
            raise ConfigError(f"{key}: {storage} does not keep what is written there: {problem}")
        here = ray.get_runtime_context().get_node_id()
        others = [node for node in nodes if node["NodeID"] != here]
        problems = _ask(others, place, name) if others else {}
    finally:
        _remove(place, name)
    if problems:
        told = "; ".join(f"{host}: {problem}" for host, problem in sorted(problems.items()))
        raise ConfigError(
            f"{key}: {storage} is not shared by the cluster's {len(nodes)} nodes ({told}); "
            f"{_ADVICE}"
        )


def require_seen(file: Path, key: str) -> None:
    """Refuses, on a node that a trial came to, a storage without a file that has to be there.

    Nodes that an autoscaler brings during a sweep were not there for `require_shared`.

    Args:
        file: what the driver wrote before the first trial.
        key: the configuration key that chose the storage.

    Raises:
        ConfigError: if this node does not see it.
    """
    until = time.monotonic() + _PATIENCE_S
    while not file.is_file():
        if time.monotonic() > until:
            raise ConfigError(
                f"{key}: {file.parent} is not shared by the cluster's nodes "
                f"({socket.gethostname()}: {file.name} is not there); {_ADVICE}"
            )
        time.sleep(0.2)


def look(place: str, name: str) -> str | None:
    """Looks for the driver's marker and leaves one beside it; runs on every node.

    Args:
        place: folder or URL.
        name: of the marker, which is also its content.

    Returns:
        None if it is there and this node may write too, else what is wrong.
    """
    own = f"{name}-{secrets.token_hex(8)}"
    try:
        files, folder = _open(place)
        until = time.monotonic() + _PATIENCE_S
        while not _is_there(files, f"{folder}/{name}", name):
            if time.monotonic() > until:
                return "does not see what was written there"
            time.sleep(0.2)
        _write(place, own)
    except (OSError, ValueError) as err:
        return _first_line(err)
    finally:
        _remove(place, own)
    return None


def _ask(nodes: list[dict[str, Any]], place: str, name: str) -> dict[str, str]:
    """What is wrong on these nodes, by address; those that were lost meanwhile count as fine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=there).remote(place, name)] = node[
            "NodeManagerAddress"
        ]
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    problems = {asked[answer]: f"no answer within {_ANSWER_S:.0f} s" for answer in late}
    for answer in done:
        try:
            problem = ray.get(answer)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue
        except ray.exceptions.RayError as err:
            problem = _first_line(getattr(err, "cause", None) or err)
        if problem is not None:
            problems[asked[answer]] = problem
    return problems


def _existing(storage: str | Path) -> str:
    """The URL itself; of a path, the innermost folder of it that is there."""
    if "://" in str(storage):
        return str(storage)
    return str(next(p for p in (Path(storage), *Path(storage).parents) if p.exists()))


def _open(place: str) -> tuple["FileSystem", str]:
    from pyarrow import fs

    if "://" in place:
        return fs.FileSystem.from_uri(place)  # type: ignore[no-any-return]
    return fs.LocalFileSystem(), place


def _write(place: str, name: str) -> None:
    files, folder = _open(place)
    with files.open_output_stream(f"{folder}/{name}") as stream:
        stream.write(name.encode())


def _is_there(files: "FileSystem", path: str, content: str) -> bool:
    try:
        with files.open_input_stream(path) as stream:
            return bool(stream.read() == content.encode())
    except FileNotFoundError:
        return False


def _remove(place: str, name: str) -> None:
    # What could not be written cannot be removed, and that was said already.
    with contextlib.suppress(OSError, ValueError):
        files, folder = _open(place)
        files.delete_file(f"{folder}/{name}")


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0] if lines else type(err).__name__
