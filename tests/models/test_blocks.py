"""Products in blocks: the numbers of a plain product, and bits that no other row changes."""

import pytest
import torch

from models import blocks
from models.blocks import BLOCK


@pytest.mark.parametrize("columns", [1, 2, 5, 7, 9, 11, 12, 24, 131, 336])
@pytest.mark.parametrize("width", [1, 3, 48, 64, 192])
def test_a_rows_bits_are_its_own(width: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(width * 1000 + columns)
    rows = torch.randn(12 * BLOCK, width, generator=generator)
    matrix = torch.randn(width, columns, generator=generator)
    bias = torch.randn(columns, generator=generator)
    for given in (matrix, matrix.T.contiguous().T):
        with blocks.fixed():
            whole = blocks.product(rows, given, bias)
            for first, number in ((0, 1), (5, 1), (3, 2), (0, 7)):
                part = rows[first * BLOCK : (first + number) * BLOCK]
                expected = whole[first * BLOCK : (first + number) * BLOCK]
                assert torch.equal(blocks.product(part, given, bias), expected)
            for places in (1, 5, 16, 31, 40):
                turned = blocks.product(rows.roll(places, 0), given, bias)
                assert torch.equal(turned, whole.roll(places, 0))
        torch.testing.assert_close(whole, rows @ matrix + bias, rtol=1e-5, atol=1e-4)


def test_elsewhere_products_are_plain() -> None:
    """To the bit: training's results are what they were."""
    rows, bias = torch.randn(45, 24), torch.randn(7)
    layer = blocks.Linear(24, 7)
    matrix = layer.weight.T
    assert torch.equal(layer(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias))
    assert torch.equal(blocks.product(rows, matrix), rows @ matrix)
    assert torch.equal(blocks.product(rows, matrix, bias), torch.addmm(bias, rows, matrix))


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with blocks.fixed(), pytest.raises(RuntimeError):
        blocks.product(torch.randn(BLOCK + 1, 8), torch.randn(8, 8))


def test_rows_may_have_axes_in_front() -> None:
    rows, layer = torch.randn(BLOCK, 3, 24), blocks.Linear(24, 40)
    with blocks.fixed():
        found = layer(rows)
    torch.testing.assert_close(found, layer(rows))
