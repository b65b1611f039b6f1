"""GraphDiffMed's vectors of the patient: sex and age."""

import torch
from torch import nn

from cafemed.batches import Batch
from cafemed.cohort import SEXES
from models.blocks import Linear
from models.dropout import FastDropout
from models.embeddings import EMBEDDING_BOUND, embedding_table


class Demographics(nn.Module):
    """Vectors of the patient at each visit: sex ("G"), sex and age ("GY"), or none.

    A patient of unknown sex has a row of its own, which starts at 0; an unknown age counts as the
    mean of the training patients.

    Args:
        modalities: letters of what is looked at; others than G and Y mean nothing here.
        dimension: d.
        dropout: the model's, on what is looked up.
    """

    def __init__(self, modalities: str, dimension: int, dropout: FastDropout) -> None:
        super().__init__()
        self.dimension, self.dropout = dimension, dropout
        self.sex, self.age = None, None
        if "G" in modalities:
            self.sex = embedding_table(len(SEXES), dimension)
            with torch.no_grad():
                self.sex[SEXES.index("unknown")] = 0
        if "Y" in modalities:
            self.age = Linear(1, dimension)
            nn.init.uniform_(self.age.weight, -EMBEDDING_BOUND, EMBEDDING_BOUND)

    @property
    def number(self) -> int:
        """Vectors a visit, G."""
        return (self.sex is not None) + (self.age is not None)

    def forward(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Gives (V, G, d)."""
        device = batch.sex.device
        found = [torch.empty(batch.num_visits, 0, self.dimension, dtype=dtype, device=device)]
        if self.sex is not None:
            patient = batch.slots // batch.num_steps
            found.append(self.dropout(self.sex[batch.sex[patient]])[:, None])
        if self.age is not None:
            age = torch.where(torch.isnan(batch.age), 0.0, batch.age).to(dtype)
            found.append(self.dropout(self.age(age[:, None]))[:, None])
        return torch.cat(found, 1)
