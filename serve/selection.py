"""Which of the probable medications are returned when few of their pairs may interact.

Of all subsets whose interacting pairs are at most a share of all their pairs, the one with the
largest sum of weights is sought by branch and bound: one medication after the other is kept or left
out, until what is undecided can all be kept, or cannot lead to more than is found already. Two
bounds say the latter, each with a price for an interacting pair (a Lagrange multiplier) and for
every size of the set:

* removal: leaving k medications out saves at most the pairs that each of them is in;
* cliques: of medications that all interact with one another, the j-th costs j - 1 pairs.

The search counts its steps rather than the time, so that the same patient gets the same answer on a
busy machine; the time is a second limit for slow ones.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Steps of one search; one takes about 0.07 ms of a core with 40 to 60 candidates (measured).
MAX_STEPS = 500
#: Processor time of one search.
MAX_SECONDS = 0.05

#: Prices of an interacting pair, in shares of the largest weight. At the last no pair pays.
_PRICES = np.array([0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.6, 0.8, 1.001])
#: Prices tried on either side of the parent's best.
_NEARBY = 2
#: Sums of weights closer than this count as equal.
_SAME = 1e-9


class Choice(NamedTuple):
    """What is kept.

    Attributes:
        kept: indices of the candidates, ascending.
        optimal: no other choice has a larger sum of weights.
    """

    kept: tuple[int, ...]
    optimal: bool


class _State(NamedTuple):
    """What is decided, sets as bits; what is neither kept nor open is left out.

    Attributes:
        kept: for certain.
        open: not yet decided.
        pairs: interacting pairs of what is kept.
        value: sum of its weights.
        price: place in the prices of the one that bounded its parent best.
    """

    kept: int
    open: int
    pairs: int
    value: float
    price: int


def rate(interactions: int, size: int) -> float:
    """Interacting pairs / all pairs of a set, as `metrics.Metrics.ddi_rate` for one set."""
    pairs = size * (size - 1) // 2
    return interactions / pairs if pairs else 0.0


def most_interactions(size: int, max_rate: float) -> int:
    """The most interacting pairs that a set of this size may have."""
    pairs = size * (size - 1) // 2
    allowed = min(pairs, int(max_rate * pairs) + 1)
    while allowed and rate(allowed, size) > max_rate:
        allowed -= 1
    return allowed


def choose(
    weights: Sequence[float],
    conflicts: Sequence[int],
    max_rate: float,
    max_size: int,
    max_steps: int = MAX_STEPS,
    max_seconds: float = MAX_SECONDS,
) -> Choice:
    """Chooses the candidates with the largest sum of weights whose pairs keep to a rate.

    To whatever is returned no other candidate could be added.

    Args:
        weights: of the candidates, at least 0 each.
        conflicts: of each candidate the others that it interacts with, bit j for candidate j.
        max_rate: interacting pairs / pairs of the choice.
        max_size: of the choice.
        max_steps: of the search.
        max_seconds: of the search, processor time.
    """
    number = len(weights)
    pairs = sum(others.bit_count() for others in conflicts) // 2
    if number <= max_size and rate(pairs, number) <= max_rate:
        return Choice(tuple(range(number)), optimal=True)
    order = _by_cliques(weights, conflicts)
    place = {candidate: i for i, candidate in enumerate(order)}
    end = time.thread_time() + max_seconds
    search = _Search(
        [weights[i] for i in order],
        [sum(1 << place[j] for j in _members(conflicts[i])) for i in order],
        max_rate,
        max_size,
        end,
    )
    optimal = search.run(max_steps, end)
    return Choice(tuple(sorted(order[i] for i in _members(search.best))), optimal)


class _Search:
    """A search among candidates whose cliques (`_by_cliques`) lie side by side."""

    def __init__(
        self,
        weights: Sequence[float],
        conflicts: Sequence[int],
        max_rate: float,
        max_size: int,
        end: float,
    ) -> None:
        number = len(weights)
        self._weights = list(weights)
        self._conflicts = list(conflicts)
        self._order = sorted(range(number), key=lambda i: (-weights[i], i))
        self._max_size = min(max_size, number)
        self._allowed = [most_interactions(size, max_rate) for size in range(number + 1)]
        self._allowed_array = np.array(self._allowed, np.float64)
        self._weight_array = np.array(weights, np.float64)
        self._largest = max(max(weights), _SAME)
        self._prices = _PRICES * self._largest
        self._clique = np.array(_numbers_of_cliques(conflicts), np.float64)
        self.best = self._improved(self._without_the_worst(), end)
        self._value = self._sum(self.best)

    def run(self, max_steps: int, end: float) -> bool:
        """Searches; says whether `best` is known to be the best."""
        stack = [_State(0, (1 << len(self._weights)) - 1, 0, 0.0, len(_PRICES) // 2)]
        steps = 0
        while stack and steps < max_steps and time.thread_time() < end:
            stack += self._expand(stack.pop())
            steps += 1
        self.best = self._filled(self.best)
        return not stack

    def _expand(self, state: _State) -> Sequence[_State]:
        """Follows a state as far as it is forced; what is then to be searched, the last first."""
        kept, undecided, pairs, value, price = self._forced(state)
        size, more = kept.bit_count(), undecided.bit_count()
        if pairs <= self._allowed[size]:
            self._found(kept, value)
        if not more:
            return ()
        members = _members(undecided)
        conflicts = [self._conflicts[i] for i in members]
        inside = [(others & undecided).bit_count() for others in conflicts]
        outside = [(others & kept).bit_count() for others in conflicts]
        all_value = value + sum(self._weights[i] for i in members)
        all_pairs = pairs + sum(inside) // 2 + sum(outside)
        if all_value <= self._value + _SAME:
            return ()
        if size + more <= self._max_size and all_pairs <= self._allowed[size + more]:
            self._found(kept | undecided, all_value)
            return ()
        total = [a + b for a, b in zip(inside, outside, strict=True)]
        low, high = max(0, price - _NEARBY), price + _NEARBY + 1
        prices = self._prices[low:high]
        weights = self._weight_array[members]
        room = self._allowed_array[size : min(size + more, self._max_size) + 1]
        bounds = _removal_bounds(weights, total, prices, room - all_pairs) + all_value
        bound, price = _highest(bounds)
        if bound <= self._value + _SAME:
            return ()
        cliques = _clique_bounds(weights, outside, self._clique[members], prices, room - pairs)
        bound, price = _highest(np.minimum(bounds, cliques + value, out=bounds))
        if bound <= self._value + _SAME:
            return ()
        most = max(range(more), key=total.__getitem__)
        bit = 1 << members[most]
        rest, price = undecided & ~bit, low + price
        weight = self._weights[members[most]]
        return (
            _State(kept | bit, rest, pairs + outside[most], value + weight, price),
            _State(kept, rest, pairs, value, price),
        )

    def _forced(self, state: _State) -> _State:
        """Decides what has no choice: too many pairs with what is kept, or none with anything."""
        kept, undecided, pairs, value, price = state
        size = kept.bit_count()
        if size >= self._max_size:
            return _State(kept, 0, pairs, value, price)
        out = -1
        while out:
            largest = size + undecided.bit_count()
            room = self._allowed[min(largest, self._max_size)] - pairs
            everything = kept | undecided
            out = into = 0
            for i in _members(undecided):
                others = self._conflicts[i]
                if (others & kept).bit_count() > room:
                    out |= 1 << i
                elif not others & everything and largest <= self._max_size:
                    into |= 1 << i
                    value += self._weights[i]
            kept |= into
            size += into.bit_count()
            undecided &= ~(out | into)
        return _State(kept, undecided, pairs, value, price)

    def _found(self, members: int, value: float) -> None:
        if value > self._value + _SAME:
            self.best, self._value = members, value

    def _without_the_worst(self) -> int:
        """A first choice: all, less the one with the most pairs for its weight, again and again."""
        members = (1 << len(self._weights)) - 1
        while not self._keeps_to_it(members):
            if self._pairs(members):
                worst = max(
                    _members(members),
                    key=lambda i: (
                        (self._conflicts[i] & members).bit_count()
                        / (self._weights[i] + 0.1 * self._largest)
                    ),
                )
            else:
                worst = min(_members(members), key=lambda i: self._weights[i])
            members &= ~(1 << worst)
        return self._filled(members)

    def _improved(self, members: int, end: float) -> int:
        """Leaves one out and fills up, one after the other, as long as that gives more."""
        value = self._sum(members)
        tried = 0
        while members & ~tried and time.thread_time() < end:
            one = members & ~tried & -(members & ~tried)
            other = self._filled(members & ~one, without=one)
            if self._sum(other) > value + _SAME:
                members, value, tried = other, self._sum(other), 0
            tried |= one
        return members

    def _filled(self, members: int, without: int = 0) -> int:
        """Adds what may be added, the heaviest first; at last also what was to be left out."""
        size, pairs = members.bit_count(), self._pairs(members)
        rest = [i for i in self._order if not (members | without) >> i & 1]
        rest += _members(without)
        added = True
        while added and size < self._max_size:
            added = False
            for i in rest:
                more = (self._conflicts[i] & members).bit_count()
                if pairs + more <= self._allowed[size + 1]:
                    members |= 1 << i
                    size, pairs, added = size + 1, pairs + more, True
                    rest.remove(i)
                    break
        return members

    def _keeps_to_it(self, members: int) -> bool:
        size = members.bit_count()
        return size <= self._max_size and self._pairs(members) <= self._allowed[size]

    def _pairs(self, members: int) -> int:
        return sum((self._conflicts[i] & members).bit_count() for i in _members(members)) // 2

    def _sum(self, members: int) -> float:
        return sum(self._weights[i] for i in _members(members))


def _removal_bounds(
    weights: NDArray[np.float64],
    pairs: Sequence[int],
    prices: NDArray[np.float64],
    room: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Bounds on what leaving some out adds to the value of all, for every price and size.

    Args:
        weights: float64 (U,), of the undecided.
        pairs: (U,) interacting pairs that each is in, with all that is not left out.
        prices: float64 (L,).
        room: float64 (S,), of each size the pairs allowed less those of all; the first size is
            that without any undecided.

    Returns:
        float64 (L, S).
    """
    gains = np.multiply.outer(prices, np.array(pairs, np.float64)) - weights
    gains.sort(axis=1)
    left_out = np.zeros((len(prices), len(weights) + 1))
    np.cumsum(gains[:, ::-1], axis=1, out=left_out[:, 1:])
    return left_out[:, ::-1][:, : len(room)] + np.multiply.outer(prices, room)


