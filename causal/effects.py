"""Effects of diagnoses and procedures on medications, for every pair at once.

Both estimators are linear regressions of "the medication is a target of the visit" on "the visit
has the code", written in cross-products, so that a whole table costs a few matrix products:

- "raw": no covariates. The coefficient is the difference of proportions P(m | code) - P(m | no
  code), what the literature uses (models.md 1.1). It is an association, not an effect.
- "adjusted": the covariates are the code's parents in the causal graph (back-door adjustment,
  Pearl, Causality, 2009, section 3.3), previous medications among them.
"""

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.codes import node_name
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph, EffectTable
from causal import columns as columns_of
from causal.columns import Columns

#: A code whose variance is explained by its parents up to this share has no effect of its own.
_DETERMINED = 1e-9


@dataclasses.dataclass(frozen=True)
class EffectsConfig:
    """How effects are estimated.

    Attributes:
        estimator: "raw" or "adjusted".
    """

    estimator: Literal["raw", "adjusted"] = "adjusted"


def estimate(cohort: Cohort, graph: CausalGraph, config: EffectsConfig) -> EffectTable:
    """Estimates the effect of every diagnosis and procedure on every medication.

    The outcome is the cohort's targets; what is regressed on is what is known at the visit
    (`Cohort.known_inputs`). Training visits only.

    Returns:
        A table of differences of probabilities. A code that no visit or every visit has, or that
        its parents determine, has effect 0 and standard error NaN.
    """
    columns = columns_of.of_cohort(cohort)
    targets = columns_of.presence(
        cohort.targets, columns_of.training_visits(cohort), cohort.sizes[2]
    )
    codes = tuple(
        node_name(kind, code)
        for kind in ("diagnosis", "procedure")
        for code in cohort.vocabularies[kind]
    )
    if config.estimator == "raw":
        parents = [np.zeros(0, np.int64)] * len(codes)
    else:
        parents = parent_columns(graph, codes, columns.names)
    position = {name: i for i, name in enumerate(columns.names)}
    treated = np.array([position[code] for code in codes], np.int64)
    effect, error = regress(columns, treated, parents, targets)
    return EffectTable(
        codes=codes,
        medications=tuple(
            node_name("medication", code) for code in cohort.vocabularies["medication"]
        ),
        effect=effect.astype(np.float32),
        standard_error=error.astype(np.float32),
        estimator=config.estimator,
    )


def parent_columns(
    graph: CausalGraph, codes: tuple[str, ...], names: tuple[str, ...]
) -> list[NDArray[np.int64]]:
    """Columns of each code's parents; an undirected neighbour is no parent."""
    position = {name: i for i, name in enumerate(names)}
    found: dict[str, list[int]] = {code: [] for code in codes}
    for a, b in zip(graph.source[graph.directed], graph.target[graph.directed], strict=True):
        child, parent = graph.nodes[b], graph.nodes[a]
        if child in found and parent in position:
            found[child].append(position[parent])
    return [np.array(sorted(found[code]), np.int64) for code in codes]


