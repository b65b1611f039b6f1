"""Answers by a recorded graph of a model, which no longer needs the interpreter.

What a model does for visits that are asked about (models/packing.py) is a few hundred small steps.
Recorded once and replayed by torch, they are the same steps on the same numbers, without Python
between them: a run of few patients takes a third less time, and a thread that replays does not keep
others from the interpreter. Whether a recording gives the model's bits, whatever the numbers of
blocks, is for whoever makes one to try.
"""

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import nn

from cafemed.batches import Batch
from models import blocks

T = TypeVar("T")


def scripted(function: Callable[..., T]) -> Callable[..., T]:
    """A function compiled by torch: a recording keeps its loops, and what it reads of tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., T] = torch.jit.script(function)
    return compiled


class Traced:
    """A recording of a model that reads nothing of a batch but its packing (`reads_packing_alone`).

    Args:
        model: in evaluation, with weights that no longer change.
        batch: an example.
        packing: of the example, with visits that are asked about; its tensors are int64.
        finish: of the model's logits, float32 (A, N_m), recorded with it.

    Raises:
        TypeError: if a tensor of the packing is not int64.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        packing: Any,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._all_of: Callable[[Any], tuple[Any, ...]] = attrgetter(*_paths(packing))
        tensors = _tensors(self._all_of(packing))
        if any(tensor.dtype != torch.int64 for tensor in tensors):
            raise TypeError("a packing to be recorded has int64 alone")
        with blocks.fixed(), warnings.catch_warnings():
            # Of sizes that it takes for constants, which those of weights are.
            warnings.simplefilter("ignore")
            recorded = torch.jit.trace(  # type: ignore[no-untyped-call]
                _OfTensors(model, batch, packing, finish, tensors).eval(),
                (_joined(tensors),),
                check_trace=False,
            )
            # Read back: what torch keeps of a recording for good is without the weights then.
            stored = io.BytesIO()
            torch.jit.save(recorded, stored)
            stored.seek(0)
            read = torch.jit.load(stored)  # type: ignore[no-untyped-call]
            self._recorded: Callable[..., torch.Tensor] = torch.jit.freeze(read)

    def __call__(self, packing: Any) -> Callable[[], torch.Tensor]:
        """Gives what replays for a packing: finished float32 (A, N_m) of the visits asked about.

        To replay takes the interpreter for a few microseconds alone, so that a thread can.
        """
        joined = _joined(_tensors(self._all_of(packing)))

        def replay() -> torch.Tensor:
            with torch.inference_mode():
                return self._recorded(joined)

        return replay


class _OfTensors(nn.Module):
    """The model as a function of the packing's tensors alone."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        packing: Any,
        finish: Callable[[torch.Tensor], torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self._batch, self._packing, self._finish = batch, packing, finish
        self._shapes = [tensor.shape[1:] for tensor in tensors]

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        parts = zip(_scripted_parts()(joined, len(self._shapes)), self._shapes, strict=True)
        tensors = (part.view(-1, *shape) for part, shape in parts)
        return self._finish(self.model(self._batch, _refilled(self._packing, tensors)))


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors of a packing, int64, end to end behind their sizes.

    Of several arguments each would make a recording wait for the interpreter once.
    """
    sizes = torch.tensor([tensor.numel() for tensor in tensors])
    flat = [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors]
    return torch.cat([sizes, *flat])


def _parts(joined: torch.Tensor, number: int) -> list[torch.Tensor]:
    """What `_joined` has joined."""
    sizes: list[int] = joined[:number].tolist()
    return list(joined[number:].split_with_sizes(sizes))


@functools.cache
def _scripted_parts() -> Callable[..., list[torch.Tensor]]:
    return scripted(_parts)


def _paths(value: Any, path: str = "") -> list[str]:
    """Where a dataclass and those in it have tensors, and sizes of steps, in a fixed order."""
    if isinstance(value, torch.Tensor | tuple):
        return [path]
    if value is None:
        return []
    inner = f"{path}." if path else ""
    return [found for name, one in vars(value).items() for found in _paths(one, inner + name)]


def _tensors(found: Sequence[Any]) -> list[torch.Tensor]:
    return [torch.tensor(one) if type(one) is tuple else one for one in found]


def _refilled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, torch.Tensor | tuple):
        return next(tensors)
    if value is None:
        return None
    changed = {name: _refilled(getattr(value, name), tensors) for name in vars(value)}
    return dataclasses.replace(value, **changed)
