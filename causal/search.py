"""The search: which move is made next, and what has to be scored again after it.

Hauser and Bühlmann, JMLR 13 (2012), for the moves and the order of "textbook"; Nazaret and Blei,
UAI 2024 (XGES), for the order of "fast".
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal import pdag, scoring
from causal.candidates import NO_ROOM, score_deletions, score_insertions, score_turns, valid_clique
from causal.compiled import Reference, cached_kernel, inlined, kernel, reference
from causal.pdag import DELETE, INSERT, TURN, Edges, Graph, is_line
from causal.pool import NUMBER, SINCE, Pool, PoolRef, best_target, drop, make_pool, wake
from causal.problem import Problem, ProblemRef, Work, WorkRef, clique_at, make_work
from causal.restrictions import close_orientations

#: Orders of moves: the best deletion, else the best turn, else the best insertion; or all
#: insertions, then all deletions, then all turns, until a round changes nothing.
FAST, TEXTBOOK = 0, 1
#: Why `run` came back.
DONE, POOL_FULL, PAUSED, IMPROVED = 0, 1, 2, 3
_PHASE, _CHANGED, _STEPS, _JOURNAL, _FORCED = 0, 1, 2, 3, 4
#: A restart is kept if it raises the score by more than this (XGES's rule).
_IMPROVEMENT = 1e-7


class State(NamedTuple):
    """A search under way; all arrays are changed in place.

    Attributes:
        graph, work: see `pdag.Graph` and `problem.Work`.
        insertions, turns: candidate moves of each target.
        deletion: float64 (p,), gain of the best deletion of each target, 0 if none gains.
        deletion_gain, deletion_clique: (p, p), [y, x] the best deletion of the edge x → y or x - y.
        deletion_stale: uint8 (p,).
        loss: float64 (p, p), [y, x] what y would lose with its parent x.
        closure: uint8 (p, p) scratch for checking restrictions.
        journal: int32 (pairs, 3), pairs changed since a restart began, and their old code;
            `journalled`, uint8 (p, p), marks them.
        progress: int64 (6,), phase, whether this round changed anything, steps made, length of the
            journal (-1 if no restart is under way), and the edge to be deleted next whatever it
            costs (-1 if none).
        total: float64 (1,), score gained since the start.
    """

    graph: Graph
    work: Work
    insertions: Pool
    turns: Pool
    deletion: NDArray[Any]
    deletion_gain: NDArray[Any]
    deletion_clique: NDArray[Any]
    deletion_stale: NDArray[Any]
    loss: NDArray[Any]
    closure: NDArray[Any]
    journal: NDArray[Any]
    journalled: NDArray[Any]
    progress: NDArray[Any]
    total: NDArray[Any]


class _StateType(Reference):
    pass


StateRef = reference(State, _StateType)


def make_state(graph: Graph) -> State:
    """The state of a search that begins at a graph."""
    p = len(graph.degree)
    return State(
        graph=graph,
        work=make_work(p),
        insertions=make_pool(p, 64 * p + 1024),
        turns=make_pool(p, 16 * p + 1024),
        deletion=np.zeros(p),
        deletion_gain=np.empty((p, p)),
        deletion_clique=np.empty((p, p), np.int32),
        deletion_stale=np.ones(p, np.uint8),
        loss=np.empty((p, p)),
        closure=np.empty((p, p), np.uint8),
        journal=np.empty((p * (p - 1) // 2 + 1, 3), np.int32),
        journalled=np.zeros((p, p), np.uint8),
        progress=np.array([0, 0, 0, -1, -1, -1]),
        total=np.zeros(1),
    )


@inlined
def _refresh(problem: Problem, s: State, move: int) -> bool:
    """Scores what is stale for one kind of move; False if a pool has no room."""
    g, w, p = s.graph, s.work, len(s.deletion)
    if move == INSERT:
        for y in range(p):
            if s.insertions.stale[y] and not score_insertions(g, problem, w, s.insertions, y):
                return False
        return True
    for y in range(p):
        if s.deletion_stale[y]:
            s.deletion[y] = score_deletions(
                g, problem, w, y, s.deletion_gain, s.deletion_clique, s.loss
            )
            s.deletion_stale[y] = 0
    if move == TURN:
        for y in range(p):
            if s.turns.stale[y] and not score_turns(g, problem, w, s.turns, y, s.loss):
                return False
    return True


@kernel
def _all_stale(s: State, y: int) -> None:
    s.insertions.stale[y] = 1
    s.deletion_stale[y] = 1
    s.turns.stale[y] = 1


@kernel
def _sources_changed(s: State, b: int) -> None:
    """b has other parents or neighbours: so its own moves, and turns of edges into it, changed."""
    g = s.graph
    _all_stale(s, b)
    for i in range(g.degree[b]):
        a = g.near[b, i]
        if g.edge[a, b]:
            s.turns.stale[a] = 1


@kernel
def _neighbours_stale(s: State, a: int, b: int) -> None:
    """Marks a's neighbours, if a = b; else the common neighbours of a and b."""
    g = s.graph
    for i in range(g.degree[a]):
        y = g.near[a, i]
        if is_line(g.edge, a, y) and (a == b or is_line(g.edge, b, y)):
            _all_stale(s, y)


