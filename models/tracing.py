"""Answers by a recorded graph of a model, which no longer needs the interpreter.

What a model does for visits that are asked about (models/packing.py) is a few hundred small steps.
Recorded once and replayed by torch, they are the same steps on the same numbers, without Python
between them: a run of few patients takes a third less time, and a thread that replays does not keep
others from the interpreter. Whether a recording gives the model's bits, whatever the numbers of
blocks, is for whoever makes one to try.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cafemed.batches import Batch
from models import blocks


class Traced:
    """A recording of a model that reads nothing of a batch but its packing (`reads_packing_alone`).

    Args:
        model: in evaluation, with weights that no longer change.
        batch: an example.
        packing: of the example, with visits that are asked about.
    """

    def __init__(self, model: nn.Module, batch: Batch, packing: Any) -> None:
        with blocks.fixed(), warnings.catch_warnings():
            # Of sizes that it takes for constants, which those of weights are.
            warnings.simplefilter("ignore")
            tensors = tuple(_tensors(packing))
            recorded = torch.jit.trace(  # type: ignore[no-untyped-call]
                _OfTensors(model, batch, packing).eval(), tensors, check_trace=False
            )
            # Read back: what torch keeps of a recording for good is without the weights then.
            stored = io.BytesIO()
            torch.jit.save(recorded, stored)
            stored.seek(0)
            read = torch.jit.load(stored)  # type: ignore[no-untyped-call]
            self._recorded: Callable[..., torch.Tensor] = torch.jit.freeze(read)

    def __call__(self, packing: Any) -> torch.Tensor:
        """Gives the logits of the visits asked about, float32 (A, N_m)."""
        with torch.inference_mode():
            return self._recorded(*_tensors(packing))


class _OfTensors(nn.Module):
    """The model as a function of the packing's tensors alone."""

    def __init__(self, model: nn.Module, batch: Batch, packing: Any) -> None:
        super().__init__()
        self.model = model
        self._batch, self._packing = batch, packing

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(self._batch, _refilled(self._packing, iter(tensors)))
        return logits


def _names(value: Any) -> list[str]:
    return list(vars(value))  # of a dataclass: its fields, in their order


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a dataclass and those in it, sizes of steps among them, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [torch.tensor(value)]
    if value is None:
        return []
    return [tensor for name in _names(value) for tensor in _tensors(getattr(value, name))]


def _refilled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, torch.Tensor | tuple):
        return next(tensors)
    if value is None:
        return None
    changed = {name: _refilled(getattr(value, name), tensors) for name in _names(value)}
    return dataclasses.replace(value, **changed)
