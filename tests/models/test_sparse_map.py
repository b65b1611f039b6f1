"""Sparse maps against dense matrices."""

import pytest
import torch

from models.sparse_map import SparseMap


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("num_pairs", [0, 1, 40])
def test_map_and_gradient_are_those_of_its_matrix(weighted, num_pairs):
    generator = torch.Generator().manual_seed(num_pairs)
    target = torch.randint(7, (num_pairs,), generator=generator).sort().values
    source = torch.randint(9, (num_pairs,), generator=generator)
    weight = torch.rand(num_pairs, generator=generator, dtype=torch.float64) if weighted else None
    matrix = torch.zeros(7, 9, dtype=torch.float64)
    for e in range(num_pairs):
        matrix[target[e], source[e]] += 1.0 if weight is None else weight[e]
    rows = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mapping = SparseMap.of(target, source, 7, 9, weight)
    assert torch.allclose(mapping(rows), matrix @ rows, atol=1e-14)
    upstream = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mapping(rows), rows, upstream)
    assert torch.allclose(gradient, matrix.T @ upstream, atol=1e-14)
