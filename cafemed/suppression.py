"""Which cells of a published table are kept back, so that no few patients are told of.

A cell of under ten patients is kept back. If that is not enough, because what is kept back follows
from the total by subtraction, further cells are too, the smallest first.
"""

import numpy as np
from numpy.typing import NDArray

#: Fewest patients that a published number may be of.
FEWEST = 10


def hidden(
    members: NDArray[np.bool_], fewest: int = FEWEST, *, counted: bool = True
) -> NDArray[np.bool_]:
    """Says which cells of one table are kept back, bool (G,).

    The total over all patients counts as known. Kept back are

    1. cells of 1 to `fewest - 1` patients;
    2. where patients are counted, cells that all patients but 1 to `fewest - 1` are in, for these
       are the total less the cell;
    3. while a single cell is kept back, or all that are hold under `fewest` patients together: the
       smallest cell left, the first of equal ones. The total less what is shown is then of several
       cells and of enough patients.

    A cell without patients is neither published nor kept back.

    Args:
        members: bool (P, G), patient p has something in cell g; a patient may be in several, as
            with cells that hold visits.
        fewest: patients.
        counted: whether the table tells numbers of patients.
    """
    sizes = members.sum(axis=0)
    kept_back: NDArray[np.bool_] = (sizes > 0) & (sizes < fewest)
    if counted:
        outside = members.any(axis=1).sum() - sizes
        kept_back |= (sizes > 0) & (outside > 0) & (outside < fewest)
    while kept_back.any() and not _enough(members, kept_back, fewest):
        left = np.flatnonzero(~kept_back & (sizes > 0))
        if len(left) == 0:
            break  # nothing is shown at all
        kept_back[left[np.argmin(sizes[left])]] = True
    return kept_back


def _enough(members: NDArray[np.bool_], kept_back: NDArray[np.bool_], fewest: int) -> bool:
    """Says whether the cells kept back cover for one another."""
    return bool(kept_back.sum() > 1 and members[:, kept_back].any(axis=1).sum() >= fewest)
