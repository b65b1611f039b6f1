"""Which trials are stopped early, by what they reached: asynchronous halving and the median rule.

A rule is plain bookkeeping, told a trial's best Jaccard so far after each of its epochs. Told the
same epochs again it is where it was, so that a sweep goes on from its history as if it had not been
interrupted; an epoch that a trial repeats, after a failure, counts once.

Trials are compared with those alone that may be chosen (`search.max_ddi_rate`): one that is better
because it is over the limit stops none that keeps it.
"""

import math
import statistics
from typing import Protocol

from cafemed.sweep_plan import SearchConfig

#: Trials that the median is taken over at least, as in Ray Tune and Vizier's service.
_MIN_TRIALS = 3


class Rule(Protocol):
    """Decides after an epoch whether a trial stops."""

    def stops(self, trial: int, epoch: int, value: float, keeps: bool = True) -> bool:
        """Takes note of an epoch (from 1) and says whether the trial stops after it.

        Args:
            trial: its number.
            epoch: which.
            value: the best until then.
            keeps: whether the trial could be chosen for it; others are compared with it if so.
        """
        ...


class Never:
    """Lets every trial train to its end."""

    def stops(self, trial: int, epoch: int, value: float, keeps: bool = True) -> bool:  # noqa: ARG002
        """See Rule."""
        return False


class Asha:
    """Asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934).

    At each rung, epoch grace_period · factor^k, a trial stops if its value is below the quantile
    1 - 1/factor of the values that came to this rung before it.
    """

    def __init__(self, epochs: int, grace_period: int, factor: float) -> None:
        self._factor = factor
        rungs = int(math.log(epochs / grace_period) / math.log(factor) + 1)
        self._rungs: list[tuple[float, dict[int, tuple[float, bool]]]] = [
            (grace_period * factor**k, {}) for k in reversed(range(rungs))
        ]

    def stops(self, trial: int, epoch: int, value: float, keeps: bool = True) -> bool:
        """See Rule."""
        for milestone, reached in self._rungs:
            if epoch < milestone or trial in reached:
                continue
            before = sorted(value for value, keeps in reached.values() if keeps)
            reached[trial] = value, keeps
            return bool(before) and value < _quantile(before, 1 - 1 / self._factor)
        return False


class Median:
    """Stops a trial whose best value is below the median of the others' running means.

    The rule of Golovin et al. 2017, "Google Vizier", section 3.2.1: means are over the epochs from
    grace_period to this one, of the trials that got so far.
    """

    def __init__(self, grace_period: int) -> None:
        self._grace_period = grace_period
        self._values: dict[int, list[float]] = {}
        self._keeps: dict[int, list[bool]] = {}

    def stops(self, trial: int, epoch: int, value: float, keeps: bool = True) -> bool:
        """See Rule."""
        own = self._values.setdefault(trial, [])
        if epoch > len(own):
            own.append(value)
            self._keeps.setdefault(trial, []).append(keeps)
        if epoch < self._grace_period:
            return False
        means = [
            statistics.fmean(values[self._grace_period - 1 : epoch])
            for other, values in self._values.items()
            if other != trial and len(values) >= epoch and self._keeps[other][epoch - 1]
        ]
        return len(means) >= _MIN_TRIALS and value < statistics.median(means)


def make_rule(search: SearchConfig, epochs: int) -> Rule:
    """The rule that `search.scheduler` names.

    Args:
        search: its settings.
        epochs: that a trial may have.
    """
    grace_period = min(search.grace_period, epochs)
    if search.scheduler == "asha":
        return Asha(epochs, grace_period, search.reduction_factor)
    return Median(grace_period) if search.scheduler == "median" else Never()


def _quantile(values: list[float], share: float) -> float:
    """Of sorted values, linear between neighbours."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