def _clique_bounds(
    weights: NDArray[np.float64],
    pairs: Sequence[int],
    clique: NDArray[np.float64],
    prices: NDArray[np.float64],
    room: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Bounds on what keeping some adds to the value of what is kept, for every price and size.

    Args:
        weights: float64 (U,), of the undecided.
        pairs: (U,) interacting pairs of each with what is kept.
        clique: float64 (U,), number of each one's clique, ascending.
        prices: float64 (L,).
        room: float64 (S,), of each size the pairs allowed less those of what is kept; the first
            size is that without any undecided.

    Returns:
        float64 (L, S).
    """
    places = np.arange(len(weights))
    starts = np.maximum.accumulate(np.where(np.diff(clique, prepend=-1.0) > 0, places, 0))
    values = weights - np.multiply.outer(prices, np.array(pairs, np.float64))
    # Sorted within each clique, the most valuable first, by one sort of all.
    far = clique * (values.max() - values.min() + 1.0)
    ordered = far - values
    ordered.sort(axis=1)
    gains = far - ordered - np.multiply.outer(prices, (places - starts).astype(np.float64))
    gains.sort(axis=1)
    kept = np.zeros((len(prices), len(weights) + 1))
    np.cumsum(gains[:, ::-1], axis=1, out=kept[:, 1:])
    return kept[:, : len(room)] + np.multiply.outer(prices, room)


def _highest(bounds: NDArray[np.float64]) -> tuple[float, int]:
    """The highest bound over the sizes, of each the lowest over the prices; and its price."""
    lowest = bounds.argmin(axis=0)
    of_size = bounds[lowest, np.arange(bounds.shape[1])]
    size = int(of_size.argmax())
    return float(of_size[size]), int(lowest[size])


def _by_cliques(weights: Sequence[float], conflicts: Sequence[int]) -> list[int]:
    """All candidates, cliques of interacting ones side by side, each begun with the heaviest."""
    left = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order: list[int] = []
    while left:
        common = -1
        clique = []
        for i in left:
            if common >> i & 1:
                clique.append(i)
                common &= conflicts[i]
        order += clique
        left = [i for i in left if i not in set(clique)]
    return order


def _numbers_of_cliques(conflicts: Sequence[int]) -> list[int]:
    """For candidates ordered by cliques the number of each one's, from 0."""
    numbers: list[int] = []
    clique = 0
    for i, others in enumerate(conflicts):
        if clique & ~others or not i:
            clique = 0
            numbers.append(numbers[-1] + 1 if numbers else 0)
        else:
            numbers.append(numbers[-1])
        clique |= 1 << i
    return numbers


def _members(bits: int) -> list[int]:
    """The places of the bits that are set, ascending."""
    return [i for i, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
