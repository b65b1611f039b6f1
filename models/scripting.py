"""Functions that a recording of a model (models/tracing.py) keeps as torch compiles them."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def recordable(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that torch can compile: a recording keeps its loops and branches.

    Of any other function a recording has what was done for its example, and takes numbers read of
    tensors for constants. Where nothing is recorded, the function is called as it is.
    """

    @functools.cache
    def compiled() -> Callable[..., T]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found: Callable[..., T] = torch.jit.script(function)
        return found

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return compiled()(*args, **kwargs)
        return function(*args, **kwargs)

    return called
