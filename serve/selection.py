"""Which of the probable medications are returned when few of their pairs may interact."""

from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """What is kept.

    Attributes:
        kept: indices of the candidates, ascending.
        optimal: no other choice is better.
    """

    kept: tuple[int, ...]
    optimal: bool


def rate(interactions: int, size: int) -> float:
    """Interacting pairs / all pairs of a set, as `metrics.Metrics.ddi_rate` for one set."""
    pairs = size * (size - 1) // 2
    return interactions / pairs if pairs else 0.0


def most_interactions(size: int, max_rate: float) -> int:
    """The most interacting pairs that a set of this size may have: pairs / all pairs ≤ max_rate."""
    pairs = size * (size - 1) // 2
    allowed = min(pairs, int(max_rate * pairs) + 1)
    while allowed and allowed / pairs > max_rate:
        allowed -= 1
    return allowed


def choose(
    weights: Sequence[float], conflicts: Sequence[int], max_rate: float, max_size: int
) -> Choice:
    """Chooses the candidates with the largest sum of weights whose pairs keep to a rate.

    Args:
        weights: at least 0 each.
        conflicts: of each candidate the others that it interacts with, bit j for candidate j.
        max_rate: interacting pairs / pairs of the choice.
        max_size: of the choice.
    """
    kept = _greedy(weights, conflicts, max_rate, max_size)
    return Choice(tuple(kept), optimal=len(kept) == len(weights))


def _greedy(
    weights: Sequence[float], conflicts: Sequence[int], max_rate: float, max_size: int
) -> list[int]:
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    chosen, members, pairs = list[int](), 0, 0
    found = True
    while found and len(chosen) < max_size:
        found = False
        for i in order:
            more = (conflicts[i] & members).bit_count()
            allowed = most_interactions(len(chosen) + 1, max_rate)
            if not members >> i & 1 and pairs + more <= allowed:
                chosen.append(i)
                members |= 1 << i
                pairs += more
                found = True
                break
    return sorted(chosen)