def regress(
    columns: Columns,
    treated: NDArray[np.int64],
    parents: list[NDArray[np.int64]],
    targets: sparse.csr_array,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares of every target on [1, code, its parents], for every code.

    By Frisch, Waugh and Lovell the coefficient of the code is that of what its parents leave of
    it. Codes with equally many parents are solved together.

    Args:
        columns: n visits, p columns.
        treated: int64 (C,), the column of each code.
        parents: for each code the columns of its parents.
        targets: CSR int64 (n, M), 0 or 1.

    Returns:
        Coefficients and their classical standard errors, float64 (C, M) each; 0 and NaN for a
        code that has no variance of its own.
    """
    moments = _Moments.of(columns.present, targets)
    effect = np.zeros((len(treated), targets.shape[1]))
    error = np.full(effect.shape, np.nan)
    sizes = np.array([len(p) for p in parents], np.int64)
    for size in np.unique(sizes):
        group = np.flatnonzero(sizes == size)
        adjusting = np.array([parents[g] for g in group], np.int64).reshape(len(group), size)
        effect[group], error[group] = _regress_group(moments, treated[group], adjusting)
    return effect, error


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Centred cross-products: among columns as exact counts, with targets, of targets."""

    num_rows: int
    counts: sparse.csr_array  # int64 (p, p)
    sums: NDArray[np.int64]  # (p,)
    with_targets: NDArray[np.float64]  # (p, M), centred
    of_targets: NDArray[np.float64]  # (M,), centred

    @classmethod
    def of(cls, present: sparse.csr_array, targets: sparse.csr_array) -> "_Moments":
        num_rows = present.shape[0]
        sums = np.asarray(present.sum(axis=0), np.int64)
        target_sums = np.asarray(targets.sum(axis=0), np.int64)
        joint = (present.T @ targets).toarray()
        # n n_cm - n_c n_m is an exact integer: two codes that never differ give exactly 0.
        with_targets = (num_rows * joint - np.outer(sums, target_sums)) / max(num_rows, 1)
        of_targets = target_sums * (num_rows - target_sums) / max(num_rows, 1)
        counts = sparse.csr_array(present.T @ present)
        return cls(num_rows, counts, sums, with_targets, of_targets)

    def among(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """Centred cross-products of the column pairs a, b (same shape), float64."""
        joint = columns_of.values_at(self.counts, a, b)
        products = self.num_rows * joint - self.sums[a] * self.sums[b]
        centred: NDArray[np.float64] = products / max(self.num_rows, 1)
        return centred


def _regress_group(
    moments: _Moments, treated: NDArray[np.int64], parents: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`regress` for g codes with k parents each; parents is int64 (g, k)."""
    size = parents.shape[1]
    variance = moments.among(treated, treated)  # (g,)
    product = moments.with_targets[treated].copy()  # (g, M)
    residual = np.broadcast_to(moments.of_targets, product.shape).copy()
    own = variance.copy()
    rank = np.zeros(len(treated), np.int64)
    if size:
        pairs = np.broadcast_to(parents[:, :, None], (len(treated), size, size))
        inverse, rank = _inverse(moments.among(pairs, pairs.transpose(0, 2, 1)))
        with_treated = moments.among(
            parents, np.broadcast_to(treated[:, None], parents.shape)
        )  # (g, k)
        slopes = np.einsum("gij,gj->gi", inverse, with_treated)
        with_targets = moments.with_targets[parents]  # (g, k, M)
        own -= np.einsum("gi,gi->g", slopes, with_treated)
        product -= np.einsum("gi,gim->gm", slopes, with_targets)
        residual -= np.einsum("gim,gij,gjm->gm", with_targets, inverse, with_targets, optimize=True)
    defined = own > _DETERMINED * np.maximum(variance, 1 / max(moments.num_rows, 1))
    divisor = np.where(defined, own, 1.0)[:, None]
    effect = np.where(defined[:, None], product / divisor, 0.0)
    residual = np.maximum(residual - effect * product, 0.0)
    freedom = (moments.num_rows - 2 - rank)[:, None]
    known = defined[:, None] & (freedom > 0)
    error = np.sqrt(residual / np.maximum(freedom, 1) / divisor)
    return effect, np.where(known, error, np.nan)


def _inverse(gram: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pseudo-inverses and ranks of Gram matrices (g, k, k): duplicate parents count once."""
    scale = np.sqrt(np.maximum(np.einsum("gii->gi", gram), 0.0))
    scale = np.where(scale > 0, scale, 1.0)
    outer = scale[:, :, None] * scale[:, None, :]
    values, vectors = np.linalg.eigh(gram / outer)
    kept = values > _DETERMINED
    inverted = np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)
    inverse = np.einsum("gik,gk,gjk->gij", vectors, inverted, vectors)
    return inverse / outer, kept.sum(axis=1)
