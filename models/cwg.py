"""Causal Weight Generator: equations (1) to (3) of CafeMed.

An entity's causal effects on the medications, averaged to one number, become a gate on its
embedding. The effects are associations unless an adjusted estimator made them (docs/models.md).
"""

from typing import Literal

import torch
from torch import nn

from cafemed.batches import ModelInputs
from models.blocks import Linear
from models.packing import Packing


class EntityWeights(nn.Module):
    """Equation (1): w_i, one number for each code, fixed.

    w_i = (1 / N_m) * sum_j E[i, j] for a diagnosis or procedure. There are no effects among
    medications: w_j of a medication is the mean of E[., j] over all diagnoses and procedures, or
    0 with `medication_weight="zero"`. With `context="visit"` the mean of a diagnosis or procedure
    is taken over the medications of the previous visit, and over all of them where it has none.

    Args:
        inputs: holds E.
        context: "entity" or "visit".
        aggregate: "signed", or "absolute": |E| in place of E.
        medication_weight: "mean" or "zero".
    """

    table: torch.Tensor
    effects: torch.Tensor

    def __init__(
        self,
        inputs: ModelInputs,
        context: Literal["entity", "visit"],
        aggregate: Literal["signed", "absolute"],
        medication_weight: Literal["mean", "zero"],
    ) -> None:
        super().__init__()
        self.context = context
        effects = torch.tensor(inputs.effects, dtype=torch.float32)
        if aggregate == "absolute":
            effects = effects.abs()
        # Means in double: the sum over thousands of codes must not depend on its order.
        rows = effects.double().mean(1)
        columns = effects.double().mean(0) if len(effects) else rows.new_zeros(inputs.sizes[2])
        if medication_weight == "zero":
            columns = torch.zeros_like(columns)
        # Derived from the inputs, which are kept with the weights: not saved a second time.
        self.register_buffer("table", torch.cat([rows, columns]).float(), persistent=False)
        self.register_buffer("effects", effects, persistent=False)

    def forward(self, packing: Packing) -> torch.Tensor:
        """Gives w of every code that exists, float32 (N,)."""
        weights = self.table.index_select(0, packing.ids)
        if self.context == "entity":
            return weights
        num_codes, num_medications = self.effects.shape
        is_medication = packing.modality == 2
        given = self.effects.new_zeros(packing.num_visits, num_medications)
        given[packing.visit[is_medication], packing.ids[is_medication] - num_codes] = 1.0
        number = given.sum(1)
        of_visit = (self.effects @ given.T) / number.clamp(min=1.0)
        row = torch.where(is_medication, 0, packing.ids)
        known = ~is_medication & (number[packing.visit] > 0)
        return torch.where(known, of_visit[row, packing.visit], weights)


class Modulation(nn.Module):
    """Equation (2): v = W2 relu(W1 w + b1) + b2, W1: 1 → h, W2: h → d; one for all modalities.

    Args:
        dimension: d.
        hidden: h.
        activation: "relu" or "tanh".
    """

    def __init__(self, dimension: int, hidden: int, activation: Literal["relu", "tanh"]) -> None:
        super().__init__()
        self.expand = Linear(1, hidden)
        self.project = Linear(hidden, dimension)
        self.activation = torch.relu if activation == "relu" else torch.tanh

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Maps w (N,) to v (N, d)."""
        out: torch.Tensor = self.project(self.activation(self.expand(weights[:, None])))
        return out


class CausalWeightGenerator(nn.Module):
    """Equations (2) and (3): e~ = e * (1 + alpha * sigmoid(v)).

    Args:
        table: w of all codes, for the mean and standard deviation of `standardise`.
        dimension: d.
        hidden: h of equation (2).
        activation: of equation (2).
        shared: one network for the three modalities, or one each.
        standardise: w is centred and scaled over all codes before equation (2).
        strength: alpha, or what it starts from.
        learnable: whether alpha is learned.
    """

    strength: torch.Tensor
    centre: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        table: torch.Tensor,
        *,
        dimension: int,
        hidden: int,
        activation: Literal["relu", "tanh"],
        shared: bool,
        standardise: bool,
        strength: float,
        learnable: bool,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            Modulation(dimension, hidden, activation) for _ in range(1 if shared else 3)
        )
        if learnable:
            self.strength = nn.Parameter(torch.tensor(strength))
        else:
            self.register_buffer("strength", torch.tensor(strength), persistent=False)
        centre, scale = torch.tensor(0.0), torch.tensor(1.0)
        if standardise:
            centre, scale = table.mean(), table.std(correction=0)
            scale = torch.where(scale > 0, scale, 1.0)
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, weights: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """Gives the factor of the embeddings, 1 + alpha * sigmoid(v).

        Args:
            weights: float32 (N,), w of each code.
            modality: int64 (N,).

        Returns:
            float32 (N, d).
        """
        scaled = (weights - self.centre) / self.scale
        gate = self.networks[0](scaled)
        for k, network in enumerate(self.networks):
            if k > 0:
                gate = torch.where((modality == k)[:, None], network(scaled), gate)
        return 1 + self.strength * torch.sigmoid(gate)
