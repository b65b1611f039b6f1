"""The cohort: patients in visit order as integer codes, with vocabularies, DDI pairs and split.

Files of a cohort folder (stage "cohort", private): `visits.parquet`, `vocabulary.json`,
`ddi.parquet`, `molecules.json`, `names.json`, `split.parquet`, `manifest.json`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cafemed import artifacts, untrusted
from cafemed.codes import KINDS, LABORATORY, CodeLists
from cafemed.errors import ArtifactError
from cafemed.laboratory import Laboratory
from cafemed.names import Names, read_names, write_names

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

#: Values of `Cohort.sex`.
SEXES = ("unknown", "female", "male")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Patients and their visits. V visits, P patients, N_d, N_p, N_m codes of each kind.

    Visits are stored patient by patient, in the protocol's visit order.

    Attributes:
        patient_offsets: int64 (P + 1,); patient p has visits
            `patient_offsets[p] .. patient_offsets[p + 1] - 1`.
        patient_ids: (P,) identifiers as in the source; patient-level, never logged.
        visit_ids: (V,) identifiers as in the source; patient-level, never logged.
        admitted: datetime64[s] (V,), NaT where the source has no time.
        diagnoses: code lists of the V visits, indices into vocabularies["diagnosis"], SEQ_NUM
            order.
        procedures: the same for procedures.
        medications: every medication of the stay, by first start then code; visit t + 1 sees it
            as history.
        targets: what is to be recommended at each visit: `medications`, or those started within
            `target_window_h`.
        vocabularies: kind → codes ("icd9:4019"), index = position; from training patients only.
            "laboratory" → items ("lab:50912"), () where there are none.
        ddi: bool (N_m, N_m), symmetric, zero diagonal; the interacting pairs.
        split: int8 (P,), index into SPLITS.
        sex: int8 (P,), index into SEXES.
        age: float32 (V,), years at admission; NaN where unknown.
        inputs: "current": a visit's own diagnoses and procedures are known when recommending;
            "history": only those of earlier visits.
        laboratory: values of the V visits; left out, no visit has any.
        molecules: medication code → canonical SMILES, sorted; empty where the cohort has none.
        names: kind → code → name, where the user gave any.
        fingerprint: of the manifest; "" for a cohort that was never saved.
    """

    patient_offsets: NDArray[np.int64]
    patient_ids: tuple[str, ...]
    visit_ids: tuple[str, ...]
    admitted: NDArray[np.datetime64]
    diagnoses: CodeLists
    procedures: CodeLists
    medications: CodeLists
    targets: CodeLists
    vocabularies: Mapping[str, tuple[str, ...]]
    ddi: NDArray[np.bool_]
    split: NDArray[np.int8]
    sex: NDArray[np.int8]
    age: NDArray[np.float32]
    inputs: Literal["current", "history"] = "current"
    laboratory: Laboratory = dataclasses.field(default_factory=lambda: Laboratory.none(0))
    molecules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    names: Names = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Spells out that there are no laboratory values, where they were left out."""
        if LABORATORY not in self.vocabularies:
            object.__setattr__(self, "vocabularies", {**self.vocabularies, LABORATORY: ()})
        if len(self.laboratory) == 0 != self.num_visits:
            object.__setattr__(self, "laboratory", Laboratory.none(self.num_visits))

    @property
    def num_patients(self) -> int:
        """P."""
        return len(self.patient_offsets) - 1

    @property
    def num_visits(self) -> int:
        """V."""
        return int(self.patient_offsets[-1])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N_d, N_p, N_m)."""
        d, p, m = (len(self.vocabularies[kind]) for kind in KINDS)
        return d, p, m

    def patients_of(self, split: Split) -> NDArray[np.int64]:
        """Indices of a split's patients, int64, ascending."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def visits_of(self, patients: NDArray[np.integer]) -> NDArray[np.int64]:
        """Indices of the visits of these patients, int64, patient by patient."""
        starts, ends = self.patient_offsets[patients], self.patient_offsets[patients + 1]
        return np.concatenate(
            [np.arange(a, b) for a, b in zip(starts, ends, strict=True)] or [np.zeros(0, np.int64)]
        )

    def patient_of_visit(self) -> NDArray[np.int64]:
        """The patient of every visit, int64 (V,)."""
        return np.repeat(np.arange(self.num_patients), np.diff(self.patient_offsets))

    def is_first_visit(self) -> NDArray[np.bool_]:
        """Says for every visit whether it is its patient's first, bool (V,)."""
        first = np.zeros(self.num_visits, np.bool_)
        first[self.patient_offsets[:-1]] = True
        return first

    def previous(self, lists: CodeLists) -> CodeLists:
        """Shifts lists by one visit within each patient; a first visit gets an empty list.

        `previous(cohort.medications)` are the M_{t-1} that a model sees at visit t.
        """
        places, offsets = self._places_before(lists)
        return CodeLists(lists.ids[places], offsets)

    def known_inputs(self) -> tuple[CodeLists, CodeLists, CodeLists]:
        """What may be seen at each visit: diagnoses, procedures, previous medications.

        With inputs="history" the first two are those of the previous visit.
        """
        history = self.previous(self.medications)
        if self.inputs == "history":
            return self.previous(self.diagnoses), self.previous(self.procedures), history
        return self.diagnoses, self.procedures, history

    def known_laboratory(self) -> Laboratory:
        """The laboratory values that may be seen at each visit, as `known_inputs`."""
        if self.inputs == "current":
            return self.laboratory
        items = self.laboratory.items
        places, offsets = self._places_before(items)
        return Laboratory(CodeLists(items.ids[places], offsets), self.laboratory.values[places])

    def _places_before(self, lists: CodeLists) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the previous visits' entries lie in `lists.ids`, and the offsets that they get."""
        before = np.maximum(np.arange(self.num_visits) - 1, 0)
        counts = np.where(self.is_first_visit(), 0, lists.counts[before])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        starts = np.repeat(lists.offsets[before], counts)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        return starts + within, offsets


