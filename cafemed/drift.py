"""How far a model's scores have moved from those it gave when it was made.

The population stability index compares two histograms, e expected and o observed, over the same
bins: PSI = sum over bins of (o - e) ln(o / e). It is the sum of both Kullback-Leibler divergences,
0 for equal histograms. In credit scoring, where it comes from, less than 0.1 passes for no change
and more than 0.25 for a large one (Siddiqi, Credit Risk Scorecards, 2006): a convention, no test.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from cafemed.reference import ScoreHistogram

#: Least share of a bin: an empty one would make the index infinite.
FLOOR = 1e-4
_BLOCKS = 10
#: Patients whose scores are counted together: to count has a cost of its own, some microseconds.
_TOGETHER = 32


def population_stability_index(
    expected: NDArray[np.floating], observed: NDArray[np.floating]
) -> float:
    """The index of two histograms.

    Args:
        expected: (bins,) shares, each sum 1.
        observed: (bins,) likewise, over the same bins.

    Returns:
        at least 0; shares below FLOOR count as FLOOR.
    """
    e, o = np.maximum(expected, FLOOR), np.maximum(observed, FLOOR)
    return float(np.sum((o - e) * np.log(o / e)))


class ScoreWindow:
    """The histogram of the last patients' scores, against the reference's; holds counts alone.

    The window moves by a tenth of itself at a time, so it has between nine tenths and all of the
    last `patients` once as many have come.
    """

    def __init__(self, reference: ScoreHistogram, patients: int) -> None:
        """Starts with no patients.

        Args:
            reference: of the model (`reference.json`).
            patients: that the window is wide, at least 1.
        """
        self._inner_edges = reference.edges[1:-1]
        self._expected = reference.shares
        self._per_block = -(-patients // _BLOCKS)
        self._full: deque[NDArray[np.int64]] = deque(maxlen=_BLOCKS - 1)
        self._to_count: list[NDArray[np.floating]] = []
        self._start_block()

    def add(self, probabilities: NDArray[np.floating]) -> None:
        """Counts one patient's probabilities, (N_m,), which must not change afterwards."""
        self._to_count.append(probabilities)
        self._in_block += 1
        if self._in_block == self._per_block:
            self._count()
            self._full.append(self._counts)
            self._start_block()
        elif len(self._to_count) == _TOGETHER:
            self._count()

    @property
    def index(self) -> float | None:
        """The index of the window; None before a tenth of the patients have come."""
        if not self._full:
            return None
        self._count()
        counts = self._counts + np.sum(self._full, axis=0)
        return population_stability_index(self._expected, counts / counts.sum())

    def _count(self) -> None:
        if self._to_count:
            # As np.histogram does: a bin has its lower edge, the last one both.
            scores = np.concatenate(self._to_count)
            bins = np.searchsorted(self._inner_edges, scores, side="right")
            self._counts += np.bincount(bins, minlength=len(self._counts))
            self._to_count.clear()

    def _start_block(self) -> None:
        self._counts = np.zeros(len(self._expected), np.int64)
        self._in_block = 0
