"""GraphDiffMed's molecules: messages to diagnoses and procedures, and vectors of medications.

Molecules are the same nodes in every visit and nothing of a visit reaches them, so what they send
is computed once a step for all codes (docs/models.md 3.2, 3.3).
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed.batches import ModelInputs
from models.embeddings import embedding_table
from models.packing import Packing
from models.relational import RelationalLayer
from models.sparse_map import Rows, SparseMap

_ROWS = ("index", "starts", "weight")


class MoleculeBranch(nn.Module):
    """Relational layers from molecules to diagnoses and procedures, and vectors of medications.

    The relevance of molecule c to code x is R[x, c] = sum of E[x, m] over the medications m that
    have c. With n levels, c reaches x by relation b = 1 .. n - 1 where b / n < R <= (b + 1) / n;
    relation 0 is virtual. Diagnoses and procedures have layers of their own.

    Args:
        inputs: sizes and effects E.
        molecules: bool (N_m, N_c).
        dimension: d.
        levels: n.
        virtual: where R = 0 for all of a visit's diagnoses (procedures): relation 0 from all
            molecules, or nothing.
    """

    relevant: torch.Tensor
    membership: torch.Tensor
    known: torch.Tensor

    def __init__(
        self,
        inputs: ModelInputs,
        molecules: NDArray[np.bool_],
        dimension: int,
        levels: int,
        virtual: Literal["all", "none"],
    ) -> None:
        super().__init__()
        self.virtual = virtual
        relevance = (inputs.effects.astype(np.float64) @ molecules).astype(np.float32)
        kinds = np.split(relevance, [inputs.sizes[0]])
        self.embedding = embedding_table(molecules.shape[1], dimension)
        self.senders = nn.ModuleList(MoleculeMessages(kind, levels) for kind in kinds)
        self.first = TwoKindLayer(levels, dimension)
        self.second = TwoKindLayer(levels, dimension)
        self.medication = nn.Sequential(
            nn.Linear(dimension, dimension), nn.ReLU(), nn.Linear(dimension, dimension)
        )
        for name, values in {
            "relevant": relevance.any(1),
            "membership": molecules.astype(np.float32),
            "known": molecules.any(1),
        }.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def medications(self, own: torch.Tensor) -> torch.Tensor:
        """Vectors of all medications from their molecules; of those without any, their own.

        On the complete graph of a medication's molecules a GIN layer (epsilon 0) gives each of
        them MLP(sum of all), so any weighted mean over the molecules is that too.

        Args:
            own: float32 (N_m, d).
        """
        vectors: torch.Tensor = self.medication(self.membership @ self.embedding)
        return torch.where(self.known[:, None], vectors, own)

    def forward(self, embedded: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Passes the molecules' messages to diagnoses and procedures; medications stay.

        Args:
            embedded: float32 (N, d), the packed codes.
            packing: of the batch.

        Returns:
            float32 (N, d).
        """
        is_code = (packing.modality < 2)[:, None]
        is_diagnosis = (packing.modality == 0)[:, None]
        # Medications look up the first code's messages, and are put back at the end.
        rows = torch.where(packing.distinct < len(self.relevant), packing.distinct, 0)
        virtual = self._is_alone(packing)[:, None] if self.virtual == "all" else None

        def pass_on(
            layer: TwoKindLayer, own: torch.Tensor, molecules: list[torch.Tensor]
        ) -> torch.Tensor:
            parts = list(zip(self.senders, layer.kinds, molecules, strict=True))
            messages = torch.cat([send(weights, sent) for send, weights, sent in parts])
            received = packing.of_codes(messages.index_select(0, rows))
            if virtual is not None:
                to_diagnosis, to_procedure = (
                    sent.mean(0) @ weights.weight[0] for _, weights, sent in parts
                )
                mean = torch.where(is_diagnosis, to_diagnosis, to_procedure)
                received = received + virtual * mean
            # Both kinds' products over all rows: a product's height must not depend on how many
            # of a batch's codes are diagnoses (models/relational.py).
            kept = torch.where(is_diagnosis, layer.diagnosis.own(own), layer.procedure.own(own))
            return kept + received

        hidden = torch.relu(pass_on(self.first, embedded, [self.embedding, self.embedding]))
        # No message reaches a molecule.
        molecules = [
            torch.relu(torch.addmm(weights.bias, self.embedding, weights.root))
            for weights in self.first.kinds
        ]
        return torch.where(is_code, pass_on(self.second, hidden, molecules), embedded)

    def _is_alone(self, packing: Packing) -> torch.Tensor:
        """Whether no code of the same visit and modality is relevant to any molecule, (N,).

        Arbitrary for medications.
        """
        relevant = self.relevant[torch.where(packing.modality < 2, packing.ids, 0)]
        number = torch.zeros(3 * packing.num_visits, device=relevant.device)
        return number.index_add(0, packing.group, relevant.float())[packing.group] == 0


class TwoKindLayer(nn.Module):
    """Weights of a relational layer into diagnoses and of one into procedures.

    Args:
        levels: relations of each, the virtual one among them.
        dimension: d.
    """

    def __init__(self, levels: int, dimension: int) -> None:
        super().__init__()
        self.diagnosis = RelationalLayer(levels, dimension)
        self.procedure = RelationalLayer(levels, dimension)

    @property
    def kinds(self) -> tuple[RelationalLayer, RelationalLayer]:
        """Of diagnoses, of procedures."""
        return self.diagnosis, self.procedure


class MoleculeMessages(nn.Module):
    """What molecules send to every diagnosis (or procedure) by the relations of one layer.

    Args:
        relevance: float32 (N_k, N_c), R.
        levels: n.
    """

    def __init__(self, relevance: NDArray[np.float32], levels: int) -> None:
        super().__init__()
        num_codes, num_molecules = relevance.shape
        bounds = (np.arange(1, levels + 1) / levels).astype(np.float32)
        relation = np.searchsorted(bounds, relevance)  # 0: too small for an edge, n: above 1
        target, molecule = np.nonzero((relation > 0) & (relation < levels))
        of_edge = relation[target, molecule]
        group = target * levels + of_edge
        number = np.bincount(group, minlength=num_codes * levels)[group]
        built = SparseMap.of(
            torch.from_numpy(target),
            torch.from_numpy((of_edge - 1) * num_molecules + molecule),
            num_codes,
            (levels - 1) * num_molecules,
            torch.from_numpy(number.astype(np.float32)),
        )
        # As buffers, the map follows the model to its device. An edge keeps the number of those
        # that share its target and relation, not its rounded inverse.
        for way, rows in (("forward", built.forward), ("backward", built.backward)):
            for name in _ROWS:
                self.register_buffer(f"{way}_{name}", getattr(rows, name), persistent=False)

    def forward(self, weights: RelationalLayer, molecules: torch.Tensor) -> torch.Tensor:
        """Gives (N_k, d), the sum over relations b of W_b times the mean of the senders' rows.

        Args:
            weights: of the layer.
            molecules: float32 (N_c, d).
        """
        projected = torch.matmul(molecules, weights.weight[1:]).flatten(0, 1)
        forward, backward = (self._rows(way, projected.dtype) for way in ("forward", "backward"))
        return SparseMap(forward, backward)(projected)

    def _rows(self, way: str, dtype: torch.dtype) -> Rows:
        index, starts, number = (getattr(self, f"{way}_{name}") for name in _ROWS)
        return Rows(index, starts, number.reciprocal().to(dtype))