def write(cohort: Cohort, folder: Path) -> None:
    """Writes the cohort's files into a folder that `artifacts.new_folder` gave."""
    columns: dict[str, Any] = {
        "patient": pa.array(np.asarray(cohort.patient_ids)[cohort.patient_of_visit()]),
        "visit": pa.array(cohort.visit_ids, pa.string()),
        "admitted": pa.array(cohort.admitted.astype("datetime64[s]")),
        "age": pa.array(cohort.age, pa.float32()),
    }
    for name in ("diagnoses", "procedures", "medications", "targets"):
        lists: CodeLists = getattr(cohort, name)
        columns[name] = pa.LargeListArray.from_arrays(lists.offsets, lists.ids)
    items, values = cohort.laboratory.items, cohort.laboratory.values
    columns["laboratory_items"] = pa.LargeListArray.from_arrays(items.offsets, items.ids)
    columns["laboratory_values"] = pa.LargeListArray.from_arrays(items.offsets, values)
    pq.write_table(pa.table(columns), folder / "visits.parquet")
    pq.write_table(
        pa.table(
            {
                "patient": pa.array(cohort.patient_ids, pa.string()),
                "split": pa.array([SPLITS[s] for s in cohort.split]),
                "sex": pa.array([SEXES[s] for s in cohort.sex]),
            }
        ),
        folder / "split.parquet",
    )
    (folder / "vocabulary.json").write_text(json.dumps(dict(cohort.vocabularies)))
    (folder / "molecules.json").write_text(json.dumps(dict(cohort.molecules)))
    write_names(cohort.names, folder / "names.json")
    write_ddi(cohort.ddi, cohort.vocabularies["medication"], folder / "ddi.parquet")


