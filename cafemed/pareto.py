"""Which trials are not beaten by another in both Jaccard and DDI rate."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(jaccard: ArrayLike, ddi_rate: ArrayLike) -> NDArray[np.bool_]:
    """Says which points are on the Pareto front: no other is as good in both and better in one.

    Args:
        jaccard: (n,), more is better.
        ddi_rate: (n,), less is better.

    Returns:
        bool (n,). Equal points are on it together; a point with NaN never is.
    """
    high, low = np.asarray(jaccard, np.float64), np.asarray(ddi_rate, np.float64)
    known = np.flatnonzero(np.isfinite(high) & np.isfinite(low))
    on_front = np.zeros(len(high), np.bool_)
    best: tuple[float, float] | None = None
    # From the highest Jaccard down, the lowest DDI rate first among equal ones.
    for i in known[np.lexsort((low[known], -high[known]))]:
        if best is None or low[i] < best[1] or (high[i], low[i]) == best:
            on_front[i] = True
            best = (high[i], low[i])
    return on_front
