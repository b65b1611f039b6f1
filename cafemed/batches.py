"""Cohorts and requests as arrays, and batches of whole patients as tensors.

One path for training and serving: `visit_arrays` turns code lists into padded arrays once, and
`collate` cuts a batch of patients out of them. A model is given a `Batch` and the fixed
`ModelInputs`; it never sees a cohort.

Modalities are numbered k = 0 diagnosis, 1 procedure, 2 medication of the previous visit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from cafemed import scaling as scalings
from cafemed.codes import KINDS, LABORATORY, CodeLists, node_name
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError
from cafemed.graphs import ORPHAN, CausalGraph, EffectTable, node_classes
from cafemed.laboratory import Laboratory
from cafemed.scaling import Scaling

#: The graph node kind of each modality. The medications are those of the previous visit, so the
#: graph restricted to a visit's inputs never holds the medications that are to be recommended.
INPUT_NODE_KINDS = ("diagnosis", "procedure", "previous_medication")


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What a model is built from besides its options: fixed, not learned.

    Attributes:
        sizes: (N_d, N_p, N_m).
        effects: float32 (N_d + N_p, N_m), E of models' equation (1); diagnoses first.
        ddi: bool (N_m, N_m), symmetric, zero diagonal; the interacting pairs.
        num_laboratory_items: N_lab, of which `Batch.laboratory_items` are indices; 0: none.
        molecules: bool (N_m, N_molecules), which medication has which molecule; the molecules in
            the order of their canonical SMILES. A medication may have none; None: nothing is known.
    """

    sizes: tuple[int, int, int]
    effects: NDArray[np.float32]
    ddi: NDArray[np.bool_]
    num_laboratory_items: int = 0
    molecules: NDArray[np.bool_] | None = None


