"""The search: which move is made next, and what has to be scored again after it.

Hauser and Bühlmann, JMLR 13 (2012), for the moves and the order of "textbook"; Nazaret and Blei,
UAI 2024 (XGES), for the order of "fast".
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal import pdag
from causal.candidates import (
    Pool,
    best_target,
    drop,
    insertion_valid,
    make_pool,
    score_insertions,
    score_turns,
    turn_valid,
    wake,
)
from causal.compiled import cached_kernel, kernel
from causal.gains import (
    Work,
    best_deletion,
    clique_at,
    make_work,
    relative_variance,
)
from causal.pdag import Graph, is_line

#: Orders of moves: the best deletion, else the best turn, else the best insertion; or all
#: insertions, then all deletions, then all turns, until a round changes nothing.
FAST, TEXTBOOK = 0, 1
#: Why `run` came back.
DONE, POOL_FULL, PAUSED = 0, 1, 2
_INSERT, _DELETE, _TURN = 0, 1, 2
_PHASE, _CHANGED, _STEPS = 0, 1, 2


class State(NamedTuple):
    """A search under way; all arrays are changed in place.

    Attributes:
        graph, work: see `pdag.Graph` and `gains.Work`.
        insertions, turns: candidate moves of each target.
        deletion: float64 (p,), gain of the best deletion of each target.
        deletion_source, deletion_clique: int32 (p,).
        deletion_stale: uint8 (p,).
        loss: float64 (p, p), [y, x] what y would lose with its parent x.
        closure: uint8 (p, p) scratch for checking restrictions.
        progress: int64 (3,), phase, whether this round changed anything, steps made.
        total: float64 (1,), score gained since the start.
    """

    graph: Graph
    work: Work
    insertions: Pool
    turns: Pool
    deletion: NDArray[np.float64]
    deletion_source: NDArray[np.int32]
    deletion_clique: NDArray[np.int32]
    deletion_stale: NDArray[np.uint8]
    loss: NDArray[np.float64]
    closure: NDArray[np.uint8]
    progress: NDArray[np.int64]
    total: NDArray[np.float64]


def make_state(graph: Graph) -> State:
    """The state of a search that begins at a graph."""
    p = len(graph.degree)
    return State(
        graph=graph,
        work=make_work(p),
        insertions=make_pool(p, 64 * p + 1024),
        turns=make_pool(p, 16 * p + 1024),
        deletion=np.zeros(p),
        deletion_source=np.zeros(p, np.int32),
        deletion_clique=np.zeros(p, np.int32),
        deletion_stale=np.ones(p, np.uint8),
        loss=np.empty((p, p)),
        closure=np.empty((p, p), np.uint8),
        progress=np.zeros(3, np.int64),
        total=np.zeros(1),
    )


@kernel
def _refresh_deletions(problem, s):  # type: ignore[no-untyped-def]
    for y in range(len(s.deletion)):
        if s.deletion_stale[y]:
            gain, source, clique = best_deletion(s.graph, problem, s.work, y, s.loss)
            s.deletion[y] = gain
            s.deletion_source[y] = source
            s.deletion_clique[y] = clique
            s.deletion_stale[y] = 0


@kernel
def _refresh_insertions(problem, s):  # type: ignore[no-untyped-def]
    for y in range(len(s.deletion)):
        if s.insertions.stale[y] and not score_insertions(
            s.graph, problem, s.work, s.insertions, y
        ):
            return False
    return True


@kernel
def _refresh_turns(problem, s):  # type: ignore[no-untyped-def]
    _refresh_deletions(problem, s)
    for v in range(len(s.deletion)):
        if s.turns.stale[v] and not score_turns(s.graph, problem, s.work, s.turns, v, s.loss):
            return False
    return True


@kernel
def _all_stale(s, y):  # type: ignore[no-untyped-def]
    s.insertions.stale[y] = 1
    s.deletion_stale[y] = 1
    s.turns.stale[y] = 1


@kernel
def _parents_changed(s, b):  # type: ignore[no-untyped-def]
    """b has other parents or neighbours: so its own moves, and turns of edges into it, changed."""
    g = s.graph
    _all_stale(s, b)
    for i in range(g.degree[b]):
        a = g.near[b, i]
        if g.edge[a, b]:
            s.turns.stale[a] = 1


@kernel
def _mark_pair(s, a, b, old, new):  # type: ignore[no-untyped-def]
    """Marks what depends on the pair a, b, whose code changed."""
    g = s.graph
    s.turns.stale[a] = 1
    s.turns.stale[b] = 1
    # Codes: bit 0 is a → b, bit 1 is b → a. A node's sources are its parents and neighbours.
    if old & 1 != new & 1 or (new & 1 and old != new):
        _parents_changed(s, b)
    if old & 2 != new & 2 or (new & 2 and old != new):
        _parents_changed(s, a)
    if old == 0:
        for i in range(g.degree[a]):
            y = g.near[a, i]
            if is_line(g, a, y) and is_line(g, b, y):
                _all_stale(s, y)
    elif new == 0:
        for end in (a, b):
            _all_stale(s, end)
            for i in range(g.degree[end]):
                y = g.near[end, i]
                if is_line(g, end, y):
                    _all_stale(s, y)
    if old & 1 and not new & 1:
        wake(s.insertions, a, b)
        wake(s.turns, a, b)
    if old & 2 and not new & 2:
        wake(s.insertions, b, a)
        wake(s.turns, b, a)


@kernel
def _absorb(s):  # type: ignore[no-untyped-def]
    """Marks everything that the logged changes touch, and clears the log."""
    g = s.graph
    for i in range(g.size[pdag.LOGGED]):
        a, b, old = g.log[i, 0], g.log[i, 1], g.log[i, 2]
        new = g.edge[a, b] + 2 * g.edge[b, a]
        if old != new:
            _mark_pair(s, a, b, old, new)
    pdag.clear_log(g)


@kernel
def close_orientations(edge, allowed, required, closed):  # type: ignore[no-untyped-def]
    """Orients lines as `allowed` and `required` ask, with Meek's rules, in a copy `closed`.

    Returns False if no member of the class obeys: an arrow that is not allowed is forced, a
    required edge points the other way, or two rules contradict each other.
    """
    p = edge.shape[0]
    closed[:] = edge
    changed = True
    while changed:
        changed = False
        for a in range(p):
            for b in range(p):
                if closed[a, b] == 0:
                    continue
                if closed[b, a] == 0:
                    if allowed[a, b] == 0 or required[b, a]:
                        return False
                    continue
                if required[a, b] or allowed[b, a] == 0 or _meek(closed, a, b):
                    closed[b, a] = 0
                    changed = True
    return True


@kernel
def _meek(e, a, b):  # type: ignore[no-untyped-def]
    """Do Meek's rules 1 to 4 orient the line a - b as a → b?"""
    p = e.shape[0]
    for c in range(p):
        if c == a or c == b:
            continue
        into_a = e[c, a] == 1 and e[a, c] == 0
        near_b = e[c, b] == 1 or e[b, c] == 1
        if into_a and not near_b:
            return True
        into_b = e[c, b] == 1 and e[b, c] == 0
        if not into_b:
            continue
        if e[a, c] == 1 and e[c, a] == 0:
            return True
        line = e[a, c] == 1 and e[c, a] == 1
        for d in range(p):
            if d in (a, b, c) or not (e[a, d] == 1 and e[d, a] == 1):
                continue
            apart = e[c, d] == 0 and e[d, c] == 0
            if line and apart and e[d, b] == 1 and e[b, d] == 0:
                return True
            # Rule 4: a - d, d → c, c → b, with b and d not connected.
            if e[d, c] == 1 and e[c, d] == 0 and e[d, b] == 0 and e[b, d] == 0 and line:
                return True
    return False


