"""The generative model of a visit: its parameters, its draws and its exact probabilities.

Codes are the diagnoses (0 .. N_d - 1) followed by the procedures (N_d .. N - 1).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters of the generative model; N = N_d + N_p codes, N_m medications.

    Attributes:
        diagnoses, procedures, medications: names, "icd9:4019" and "atc:A02B", sorted.
        cluster: int32 (N,), the cluster of each code.
        order: int32 (N,), a topological order of the codes.
        parent, child: int32 (E,), edges of the graph over codes, indices of codes.
        edge_strength: float64 (E,), noisy-or strengths of these edges.
        code_leak: float64 (N,), probability of a code without any cause.
        code_persistence: float64 (N,), strength from a code to itself a visit later.
        cause, caused: int32 (K,), edges from codes to medications.
        cause_strength: float64 (K,), noisy-or strengths of these edges.
        medication_leak: float64 (N_m,), probability that a medication is drafted without cause.
        medication_persistence: float64 (N_m,), strength from a medication to itself a visit later.
        priority: int32 (N_m,), a permutation; of two interacting medications, the one with the
            smaller value stays.
        ddi: bool (N_m, N_m), the interacting pairs; symmetric, zero diagonal.
        avoidance: probability of striking one of two interacting drafted medications.
    """

    diagnoses: tuple[str, ...]
    procedures: tuple[str, ...]
    medications: tuple[str, ...]
    cluster: NDArray[np.int32]
    order: NDArray[np.int32]
    parent: NDArray[np.int32]
    child: NDArray[np.int32]
    edge_strength: Floats
    code_leak: Floats
    code_persistence: Floats
    cause: NDArray[np.int32]
    caused: NDArray[np.int32]
    cause_strength: Floats
    medication_leak: Floats
    medication_persistence: Floats
    priority: NDArray[np.int32]
    ddi: Bools
    avoidance: float

    @property
    def num_codes(self) -> int:
        """N, diagnoses and procedures."""
        return len(self.diagnoses) + len(self.procedures)

    @functools.cached_property
    def parents(self) -> dict[int, list[tuple[int, float]]]:
        """Child → its (parent, strength) pairs; codes without parents are left out."""
        found: dict[int, list[tuple[int, float]]] = {}
        edges = zip(self.parent, self.child, self.edge_strength, strict=True)
        for parent, child, strength in edges:
            found.setdefault(int(child), []).append((int(parent), float(strength)))
        return found

    @functools.cached_property
    def log_miss(self) -> sparse.csr_array:
        """Log probability that a present code fails to cause a medication, CSR (N, N_m)."""
        shape = (self.num_codes, len(self.medications))
        values = np.log1p(-self.cause_strength)
        return sparse.csr_array((values, (self.cause, self.caused)), shape=shape)

    @functools.cached_property
    def strikes(self) -> NDArray[np.float32]:
        """1 where the row medication can strike the column medication, float32 (N_m, N_m)."""
        above = self.priority[:, None] < self.priority[None, :]
        return (self.ddi & above).astype(np.float32)


def codes_given(
    model: Model,
    uniform: NDArray[np.float32],
    previous: Bools | None = None,
    *,
    nodes: Sequence[int] | None = None,
    known: Bools | None = None,
) -> Bools:
    """Ancestral sampling of codes: P(c_i = 0 | parents) = (1 - leak_i) Π (1 - w_ji)^{c_j}.

    Args:
        model: the parameters.
        uniform: (N, rows), the noise; the same noise gives the same codes.
        previous: (N, rows), codes of the visit before; None for first visits.
        nodes: redraw only these codes (in topological order), taking the others from `known`.
        known: (N, rows), changed in place and returned.

    Returns:
        bool (N, rows), code present.
    """
    persists = model.code_persistence > 0
    if known is None:
        known = uniform >= (1 - model.code_leak[:, None]).astype(np.float32)
        if previous is not None and persists.any():
            nodes = model.order.tolist()
        else:
            nodes = [int(i) for i in model.order if int(i) in model.parents]
    for i in nodes or []:
        absent = np.full(uniform.shape[1], 1 - model.code_leak[i], np.float32)
        for parent, strength in model.parents.get(i, []):
            absent[known[parent]] *= 1 - strength
        if previous is not None and persists[i]:
            absent[previous[i]] *= 1 - model.code_persistence[i]
        known[i] = uniform[i] >= absent
    return known


