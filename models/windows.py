"""The neighbours of every position within its own visit, for convolutions over packed visits.

On the host, in NumPy, as all of models/packing.py.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

#: Kernel width of equations (10) and (11), and the padding on each side.
KERNEL = 7
PADDING = 3


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the gradients of a `Window` need.

    Attributes:
        opposite: int64 (Q, 7); [q, o] is q - o + 3 if that lies in the visit of q, else Q.
        to_sum, to_sum_starts: as those of the window, over `opposite`.
    """

    opposite: torch.Tensor
    to_sum: torch.Tensor
    to_sum_starts: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Window:
    """The neighbours of every position within its visit. Q positions.

    Attributes:
        neighbour: int64 (Q, 7); [q, o] is q + o - 3 if that lies in the visit of q, else Q.
        to_sum, to_sum_starts: rows of a (Q * 7, ...) array, row q * 7 + o, that add up at each
            position: those at its neighbours, each under its own offset o.
        backward: None where there will be no gradients.
    """

    neighbour: torch.Tensor
    to_sum: torch.Tensor
    to_sum_starts: torch.Tensor
    backward: Backward | None


def window_of(lengths: NDArray[np.int64], gradients: bool) -> Window:
    """Finds the neighbours of all positions of visits of these lengths.

    Args:
        lengths: int64 (V,), positions of each visit.
        gradients: whether there will be any.
    """
    ends = lengths.cumsum()
    begin = (ends - lengths).repeat(lengths)
    position = np.arange(len(begin))
    # How many neighbours a position has before itself, and how many from itself on.
    before = np.minimum(position - begin, PADDING)
    after = np.minimum(ends.repeat(lengths) - position, PADDING + 1)
    neighbour = OFFSETS.take(before * (PADDING + 2) + after, 0)
    neighbour += position[:, None]
    np.minimum(neighbour, len(position), out=neighbour)
    numbers = before + after
    starts = numbers.cumsum() - numbers
    to_sum_starts = torch.from_numpy(starts)
    # Row q * 7 + o of what is added up lies 7 (o - 3) rows from the position's, q' * 7 + o: from
    # one offset to the next eight rows on, and six back where the offsets are turned round.
    first = KERNEL * position + PADDING - (KERNEL + 1) * before
    to_sum = _sequences(first, KERNEL + 1, starts, numbers)
    backward = None
    if gradients:
        opposite = torch.from_numpy(np.ascontiguousarray(neighbour[:, ::-1]))
        first = KERNEL * position - PADDING + (KERNEL - 1) * after
        backward = Backward(opposite, _sequences(first, 1 - KERNEL, starts, numbers), to_sum_starts)
    return Window(torch.from_numpy(neighbour), to_sum, to_sum_starts, backward)


def _offsets() -> NDArray[np.int64]:
    """Which neighbours there are for each `before` and `after`: how far off, or very far off."""
    before, after, offset = np.ogrid[: PADDING + 1, : PADDING + 2, -PADDING : PADDING + 1]
    inside = (-before <= offset) & (offset < after)
    far = np.iinfo(np.int64).max // 2
    return np.where(inside, offset, far).astype(np.int64).reshape(-1, KERNEL)


OFFSETS = _offsets()


def _sequences(
    first: NDArray[np.int64], step: int, starts: NDArray[np.int64], numbers: NDArray[np.int64]
) -> torch.Tensor:
    """For each position as many rows as it has neighbours: the first one and every `step` on."""
    rows = (first - step * starts).repeat(numbers)
    rows += np.arange(0, step * len(rows), step)
    return torch.from_numpy(rows)