@kernel
def _obeys(problem, s):  # type: ignore[no-untyped-def]
    if problem.restricted[0] == 0:
        return True
    return close_orientations(s.graph.edge, problem.allowed, problem.required, s.closure)


@kernel
def _record(s, gain):  # type: ignore[no-untyped-def]
    s.total[0] += gain
    s.progress[_STEPS] += 1
    s.progress[_CHANGED] = 1
    _absorb(s)


@kernel
def _delete_step(problem, s):  # type: ignore[no-untyped-def]
    """Makes the best deletion; False if none gains."""
    g, w = s.graph, s.work
    _refresh_deletions(problem, s)
    while True:
        best, v = 0.0, -1
        for y in range(len(s.deletion)):
            if s.deletion[y] > best:
                best, v = s.deletion[y], y
        if v < 0:
            return False
        u = s.deletion_source[v]
        size = clique_at(g, w, v, s.deletion_clique[v])
        count = 0
        for j in range(size):
            if w.members[j] != u:
                w.members[count] = w.members[j]
                count += 1
        pdag.delete(g, u, v, w.members, count)
        if _obeys(problem, s):
            _record(s, best)
            return True
        pdag.undo(g)
        s.deletion[v] = 0.0


@kernel
def _insert_step(problem, s):  # type: ignore[no-untyped-def]
    """Makes the best valid insertion; False if none gains."""
    g, w, pool = s.graph, s.work, s.insertions
    while True:
        v = best_target(pool)
        if v < 0:
            return False
        valid, size = insertion_valid(g, w, pool, v)
        if not valid:
            continue
        at = pool.best_at[v]
        gain = pool.gain[at]
        pdag.insert(g, pool.source[at], v, w.members, size)
        if _obeys(problem, s):
            _record(s, gain)
            return True
        pdag.undo(g)
        drop(pool, v, at)


