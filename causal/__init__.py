"""Causal discovery and effects; importing it is cheap, the engines are loaded when called."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cafemed.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from causal.gies import GiesResult

__all__ = ["fit_gies"]


def fit_gies(
    data: Any,
    *,
    environments: "NDArray[np.integer[Any]] | None" = None,
    targets: Sequence[Sequence[int]] | None = None,
    score: str = "gaussian_bic",
    penalty: float = 1.0,
    intercept: str = "pooled",
    search: str = "best",
    **options: Any,
) -> "GiesResult":
    """Learns the (interventional) equivalence class of the graph behind the columns of `data`.

    Args:
        data: (n, p), an array of numbers or a scipy sparse matrix of 0 and 1.
        environments: (n,), environment index of each row; None if there is one.
        targets: one list of column indices per environment; `[[]]` or None is observational.
        score, penalty, intercept, search, options: see `causal.gies.fit_statistics`.

    Raises:
        DataError: if data is not a table of numbers.
        ConfigError: if an option is unknown or does not fit.
    """
    from causal import gies, statistics

    known = inspect.signature(gies.fit_statistics).parameters
    for name in options:
        if name not in known:
            expected = ", ".join(list(known)[1:])
            raise ConfigError(f"{name}: no such option; expected one of {expected}")
    sparse = hasattr(data, "tocsr")
    collect = statistics.from_sparse if sparse else statistics.from_dense
    return gies.fit_statistics(
        collect(data, environments, targets),
        score=score,
        penalty=penalty,
        intercept=intercept,
        search=search,
        **options,
    )
