"""Products of reduced precision, where torch's autocast asks for them.

Autocast casts what torch's own functions are given, forward. Functions whose gradients are written
out have to be given rows and weights of one type, so that their gradients meet that type again.
"""

import contextlib

import torch

_DEVICES = ("cpu", "cuda")  # whose autocast torch can be asked about


def product_type(rows: torch.Tensor) -> torch.dtype:
    """The type that products of these rows are taken in: autocast's, or else their own."""
    device = rows.device.type
    if device in _DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return rows.dtype


def without_autocast(rows: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which nothing on the rows' device is cast."""
    if product_type(rows) == rows.dtype:
        return contextlib.nullcontext()
    return torch.autocast(rows.device.type, enabled=False)