@kernel
def _absorb(s: State) -> None:
    """Marks everything that the logged changes touch, and clears the log."""
    g, log = s.graph, s.graph.log
    for i in range(g.size[pdag.LOGGED]):
        a, b, old = log[i, 0], log[i, 1], log[i, 2]
        n = s.progress[_JOURNAL]
        if n >= 0 and s.journalled[a, b] == 0:
            s.journalled[a, b] = 1
            s.journal[n, 0], s.journal[n, 1], s.journal[n, 2] = a, b, old
            s.progress[_JOURNAL] = n + 1
        # Codes: bit 0 is a → b, bit 1 is b → a.
        new = g.edge[a, b] + 2 * g.edge[b, a]
        if old == new:
            continue
        s.turns.stale[a] = 1
        s.turns.stale[b] = 1
        if (old | new) & 1:
            _sources_changed(s, b)
        if (old | new) & 2:
            _sources_changed(s, a)
        if old == 0:
            _neighbours_stale(s, a, b)
        elif new == 0:
            _neighbours_stale(s, a, a)
            _neighbours_stale(s, b, b)
            _all_stale(s, a)
            _all_stale(s, b)
        for way in range(2):
            if (old >> way) & 1 and not (new >> way) & 1:
                start, end = (a, b) if way == 0 else (b, a)
                wake(s.insertions, start, end)
                wake(s.turns, start, end)
    pdag.clear_log(g)


@kernel
def _deletion_clique(s: State, u: int, v: int) -> int:
    """Writes the clique of the best deletion of u → v to `work.members`; returns its size."""
    members, count = s.work.members, 0
    for j in range(clique_at(s.graph, s.work, v, s.deletion_clique[v, u])):
        if members[j] != u:
            members[count] = members[j]
            count += 1
    return count


@kernel
def _pick(s: State, move: int) -> tuple[int, int, int, float]:
    """The best valid move of a kind: source, target (-1 if none, or NO_ROOM), clique size, gain.

    The clique is in `work.members`.
    """
    g, w = s.graph, s.work
    if s.progress[_FORCED] >= 0:
        u, v = s.progress[_FORCED], s.progress[_FORCED + 1]
        s.progress[_FORCED] = -1
        return u, v, _deletion_clique(s, u, v), s.deletion_gain[v, u]
    if move == DELETE:
        v = best_target(s.deletion)
        if v < 0:
            return -1, -1, 0, 0.0
        for i in range(g.degree[v]):
            u = g.near[v, i]
            if g.edge[u, v] and s.deletion_gain[v, u] == s.deletion[v]:
                return u, v, _deletion_clique(s, u, v), s.deletion[v]
    pool = s.insertions if move == INSERT else s.turns
    pool.size[SINCE] = pool.size[NUMBER]
    while True:
        v = best_target(pool.best)
        if v < 0:
            return -1, -1, 0, 0.0
        size = valid_clique(g, w, pool, move, v)
        if size == NO_ROOM:
            return -1, NO_ROOM, 0, 0.0
        if size >= 0:
            at = pool.best_at[v]
            return pool.source[at], v, size, pool.gain[at]


@inlined
def _attempt(problem: Problem, s: State, move: int) -> tuple[bool, bool]:
    """Makes the best move of a kind; returns (the pool had room, a move was made)."""
    if not _refresh(problem, s, move):
        return False, False
    g, free = s.graph, problem.restricted[0] == 0
    while True:
        u, v, size, gain = _pick(s, move)
        if v < 0:
            return v != NO_ROOM, False
        pdag.change(g, move, u, v, s.work.members, size)
        if free or close_orientations(g.edge, problem.allowed, problem.required, s.closure):
            s.total[0] += gain
            s.progress[_STEPS] += 1
            s.progress[_CHANGED] = 1
            return True, True
        # No member of the new class obeys the restrictions: take the move back.
        pdag.undo(g)
        if move == DELETE:
            s.deletion[v] = 0.0
        else:
            drop(s.insertions if move == INSERT else s.turns, v)


