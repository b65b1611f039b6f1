"""Answers by a recorded graph of a model, which no longer needs the interpreter.

What a model does for visits that are asked about (models/asked.py) is a few hundred small steps.
Recorded once and replayed by torch, they are the same steps on the same numbers, without Python
between them: a run of few patients takes a third less time, and a thread that replays does not keep
others from the interpreter. Whether a recording gives the model's bits, whatever the numbers of
blocks, is for whoever makes one to try.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cafemed.batches import Batch
from models import blocks
from models.asked import Codes
from models.scripting import recordable


class Traced:
    """A recording of a model that reads nothing of a batch but its codes (`reads_codes_alone`).

    Args:
        model: in evaluation, with weights that no longer change.
        batch: an example.
        codes: of the example.
        finish: of the model's logits, float32 (A, N_m), recorded with it.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        codes: Codes,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        with blocks.fixed(), warnings.catch_warnings():
            # Of sizes that it takes for constants, which those of weights are.
            warnings.simplefilter("ignore")
            recorded = torch.jit.trace(  # type: ignore[no-untyped-call]
                _OfCodes(model, batch, finish).eval(), (_joined(codes),), check_trace=False
            )
            # Read back: what torch keeps of a recording for good is without the weights then.
            stored = io.BytesIO()
            torch.jit.save(recorded, stored)
            stored.seek(0)
            read = torch.jit.load(stored)  # type: ignore[no-untyped-call]
            self._recorded: Callable[..., torch.Tensor] = torch.jit.freeze(read)

    def __call__(self, codes: Codes) -> Callable[[], torch.Tensor]:
        """Gives what replays for codes: finished float32 (A, N_m) of the visits asked about.

        To replay takes the interpreter for a few microseconds alone, so that a thread can.
        """
        joined = _joined(codes)

        def replay() -> torch.Tensor:
            with torch.inference_mode():
                return self._recorded(joined)

        return replay


class _OfCodes(nn.Module):
    """The model as a function of joined codes alone."""

    def __init__(
        self, model: nn.Module, batch: Batch, finish: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.model: Any = model
        self._batch, self._finish = batch, finish

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        counts, *others = _parts(joined)
        prepared = self.model.prepare(self._batch, Codes(counts.view(-1, 3), *others))
        return self._finish(self.model(self._batch, prepared))


def _joined(codes: Codes) -> torch.Tensor:
    """All of it end to end behind the sizes.

    Of several arguments each would make a recording wait for the interpreter once.
    """
    parts = [codes.counts.view(-1), codes.lengths, codes.ids, codes.classes, codes.asked]
    parts.append(codes.filling)
    return torch.cat([torch.tensor([part.numel() for part in parts]), *parts])


@recordable
def _parts(joined: torch.Tensor) -> list[torch.Tensor]:
    """What `_joined` has joined."""
    sizes: list[int] = joined[:6].tolist()
    return list(joined[6:].split_with_sizes(sizes))
