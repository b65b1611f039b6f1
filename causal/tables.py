"""Kernels of the scores on counts of 0/1 rows: what every new parent is worth.

The local score of a column y with parents S is a sum over tables, one for each group of rows
(`scores.TablesScore`), and there over the configurations c of S:

    sum over c of ones[k, n_c1] + ones[k, n_c0] - both[k, n_c],  less cost[k], less edge * |S|

with n_c the rows of configuration c, n_c1 and n_c0 those with y = 1 and 0, and k the parents that
vary in the group. Codes are rare: only rows in which some parent is 1 are looked at, and of them
only the codes that they have; the configuration "no parent" is what is left of the totals. So one
pass over those rows gives the gain of every source at once. `causal.scoring` says what each of the
functions is for.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from causal.compiled import Reference, inlined, kernel, reference
from causal.pdag import Edges, Graph, Nodes, adjacent
from causal.problem import Floats
from causal.scores import MAX_TABLE_PARENTS as MAX_PARENTS

#: Positions in `Tables.state`.
_STAMP, _CHILD, _CHILD_STAMP, _WANT, KNOWN = 0, 1, 2, 3, 4


class Tables(NamedTuple):
    """The score of p columns over n rows, and scratch.

    Attributes:
        row_start, row_columns: int64 (n + 1,), int32; the columns that are 1 in each row.
        column_start, column_rows: int64 (p + 1,), int32; the rows in which each column is 1.
        environment: int32 (n,), of each row.
        group_of: int32 (patterns, environments), the group of an environment's rows for targets of
            a pattern; -1 if they take no part.
        uses: uint8 (patterns, groups), whether a pattern's score has a table for a group.
        pattern: int64 (p,), of each target.
        source_start, sources: int64 (p + 1,), int32; the sources that each target may have.
        joint: int32 (groups, p, p), rows in which two columns are both 1.
        size: int64 (groups,), rows.
        ones, both: float64 (K, n + 1), see above; the last row holds for all larger k.
        cost: float64 (MAX_PARENTS + 2,).
        edge: float64 (1,).
        code, code_stamp: int64 (n,), configuration of a row; valid where the stamp is current.
        child_stamp: int64 (n,), marks the rows in which the current target is 1.
        parent: int64 (MAX_PARENTS + 1,), the parents added.
        head: int32 (2^MAX_PARENTS,), first row of a configuration, -1 if none; `following`, int32
            (n,), the next one; `found`, int64, the configurations that occur.
        with_source, with_both: int32 (p,), rows of a configuration in which a column, and the
            target too, is 1; `touched`, int64 (p,), the columns for which they are not 0.
        wanted: int64 (p,), the sources to be scored; `is_wanted`, int64 (p,), marks them.
        sum_source, sum_both: int64 (p,), the same over all configurations.
        delta: float64 (p,), what the tables gain by each source.
        family, family_ones: int64 (2^MAX_PARENTS,), rows of each configuration, and with y = 1.
        lost: float64 (MAX_PARENTS + 1,).
        code_of, code_of_child: int64 (p,), random; a family's key is the sum of those of its
            parents and of its child.
        known, known_score: int64, float64 (a power of two,), keys of families (0: none) and their
            local scores.
        state: int64 (5,), last stamp, current target and its stamp, last mark of wanted sources,
            families known.
    """

    row_start: NDArray[Any]
    row_columns: NDArray[Any]
    column_start: NDArray[Any]
    column_rows: NDArray[Any]
    environment: NDArray[Any]
    group_of: NDArray[Any]
    uses: NDArray[Any]
    pattern: NDArray[Any]
    source_start: NDArray[Any]
    sources: NDArray[Any]
    joint: NDArray[Any]
    size: NDArray[Any]
    ones: NDArray[Any]
    both: NDArray[Any]
    cost: NDArray[Any]
    edge: NDArray[Any]
    code: NDArray[Any]
    code_stamp: NDArray[Any]
    child_stamp: NDArray[Any]
    parent: NDArray[Any]
    head: NDArray[Any]
    following: NDArray[Any]
    found: NDArray[Any]
    with_source: NDArray[Any]
    with_both: NDArray[Any]
    touched: NDArray[Any]
    wanted: NDArray[Any]
    is_wanted: NDArray[Any]
    sum_source: NDArray[Any]
    sum_both: NDArray[Any]
    delta: NDArray[Any]
    family: NDArray[Any]
    family_ones: NDArray[Any]
    lost: NDArray[Any]
    code_of: NDArray[Any]
    code_of_child: NDArray[Any]
    known: NDArray[Any]
    known_score: NDArray[Any]
    state: NDArray[Any]


class TablesType(Reference):
    """Numba's type of `TablesRef`."""


