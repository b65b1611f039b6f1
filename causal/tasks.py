"""The searches of a discovery: what all of them share, what each looks at, what each finds."""

import dataclasses
import time
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from causal.columns import Columns, Cooccurrence
from causal.count_scores import CountScores
from causal.local_scores import ColumnScores, LocalScores
from causal.merge import Arrows, arrows_of
from causal.scores import Rule
from causal.statistics import Statistics, from_sparse


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all searches of one discovery share; p columns. Sent to the workers once.

    Attributes:
        counts: of the p columns.
        tiers: int64 (p,).
        rule: the score.
        search: see `causal.fit_gies`.
        rows: the visits themselves, for scores on counts and for cdt; else None.
        allowed: bool (p, p), symmetric, the pairs that may get an edge unless a task has its own;
            None: no pair.
    """

    counts: Cooccurrence
    tiers: NDArray[np.int64]
    rule: Rule
    search: str
    rows: Columns | None = None
    allowed: sparse.csr_array | None = None

    def scores(self) -> ColumnScores:
        """The score of all columns, without anything dense."""
        if not self.rule.counts_rows:
            return LocalScores.of(self.counts, self.rule.edge_penalty(self.counts.num_rows))
        assert self.rows is not None
        return CountScores.of(self.rows.present, self.rows.strata, self.rule)

    def statistics(self, columns: NDArray[np.int64]) -> Statistics:
        """The engine's statistics of some columns, with an environment a stratum."""
        statistics = self.counts.statistics(columns)
        if not self.rule.counts_rows:
            return statistics
        assert self.rows is not None
        return dataclasses.replace(statistics, rows=self.rows.holding(columns))


@dataclasses.dataclass(frozen=True)
class Task:
    """One search: which columns, which pairs of them may get an edge, and where it starts.

    Attributes:
        columns: int64 (b,), ascending.
        first, second: int64, the allowed pairs; those with an end outside `columns` are ignored.
            None: the problem's.
        start: a directed acyclic graph; arrows with an end outside `columns` are ignored. None: the
            empty graph.
        engine: "native", or "cdt", which knows neither `start` nor tiers and has its own penalty.
    """

    columns: NDArray[np.int64]
    first: NDArray[np.int64] | None = None
    second: NDArray[np.int64] | None = None
    start: Arrows | None = None
    engine: str = "native"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Many small searches in one task, so that handing them out costs less than running them.

    Attributes:
        tasks: run one after another.
    """

    tasks: tuple[Task, ...]


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

    def arrows(self) -> Arrows:
        """The member of the class, in the problem's numbering."""
        return self._numbered(arrows_of(self.dag))

    def edges(self) -> Arrows:
        """The essential graph, in the problem's numbering; a line is an arrow each way."""
        return self._numbered(arrows_of(self.adjacency))

    def _numbered(self, arrows: Arrows) -> Arrows:
        return Arrows(self.columns[arrows.source], self.columns[arrows.target])


def search_batch(problem: Problem, batch: Batch) -> list[Learned]:
    """Runs the searches of a batch; the function that a worker executes.

    The clock is read once, since that can take longer than a small search; each is said to have
    taken its share.
    """
    load_engine(problem.search, problem.rule.counts_rows)
    started = time.thread_time()
    found = [_search(problem, task) for task in batch.tasks]
    share = (time.thread_time() - started) / max(len(found), 1)
    return [dataclasses.replace(learned, cpu_s=learned.cpu_s + share) for learned in found]


def search(problem: Problem, task: Task) -> Learned:
    """Runs one search."""
    return search_batch(problem, Batch((task,)))[0]


def _search(problem: Problem, task: Task) -> Learned:
    size = len(task.columns)
    forbidden = _forbidden(problem, task)
    if forbidden.all():
        empty = np.zeros((size, size), np.int8)
        return Learned(task.columns, empty, empty, 0.0)
    if task.engine == "cdt":
        return _search_by_cdt(problem, task, forbidden)
    adjacency, dag = _fit(
        problem.statistics(task.columns),
        problem.rule,
        problem.search,
        forbidden,
        problem.tiers[task.columns],
        None if task.start is None else _dense(task.start, task.columns, len(problem.tiers)),
    )
    return Learned(task.columns, adjacency, dag, 0.0)


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
def load_engine(search: str, counts_rows: bool) -> None:
    """Loads the native engine's machine code, compiling it where that was never done.

    Once a process, and not counted as time of a search. Called before workers are, it also spares
    them from compiling the same code side by side.
    """
    statistics = from_sparse(sparse.csr_array([[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]]))
    start = np.triu(np.ones((3, 3), np.int8), 1)
    rule = Rule("bdeu" if counts_rows else "gaussian_bic", 1.0, 1.0, 3)
    _fit(statistics, rule, search, np.zeros((3, 3), np.bool_), np.zeros(3, np.int64), start)


def _fit(
    statistics: Statistics,
    rule: Rule,
    search: str,
    forbidden: NDArray[np.bool_],
    tiers: NDArray[np.int64],
    start: NDArray[np.int8] | None,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    from causal.gies import fit_statistics  # here, because numba is slow to import

    result = fit_statistics(
        statistics,
        score=rule.name,
        penalty=rule.penalty,
        gamma=rule.gamma,
        num_columns=rule.num_columns,
        intercept="per_environment",
        search=search,
        forbidden=forbidden,
        tiers=tiers,
        start=start,
    )
    return result.adjacency, result.dag


def _forbidden(problem: Problem, task: Task) -> NDArray[np.bool_]:
    columns = task.columns
    if task.first is None or task.second is None:
        if problem.allowed is None:
            return np.ones((len(columns),) * 2, np.bool_)
        inside: NDArray[np.bool_] = problem.allowed[columns][:, columns].toarray()
        return ~inside
    a, b = _inside(task.first, task.second, columns, len(problem.tiers))
    forbidden = np.ones((len(columns),) * 2, np.bool_)
    forbidden[a, b] = forbidden[b, a] = False
    return forbidden


def _dense(arrows: Arrows, columns: NDArray[np.int64], num_columns: int) -> NDArray[np.int8]:
    adjacency = np.zeros((len(columns),) * 2, np.int8)
    adjacency[_inside(arrows.source, arrows.target, columns, num_columns)] = 1
    return adjacency


def _inside(
    a: NDArray[np.int64], b: NDArray[np.int64], columns: NDArray[np.int64], num_columns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs with both ends among the columns, numbered among these."""
    place = np.full(num_columns, -1, np.int64)
    place[columns] = np.arange(len(columns))
    a, b = place[a], place[b]
    kept = (a >= 0) & (b >= 0)
    return a[kept], b[kept]
