"""The training loss of one visit: accuracy terms, and drug interactions above a target rate.

    BCE  = mean over medications of the binary cross-entropy of the logits
    MLM  = 1/N_m · Σ_{j in M_t} Σ_{i not in M_t} max(0, 1 - p_j + p_i)
    ACC  = (1 - margin_weight) · BCE + margin_weight · MLM

Objective "mixture", of CafeMed, CausalMed and GraphDiffMed's published code:

    DDI  = ddi_weight · Σ_{i,j} A_ij p_i p_j            (ordered pairs)
    rate = interacting pairs / pairs of {m: p_m ≥ threshold}, 0 with fewer than two
    β    = min(1, exp(ddi_coefficient · (1 - rate / ddi_target)))
    loss = β · ACC + (1 - β) · DDI, so ACC alone where rate ≤ ddi_target

Objective "sum", of GraphDiffMed's paper (which has no MLM: margin_weight 0, and an L2 term, which
is `train.weight_decay`):

    S    = {m: p_m ≥ threshold}
    DDI  = ddi_weight / |S|² · Σ_{i,j in S} A_ij p_i p_j, 0 where S is empty
    rate = the same share, pooled over the predicted sets of the batch
    β    = max(0, 1 - exp(-ddi_coefficient · (rate - ddi_target) / ddi_target))
    loss = ACC + β · DDI

The paper leaves β negative below the target, where it would reward interactions; its factor β_0 is
part of ddi_weight. β carries no gradient. A batch takes the mean over its visits.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Objective = Literal["mixture", "sum"]


@dataclasses.dataclass(frozen=True)
class VisitLosses:
    """The terms above for each of V visits, float32 (V,).

    Attributes:
        loss: what is minimised.
        bce, margin, ddi: its terms, before β and margin_weight; ddi with ddi_weight.
        beta: β, without gradient: the weight of ACC in "mixture", of the interactions in "sum".
    """

    loss: Tensor
    bce: Tensor
    margin: Tensor
    ddi: Tensor
    beta: Tensor


def visit_losses(
    logits: Tensor,
    targets: Tensor,
    ddi: Tensor,
    *,
    ddi_target: float = 0.06,
    ddi_coefficient: float = 2.5,
    ddi_weight: float = 0.0005,
    margin_weight: float = 0.05,
    threshold: float = 0.5,
    objective: Objective = "mixture",
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> VisitLosses:
    """Computes the loss of every visit.

    Args:
        logits: float (V, N_m).
        targets: float (V, N_m), 0 or 1.
        ddi: float (N_m, N_m), 0 or 1, symmetric, zero diagonal; on the logits' device.
        ddi_target: rate above which a visit is trained towards fewer interactions; above 0.
        ddi_coefficient: how fast β falls above the target.
        ddi_weight: factor of the DDI term.
        margin_weight: share of the margin term in ACC.
        threshold: of the predicted set whose rate counts.
        objective: see above.
        total: sums counts of these visits over the processes that share the batch.
    """
    p = torch.sigmoid(logits)
    bce = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    margin = multilabel_margin(p, targets)
    accuracy = (1 - margin_weight) * bce + margin_weight * margin
    if objective == "mixture":
        interactions = ddi_weight * _interacting(p, ddi)
        rate = ddi_rate(p.detach(), ddi, threshold)
        beta = torch.exp(ddi_coefficient * (1 - rate / ddi_target)).clamp(max=1)
        loss = beta * accuracy + (1 - beta) * interactions
    else:
        chosen = (p.detach() >= threshold).to(p.dtype)
        size = chosen.sum(dim=1)
        interactions = ddi_weight * _interacting(p * chosen, ddi) / (size * size).clamp(min=1)
        counts = torch.stack([_interacting(chosen, ddi).sum(), (size * (size - 1)).sum()])
        interacting, pairs = total(counts)
        rate = interacting / pairs.clamp(min=1)
        beta = (-torch.expm1(ddi_coefficient * (1 - rate / ddi_target))).clamp(min=0)
        beta = beta.expand_as(size)
        loss = accuracy + beta * interactions
    return VisitLosses(loss, bce, margin, interactions, beta)


def multilabel_margin(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Multilabel margin of probabilities, in closed form, float (V,).

    Equals `torch.nn.functional.multilabel_margin_loss` visit by visit. With probabilities in
    [0, 1] the hinge 1 - p_j + p_i is never negative, so the double sum separates.

    Args:
        probabilities: float (V, N_m), in [0, 1].
        targets: float (V, N_m), 0 or 1.
    """
    others = 1 - targets
    num_targets, num_others = targets.sum(dim=1), others.sum(dim=1)
    misses = num_targets - (probabilities * targets).sum(dim=1)  # Σ_j (1 - p_j)
    extras = (probabilities * others).sum(dim=1)  # Σ_i p_i
    return (num_others * misses + num_targets * extras) / probabilities.shape[1]


def ddi_rate(probabilities: Tensor, ddi: Tensor, threshold: float = 0.5) -> Tensor:
    """Share of interacting pairs in each visit's predicted set, float (V,), without gradient.

    Args:
        probabilities: float (V, N_m).
        ddi: float (N_m, N_m), as in `visit_losses`.
        threshold: a medication with at least this probability is in the set.
    """
    predicted = (probabilities >= threshold).to(ddi.dtype)
    size = predicted.sum(dim=1)
    return _interacting(predicted, ddi) / (size * (size - 1)).clamp(min=1)


def _interacting(values: Tensor, ddi: Tensor) -> Tensor:
    """Σ_{i,j} A_ij v_i v_j over ordered pairs, float (V,)."""
    return ((values @ ddi) * values).sum(dim=1)
