"""Handing tasks out to Dask's workers, which share one copy of what all tasks need."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from cafemed import console
from cafemed.errors import DataError

#: How often tasks are handed out again after the workers that held the shared data are gone.
_ROUNDS = 3
_POLL_S = 0.02


class Runner(Protocol):
    """Runs a function on what is shared and each of some tasks; results in the tasks' order."""

    def run(
        self, tasks: Sequence[Any], what: str, function: Callable[[Any, Any], Any]
    ) -> list[Any]:
        """Runs all tasks; `what` names them for people."""
        ...


class Alone:
    """Runs tasks here, one after another: inside a task of somebody else's."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def run(
        self, tasks: Sequence[Any], what: str, function: Callable[[Any, Any], Any]
    ) -> list[Any]:
        """See Runner."""
        del what
        return [function(self._shared, task) for task in tasks]


class Workers:
    """A client's workers, each with a copy of what is shared."""

    def __init__(self, client: Client, shared: Any) -> None:
        self._client, self._content = client, shared
        self._shared: Future[Any] | None = None

    def run(
        self, tasks: Sequence[Any], what: str, function: Callable[[Any, Any], Any]
    ) -> list[Any]:
        """Runs tasks on the workers, with a progress bar.

        When a worker dies, what it was running is run again by another; only if all copies of the
        shared data died with their workers is it sent again, and then only the tasks without a
        result are handed out.

        Returns:
            The results in the order of the tasks, whatever order they came in.

        Raises:
            DataError: if a task killed its worker repeatedly (out of memory, most likely).
        """
        results: dict[int, Any] = {}
        if not tasks:
            return []
        for _ in range(_ROUNDS):
            shared = self._send()
            missing = [i for i in range(len(tasks)) if i not in results]
            number = {
                self._client.submit(function, shared, tasks[i], pure=False): i for i in missing
            }
            for future in console.progress(_ended(number, shared), what, total=len(missing)):
                with contextlib.suppress(FutureCancelledError):  # lost with its worker: next round
                    results[number[future]] = _result(future, what)
                future.release()  # or Dask would compute it again if its worker dies later
            if len(results) == len(tasks):
                return [results[i] for i in range(len(tasks))]
        raise DataError(
            f"causal: {len(tasks) - len(results)} {what} tasks were lost with their workers "
            f"{_ROUNDS} times; look at the memory and the log of the Dask workers"
        )

    def _send(self) -> "Future[Any]":
        if self._shared is None or self._shared.status != "finished":
            try:
                # A new key each time: Dask may still be forgetting an older copy of the same key.
                self._shared = self._client.scatter(self._content, broadcast=True, hash=False)
            except TimeoutError as err:
                raise DataError("causal: the Dask cluster has no workers left") from err
        return self._shared


def _result(future: "Future[Any]", what: str) -> Any:
    try:
        return future.result()
    except KilledWorker as err:
        raise DataError(
            f"causal: a task of {what!r} killed its worker repeatedly; give workers more memory, "
            "start fewer of them (causal.workers), or lower causal.blocks.max_size"
        ) from err


def _ended(futures: "Collection[Future[Any]]", shared: "Future[Any]") -> "Iterator[Future[Any]]":
    """Futures as they end; no more once the shared data that they wait for are gone.

    Not `distributed.as_completed`, which may wait for ever for tasks whose input died with its
    workers.
    """
    waiting = list(futures)
    while waiting and shared.status == "finished":
        ended = [future for future in waiting if future.status != "pending"]
        waiting = [future for future in waiting if future not in ended]
        yield from ended
        time.sleep(_POLL_S)
