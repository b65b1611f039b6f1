"""The processes that train one model together: what they divide, sum up and decide alike.

Whoever starts them joins them (`torch.distributed.init_process_group`; `cafemed/distributed.py`
lets Ray Train do it), and `training.fit` finds them by `current`. A process that trains alone is a
group of one, in which nothing below costs anything.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes that call the same methods in the same order; each method says what for.

    Attributes:
        rank: of this process, from 0; the first one talks to the world.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def part(self, patients: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's share of the patients; every patient is in exactly one share."""
        return patients[self.rank :: self.size]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as it has to be called where there are gradients.

        Gradients are then the mean of those of all processes, and all begin with the first one's
        weights. A parameter that no process used keeps no gradient, as with one process.
        """
        if self.size == 1:
            return model
        # Buffers are constants of the inputs: nothing to send before a step.
        return DistributedDataParallel(
            model, forward_sync_buffers=False, find_unused_parameters=True
        )

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, written over the values, which carry no gradient."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on the first process; nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, found)
        return found or []

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives or raises in the first process, in all of them."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = make()
            except Exception as err:  # noqa: BLE001  the others would wait for ever
                told[1] = err
        distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        value: T = told[0]
        return value


def current() -> Group:
    """The group that this process has joined; one of its own if it has joined none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Group()
    return Group(distributed.get_rank(), distributed.get_world_size())


def backend(device: torch.device) -> str:
    """What processes that train on such devices are joined with.

    Tensors go through NCCL where they are on GPUs; what is decided alike goes through gloo.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
