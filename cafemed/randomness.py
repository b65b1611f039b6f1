"""Random states of Python, NumPy and torch: seeded for a run, saved, and put back afterwards."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomStates:
    """The states of every global generator that a model may draw from.

    Attributes:
        plain: of Python and NumPy; JSON values.
        tensors: of torch, uint8: "cpu", and "cuda" where a CUDA device is used.
    """

    plain: dict[str, Any]
    tensors: dict[str, Tensor]


def capture(device: torch.device) -> RandomStates:
    """Copies the current states."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return RandomStates(plain, tensors)


def restore(states: RandomStates, device: torch.device) -> None:
    """Sets the generators to states that `capture` gave."""
    version, internal, gauss = states.plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states.plain["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(states.tensors["cpu"])
    if device.type == "cuda" and "cuda" in states.tensors:
        torch.cuda.set_rng_state(states.tensors["cuda"], device)


def diverge(seed: int, rank: int) -> None:
    """Gives each process of a group random numbers of its own; the first keeps those it has.

    Args:
        seed: of the fit.
        rank: of this process.
    """
    if rank > 0:
        _seed_all(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]))


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def reproducible(seed: int, num_threads: int, device: torch.device) -> Iterator[None]:
    """Seeds Python, NumPy and torch and sets torch's threads; puts all of it back at the end.

    With one thread, the same seed gives the same floating-point results to the bit on the CPU.
    """
    before, threads = capture(device), torch.get_num_threads()
    _seed_all(seed)
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        restore(before, device)
