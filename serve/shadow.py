"""A second version that sees some of the requests, whose answers are only compared.

It runs in a process of its own, asked after the client has its answer, and is handed bytes, so it
neither delays nor fails one. What is compared is what the models say, before any option of the
request: the sets of medications that reach each model's threshold, and the probabilities. Nothing
of it is kept but counts.
"""

import asyncio
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cafemed import registry
from cafemed.errors import UserError
from serve.asking import unpacked
from serve.following import FollowingModel
from serve.observing import Counts
from serve.recommender import Recommender

logger = logging.getLogger(__name__)

R = TypeVar("R")

#: Longest that a comparison is waited for; then its place in the queue is free again.
_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the served model said to a request.

    Attributes:
        version: of it.
        medications: its N_m codes.
        threshold: of its recommendations.
        rows: each patient's probabilities, float32 (N_m,).
    """

    version: int
    medications: tuple[str, ...]
    threshold: float
    rows: Sequence[NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on one patient.

    Attributes:
        jaccard: of the recommended sets; 1 where both are empty.
        difference: mean absolute difference of the probabilities of medications that both know;
            None if there are none.
    """

    jaccard: float
    difference: float | None


class ShadowModel:
    """The version that is compared; it may not be there yet, and may change."""

    def __init__(self, registry_dir: registry.Location, alias: int | str) -> None:
        self._registry_dir = registry_dir
        self._alias = alias
        self._following: FollowingModel | None = None
        self._reported = ""
        self.refresh()

    @property
    def version(self) -> int | None:
        """Of the registry; None while there is none that works."""
        return self._following.recommender.name.version if self._following else None

    def refresh(self) -> None:
        """Looks where the alias points, and loads that."""
        if self._following is not None:
            self._following.refresh()
            return
        try:
            self._following = FollowingModel(self._registry_dir, self._alias)
        except Exception as err:  # noqa: BLE001 - whatever it is, what is served goes on
            said = str(err) if isinstance(err, (UserError, OSError)) else type(err).__name__
            if said != self._reported:
                logger.warning("no shadow yet: %s", said)
                self._reported = said

    def compare(self, patients: bytes, answered: Answered) -> list[Comparison] | None:
        """Asks this version about a request's patients too; None if there is none to compare with.

        Args:
            patients: of `asking.packed`.
            answered: what the served version said of them.

        Raises:
            UnknownSystemError: if only the served model knows a code system.
        """
        if self._following is None or self.version == answered.version:
            return None
        recommender = self._following.recommender
        own = recommender.bundle.vocabularies["medication"]
        index = {code: i for i, code in enumerate(own)}
        both = [(i, index[c]) for i, c in enumerate(answered.medications) if c in index]
        theirs, ours = np.array(both, np.int64).reshape(-1, 2).T
        rows = recommender.probabilities(recommender.encoder.encode_all(unpacked(patients)))
        threshold = recommender.bundle.preprocessing.threshold
        found = []
        for served, row in zip(answered.rows, rows, strict=True):
            chosen = {answered.medications[i] for i in _above(served, answered.threshold)}
            jaccard = _jaccard(chosen, {own[i] for i in _above(row, threshold)})
            difference = np.abs(served[theirs] - row[ours])
            found.append(Comparison(jaccard, float(difference.mean()) if both else None))
        return found


class Sampling(Generic[R]):
    """Sends a replica's share of requests to the shadow, at most so many at a time."""

    def __init__(
        self,
        ask: Callable[[R, Answered], Awaitable[str]],
        meters: Counts,
        share: float,
        most: int,
    ) -> None:
        """Starts with none sent.

        Args:
            ask: compares a request and gives the result's name, for the metric.
            meters: gets `cafemed_shadow_requests`.
            share: of requests that are sent.
            most: requests on their way at once; others are dropped.
        """
        self._ask = ask
        self._meters = meters
        self._share = share
        self._most = most
        self._random = random.Random()
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(
        self,
        request: R,
        recommender: Recommender,
        rows: Sequence[NDArray[np.float32]],
    ) -> None:
        """Sends a request and what the served model said now and then; returns at once."""
        if self._random.random() >= self._share:
            return
        if len(self._tasks) >= self._most:
            self._meters.count("cafemed_shadow_requests", result="dropped")
            return
        answered = Answered(
            version=recommender.name.version,
            medications=recommender.bundle.vocabularies["medication"],
            threshold=recommender.bundle.preprocessing.threshold,
            rows=[np.array(row) for row in rows],  # a row may be a view of its whole run
        )
        task = asyncio.get_running_loop().create_task(self._send(request, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, request: R, answered: Answered) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                result = await self._ask(request, answered)
        except Exception:  # noqa: BLE001 - nobody waits for it, and its message may quote a request
            result = "failed"
        self._meters.count("cafemed_shadow_requests", result=result)


def report(meters: Counts, comparisons: Sequence[Comparison]) -> None:
    """Adds comparisons to the metrics."""
    for comparison in comparisons:
        meters.observe("cafemed_shadow_jaccard", comparison.jaccard)
        if comparison.difference is not None:
            meters.observe("cafemed_shadow_difference", comparison.difference)


def _above(row: NDArray[np.float32], threshold: float) -> list[int]:
    indices: list[int] = np.flatnonzero(row >= threshold).tolist()
    return indices


def _jaccard(first: set[str], second: set[str]) -> float:
    either = first | second
    return len(first & second) / len(either) if either else 1.0