def usable(model: Model, codes: Bools) -> Bools:
    """Says which columns of codes (N, rows) have a diagnosis and a procedure, bool (rows,)."""
    split = len(model.diagnoses)
    return np.logical_and(codes[:split].any(axis=0), codes[split:].any(axis=0))


def draw_codes(
    model: Model, num_rows: int, previous: Bools | None, rng: np.random.Generator
) -> Bools:
    """Draws visits' codes, again until each visit has a diagnosis and a procedure.

    Args:
        model: the parameters.
        num_rows: visits to draw.
        previous: bool (N, rows), codes of the visits before; None for first visits.
        rng: source of the noise.

    Returns:
        bool (N, rows).
    """
    codes = codes_given(model, _noise(model, num_rows, rng), previous)
    wanting = np.flatnonzero(~usable(model, codes))
    while len(wanting):
        before = None if previous is None else previous[:, wanting]
        again = codes_given(model, _noise(model, len(wanting), rng), before)
        codes[:, wanting] = again
        wanting = wanting[~usable(model, again)]
    return codes


def _noise(model: Model, num_rows: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.random((model.num_codes, num_rows), np.float32)


def draft_log_miss(model: Model, codes: sparse.csr_array, previous: Floats | Bools) -> Floats:
    """Log probability that each medication is not drafted.

    log(1 - p_j) = log(1 - leak_j) + Σ_i c_i log(1 - s_ij) + m'_j log(1 - persistence_j)

    Args:
        model: the parameters.
        codes: CSR (rows, N), 1 where a code is present.
        previous: (rows, N_m), medications of the visit before; zeros for first visits.

    Returns:
        float64 (rows, N_m).
    """
    log_miss: Floats = (codes @ model.log_miss).toarray()
    log_miss += np.log1p(-model.medication_leak)
    log_miss += previous * np.log1p(-model.medication_persistence)
    return log_miss


def medication_probabilities(model: Model, log_miss: Floats) -> Floats:
    """Exact probability of each medication, after striking and given that there is one at all.

    With p the draft probabilities, q the avoidance and "above j" the interacting medications of
    higher priority,

        P(m_j = 1) = p_j Π_{k above j} (1 - q p_k) / (1 - Π_k (1 - p_k)).

    The draft's medications are independent, each pair's strike falls on its lower member alone,
    and the highest drafted medication is never struck, so that the list is empty exactly where
    the draft was.

    Args:
        model: the parameters.
        log_miss: (rows, N_m), see draft_log_miss.

    Returns:
        float64 (rows, N_m).
    """
    drafted = -np.expm1(log_miss)
    kept = np.exp(np.log1p(-model.avoidance * drafted) @ model.strikes) if model.avoidance else 1.0
    some = -np.expm1(log_miss.sum(axis=1, keepdims=True))
    probabilities: Floats = drafted * kept / some
    return probabilities


def draw_medications(model: Model, log_miss: Floats, rng: np.random.Generator) -> Bools:
    """Draws medications: a draft (again while it is empty), then the strikes.

    Args:
        model: the parameters.
        log_miss: (rows, N_m), see draft_log_miss.
        rng: source of the noise.

    Returns:
        bool (rows, N_m), at least one medication a row.
    """
    absent = np.exp(log_miss)
    draft = rng.random(absent.shape) >= absent
    wanting = np.flatnonzero(~draft.any(axis=1))
    while len(wanting):
        draft[wanting] = rng.random((len(wanting), absent.shape[1])) >= absent[wanting]
        wanting = wanting[~draft[wanting].any(axis=1)]
    return struck(model, draft, rng.random(absent.shape, np.float32))


def struck(model: Model, draft: Bools, uniform: NDArray[np.float32]) -> Bools:
    """Strikes: each interacting drafted medication of higher priority strikes with `avoidance`.

    Args:
        model: the parameters.
        draft: (rows, N_m).
        uniform: (rows, N_m), the noise.

    Returns:
        bool (rows, N_m).
    """
    opponents = draft.astype(np.float32) @ model.strikes
    kept: Bools = draft & (uniform < (1 - model.avoidance) ** opponents)
    return kept
