"""Laboratory values of visits: which items were measured, and what came first."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from cafemed.codes import CodeLists


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """One value an item and visit, the first that was measured. V visits, n values in all.

    Attributes:
        items: which items each of the V visits has, at most once each; indices into
            vocabularies["laboratory"].
        values: float32 (n,), aligned with `items.ids`, finite, in the source's own unit.
    """

    items: CodeLists
    values: NDArray[np.float32]

    @classmethod
    def none(cls, num_visits: int) -> "Laboratory":
        """No value at any of so many visits."""
        offsets = np.zeros(num_visits + 1, np.int64)
        return cls(CodeLists(np.zeros(0, np.int32), offsets), np.zeros(0, np.float32))

    def __len__(self) -> int:
        """V."""
        return len(self.items)
