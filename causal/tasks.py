"""The searches of a discovery as Dask tasks that share one copy of the statistics."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker
from numpy.typing import NDArray

from cafemed import console
from cafemed.errors import DataError
from causal.columns import Columns, Cooccurrence
from causal.merge import Arrows
from causal.statistics import Statistics, from_cooccurrence

#: How often tasks are handed out again after the workers that held the statistics are gone.
_ROUNDS = 3
_POLL_S = 0.02


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all searches of one discovery share; p columns. Sent to the workers once.

    Attributes:
        counts: of the p columns.
        tiers: int64 (p,).
        penalty: what an edge costs, on the scale of the log-likelihood.
        search: see `causal.fit_gies`.
        rows: the visits themselves, for cdt, which takes no statistics; else None.
    """

    counts: Cooccurrence
    tiers: NDArray[np.int64]
    penalty: float
    search: str
    rows: Columns | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One search: which columns, which pairs of them may get an edge, and where it starts.

    Attributes:
        columns: int64 (b,), ascending.
        first, second: int64, the allowed pairs; those with an end outside `columns` are ignored.
        start: a directed acyclic graph between columns; None: the empty graph.
        engine: "native", or "cdt", which knows neither `start` nor tiers and has its own penalty.
    """

    columns: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    start: Arrows | None = None
    engine: str = "native"


@dataclasses.dataclass(frozen=True)
class Learned:
    """The essential graph that a search found.

    Attributes:
        columns: int64 (b,), ascending.
        adjacency: int8 (b, b); [i, j] = 1, [j, i] = 0: i → j; both 1: undirected.
        dag: int8 (b, b), one member of its class, with cdt's arrows against the tiers turned.
        cpu_s: CPU seconds of the search.
    """

    columns: NDArray[np.int64]
    adjacency: NDArray[np.int8]
    dag: NDArray[np.int8]
    cpu_s: float


def search(problem: Problem, task: Task) -> Learned:
    """Runs one search; the function that a worker executes."""
    size = len(task.columns)
    forbidden = _forbidden(task, len(problem.tiers))
    if forbidden.all():
        empty = np.zeros((size, size), np.int8)
        return Learned(task.columns, empty, empty, 0.0)
    if task.engine == "cdt":
        return _search_by_cdt(problem, task, forbidden)
    load_engine(problem.search)
    started = time.thread_time()
    adjacency, dag = _fit(
        problem.counts.statistics(task.columns),
        problem.penalty / (0.5 * np.log(problem.counts.num_rows)),
        problem.search,
        forbidden,
        problem.tiers[task.columns],
        None if task.start is None else _dense(task.start, task.columns, size),
    )
    return Learned(task.columns, adjacency, dag, time.thread_time() - started)


def _search_by_cdt(problem: Problem, task: Task, forbidden: NDArray[np.bool_]) -> Learned:
    from causal.cdt_engine import fit_cdt

    assert problem.rows is not None
    started = time.perf_counter()  # R is another process: its CPU time is not this thread's
    table = problem.rows.present[:, task.columns].toarray().astype(np.float64)
    for stratum in np.unique(problem.rows.strata):
        inside = problem.rows.strata == stratum
        table[inside] -= table[inside].mean(axis=0)
    result = fit_cdt(table, forbidden=forbidden)
    tiers = problem.tiers[task.columns]
    against = (result.dag != 0) & (tiers[:, None] > tiers[None, :])
    dag = np.where(against, 0, result.dag) | against.T
    return Learned(
        task.columns, result.adjacency, dag.astype(np.int8), time.perf_counter() - started
    )


@cache
def load_engine(search: str) -> None:
    """Loads the native engine's machine code, compiling it where that was never done.

    Once a process, and not counted as time of a search. Called before workers are, it also spares
    them from compiling the same code side by side.
    """
    chain = np.array([[60, 40, 30], [40, 50, 35], [30, 35, 45]], np.int32)
    start = np.triu(np.ones((3, 3), np.int8), 1)
    statistics = from_cooccurrence([100], [chain])
    _fit(statistics, 1.0, search, np.zeros((3, 3), np.bool_), np.zeros(3, np.int64), start)


def _fit(
    statistics: Statistics,
    multiplier: float,
    search: str,
    forbidden: NDArray[np.bool_],
    tiers: NDArray[np.int64],
    start: NDArray[np.int8] | None,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    from causal.gies import fit_statistics  # here, because numba is slow to import

    result = fit_statistics(
        statistics,
        score="gaussian_bic",
        penalty=multiplier,
        intercept="per_environment",
        search=search,
        forbidden=forbidden,
        tiers=tiers,
        start=start,
    )
    return result.adjacency, result.dag


class Workers:
    """A client's workers, each with a copy of one problem."""

    def __init__(self, client: Client, problem: Problem) -> None:
        self._client, self._problem = client, problem
        self._shared: Future[Problem] | None = None

    def run(
        self,
        tasks: Sequence[Task],
        what: str,
        function: Callable[[Problem, Task], Any] = search,
    ) -> list[Any]:
        """Runs tasks on the workers, with a progress bar.

        When a worker dies, what it was running is run again by another; only if all copies of the
        problem died with their workers is it sent again, and then only the tasks without a result
        are handed out.

        Returns:
            The results in the order of the tasks, whatever order they came in.

        Raises:
            DataError: if a task killed its worker repeatedly (out of memory, most likely).
        """
        results: dict[int, Any] = {}
        for _ in range(_ROUNDS):
            shared = self._send()
            missing = [i for i in range(len(tasks)) if i not in results]
            number = {
                self._client.submit(function, shared, tasks[i], pure=False): i for i in missing
            }
            for future in console.progress(_ended(number, shared), what, total=len(missing)):
                with contextlib.suppress(FutureCancelledError):  # lost with its worker: next round
                    results[number[future]] = _result(future, tasks[number[future]], what)
                future.release()  # or Dask would compute it again if its worker dies later
            if len(results) == len(tasks):
                return [results[i] for i in range(len(tasks))]
        raise DataError(
            f"causal: {len(tasks) - len(results)} {what} tasks were lost with their workers "
            f"{_ROUNDS} times; look at the memory and the log of the Dask workers"
        )

    def _send(self) -> "Future[Problem]":
        if self._shared is None or self._shared.status != "finished":
            try:
                # A new key each time: Dask may still be forgetting an older copy of the same key.
                self._shared = self._client.scatter(self._problem, broadcast=True, hash=False)
            except TimeoutError as err:
                raise DataError("causal: the Dask cluster has no workers left") from err
        return self._shared


