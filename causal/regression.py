"""Least squares of every medication on every code and its adjustment set, from cross-products.

A whole table of effects costs a few matrix products: by Frisch, Waugh and Lovell the coefficient of
a code is that of what its adjustment set leaves of it.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from causal import columns as columns_of
from causal.columns import Columns

#: A code whose variance is explained by its adjustment set up to this share has no effect.
_DETERMINED = 1e-9


def regress(
    columns: Columns,
    treated: NDArray[np.int64],
    adjusting: list[NDArray[np.int64]],
    targets: sparse.csr_array,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares of every target on [1, code, its adjustment set], for every code.

    Codes with equally large sets are solved together. Standard errors are the classical ones, with
    one variance for all visits.

    Args:
        columns: n visits, p columns.
        treated: int64 (T,), the column of each code.
        adjusting: for each code the columns to adjust for.
        targets: CSR int64 (n, M), 0 or 1.

    Returns:
        Coefficients and their standard errors, float64 (T, M) each; 0 and NaN for a code that has
        no variance of its own.
    """
    moments = _Moments.of(columns.present, targets)
    effect = np.zeros((len(treated), targets.shape[1]))
    error = np.full(effect.shape, np.nan)
    sizes = np.array([len(chosen) for chosen in adjusting], np.int64)
    for size in np.unique(sizes):
        group = np.flatnonzero(sizes == size)
        sets = np.array([adjusting[g] for g in group], np.int64).reshape(len(group), size)
        effect[group], error[group] = _regress_group(moments, treated[group], sets)
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
    moments: _Moments, treated: NDArray[np.int64], sets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`regress` for g codes that adjust for k columns each; sets is int64 (g, k)."""
    size = sets.shape[1]
    variance = moments.among(treated, treated)  # (g,)
    product = moments.with_targets[treated].copy()  # (g, M)
    residual = np.broadcast_to(moments.of_targets, product.shape).copy()
    own = variance.copy()
    rank = np.zeros(len(treated), np.int64)
    if size:
        pairs = np.broadcast_to(sets[:, :, None], (len(treated), size, size))
        inverse, rank = _inverse(moments.among(pairs, pairs.transpose(0, 2, 1)))
        with_treated = moments.among(sets, np.broadcast_to(treated[:, None], sets.shape))  # (g, k)
        slopes = np.einsum("gij,gj->gi", inverse, with_treated)
        with_targets = moments.with_targets[sets]  # (g, k, M)
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
    """Pseudo-inverses and ranks of Gram matrices (g, k, k): duplicate columns count once."""
    scale = np.sqrt(np.maximum(np.einsum("gii->gi", gram), 0.0))
    scale = np.where(scale > 0, scale, 1.0)
    outer = scale[:, :, None] * scale[:, None, :]
    values, vectors = np.linalg.eigh(gram / outer)
    kept = values > _DETERMINED
    inverted = np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)
    inverse = np.einsum("gik,gk,gjk->gij", vectors, inverted, vectors)
    return inverse / outer, kept.sum(axis=1)
