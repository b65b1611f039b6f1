"""Where the workers of a fit are: what they reserve, how many groups fit, and an end to each group.

Ray Train reserves a placement group of its own for the workers of a trainer. If the process that
called the trainer is ended from outside, as Ray Tune ends a trial that a scheduler stops, Ray 2.60
leaves that group behind, with all it reserves (tried out; also with the cleaner that Ray Train
starts for it). So every group carries the number of its trial, as a few bytes of memory that its
workers reserve, and whoever learns of the trial's end removes what carries it.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cafemed import cluster, console
from cafemed.errors import ConfigError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_BYTES_PER_GB = 1e9
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Workers:
    """The processes that train one model together.

    Attributes:
        num: how many.
        cpus: CPUs that each reserves.
        gpus: GPUs that each reserves; 0 or 1, as NCCL joins no two processes on one GPU.
        memory_gb: memory that each reserves, in units of 1e9 bytes; None: not counted.
    """

    num: int
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float | None = None

    def reserved(self, number: int) -> dict[str, float]:
        """What a worker reserves, in Ray's words, with the mark of a trial's number."""
        memory = int((self.memory_gb or 0.0) * _BYTES_PER_GB) + number + 1
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": memory}

    def groups_on(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many groups fit on nodes at the same time.

        Args:
            nodes: what each has in all: "CPU", "GPU" and "memory" (bytes).
        """
        needs = {"CPU": self.cpus, "GPU": self.gpus}
        needs["memory"] = (self.memory_gb or 0.0) * _BYTES_PER_GB
        workers = 0
        for node in nodes:
            rooms = [node.get(k, 0.0) / need + _ROUNDING for k, need in needs.items() if need]
            workers += math.floor(min(rooms))
        return workers // self.num


def problems(num_workers: int, gpus: float, key: str) -> list[str]:
    """What is wrong with the GPUs of a group's workers, under their configuration key."""
    if num_workers > 1 and gpus not in (0, 1):
        return [
            f"{key}: with several workers each has a GPU of its own or none, as NCCL joins no two "
            f"on one GPU; expected 0 or 1, got {gpus:g}"
        ]
    if gpus > 1 and not gpus.is_integer():
        return [
            f"{key}: Ray reserves whole GPUs, or a part of one; expected at most 1 or a whole "
            f"number, got {gpus:g}"
        ]
    return []


def require_room(workers: Workers, keys: Mapping[str, str]) -> None:
    """Refuses a group that a local Ray has no room for; of a cluster, which may grow, it says so.

    Args:
        workers: of one model.
        keys: the configuration keys of "num", "CPU", "GPU" and, where it is set, "memory".

    Raises:
        ConfigError: naming the key.
    """
    wanted = {"CPU": (keys["CPU"], workers.cpus), "GPU": (keys["GPU"], workers.gpus)}
    if workers.memory_gb is not None:
        wanted["memory"] = (keys["memory"], workers.memory_gb)
    cluster.require_resources("a worker", wanted)
    if workers.groups_on(_nodes()) > 0:
        return
    lack = f"{keys['num']}: there is no room for {workers.num} workers of {_described(workers)}"
    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"{lack}; reserve less, or choose fewer")
    console.say("ray", f"{lack} now; waiting for nodes that have it")


def room(workers: Workers) -> int:
    """How many groups of workers fit on the nodes that are up, were nothing else there."""
    return workers.groups_on(_nodes())


def release(workers: Workers, number: int) -> None:
    """Removes the placement groups of a trial, and with them its workers; of this job's only.

    Of a cluster that is gone there is nothing to remove.

    Args:
        workers: that the trial was started with.
        number: of the trial.
    """
    import ray

    with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ConnectionError):
        for group in _groups_of(workers, number):
            ray.util.remove_placement_group(group)


def _groups_of(workers: Workers, number: int) -> list["PlacementGroup"]:
    import ray
    from ray.util.placement_group import PlacementGroup

    bundle = {kind: amount for kind, amount in workers.reserved(number).items() if amount}
    own, found = ray.get_runtime_context().get_job_id(), list[PlacementGroup]()
    for name, group in ray.util.placement_group_table().items():
        # The last of an id's bytes are those of the job.
        is_ours = name.endswith(own) and group["state"] != "REMOVED"
        if is_ours and list(group["bundles"].values()) == [bundle] * workers.num:
            found.append(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
    return found


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _described(workers: Workers) -> str:
    parts = [f"{workers.cpus:g} CPUs"]
    if workers.gpus:
        parts.append(f"{workers.gpus:g} GPU")
    if workers.memory_gb is not None:
        parts.append(f"{workers.memory_gb:g} GB")
    return ", ".join(parts)
