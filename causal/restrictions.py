"""Kernels that tell whether a class has a member that obeys the restrictions on edges."""

from causal.compiled import cached_kernel, kernel
from causal.pdag import Edges, adjacent, is_arrow, is_line


@cached_kernel
def close_orientations(edge: Edges, allowed: Edges, required: Edges, closed: Edges) -> bool:
    """Orients lines as `allowed` and `required` ask, with Meek's rules, in a copy `closed`.

    Returns False if no member of the class obeys: an arrow that is not allowed is forced, a
    required edge points the other way, or two rules contradict each other.
    """
    p = edge.shape[0]
    for a in range(p):
        for b in range(p):
            closed[a, b] = edge[a, b]
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
                elif required[a, b] or allowed[b, a] == 0 or _forced(closed, a, b):
                    closed[b, a] = 0
                    changed = True
    return True


@kernel
def _forced(edge: Edges, a: int, b: int) -> bool:
    """Do Meek's rules 1 to 4 orient the line a - b as a → b?"""
    for c in range(edge.shape[0]):
        if c == b:
            continue
        if is_arrow(edge, c, a) and not adjacent(edge, c, b):
            return True
        if c == a or not is_arrow(edge, c, b):
            continue
        if is_arrow(edge, a, c):
            return True
        if is_line(edge, a, c) and _forced_by_two(edge, a, b, c):
            return True
    return False


@kernel
def _forced_by_two(edge: Edges, a: int, b: int, c: int) -> bool:
    """Rules 3 and 4, for a - c → b: does a d with a - d, and d → b or d → c, force a → b?"""
    for d in range(edge.shape[0]):
        if d in (b, c) or not is_line(edge, a, d):
            continue
        if is_arrow(edge, d, b) and not adjacent(edge, c, d):
            return True
        if is_arrow(edge, d, c) and not adjacent(edge, d, b):
            return True
    return False
