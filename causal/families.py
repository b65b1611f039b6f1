"""Kernels that score a family, a column with given parents, by its counted configurations.

Scores are remembered: the same families come up again and again while a graph grows.
`causal.scoring` says what each of the public functions is for.
"""

import numpy as np

from causal.compiled import kernel
from causal.pdag import Nodes
from causal.problem import Floats
from causal.scores import MAX_TABLE_PARENTS
from causal.tables import KNOWN, Tables, configure, mark_child, term, varies, varying


@kernel
def _count_family(t: Tables, y: int, nodes: Nodes, count: int, group: int) -> None:
    """Fills `family` and `family_ones` for configurations of the given nodes in a group."""
    child, group_of = mark_child(t, y), t.group_of[t.pattern[y]]
    family, ones = t.family, t.family_ones
    for c in range(1 << count):
        family[c], ones[c] = 0, 0
    family[0], ones[0] = t.size[group], t.joint[group, y, y]
    for q in range(count):
        s = nodes[q]
        for i in range(t.column_start[s], t.column_start[s + 1]):
            row = t.column_rows[i]
            code = t.code[row]
            if code & ((1 << q) - 1) or group_of[t.environment[row]] != group:
                continue
            family[code] += 1
            family[0] -= 1
            if t.child_stamp[row] == child:
                ones[code] += 1
                ones[0] -= 1


@kernel
def _family_score(t: Tables, k: int, count: int, left_out: int) -> float:
    """Score of the counted family without the parent of this bit (0: with all); k parents vary."""
    total = -t.cost[k]
    for c in range(1 << count):
        rows, ones = t.family[c], t.family_ones[c]
        if c & left_out:
            continue
        if left_out:
            rows += t.family[c | left_out]
            ones += t.family_ones[c | left_out]
        if rows:
            total += term(t, k, ones, rows)
    return float(total)


@kernel
def _place(t: Tables, key: int) -> int:
    """Where a family's score is remembered, or would be."""
    last = len(t.known) - 1
    i = key & last
    while t.known[i] != 0 and t.known[i] != key:
        i = (i + 1) & last
    return int(i)


@kernel
def _remember(t: Tables, key: int, value: float) -> None:
    i = _place(t, key)
    if t.known[i] == 0:
        t.known[i] = key
        t.state[KNOWN] += 1
    t.known_score[i] = value


@kernel
def _count_scores(t: Tables, y: int, nodes: Nodes, first: int, count: int, key: int) -> None:
    """Remembers the local score of y with these parents, and without each from `first` on.

    The scores leave out what each parent costs by itself.
    """
    if 2 * (t.state[KNOWN] + count + 1) > len(t.known):
        for i in range(len(t.known)):
            t.known[i] = 0
        t.state[KNOWN] = 0
    whole = 0.0
    for i in range(first, count):
        t.lost[i] = 0.0
    configure(t, nodes, count)
    for group in range(len(t.size)):
        if not t.uses[t.pattern[y], group] or not varies(t, group, y):
            continue
        k = varying(t, group, nodes, count)
        _count_family(t, y, nodes, count, group)
        score = _family_score(t, k, count, 0)
        whole += score
        for i in range(first, count):
            if varies(t, group, nodes[i]):
                t.lost[i] += _family_score(t, k - 1, count, 1 << i)
            else:
                t.lost[i] += score
    _remember(t, key, whole)
    for i in range(first, count):
        _remember(t, key - t.code_of[nodes[i]], t.lost[i])


@kernel
def _losses(t: Tables, y: int, nodes: Nodes, first: int, count: int, lost: Floats) -> None:
    """Fills lost[first:count]."""
    key = t.code_of_child[y]
    for i in range(count):
        key += t.code_of[nodes[i]]
    known = t.known[_place(t, key)] != 0
    for i in range(first, count):
        known = known and t.known[_place(t, key - t.code_of[nodes[i]])] != 0
    if not known:
        _count_scores(t, y, nodes, first, count, key)
    whole = t.known_score[_place(t, key)]
    for i in range(first, count):
        without = t.known_score[_place(t, key - t.code_of[nodes[i]])]
        lost[i] = whole - without - t.edge[0]


@kernel
def parent_losses(t: Tables, y: int, nodes: Nodes, count: int, lost: Floats) -> None:
    """See `causal.scoring`."""
    _losses(t, y, nodes, 0, count, lost)


@kernel
def open_near(t: Tables, v: int, near: Nodes, n: int) -> None:
    """See `causal.scoring`; nothing is kept between sets of parents."""


@kernel
def add_near(t: Tables, v: int, r: int, at: int, near: Nodes, n: int) -> None:  # noqa: ARG001
    """See `causal.scoring`."""
    t.parent[r] = near[at]


@kernel
def near_gain(t: Tables, v: int, r: int, at: int, near: Nodes, n: int) -> float:  # noqa: ARG001
    """See `causal.scoring`."""
    t.parent[r] = near[at]
    _losses(t, v, t.parent, r, r + 1, t.lost)
    return float(t.lost[r])


@kernel
def last_loss(t: Tables, y: int, nodes: Nodes, count: int) -> float:
    """See `causal.scoring`."""
    if count > MAX_TABLE_PARENTS:
        return np.inf
    _losses(t, y, nodes, count - 1, count, t.lost)
    return float(t.lost[count - 1])


@kernel
def family_gain(t: Tables, y: int, nodes: Nodes, count: int) -> float:
    """See `causal.scoring`."""
    total = 0.0
    for i in range(count):
        _losses(t, y, nodes, i, i + 1, t.lost)
        total += t.lost[i]
    return total
