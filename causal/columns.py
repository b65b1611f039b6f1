"""The columns of a causal graph: a cohort's codes as one sparse 0/1 table, and its statistics.

Only training patients' visits are read. The columns of visit t are its diagnoses and procedures and
the medications of visit t - 1; this visit's medications are none of them, since a model that has to
predict them must not see a graph that was found with their help (models.md 1.9 tells how the
published graphs leak them). They are columns of their own, `sinks_of`.
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.codes import KINDS, CodeLists, node_name
from cafemed.cohort import Cohort
from causal.statistics import Rows, Statistics, from_cooccurrence

#: The kind of node that each of a visit's three input lists becomes.
INPUT_KINDS = ("diagnosis", "procedure", "previous_medication")

#: The kind of node that the medications of the visit itself become, and their place in time.
SINK_KIND = "medication"
_SINK_TIER = 2


@dataclasses.dataclass(frozen=True)
class Columns:
    """Presence of codes in visits; n rows, p columns.

    Attributes:
        names: node names, sorted, so that the order of a vocabulary changes no result.
        present: CSR int64 (n, p), 0 or 1.
        tiers: int64 (p,); an edge never points from a higher tier to a lower one.
        strata: int8 (n,), 0 for a patient's first visit, else 1.
    """

    names: tuple[str, ...]
    present: sparse.csr_array
    tiers: NDArray[np.int64]
    strata: NDArray[np.int8]

    @functools.cached_property
    def by_column(self) -> sparse.csc_array:
        """`present` as CSC."""
        return self.present.tocsc()

    def holding(self, columns: NDArray[np.integer]) -> Rows:
        """Some columns in the rows in which one of them is 1; environments are the strata's ranks.

        Of the other rows scores on counts need the number alone.
        """
        chosen = self.by_column[:, columns].tocsr()
        rows = np.flatnonzero(np.diff(chosen.indptr))
        return Rows(chosen[rows].astype(np.int32), self.stratum[rows])

    @functools.cached_property
    def stratum(self) -> NDArray[np.int32]:
        """Each visit's stratum as its rank, int32 (n,)."""
        return np.unique(self.strata, return_inverse=True)[1].astype(np.int32)

    def take(self, columns: NDArray[np.integer]) -> "Columns":
        """Some columns, in the given order."""
        names = tuple(self.names[i] for i in columns)
        return Columns(names, self.present[:, columns], self.tiers[columns], self.strata)

    def visits(self, rows: NDArray[np.integer]) -> "Columns":
        """Some visits, in the given order; a row may be given more than once."""
        return Columns(self.names, self.present[rows], self.tiers, self.strata[rows])


@dataclasses.dataclass(frozen=True)
class Cooccurrence:
    """Counts that hold all that a search needs; any set of columns is a slice of them.

    Integers, so that they are the same to the bit however the rows were split or ordered, and
    sparse, so that 20,000 codes fit.

    Attributes:
        rows: int64 (S,), visits of each stratum.
        strata: S matrices, CSR int64 (p, p), symmetric; visits of the stratum that have both codes,
            on the diagonal visits that have the one.
    """

    rows: NDArray[np.int64]
    strata: tuple[sparse.csr_array, ...]

    @property
    def num_rows(self) -> int:
        """n, visits."""
        return int(self.rows.sum())

    @property
    def total(self) -> sparse.csr_array:
        """Counts over all strata, CSR int64 (p, p)."""
        return sparse.csr_array(sum(self.strata[1:], self.strata[0]))

    def take(self, columns: NDArray[np.integer]) -> "Cooccurrence":
        """The counts of some columns, in the given order."""
        return Cooccurrence(self.rows, tuple(c[columns][:, columns] for c in self.strata))

    def statistics(self, columns: NDArray[np.integer]) -> Statistics:
        """The engine's statistics of some columns, int64 (b,), with an environment a stratum.

        Scored with an intercept per environment they take out the mean of each stratum. That is
        needed because a first visit has no previous medications at all: under one common mean every
        two of them would seem to depend on each other.
        """
        joint = [counts.toarray().astype(np.int32) for counts in self.take(columns).strata]
        return from_cooccurrence(self.rows, joint, [()] * len(joint))


