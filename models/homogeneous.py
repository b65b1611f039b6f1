"""Homogeneous branch of CausalMed and CafeMed: a mask by the class of a code in its visit's graph.

docs/models.md 1.9: s = e * mu[k, class]; no messages are passed along the graph's edges.
"""

import torch
from torch import nn

NUM_CLASSES = 4


class ClassMask(nn.Module):
    """Twelve learned vectors mu, one for each modality and node class, that start at 1.

    Args:
        dimension: d.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(3, NUM_CLASSES, dimension))

    def forward(
        self, embedded: torch.Tensor, modality: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Masks embeddings (N, d) by modality int64 (N,) and class int64 (N,)."""
        mask = self.mask.flatten(0, 1).index_select(0, modality * NUM_CLASSES + classes)
        return embedded * mask
