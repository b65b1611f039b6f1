"""Codes of records: their kinds, how they are written, and ragged lists of them.

A code is written `system:CODE`, the system in lower case and the code in upper case without dots:
`icd9:4019`, `icd10:I10`, `atc:A02B`. ICD-9 and ICD-10 codes are thereby distinct. A node of a
causal graph is `kind/system:CODE`: `diagnosis/icd9:4019`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: The modalities in the order of the papers: k = 0, 1, 2.
KINDS = ("diagnosis", "procedure", "medication")

#: The vocabulary of laboratory items ("lab:50912"); they are measured, not coded, and no modality.
LABORATORY = "laboratory"
LABORATORY_SYSTEM = "lab"

#: Kinds of graph nodes: the codes of visit t, and the medications of visit t - 1.
NODE_KINDS = ("diagnosis", "procedure", "previous_medication", "medication")


def normalise(system: str, code: str) -> str:
    """Writes a code the one way it is compared: dots, blanks and case do not matter."""
    return f"{system.strip().lower()}:{code.strip().replace('.', '').upper()}"


def node_name(kind: str, code: str) -> str:
    """The graph node of a code (see NODE_KINDS)."""
    return f"{kind}/{code}"


@dataclasses.dataclass(frozen=True)
class CodeLists:
    """One list of code indices per visit, in one array (CSR).

    Attributes:
        ids: int32, (codes of all visits,); indices into a vocabulary, in the visit's own order.
        offsets: int64, (visits + 1,); visit v has `ids[offsets[v]:offsets[v + 1]]`.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "CodeLists":
        """Builds from plain lists."""
        sizes = np.fromiter((len(codes) for codes in lists), np.int64, len(lists))
        flat = [code for codes in lists for code in codes]
        return cls(np.asarray(flat, np.int32), np.concatenate([[0], np.cumsum(sizes)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, visit: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[visit] : self.offsets[visit + 1]]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Codes per visit, int64 (visits,)."""
        return np.diff(self.offsets)

    def take(self, visits: NDArray[np.integer]) -> "CodeLists":
        """The lists of the given visits, in that order."""
        sizes = self.counts[visits]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        return CodeLists(self.ids[np.repeat(self.offsets[visits], sizes) + within], offsets)

    def multi_hot(self, size: int) -> NDArray[np.bool_]:
        """Presence of each code, bool (visits, size)."""
        dense = np.zeros((len(self), size), dtype=np.bool_)
        dense[np.repeat(np.arange(len(self)), self.counts), self.ids] = True
        return dense