def values_at(
    matrix: sparse.csr_array, rows: NDArray[np.integer], columns: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Elements (rows[i], columns[i]) of a sparse matrix, int64 in the shape of `rows`."""
    # Indexing with empty arrays gives a sparse array instead of a plain one.
    if rows.size == 0:
        return np.zeros(rows.shape, np.int64)
    return np.asarray(matrix[rows.ravel(), columns.ravel()], np.int64).reshape(rows.shape)


def training_visits(cohort: Cohort) -> NDArray[np.int64]:
    """Visits that discovery and effects learn from, int64.

    All visits of training patients. With `inputs="history"` first visits are left out: nothing is
    known at them, and rows that are empty by construction would make all codes seem related.
    """
    visits = cohort.visits_of(cohort.patients_of("train"))
    if cohort.inputs == "history":
        visits = visits[~cohort.is_first_visit()[visits]]
    return visits


def presence(lists: CodeLists, visits: NDArray[np.integer], size: int) -> sparse.csr_array:
    """Presence of each code in the given visits, CSR int64 (visits, size), 0 or 1."""
    taken = lists.take(visits)
    matrix = sparse.csr_array(
        (np.ones(len(taken.ids), np.int64), taken.ids, taken.offsets), shape=(len(taken), size)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1  # a code that a visit lists twice is present once
    return matrix


def of_cohort(cohort: Cohort) -> Columns:
    """Builds the sorted columns of a cohort's training visits.

    Tiers follow time. With `inputs="current"` the previous visit's medications come before this
    visit's diagnoses and procedures; with `inputs="history"` all three are of the previous visit,
    where conditions and procedures come before the drugs that were given for them.
    """
    visits = training_visits(cohort)
    names: list[str] = []
    tiers: list[int] = []
    tier_of = {"current": (1, 1, 0), "history": (0, 0, 1)}[cohort.inputs]
    for kind, vocabulary_kind, tier in zip(INPUT_KINDS, KINDS, tier_of, strict=True):
        codes = cohort.vocabularies[vocabulary_kind]
        names += [node_name(kind, code) for code in codes]
        tiers += [tier] * len(codes)
    parts = [
        presence(lists, visits, size)
        for lists, size in zip(cohort.known_inputs(), cohort.sizes, strict=True)
    ]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    return Columns(
        names=tuple(names[i] for i in order),
        present=sparse.csr_array(sparse.hstack(parts, format="csc")[:, order].tocsr()),
        tiers=np.array(tiers, np.int64)[order],
        strata=np.where(cohort.is_first_visit()[visits], 0, 1).astype(np.int8),
    )


def sinks_of(cohort: Cohort) -> Columns:
    """Builds the sorted columns of what is to be recommended at the same visits.

    A tier of their own, after all that `of_cohort` gives; see `causal.sinks`.
    """
    visits = training_visits(cohort)
    names = [node_name(SINK_KIND, code) for code in cohort.vocabularies[SINK_KIND]]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    return Columns(
        names=tuple(names[i] for i in order),
        present=presence(cohort.targets, visits, len(names))[:, order],
        tiers=np.full(len(names), _SINK_TIER, np.int64),
        strata=np.where(cohort.is_first_visit()[visits], 0, 1).astype(np.int8),
    )


def count(columns: Columns) -> Cooccurrence:
    """Counts co-occurrences, once, for every block and the merge."""
    parts = [columns.present[columns.strata == s] for s in np.unique(columns.strata)]
    if not parts:
        parts = [columns.present]
    return Cooccurrence(
        rows=np.array([part.shape[0] for part in parts], np.int64),
        strata=tuple(sparse.csr_array(part.T @ part) for part in parts),
    )
