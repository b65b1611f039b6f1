"""What every model begins with: a batch of the right vocabularies, and a table of embeddings."""

import torch
from torch import nn

from cafemed.batches import Batch
from cafemed.errors import ArtifactError

#: Embeddings start uniform in (-EMBEDDING_BOUND, EMBEDDING_BOUND), as CausalMed's.
EMBEDDING_BOUND = 0.1


def embedding_table(number: int, dimension: int) -> nn.Parameter:
    """A table of embeddings with new weights, float32 (number, dimension)."""
    return nn.Parameter(torch.empty(number, dimension).uniform_(-EMBEDDING_BOUND, EMBEDDING_BOUND))


def require_sizes(batch: Batch, sizes: tuple[int, int, int]) -> None:
    """Refuses a batch whose codes are of vocabularies of other sizes than the model's.

    Raises:
        ArtifactError: naming both.
    """
    if batch.sizes != sizes:
        raise ArtifactError(
            f"the model was built for vocabularies of {sizes} diagnoses, procedures and "
            f"medications, the batch's have {batch.sizes}"
        )
