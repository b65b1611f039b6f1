"""From a patient's probabilities to what is recommended, warned of and left out.

In this order: what reaches the threshold; without what falls under an allergy; of that the best
choice that keeps to the options (serve/selection.py).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve import selection
from serve.encoding import EncodedPatient
from serve.schema import (
    MAX_NEAR_MISSES,
    Explained,
    Explanation,
    Interaction,
    InteractionWithTaken,
    LeftOut,
    Medication,
    NearMiss,
    Options,
    Recommendation,
)

#: Probabilities this close to 0 or 1 are taken for it: single precision's step below 1.
_STEP = 2.0**-24


class Explains(Protocol):
    """The explanation of one patient's answer."""

    @property
    def explained(self) -> Explained:
        """How much of the patient it covers."""

    def of(self, medication: int) -> Explanation:
        """What raised and lowered a medication, by its index."""


@dataclasses.dataclass(frozen=True)
class _Outcome:
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
        self._ddi = ddi
        self._threshold = threshold
        self._parts: list[dict[str, Any]] = []
        for name in medications:
            system, _, code = name.partition(":")
            self._parts.append({"system": system, "code": code, "name": names.get(name)})

    def answer(
        self,
        patient: EncodedPatient,
        probabilities: NDArray[np.float32],
        options: Options,
        explanation: Explains | None = None,
    ) -> Recommendation:
        """The recommendation for a patient with these probabilities, float32 (N_m,)."""
        order = np.argsort(-probabilities, kind="stable").tolist()
        number = int((probabilities >= self._threshold).sum())
        values: list[float] = probabilities.tolist()
        refused = self._refused(patient.allergies)
        outcome = self._outcome(order[:number], values, refused, options)
        chosen = outcome.chosen
        taken = [m for m in patient.taken if m not in set(chosen)]
        codes = self._codes
        pairs = self._pairs(chosen)
        explain: Callable[[int], Explanation | None]
        explain = (lambda _: None) if explanation is None else explanation.of
        near = (m for m in order[number:] if m not in refused)
        # Nothing here needs checking again, so nothing is: model_construct.
        return Recommendation.model_construct(
            medications=[
                Medication.model_construct(**self._scored(m, values), explanation=explain(m))
                for m in chosen
            ],
            interactions=[
                Interaction.model_construct(first=codes[a], second=codes[b]) for a, b in pairs
            ],
            interactions_with_taken=[
                InteractionWithTaken.model_construct(recommended=codes[a], taken=codes[b])
                for a in chosen
                for b in taken
                if self._ddi[a, b]
            ],
            ddi_rate=selection.rate(len(pairs), len(chosen)),
            left_out=outcome.left_out,
            optimal=outcome.optimal,
            near_misses=[
                NearMiss.model_construct(**self._scored(m, values))
                for m in itertools.islice(near, MAX_NEAR_MISSES)
            ],
            explained_codes=None if explanation is None else explanation.explained,
            unknown_codes=list(patient.unknown),
        )

    def _scored(self, medication: int, values: Sequence[float]) -> dict[str, Any]:
        return {**self._parts[medication], "probability": values[medication]}

    def _refused(self, allergies: Iterable[str]) -> dict[int, str]:
        """Medications that fall under an allergy → the first such prefix.

        A class of the model falls under a finer prefix too: it may mean just that substance.
        """
        refused: dict[int, str] = {}
        for prefix in allergies:
            for m, part in enumerate(self._parts):
                if part["code"].startswith(prefix) or prefix.startswith(part["code"]):
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
        optimal: bool | None = None
        if options.max_ddi_rate is None:
            chosen = candidates[:most]
        else:
            kept, optimal = selection.choose(
                [self._weight(values[m]) for m in candidates],
                self._conflicts(candidates),
                options.max_ddi_rate,
                most,
            )
            chosen = [candidates[i] for i in kept]
        left_out = []
        for m in (m for m in probable if m not in set(chosen)):
            part = {**self._scored(m, values), "pairs": [], "allergy": refused.get(m)}
            part["reason"] = "top_k"
            if m in refused:
                part["reason"] = "allergy"
            elif options.max_ddi_rate is not None:
                pairs = [(a, m) for a in chosen if self._ddi[a, m]]
                total = len(pairs) + len(self._pairs(chosen))
                if selection.rate(total, len(chosen) + 1) > options.max_ddi_rate:
                    part["reason"] = "max_ddi_rate"
                    part["pairs"] = [
                        Interaction.model_construct(first=self._codes[a], second=self._codes[b])
                        for a, b in pairs
                    ]
            left_out.append(LeftOut.model_construct(**part))
        return _Outcome(chosen, left_out, optimal)

    def _weight(self, probability: float) -> float:
        """Log-odds above the threshold's, at least 0."""
        return max(0.0, _log_odds(probability) - _log_odds(self._threshold))

    def _conflicts(self, medications: Sequence[int]) -> list[int]:
        """For each the set of others that it interacts with, as bits."""
        inside = self._ddi[np.ix_(medications, medications)]
        packed = np.packbits(inside, axis=1, bitorder="little")
        return [int.from_bytes(row.tobytes(), "little") for row in packed]

    def _pairs(self, medications: Sequence[int]) -> list[tuple[int, int]]:
        """Interacting pairs among these medications, in their order."""
        inside = self._ddi[np.ix_(medications, medications)]
        return [
            (medications[a], medications[b])
            for a, b in zip(*(i.tolist() for i in np.nonzero(inside)), strict=True)
            if a < b
        ]


def _log_odds(probability: float) -> float:
    inside = min(max(probability, _STEP), 1.0 - _STEP)
    return float(np.log(inside) - np.log1p(-inside))