TablesRef = reference(Tables, TablesType)


def make_tables(**given: NDArray[Any]) -> Tables:
    """The score, given all of `Tables` up to `edge`, with its scratch."""
    n, p, most = len(given["environment"]), len(given["pattern"]), 1 << MAX_PARENTS
    families = 1 << min(20, 6 + p.bit_length())
    # Always the same draw: that two families share a key is as good as impossible.
    codes = np.random.default_rng(0).integers(1, 2**62, (2, p))
    return Tables(
        **given,
        code=np.zeros(n, np.int64),
        code_stamp=np.zeros(n, np.int64),
        child_stamp=np.zeros(n, np.int64),
        parent=np.zeros(MAX_PARENTS + 1, np.int64),
        head=np.full(most, -1, np.int32),
        following=np.zeros(n, np.int32),
        found=np.zeros(most, np.int64),
        with_source=np.zeros(p, np.int32),
        with_both=np.zeros(p, np.int32),
        touched=np.zeros(p, np.int64),
        wanted=np.zeros(p, np.int64),
        is_wanted=np.zeros(p, np.int64),
        sum_source=np.zeros(p, np.int64),
        sum_both=np.zeros(p, np.int64),
        delta=np.zeros(p),
        family=np.zeros(most, np.int64),
        family_ones=np.zeros(most, np.int64),
        lost=np.zeros(MAX_PARENTS + 1),
        code_of=codes[0],
        code_of_child=codes[1],
        known=np.zeros(families, np.int64),
        known_score=np.zeros(families),
        state=np.array([0, -1, 0, 0, 0]),
    )


@kernel
def varies(t: Tables, group: int, x: int) -> bool:
    """Says whether a column is not the same in all rows of a group."""
    return bool(0 < t.joint[group, x, x] < t.size[group])


@kernel
def varying(t: Tables, group: int, nodes: Nodes, count: int) -> int:
    """How many of the nodes are not the same in all rows of a group."""
    number = 0
    for i in range(count):
        if varies(t, group, nodes[i]):
            number += 1
    return number


@kernel
def term(t: Tables, k: int, ones: int, rows: int) -> float:
    """What one configuration adds."""
    last = len(t.ones) - 1
    i = min(k, last)
    return float(t.ones[i, ones] + t.ones[i, rows - ones] - t.both[i, rows])


@kernel
def mark_child(t: Tables, y: int) -> int:
    """Marks the rows in which y is 1; returns the mark."""
    if t.state[_CHILD] != y:
        t.state[_STAMP] += 1
        t.state[_CHILD], t.state[_CHILD_STAMP] = y, t.state[_STAMP]
        for i in range(t.column_start[y], t.column_start[y + 1]):
            t.child_stamp[t.column_rows[i]] = t.state[_STAMP]
    return int(t.state[_CHILD_STAMP])


@kernel
def configure(t: Tables, nodes: Nodes, count: int) -> None:
    """Sets the configuration of every row in which a node is 1."""
    t.state[_STAMP] += 1
    stamp = t.state[_STAMP]
    code, code_stamp, rows = t.code, t.code_stamp, t.column_rows
    for q in range(count):
        s = nodes[q]
        for i in range(t.column_start[s], t.column_start[s + 1]):
            row = rows[i]
            if code_stamp[row] != stamp:
                code_stamp[row] = stamp
                code[row] = 0
            code[row] |= 1 << q