@kernel
def _next_phase(progress: NDArray[Any]) -> bool:
    """Moves to the next phase; False if a whole round changed nothing."""
    if progress[_PHASE] != TURN:
        progress[_PHASE] += 1
        return True
    again = progress[_CHANGED] == 1
    progress[_PHASE] = INSERT
    progress[_CHANGED] = 0
    return bool(again)


@inlined
def _end_restart(s: State, keep: bool) -> None:
    """Ends the journal; if the restart is not kept, every pair becomes what it was."""
    n = s.progress[_JOURNAL]
    s.progress[_JOURNAL] = -1
    for i in range(n):
        a, b, code = s.journal[i, 0], s.journal[i, 1], s.journal[i, 2]
        s.journalled[a, b] = 0
        if not keep:
            pdag.set_pair(s.graph, a, b, code & 1, code >> 1)


@inlined
def _next_move(progress: NDArray[Any], order: int, move: int, moved: bool) -> int:
    """The kind of move to try next, -1 if the search is done."""
    if order == TEXTBOOK:
        if moved or _next_phase(progress):
            return int(progress[_PHASE])
        return -1
    # Deletions first, then turns, then insertions; after any move, deletions again.
    if moved:
        return DELETE
    if move == INSERT:
        return -1
    return TURN if move == DELETE else INSERT


@inlined
def _referenced(state: State) -> State:
    return StateRef(
        pdag.GraphRef(*state.graph),
        WorkRef(*state.work),
        PoolRef(*state.insertions),
        PoolRef(*state.turns),
        state.deletion,
        state.deletion_gain,
        state.deletion_clique,
        state.deletion_stale,
        state.loss,
        state.closure,
        state.journal,
        state.journalled,
        state.progress,
        state.total,
    )


@inlined
def _problem(given: Problem) -> Problem:
    return ProblemRef(
        scoring.reference_to(given.local), given.allowed, given.required, given.restricted
    )


@cached_kernel
def run(given: Problem, state: State, order: int, max_steps: int, x: int, y: int) -> int:
    """Makes up to `max_steps` moves; returns DONE, POOL_FULL or PAUSED.

    With x >= 0 it is a restart: the edge between x and y is deleted and the insertion of x → y
    forbidden first, and in the end everything is taken back unless the score rose (then it returns
    IMPROVED).
    """
    problem = _problem(given)
    s = _referenced(state)
    allowed, before, was_allowed = problem.allowed, s.total[0], 0
    move = DELETE if order == FAST else s.progress[_PHASE]
    if x >= 0:
        was_allowed = allowed[x, y]
        allowed[x, y] = 0
        s.progress[_JOURNAL], s.progress[_FORCED], s.progress[_FORCED + 1] = 0, x, y
    status, steps = -1, 0
    while status < 0:
        room, moved = _attempt(problem, s, move)
        steps += moved
        move = _next_move(s.progress, order, move, moved) if room else move
        if not room:
            status = POOL_FULL
        elif move < 0:
            status = DONE
        elif steps >= max_steps:
            status = PAUSED
        if status >= 0 and x >= 0:
            improved = status == DONE and s.total[0] > before + _IMPROVEMENT
            allowed[x, y] = was_allowed
            _end_restart(s, improved)
            _all_stale(s, x)
            _all_stale(s, y)
            s.progress[_FORCED] = -1
            if improved:
                status = IMPROVED
            else:
                s.total[0] = before
        _absorb(s)
    return status


@cached_kernel
def gain_of_dag(given: Problem, scratch: Work, dag: Edges, gain: NDArray[np.float64]) -> None:
    """Fills gain, float64 (p,), with what each node's parents add to its local score."""
    problem, w = _problem(given), WorkRef(*scratch)
    most = scoring.most_parents(problem.local)
    for y in range(len(gain)):
        count = 0
        for x in range(len(gain)):
            if dag[x, y] and count < most:
                w.members[count] = x
                count += 1
        gain[y] = scoring.family_gain(problem.local, y, w.members, count)
