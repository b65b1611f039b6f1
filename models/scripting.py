"""Functions compiled by torch, for recordings (models/tracing.py)."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def scripted(function: Callable[..., T]) -> Callable[..., T]:
    """A function compiled by torch: a recording keeps its loops, and what it reads of tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., T] = torch.jit.script(function)
    return compiled
