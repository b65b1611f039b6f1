"""Metrics with intervals over test patients and seeds, and p-values of differences.

A round of the bootstrap draws as many test patients as there are, with replacement, the same ones
for every variant; and for each variant as many of its seeds as it has, with replacement. The
round's value is the mean over the drawn seeds of the metric on the drawn patients. Intervals are
the rounds' 2.5th and 97.5th percentiles. A p-value is two-sided: twice the share of rounds in which
the difference of two variants has the rarer sign (1 added to both counts).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cafemed import intervals, metrics

Floats = NDArray[np.float64]

METRICS = ("jaccard", "f1", "prauc", "ddi_rate", "num_medications")


class Sets(NamedTuple):
    """What predictions are compared with: P patients, V visits.

    Attributes:
        targets: bool (V, N_m).
        patient_offsets: int64 (P + 1,) into the visits.
        ddi: bool (N_m, N_m).
    """

    targets: NDArray[np.bool_]
    patient_offsets: NDArray[np.int64]
    ddi: NDArray[np.bool_]

    def terms(self, probabilities: NDArray[np.floating[Any]], threshold: float) -> Floats:
        """`metrics.terms` of predictions (V, N_m): what every patient adds to sums, (P, K)."""
        found = metrics.score_visits(probabilities, self.targets, self.ddi, threshold)
        return metrics.terms(found, self.patient_offsets)


class Sample(NamedTuple):
    """A variant's metrics: on the test patients (5,), and in every round (rounds, 5)."""

    value: Floats
    rounds: Floats

    def interval(self) -> tuple[Floats, Floats]:
        """2.5th and 97.5th percentiles, (5,) each."""
        low, high = np.quantile(self.rounds, (0.025, 0.975), axis=0)
        return low, high

    def p_values(self, other: "Sample") -> Floats:
        """Of the differences to another variant, (5,)."""
        difference = self.rounds - other.rounds
        rarer = np.minimum((difference <= 0).sum(axis=0), (difference >= 0).sum(axis=0))
        found: Floats = np.minimum(2 * (1 + rarer) / (1 + len(difference)), 1.0)
        return found

    def share_of(self, best: "Sample") -> tuple[float, float, float]:
        """This Jaccard over another's, and the interval of that."""
        share = self.rounds[:, 0] / best.rounds[:, 0]
        low, high = np.quantile(share, (0.025, 0.975))
        return float(self.value[0] / best.value[0]), float(low), float(high)


def sample(
    runs: Sequence[NDArray[np.float64]], number: int, rounds: int = intervals.ROUNDS, seed: int = 0
) -> Sample:
    """The metrics of a variant.

    Args:
        runs: of every seed, `Sets.terms`.
        number: of the variant: variants draw their seeds independently of each other.
        rounds: of the bootstrap.
        seed: of the draws; the same seed draws the same patients for every variant.
    """
    sums = intervals.resampled_sums(np.concatenate(runs, axis=1), rounds, seed)
    of_seeds = metrics.from_sums(sums.reshape(rounds, len(runs), -1))
    drawn = np.random.default_rng((seed, number)).integers(len(runs), size=(rounds, len(runs)))
    chosen = np.take_along_axis(of_seeds, drawn[:, :, None], axis=1).mean(axis=1)
    value = metrics.from_sums(np.stack([terms.sum(axis=0) for terms in runs])).mean(axis=0)
    return Sample(value, chosen)
