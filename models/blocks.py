"""Matrix products in blocks of a fixed number of rows, for answers that depend on nobody else.

A matrix product gives a row other last bits among 64 rows than alone. A server that answers several
patients with one run of a model, and each as if alone, therefore has every product done in blocks
of BLOCK rows: the same routine on the same sizes, however many blocks there are. That costs a tenth
of the products' time, so training and evaluation do without. Whoever asks for it (`fixed`) sees to
it that all rows come in whole blocks (`asked.Codes`); elementwise functions then have no last few
elements either, which fill no vector register and would be computed by another routine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

#: Rows of one product. A multiple of 32, so that a block fills vector registers of any width.
BLOCK = 32
#: Columns of one product, at least: with fewer, the last rows of a block may go by other routines
#: than the first (seen with MKL for 1, 5 to 7 and 9 to 11 columns).
LEAST_COLUMNS = 16

_IS_FIXED: ContextVar[bool] = ContextVar("fixed blocks", default=False)


@contextmanager
def fixed() -> Iterator[None]:
    """A context in which products are done in blocks; without gradients."""
    token = _IS_FIXED.set(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        _IS_FIXED.reset(token)


def is_fixed() -> bool:
    """Whether products are done in blocks."""
    return _IS_FIXED.get()


def whole(number: int) -> int:
    """The rows of the blocks that so many rows need."""
    return -(-number // BLOCK) * BLOCK


def product(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows (..., K) times a matrix (K, N), plus a bias (N,); in blocks where that is asked for.

    In blocks, the number of rows has to be a multiple of BLOCK.
    """
    if not is_fixed():
        return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    blocks = rows.reshape(-1, BLOCK, rows.shape[-1])
    # Not `matmul`, which joins the blocks of some products again.
    out = torch.bmm(blocks, widened(matrix).expand(blocks.shape[0], -1, -1))
    out = out[..., : matrix.shape[1]]
    if bias is not None:
        out = out + bias
    return out.reshape(*rows.shape[:-1], matrix.shape[1])


def widened(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (..., N) with columns of zeros to LEAST_COLUMNS, if it has fewer."""
    missing = LEAST_COLUMNS - matrix.shape[-1]
    return nn.functional.pad(matrix, (0, missing)) if missing > 0 else matrix


class Linear(nn.Linear):
    """`nn.Linear` whose product is in blocks where that is asked for."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Maps rows (..., K) to (..., N)."""
        if not is_fixed():
            return super().forward(rows)
        return product(rows, self.weight.T, self.bias)