@inlined
def _collect(t: Tables, y: int, group: int, count: int) -> int:
    """Lists the configured rows of a group by configuration; returns how many occur."""
    group_of, number = t.group_of[t.pattern[y]], 0
    for q in range(count):
        s = t.parent[q]
        for i in range(t.column_start[s], t.column_start[s + 1]):
            row = t.column_rows[i]
            code = t.code[row]
            # A row is listed once, at the first of its parents.
            if code & ((1 << q) - 1) or group_of[t.environment[row]] != group:
                continue
            if t.head[code] < 0:
                t.found[number] = code
                number += 1
            t.following[row] = t.head[code]
            t.head[code] = row
    return number


@inlined
def _count_configuration(t: Tables, code: int, child: int, want: int) -> tuple[int, int, int]:
    """Counts sources over a configuration's rows; returns rows, those with the child, touched."""
    rows, ones, touched = 0, 0, 0
    row = t.head[code]
    while row >= 0:
        rows += 1
        has_child = t.child_stamp[row] == child
        if has_child:
            ones += 1
        for i in range(t.row_start[row], t.row_start[row + 1]):
            x = t.row_columns[i]
            if t.is_wanted[x] != want:
                continue
            if t.with_source[x] == 0:
                t.touched[touched] = x
                touched += 1
            t.with_source[x] += 1
            if has_child:
                t.with_both[x] += 1
        row = t.following[row]
    t.head[code] = -1
    return rows, ones, touched


@inlined
def _add_group(t: Tables, y: int, group: int, count: int, number: int, gain: Floats) -> None:
    """Adds to `gain` what one group's table gains by each wanted source."""
    k, child, want = varying(t, group, t.parent, count), mark_child(t, y), t.state[_WANT]
    rows_left, ones_left = int(t.size[group]), int(t.joint[group, y, y])
    # What a source that is 0 in all rows of a configuration gains there: the prior of k + 1.
    flat = 0.0
    for c in range(_collect(t, y, group, count)):
        rows, ones, touched = _count_configuration(t, t.found[c], child, want)
        rows_left -= rows
        ones_left -= ones
        flat += term(t, k + 1, ones, rows) - term(t, k, ones, rows)
        for i in range(touched):
            x = t.touched[i]
            n, n1 = t.with_source[x], t.with_both[x]
            t.with_source[x], t.with_both[x] = 0, 0
            t.sum_source[x] += n
            t.sum_both[x] += n1
            split = term(t, k + 1, n1, n) + term(t, k + 1, ones - n1, rows - n)
            t.delta[x] += split - term(t, k + 1, ones, rows)
    flat -= t.cost[k + 1] - t.cost[k]
    whole = term(t, k, ones_left, rows_left)
    for i in range(number):
        x = t.wanted[i]
        if varies(t, group, x):
            n = t.joint[group, x, x] - t.sum_source[x]
            n1 = t.joint[group, x, y] - t.sum_both[x]
            split = term(t, k + 1, n1, n) + term(t, k + 1, ones_left - n1, rows_left - n)
            gain[x] += flat + t.delta[x] + split - whole
        t.sum_source[x], t.sum_both[x], t.delta[x] = 0, 0, 0.0


@kernel
def most_parents(t: Tables) -> int:  # noqa: ARG001
    """See `causal.scoring`."""
    return MAX_PARENTS


@kernel
def open_target(t: Tables, y: int) -> None:
    """See `causal.scoring`; nothing is kept between sets of parents."""


@kernel
def add_parent(t: Tables, y: int, r: int, x: int) -> None:  # noqa: ARG001
    """See `causal.scoring`."""
    t.parent[r] = x


@kernel
def source_gains(t: Tables, g: Graph, allowed: Edges, y: int, r: int, gain: Floats) -> None:
    """See `causal.scoring`."""
    number = 0
    t.state[_WANT] += 1
    for x in range(len(t.pattern)):
        gain[x] = 0.0
    for i in range(t.source_start[y], t.source_start[y + 1]):
        x = t.sources[i]
        if allowed[x, y] and not adjacent(g.edge, x, y):
            t.wanted[number] = x
            t.is_wanted[x] = t.state[_WANT]
            gain[x] = -t.edge[0]
            number += 1
    if number == 0:
        return
    configure(t, t.parent, r)
    for group in range(len(t.size)):
        if t.uses[t.pattern[y], group] and varies(t, group, y):
            _add_group(t, y, group, r, number, gain)
