"""The direct path: what each code of a visit says of each medication by itself.

One number for each pair of code and medication, beside the deep path whose visits are sums of
embeddings; docs/models.md 1.12.
"""

from typing import Literal

import torch
from torch import nn

from cafemed.batches import ModelInputs
from models.packing import Packing

#: Chance that a code alone brings a medication, where nothing is known of the pair.
START_CHANCE = 0.007
#: Effects are taken as chances up to here at the start.
MAX_START_CHANCE = 0.95
#: Least -log(1 - p); keeps the logit finite, above -28.
LEAST_HAZARD = 1e-12


class DirectPath(nn.Module):
    """Joins logits y with c_ij = sigmoid(theta_ij), the chance that code i alone brings j.

    With `link="noisy_or"` the deep path and the codes are causes that act independently,

        1 - p_j = (1 - sigmoid(y_j)) * prod_i (1 - c_ij)    over the codes i of the visit,

    and with `link="additive"` the codes' hazards -log(1 - c_ij) add to the log-odds,
    logit p_j = y_j - sum_i log(1 - c_ij). Either way a code can only make a medication likelier.

    Args:
        inputs: sizes and effects E.
        link: see above.
        start: "effects": c_ij = E_ij within [START_CHANCE, MAX_START_CHANCE] for diagnoses and
            procedures; "even": START_CHANCE for all, as always for medications.
        pace: theta = pace * table, above 0. Adam moves a weight by about the learning rate a step;
            theta has to travel several units, embeddings a tenth of one.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        link: Literal["noisy_or", "additive"],
        start: Literal["effects", "even"],
        pace: float,
    ) -> None:
        super().__init__()
        self.link = link
        self.pace = pace
        chance = torch.full((sum(inputs.sizes), inputs.sizes[2]), START_CHANCE)
        if start == "effects":
            effects = torch.tensor(inputs.effects, dtype=torch.float32)
            chance[: len(effects)] = effects.clamp(START_CHANCE, MAX_START_CHANCE)
        self.table = nn.Parameter(torch.logit(chance) / pace)
        self._folded: torch.Tensor | None = None

    def forward(self, logits: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Gives logit p, float32 (V, N_m), from y, float32 (V, N_m), of the packing's visits.

        Where some are asked about, both are of these.
        """
        if packing.asked is not None:
            table = self._hazards(self.table) if self._folded is None else self._folded
            return self._joined(logits, self.pace * packing.asked.codes.add_up(table))
        of_codes = self._hazards(self.table.index_select(0, packing.distinct))
        return self._joined(logits, self.pace * packing.to_visits(of_codes))

    def fold(self) -> None:
        """Works out the hazards once, for a model that no longer learns."""
        self._folded = self._hazards(self.table)

    def _hazards(self, rows: torch.Tensor) -> torch.Tensor:
        # With this beta softplus gives its value at pace times theta's table, over pace.
        return nn.functional.softplus(rows, beta=self.pace)

    def _joined(self, logits: torch.Tensor, hazard: torch.Tensor) -> torch.Tensor:
        if self.link == "additive":
            return logits + hazard
        # softplus(x) = -log(1 - sigmoid(x)): hazards add where chances of no cause multiply.
        hazard = (hazard + nn.functional.softplus(logits)).clamp(min=LEAST_HAZARD)
        return hazard + torch.log(-torch.expm1(-hazard))


def direct_path(
    inputs: ModelInputs,
    link: Literal["noisy_or", "additive", "none"],
    start: Literal["effects", "even"],
    pace: float,
) -> DirectPath | None:
    """The direct path of a model's options `direct`, `direct_start`, `direct_pace`, if any."""
    return None if link == "none" else DirectPath(inputs, link, start, pace)