def load(folder: Path) -> Cohort:
    """Reads a cohort folder.

    Raises:
        ArtifactError: if a file is missing, truncated or edited, they do not belong together, or
            an earlier version of the program made them.
    """
    manifest = artifacts.verify(folder, "cohort")
    visits = pq.read_table(folder / "visits.parquet")
    if "laboratory_items" not in visits.column_names:
        raise ArtifactError(
            f"{folder}: made by an earlier version of this program; run jobs/prepare.py again"
        )
    patients = pq.read_table(folder / "split.parquet")
    vocabularies = read_vocabulary(folder / "vocabulary.json")
    patient_ids = tuple(patients["patient"].to_pylist())
    of_visit = visits["patient"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.concatenate([[True], of_visit[1:] != of_visit[:-1]]))
    if tuple(of_visit[starts]) != patient_ids:
        raise ArtifactError(f"{folder}: visits.parquet and split.parquet list other patients")
    names = ("diagnoses", "procedures", "medications", "targets", "laboratory_items")
    lists = {name: _read_lists(visits, name) for name in names}
    values = visits["laboratory_values"].combine_chunks().values
    laboratory = Laboratory(
        lists.pop("laboratory_items"), np.array(values.to_numpy(zero_copy_only=False), np.float32)
    )
    return Cohort(
        patient_offsets=np.concatenate([starts, [len(of_visit)]]).astype(np.int64),
        patient_ids=patient_ids,
        visit_ids=tuple(visits["visit"].to_pylist()),
        admitted=np.array(visits["admitted"].to_numpy(), "datetime64[s]"),
        vocabularies=vocabularies,
        ddi=read_ddi(folder / "ddi.parquet", vocabularies["medication"]),
        split=np.array([SPLITS.index(s) for s in patients["split"].to_pylist()], np.int8),
        sex=np.array([SEXES.index(s) for s in patients["sex"].to_pylist()], np.int8),
        age=np.array(visits["age"].to_numpy(), np.float32),
        inputs=manifest.config.get("inputs", "current"),
        laboratory=laboratory,
        molecules=read_molecules(folder / "molecules.json", vocabularies["medication"]),
        names=read_names(folder / "names.json", vocabularies),
        fingerprint=manifest.fingerprint,
        **lists,
    )


def read_vocabulary(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads `vocabulary.json`: kind → codes, and "laboratory" → items."""
    kinds = (*KINDS, LABORATORY)
    try:
        content = json.loads(path.read_text())
        return {kind: tuple(content[kind]) for kind in kinds}
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ArtifactError(f"{path}: expected a list of codes for each of {kinds}") from err


def read_molecules(path: Path, medications: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Reads `molecules.json`: medication code → canonical SMILES.

    Raises:
        ArtifactError: if it is not of this form, or names a medication that the vocabulary does
            not have.
    """
    try:
        content = json.loads(path.read_text())
        molecules = {str(code): tuple(smiles) for code, smiles in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise ArtifactError(f"{path}: expected SMILES strings by medication") from err
    for code, smiles in molecules.items():
        if code not in medications:
            raise ArtifactError(f"{path}: {code} is not in the medication vocabulary")
        if not smiles or not all(isinstance(text, str) and text for text in smiles):
            raise ArtifactError(f"{path}: {code}: expected SMILES strings")
    return molecules


def _read_lists(table: pa.Table, name: str) -> CodeLists:
    column = table[name].combine_chunks()
    return CodeLists(
        np.array(column.values.to_numpy(zero_copy_only=False), np.int32),
        np.array(column.offsets.to_numpy(), np.int64),
    )


#: Characters of a code in a message.
_MAX_SHOWN = 100
#: Of a table of pairs, rows that are always read.
_MIN_ROWS = 1000


def write_ddi(ddi: NDArray[np.bool_], medications: tuple[str, ...], path: Path) -> None:
    """Writes the interacting pairs as two columns of medication codes, each pair once."""
    a, b = np.nonzero(np.triu(ddi, 1))
    names = np.asarray(medications, dtype=object)
    table = {"a": pa.array(names[a], pa.string()), "b": pa.array(names[b], pa.string())}
    pq.write_table(pa.table(table), path)


def read_ddi(path: Path, medications: tuple[str, ...]) -> NDArray[np.bool_]:
    """Reads the interacting pairs as a bool (N_m, N_m) matrix, symmetric, zero diagonal.

    Raises:
        ArtifactError: if a pair names a medication that the vocabulary does not have.
    """
    index = {code: i for i, code in enumerate(medications)}
    table = untrusted.read_table(path, max_rows=max(len(index) ** 2, _MIN_ROWS))
    ddi = np.zeros((len(index), len(index)), np.bool_)

    def ends(name: str) -> NDArray[np.int64]:
        names, rows = untrusted.labels(table[name])
        unknown = next((n for n in names if n not in index), None)
        if unknown is not None:
            shown = unknown[:_MAX_SHOWN]
            raise ArtifactError(f"{path}: {shown} is not in the medication vocabulary")
        return np.array([index[n] for n in names], np.int64)[rows]

    a, b = ends("a"), ends("b")
    ddi[a, b] = ddi[b, a] = True
    return ddi
