"""The local scores as the search sees them: the same questions to either kind of score.

All gains and losses are of the whole local score: fit less what the parents cost. Of a set of
parents that is built up, number r replaces what was number r before, and drops those after it.
"""

from typing import Any

from numba import extending

from causal import families, gaussian, tables
from causal.compiled import Reference, one_of
from causal.pdag import Edges, Graph, Nodes
from causal.problem import Floats

Local = Any  # gaussian.Gaussian or tables.Tables


def reference_to(local: Local) -> Local:
    """A reference to the record that an entry kernel was given (`compiled.Reference`)."""
    raise NotImplementedError


def most_parents(local: Local) -> int:
    """How many parents a set may have."""
    raise NotImplementedError


def open_target(local: Local, y: int) -> None:
    """Begins a set of parents of y."""
    raise NotImplementedError


def add_parent(local: Local, y: int, r: int, x: int) -> None:
    """Makes x parent number r of y."""
    raise NotImplementedError


def source_gains(local: Local, g: Graph, allowed: Edges, y: int, r: int, gain: Floats) -> None:
    """Fills gain, float64 (p,), with what each source is worth as one more parent beside r.

    What gains nothing may be given any value that is not positive, and what is not allowed, or is
    adjacent to y already, any value.
    """
    raise NotImplementedError


def parent_losses(local: Local, y: int, nodes: Nodes, count: int, lost: Floats) -> None:
    """Fills lost[i] with what y loses when nodes[i] leaves the parents nodes[:count]."""
    raise NotImplementedError


def open_near(local: Local, v: int, near: Nodes, n: int) -> None:
    """Begins a set of parents of v, all among its n adjacent nodes."""
    raise NotImplementedError


def add_near(local: Local, v: int, r: int, at: int, near: Nodes, n: int) -> None:
    """Makes near[at] parent number r of v."""
    raise NotImplementedError


def near_gain(local: Local, v: int, r: int, at: int, near: Nodes, n: int) -> float:
    """What near[at] is worth as one more parent of v beside r; -inf if they determine it."""
    raise NotImplementedError


def last_loss(local: Local, y: int, nodes: Nodes, count: int) -> float:
    """What y loses when the last of the parents nodes[:count] leaves."""
    raise NotImplementedError


def family_gain(local: Local, y: int, nodes: Nodes, count: int) -> float:
    """What the parents nodes[:count] add to y's score without parents."""
    raise NotImplementedError


@extending.overload(reference_to, strict=False)
def _reference_to(local: Any) -> Any:
    if local.instance_class is gaussian.Gaussian:
        return lambda local: gaussian.GaussianRef(*local)
    return lambda local: tables.TablesRef(*local)


for _stub, _of_counts in (
    (most_parents, tables),
    (open_target, tables),
    (add_parent, tables),
    (source_gains, tables),
    (parent_losses, families),
    (open_near, families),
    (add_near, families),
    (near_gain, families),
    (last_loss, families),
    (family_gain, families),
):
    _choices: dict[type[Reference], Any] = {
        gaussian.GaussianType: getattr(gaussian, _stub.__name__),
        tables.TablesType: getattr(_of_counts, _stub.__name__),
    }
    one_of(_stub, _choices)