@kernel
def _turn_step(problem, s):  # type: ignore[no-untyped-def]
    """Makes the best valid turn; False if none gains."""
    g, w, pool = s.graph, s.work, s.turns
    while True:
        v = best_target(pool)
        if v < 0:
            return False
        valid, size = turn_valid(g, w, pool, v)
        if not valid:
            continue
        at = pool.best_at[v]
        gain = pool.gain[at]
        pdag.turn(g, pool.source[at], v, w.members, size)
        if _obeys(problem, s):
            _record(s, gain)
            return True
        pdag.undo(g)
        drop(pool, v, at)


@kernel
def _fast_step(problem, s):  # type: ignore[no-untyped-def]
    if _delete_step(problem, s):
        return True, True
    if not _refresh_turns(problem, s):
        return False, False
    if _turn_step(problem, s):
        return True, True
    if not _refresh_insertions(problem, s):
        return False, False
    return True, _insert_step(problem, s)


@kernel
def _phase_step(problem, s):  # type: ignore[no-untyped-def]
    """One step of the current phase: (the pool had room, a step was made)."""
    phase = s.progress[_PHASE]
    if phase == _INSERT:
        if not _refresh_insertions(problem, s):
            return False, False
        return True, _insert_step(problem, s)
    if phase == _DELETE:
        return True, _delete_step(problem, s)
    if not _refresh_turns(problem, s):
        return False, False
    return True, _turn_step(problem, s)


@kernel
def _next_phase(s):  # type: ignore[no-untyped-def]
    """Moves to the next phase; False if a whole round changed nothing."""
    if s.progress[_PHASE] != _TURN:
        s.progress[_PHASE] += 1
        return True
    again = s.progress[_CHANGED] == 1
    s.progress[_PHASE] = _INSERT
    s.progress[_CHANGED] = 0
    return again


@cached_kernel
def run(problem, s, order, max_steps):  # type: ignore[no-untyped-def]
    """Makes up to `max_steps` steps; returns DONE, POOL_FULL or PAUSED."""
    for _ in range(max_steps):
        if order == FAST:
            room, moved = _fast_step(problem, s)
            if room and not moved:
                return DONE
        else:
            room, moved = _phase_step(problem, s)
            if room and not moved and not _next_phase(s):
                return DONE
        if not room:
            return POOL_FULL
    return PAUSED


@cached_kernel
def fit_of_dag(problem, work, dag, fit):  # type: ignore[no-untyped-def]
    """Fills fit, float64 (p,), with the log-likelihood that each node's parents gain it."""
    p = dag.shape[0]
    for y in range(p):
        count = 0
        for x in range(p):
            if dag[x, y]:
                work.members[count] = x
                count += 1
        fit[y] = 0.0
        if count:
            rest = relative_variance(problem, work, y, work.members, count)
            if rest > 0.0:
                fit[y] = -0.5 * problem.rows[y] * np.log(rest)


@cached_kernel
def representative(g):  # type: ignore[no-untyped-def]
    """Orients every line of an essential graph, so that it becomes a DAG of its class."""
    first = np.empty(2, np.int32)
    for v in range(len(g.degree)):
        for i in range(g.degree[v]):
            if is_line(g, v, g.near[v, i]):
                first[0] = v
                pdag.orient_component(g, first, 1)
                break
    for i in range(g.size[pdag.QUEUED]):
        g.queued[g.queue[i, 0], g.queue[i, 1]] = 0
    g.size[pdag.QUEUED] = 0
    pdag.clear_log(g)


@cached_kernel
def restricted_class(edge, allowed, required, closed):  # type: ignore[no-untyped-def]
    """`close_orientations` for Python."""
    return close_orientations(edge, allowed, required, closed)
