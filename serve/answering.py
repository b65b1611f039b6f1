"""From a patient's probabilities to what is recommended, warned of and left out.

In this order: what reaches the threshold; without what falls under an allergy; of that the best
choice that keeps to the options (serve/selection.py).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serve import selection
from serve.answers import (
    MAX_NEAR_MISSES,
    Explained,
    Explanation,
    Interaction,
    InteractionWithTaken,
    LeftOut,
    Medication,
    NearMiss,
    Recommendation,
)
from serve.encoding import EncodedPatient
from serve.schema import Options

#: Share of the threshold that a near miss has at least.
NEAR = 0.5
#: Probabilities this close to 0 or 1 are taken for it: single precision's step below 1.
_STEP = 2.0**-24


class Explains(Protocol):
    """The explanation of one patient's answer."""

    @property
    def explained(self) -> Explained:
        """How much of the patient it covers."""

    def of(self, medication: int) -> Explanation:
        """What raised and lowered a medication, by its index."""


class _Outcome(NamedTuple):
    """What became of the probable medications, all the most probable first.

    Attributes:
        chosen: recommended.
        left_out: with the reason.
        optimal: as in the answer.
    """

    chosen: list[int]
    left_out: list[LeftOut]
    optimal: bool | None


class Answerer:
    """Makes answers for one model."""

    def __init__(
        self,
        medications: Sequence[str],
        ddi: NDArray[np.bool_],
        names: Mapping[str, str],
        threshold: float,
    ) -> None:
        """Prepares what all answers share.

        Args:
            medications: N_m codes.
            ddi: bool (N_m, N_m), symmetric, zero diagonal.
            names: of the codes, where they have one.
            threshold: see Preprocessing.
        """
        self._codes = tuple(medications)
        self._parts: list[tuple[str, str, str | None]] = []
        for name in medications:
            system, _, code = name.partition(":")
            self._parts.append((system, code, names.get(name)))
        self._partners = [frozenset(np.flatnonzero(row).tolist()) for row in ddi]
        # In single precision, as probabilities are.
        self._threshold = float(np.float32(threshold))
        self._lowest = threshold * NEAR
        self._base = _log_odds(threshold)

    def answer(
        self,
        patient: EncodedPatient,
        probabilities: NDArray[np.float32],
        options: Options,
        explanation: Explains | None = None,
    ) -> Recommendation:
        """The recommendation for a patient with these probabilities, float32 (N_m,)."""
        order: list[int] = (-probabilities).argsort(kind="stable").tolist()
        values: list[float] = probabilities.tolist()
        number = 0
        while number < len(order) and values[order[number]] >= self._threshold:
            number += 1
        refused = self._refused(patient.allergies)
        outcome = self._outcome(order[:number], values, refused, options)
        chosen, codes = outcome.chosen, self._codes
        recommended = frozenset(chosen)
        taken = [m for m in dict.fromkeys(patient.taken) if m not in recommended]
        pairs = self._pairs(chosen)
        lowest = self._lowest
        near = (m for m in order[number:] if values[m] >= lowest and m not in refused)
        return Recommendation(
            medications=[
                Medication(
                    *self._parts[m], values[m], None if explanation is None else explanation.of(m)
                )
                for m in chosen
            ],
            interactions=pairs,
            interactions_with_taken=[
                InteractionWithTaken(codes[m], codes[other])
                for m in chosen
                for other in taken
                if other in self._partners[m]
            ],
            ddi_rate=selection.rate(len(pairs), len(chosen)),
            left_out=outcome.left_out,
            optimal=outcome.optimal,
            near_misses=[
                NearMiss(*self._parts[m], values[m])
                for m in itertools.islice(near, MAX_NEAR_MISSES)
            ],
            unknown_codes=list(patient.unknown),
            explained_codes=None if explanation is None else explanation.explained,
        )

    def _refused(self, allergies: Iterable[str]) -> dict[int, str]:
        """Medications that fall under an allergy → the first such prefix.

        A class of the model falls under a finer prefix too: it may mean just that substance.
        """
        refused: dict[int, str] = {}
        for prefix in allergies:
            for m, (_, code, _) in enumerate(self._parts):
                if code.startswith(prefix) or prefix.startswith(code):
                    refused.setdefault(m, prefix)
        return refused

    def _outcome(
        self,
        probable: Sequence[int],
        values: Sequence[float],
        refused: Mapping[int, str],
        options: Options,
    ) -> _Outcome:
        candidates = [m for m in probable if m not in refused]
        most = len(candidates) if options.top_k is None else options.top_k
        if options.max_ddi_rate is None:
            chosen, optimal = candidates[:most], None
        else:
            weights = [max(0.0, _log_odds(values[m]) - self._base) for m in candidates]
            conflicts = self._conflicts(candidates)
            kept, optimal = selection.choose(weights, conflicts, options.max_ddi_rate, most)
            chosen = [candidates[i] for i in kept]
        if len(chosen) == len(probable):
            return _Outcome(chosen, [], optimal)
        recommended = frozenset(chosen)
        left_out = [
            self._left_out(m, values[m], refused.get(m), chosen, options)
            for m in probable
            if m not in recommended
        ]
        return _Outcome(chosen, left_out, optimal)

    def _left_out(
        self,
        medication: int,
        probability: float,
        allergy: str | None,
        chosen: Sequence[int],
        options: Options,
    ) -> LeftOut:
        reason: Literal["allergy", "max_ddi_rate", "top_k"] = "top_k"
        pairs: list[Interaction] = []
        if allergy is not None:
            reason = "allergy"
        elif options.max_ddi_rate is not None:
            both = self._pairs([*chosen, medication])
            if selection.rate(len(both), len(chosen) + 1) > options.max_ddi_rate:
                reason = "max_ddi_rate"
                code = self._codes[medication]
                pairs = [pair for pair in both if pair.second == code]
        parts = self._parts[medication]
        return LeftOut(*parts, probability, reason=reason, pairs=pairs, allergy=allergy)

    def _conflicts(self, medications: Sequence[int]) -> list[int]:
        """For each the set of others that it interacts with, as bits."""
        bit = {m: 1 << i for i, m in enumerate(medications)}
        return [sum(bit[o] for o in self._partners[m] if o in bit) for m in medications]

    def _pairs(self, medications: Sequence[int]) -> list[Interaction]:
        """Interacting pairs among these medications, in their order."""
        codes, everyone = self._codes, frozenset(medications)
        return [
            Interaction(codes[m], codes[other])
            for i, m in enumerate(medications)
            if not self._partners[m].isdisjoint(everyone)
            for other in medications[i + 1 :]
            if other in self._partners[m]
        ]


def _log_odds(probability: float) -> float:
    inside = min(max(probability, _STEP), 1.0 - _STEP)
    return math.log(inside) - math.log1p(-inside)
