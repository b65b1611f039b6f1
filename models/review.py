"""GraphDiffMed's causal review: logits moved by how large the effects of a visit's codes are."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed.batches import ModelInputs
from models.packing import Packing
from models.sparse_map import Rows

#: Quantiles of the effects below which they count as low and above which as high.
LOW, HIGH = 0.90, 0.97
#: delta_1 and delta_2 at the start.
START = 0.01
#: What an effect of the class high adds to a visit's score: more than all others can.
_HIGH_SCORE = 1 << 16


class CausalReview(nn.Module):
    """Lowers the logit of medication m by delta_1, or raises it by delta_2.

    With c_d = max(0, max of E[i, m] over the visit's diagnoses) and c_p over its procedures, it is
    lowered if both are below the LOW quantile, else raised if one is above the HIGH quantile.
    delta_1 and delta_2 are learned; the quantiles are not.

    Args:
        inputs: sizes and effects E.
        quantiles: of all effects of the same kind of code, or of all effects.
    """

    scores: torch.Tensor

    def __init__(self, inputs: ModelInputs, quantiles: Literal["kind", "all"]) -> None:
        super().__init__()
        kinds = np.split(inputs.effects, [inputs.sizes[0]])
        limits = [_limits(inputs.effects if quantiles == "all" else kind) for kind in kinds]
        # 0 low, 1 between, 2 high. Limits ascend, so the class of a maximum is the largest class.
        classes = np.concatenate([_classes(*pair) for pair in zip(kinds, limits, strict=True)])
        # The maxima begin at 0, the class of an effect of 0.
        self.least = max(int(_classes(np.zeros(1, np.float32), pair)[0]) for pair in limits)
        scores = np.array([0, 1, _HIGH_SCORE], np.float32)[classes]
        self.register_buffer("scores", torch.from_numpy(scores), persistent=False)
        self.lowering = nn.Parameter(torch.tensor(START))
        self.raising = nn.Parameter(torch.tensor(START))

    def forward(self, logits: torch.Tensor, known: Rows) -> torch.Tensor:
        """Reviews logits.

        Args:
            logits: float32 (V, N_m).
            known: of `known_codes`.
        """
        score = known.add_up(self.scores)
        low, high = score == 0, score >= _HIGH_SCORE
        if self.least > 0:
            low = torch.zeros_like(low)
        if self.least > 1:
            high = torch.ones_like(high)
        return logits - low * self.lowering + high * self.raising


def known_codes(packing: Packing) -> Rows:
    """The diagnoses and procedures of each visit, as rows of the effects to add up."""
    codes = (packing.modality < 2).nonzero()[:, 0]
    number = torch.bincount(packing.visit[codes], minlength=packing.num_visits)
    return Rows(packing.ids[codes], number.cumsum(0) - number, None)


def _limits(effects: NDArray[np.float32]) -> list[float]:
    """The LOW and HIGH quantiles; of a kind without codes, limits that 0 is below."""
    if effects.size == 0:
        return [np.inf, np.inf]
    found: list[float] = np.quantile(effects, [LOW, HIGH]).tolist()
    return found


def _classes(effects: NDArray[np.float32], limits: list[float]) -> NDArray[np.int64]:
    """0 below the first limit, 2 above the second, else 1."""
    return (effects >= limits[0]).astype(np.int64) + (effects > limits[1])