def model_inputs(
    vocabularies: Mapping[str, tuple[str, ...]],
    effects: EffectTable,
    ddi: NDArray[np.bool_],
    molecules: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelInputs:
    """Checks that effects and interactions belong to the vocabularies, and gives the inputs.

    Args:
        vocabularies: kind → codes (`Cohort.vocabularies`).
        effects: rows and columns named by graph nodes. Models take the rows of diagnoses and
            procedures; those of previous medications may follow, or be missing.
        ddi: bool (N_m, N_m).
        molecules: medication code → canonical SMILES (`Cohort.molecules`); None or empty: none
            are known.

    Raises:
        ArtifactError: if names or shapes differ from the vocabularies, or an effect is not finite.
    """
    d, p, m = (vocabularies[kind] for kind in KINDS)
    rows = [node_name("diagnosis", c) for c in d] + [node_name("procedure", c) for c in p]
    if len(effects.codes) > len(rows):  # tables of earlier versions end here
        previous = [node_name("previous_medication", c) for c in m]
        _require_names("rows", effects.codes, [*rows, *previous])
    else:
        _require_names("rows", effects.codes, rows)
    _require_names("columns", effects.medications, [node_name("medication", c) for c in m])
    shape = (len(effects.codes), len(m))
    if effects.effect.shape != shape:
        raise ArtifactError(f"effects: expected shape {shape}, got {effects.effect.shape}")
    if not np.isfinite(effects.effect).all():
        raise ArtifactError("effects: expected finite numbers, got NaN or infinity")
    if ddi.shape != (len(m), len(m)):
        raise ArtifactError(f"ddi: expected shape {(len(m), len(m))}, got {ddi.shape}")
    return ModelInputs(
        (len(d), len(p), len(m)),
        effects.effect[: len(rows)].astype(np.float32),
        ddi,
        len(vocabularies.get(LABORATORY, ())),
        molecule_matrix(m, molecules) if molecules else None,
    )


def molecule_matrix(
    medications: Sequence[str], molecules: Mapping[str, tuple[str, ...]]
) -> NDArray[np.bool_]:
    """Says which medication has which molecule, bool (N_m, N_molecules).

    The columns are the distinct SMILES in sorted order.
    """
    names = sorted({smiles for of_one in molecules.values() for smiles in of_one})
    column = {smiles: i for i, smiles in enumerate(names)}
    matrix = np.zeros((len(medications), len(names)), np.bool_)
    for row, code in enumerate(medications):
        matrix[row, [column[smiles] for smiles in molecules.get(code, ())]] = True
    return matrix


def _require_names(what: str, got: tuple[str, ...], expected: list[str]) -> None:
    if list(got) == expected:
        return
    if len(got) != len(expected):
        detail = f"expected {len(expected)} {what}, got {len(got)}"
    else:
        at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
        detail = f"{what}[{at}]: expected {expected[at]}, got {got[at]}"
    raise ArtifactError(f"effects do not belong to this vocabulary: {detail}; run discover again")


@dataclasses.dataclass(frozen=True)
class VisitArrays:
    """All visits of P patients, V visits patient by patient, as NumPy arrays.

    Holds no torch object and needs no writable array, so it lies in Ray's object store once and
    is read by every trial without a copy.

    Attributes:
        codes: int32 (V, 3, L); indices into each modality's own vocabulary, in the visit's order;
            padding is 0 and means nothing, `counts` says what exists.
        counts: int32 (V, 3), codes per visit and modality; 0 medications at a first visit.
        classes: int8 (V, 3, L), node classes (`graphs.CAUSE` …); padding is ORPHAN.
        targets: bool (V, N_m); all False in a request.
        patient_offsets: int64 (P + 1,).
        sex: int8 (P,), index into `cohort.SEXES`.
        age: float32 (V,), scaled (`scaling.Scaling`); NaN where unknown.
        laboratory_items: int32 (V, E), E >= 0 the largest number of a visit; padding is 0 and
            means nothing.
        laboratory_values: float32 (V, E), scaled; padding is NaN.
        laboratory_counts: int32 (V,), values that exist.
        sizes: (N_d, N_p, N_m).
    """

    codes: NDArray[np.int32]
    counts: NDArray[np.int32]
    classes: NDArray[np.int8]
    targets: NDArray[np.bool_]
    patient_offsets: NDArray[np.int64]
    sex: NDArray[np.int8]
    age: NDArray[np.float32]
    laboratory_items: NDArray[np.int32]
    laboratory_values: NDArray[np.float32]
    laboratory_counts: NDArray[np.int32]
    sizes: tuple[int, int, int]

    @property
    def num_patients(self) -> int:
        """P."""
        return len(self.patient_offsets) - 1

    @property
    def num_visits(self) -> int:
        """V."""
        return len(self.counts)


def input_adjacencies(
    graph: CausalGraph, vocabularies: Mapping[str, tuple[str, ...]]
) -> list[sparse.csr_array]:
    """Directed edges among the codes of each modality, three float32 CSR (N_k, N_k)."""
    return [
        graph.directed_adjacency([node_name(node_kind, code) for code in vocabularies[kind]])
        for kind, node_kind in zip(KINDS, INPUT_NODE_KINDS, strict=True)
    ]


def visit_arrays(
    known: tuple[CodeLists, CodeLists, CodeLists],
    targets: CodeLists | None,
    patient_offsets: NDArray[np.int64],
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    sex: NDArray[np.int8],
    age: NDArray[np.float32],
    scaling: Scaling,
    laboratory: Laboratory | None = None,
    adjacencies: Sequence[sparse.csr_array] | None = None,
) -> VisitArrays:
    """Pads code lists and finds their node classes; the one entry for cohorts and requests.

    Args:
        known: diagnoses, procedures and previous medications of the V visits, each code at most
            once in a list.
        targets: medications to recommend at each visit; None for a request.
        patient_offsets: int64 (P + 1,); patient p has the visits from its offset to the next.
        graph: gives the node classes; codes that it does not name are orphans.
        vocabularies: kind → codes.
        sex: int8 (P,).
        age: float32 (V,), years; NaN where unknown.
        scaling: of ages and laboratory values, as fitted on the training patients.
        laboratory: what is known at each visit, in the source's units; None: nothing.
        adjacencies: what `input_adjacencies` gives for this graph, where many small requests
            follow one another; None: it is called here.

    Raises:
        ArtifactError: if a code index lies outside its vocabulary, or lengths differ.
    """
    sizes = tuple(len(vocabularies[kind]) for kind in KINDS)
    num_visits = int(patient_offsets[-1])
    laboratory = laboratory or Laboratory.none(num_visits)
    _require_lengths(known, targets, laboratory, num_visits, len(patient_offsets) - 1, sex, age)
    if adjacencies is None:
        adjacencies = input_adjacencies(graph, vocabularies)
    longest = max([1, *(int(lists.counts.max(initial=0)) for lists in known)])
    codes = np.zeros((num_visits, 3, longest), np.int32)
    classes = np.full((num_visits, 3, longest), ORPHAN, np.int8)
    counts = np.zeros((num_visits, 3), np.int32)
    for k, (kind, lists) in enumerate(zip(KINDS, known, strict=True)):
        _require_inside(kind, lists, sizes[k])
        visit = np.repeat(np.arange(num_visits), lists.counts)
        place = np.arange(len(lists.ids)) - np.repeat(lists.offsets[:-1], lists.counts)
        codes[visit, k, place] = lists.ids
        classes[visit, k, place] = node_classes(lists, adjacencies[k])
        counts[:, k] = lists.counts
    if targets is None:
        wanted = np.zeros((num_visits, sizes[2]), np.bool_)
    else:
        _require_inside("target", targets, sizes[2])
        wanted = targets.multi_hot(sizes[2])
    return VisitArrays(
        codes=codes,
        counts=counts,
        classes=classes,
        targets=wanted,
        patient_offsets=np.asarray(patient_offsets, np.int64),
        sex=np.asarray(sex, np.int8),
        age=scaling.ages(age),
        **_laboratory_arrays(laboratory, scaling),
        sizes=(sizes[0], sizes[1], sizes[2]),
    )


def _laboratory_arrays(laboratory: Laboratory, scaling: Scaling) -> dict[str, Any]:
    """Pads laboratory values to (V, E); items 0 and values NaN in the padding."""
    lists = laboratory.items
    _require_inside("laboratory", lists, scaling.num_items)
    shape = (len(lists), int(lists.counts.max(initial=0)))
    items, values = np.zeros(shape, np.int32), np.full(shape, np.nan, np.float32)
    exists = np.arange(shape[1]) < lists.counts[:, None]
    items[exists] = lists.ids
    values[exists] = scaling.values(lists.ids, laboratory.values)
    return {
        "laboratory_items": items,
        "laboratory_values": values,
        "laboratory_counts": lists.counts.astype(np.int32),
    }


def cohort_arrays(cohort: Cohort, graph: CausalGraph) -> VisitArrays:
    """The arrays of a whole cohort: every patient of every split, in cohort order.

    Ages and laboratory values are scaled by what the training patients' are (`scaling.fit`).
    """
    return visit_arrays(
        cohort.known_inputs(),
        cohort.targets,
        cohort.patient_offsets,
        graph,
        cohort.vocabularies,
        cohort.sex,
        cohort.age,
        scalings.fit(cohort),
        cohort.known_laboratory(),
    )


def _require_lengths(
    known: tuple[CodeLists, CodeLists, CodeLists],
    targets: CodeLists | None,
    laboratory: Laboratory,
    num_visits: int,
    num_patients: int,
    sex: NDArray[np.int8],
    age: NDArray[np.float32],
) -> None:
    found = {f"{kind} lists": len(lists) for kind, lists in zip(KINDS, known, strict=True)}
    found["ages"] = len(age)
    found["laboratory lists"] = len(laboratory)
    if targets is not None:
        found["target lists"] = len(targets)
    for what, length in found.items():
        if length != num_visits:
            raise ArtifactError(f"expected {num_visits} {what}, one a visit, got {length}")
    if len(sex) != num_patients:
        raise ArtifactError(f"expected {num_patients} sexes, one a patient, got {len(sex)}")


def _require_inside(kind: str, lists: CodeLists, size: int) -> None:
    if len(lists.ids) and not (lists.ids.min() >= 0 and lists.ids.max() < size):
        raise ArtifactError(
            f"{kind} codes: expected indices in 0 .. {size - 1}, the vocabulary's, got indices "
            f"from {lists.ids.min()} to {lists.ids.max()}"
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """B patients with V visits in all, as tensors on one device; visits patient by patient.

    T is the largest number of visits of a patient, L the largest number of codes of a visit and
    modality (at least 1).

    Attributes:
        codes: int64 (V, 3, L), indices into each modality's own vocabulary. Padding holds an
            arbitrary valid index: mask by `counts`.
        counts: int64 (V, 3), codes that exist.
        classes: int64 (V, 3, L), node classes; padding is arbitrary but valid.
        lengths: int64 (B,), visits of each patient.
        targets: float32 (V, N_m), 1 where the medication was given.
        sex: int64 (B,), index into `cohort.SEXES`.
        age: float32 (V,), scaled; NaN where unknown.
        laboratory_items: int64 (V, E), indices of laboratory items, E >= 0; padding is arbitrary
            but valid: mask by `laboratory_counts`.
        laboratory_values: float32 (V, E), scaled; padding may be NaN: mask by `where`, not by a
            product.
        laboratory_counts: int64 (V,), values that exist.
        slots: int64 (V,), where each visit lies in the flattened (B, T) grid: b * T + t.
        num_steps: T.
        sizes: (N_d, N_p, N_m), of the vocabularies that `codes` index.
    """

    codes: torch.Tensor
    counts: torch.Tensor
    classes: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor
    sex: torch.Tensor
    age: torch.Tensor
    laboratory_items: torch.Tensor
    laboratory_values: torch.Tensor
    laboratory_counts: torch.Tensor
    slots: torch.Tensor
    num_steps: int
    sizes: tuple[int, int, int]

    @property
    def num_patients(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def num_visits(self) -> int:
        """V."""
        return len(self.counts)

    @property
    def is_first(self) -> torch.Tensor:
        """Says for every visit whether it is its patient's first, bool (V,)."""
        return self.slots % self.num_steps == 0

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Lays visit rows (V, ...) out as (B, T, ...); steps after a patient's last hold 0."""
        grid = rows.new_zeros((self.num_patients * self.num_steps, *rows.shape[1:]))
        grid.index_copy_(0, self.slots, rows)
        return grid.view(self.num_patients, self.num_steps, *rows.shape[1:])

    def flatten(self, padded: torch.Tensor) -> torch.Tensor:
        """Takes the visits that exist out of (B, T, ...), as rows (V, ...)."""
        return padded.flatten(0, 1).index_select(0, self.slots)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)


def collate(arrays: VisitArrays, patients: NDArray[np.int64]) -> Batch:
    """Cuts a batch out of the arrays: all visits of the given patients, in the order given.

    Args:
        arrays: of a cohort or a request.
        patients: int64 (B,), indices into the patients of `arrays`, at least one.
    """
    starts = arrays.patient_offsets[patients]
    lengths = arrays.patient_offsets[patients + 1] - starts
    num_visits, num_steps = int(lengths.sum()), max(int(lengths.max(initial=1)), 1)
    ends = np.cumsum(lengths)
    step = np.arange(num_visits) - np.repeat(ends - lengths, lengths)
    visits = np.repeat(starts, lengths) + step
    slots = np.repeat(np.arange(len(patients)) * num_steps, lengths) + step
    counts = arrays.counts[visits]
    longest = max(int(counts.max(initial=1)), 1)
    measured = arrays.laboratory_counts[visits]
    most = int(measured.max(initial=0))
    return Batch(
        codes=_tensor(arrays.codes[visits, :, :longest], np.int64),
        counts=_tensor(counts, np.int64),
        classes=_tensor(arrays.classes[visits, :, :longest], np.int64),
        lengths=_tensor(lengths, np.int64),
        targets=_tensor(arrays.targets[visits], np.float32),
        sex=_tensor(arrays.sex[patients], np.int64),
        age=_tensor(arrays.age[visits], np.float32),
        laboratory_items=_tensor(arrays.laboratory_items[visits, :most], np.int64),
        laboratory_values=_tensor(arrays.laboratory_values[visits, :most], np.float32),
        laboratory_counts=_tensor(measured, np.int64),
        slots=_tensor(slots, np.int64),
        num_steps=num_steps,
        sizes=arrays.sizes,
    )


def _tensor(array: NDArray[np.generic], dtype: type[np.generic]) -> torch.Tensor:
    # `array` was taken out by index, so it is a copy: the object store's own arrays cannot be
    # written, of which torch warns.
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