def _result(future: "Future[Any]", task: Task, what: str) -> Any:
    try:
        return future.result()
    except KilledWorker as err:
        raise DataError(
            f"causal: the {what} task with {len(task.columns)} columns killed its worker "
            "repeatedly; give workers more memory or lower causal.blocks.max_size"
        ) from err


def _ended(
    futures: "Collection[Future[Any]]", shared: "Future[Problem]"
) -> "Iterator[Future[Any]]":
    """Futures as they end; no more once the statistics that they wait for are gone.

    Not `distributed.as_completed`, which may wait for ever for tasks whose input died with its
    workers.
    """
    waiting = list(futures)
    while waiting and shared.status == "finished":
        ended = [future for future in waiting if future.status != "pending"]
        waiting = [future for future in waiting if future not in ended]
        yield from ended
        time.sleep(_POLL_S)


def _forbidden(task: Task, num_columns: int) -> NDArray[np.bool_]:
    place = np.full(num_columns, -1, np.int64)
    place[task.columns] = np.arange(len(task.columns))
    a, b = place[task.first], place[task.second]
    inside = (a >= 0) & (b >= 0)
    forbidden = np.ones((len(task.columns),) * 2, np.bool_)
    forbidden[a[inside], b[inside]] = forbidden[b[inside], a[inside]] = False
    return forbidden


def _dense(arrows: Arrows, columns: NDArray[np.int64], size: int) -> NDArray[np.int8]:
    place = np.searchsorted(columns, np.arange(columns[-1] + 1)) if size else columns
    adjacency = np.zeros((size, size), np.int8)
    adjacency[place[arrows.source], place[arrows.target]] = 1
    return adjacency
