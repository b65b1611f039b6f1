"""Drawing a population of patients from a generative model with known truth."""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.codes import CodeLists
from cafemed.synthetic.calibration import visit_counts
from cafemed.synthetic.config import SyntheticConfig
from cafemed.synthetic.design import draw_model
from cafemed.synthetic.model import Bools, Model, draft_log_miss, draw_codes, draw_medications

#: Patients drawn at once: bounds the memory at (codes x this) floats.
_CHUNK_PATIENTS = 4_096
#: Streams of random numbers that a seed opens, one for each purpose.
MODEL_STREAM, PATIENT_STREAM, TABLE_STREAM, EFFECT_STREAM = range(4)
LABORATORY_STREAM, MOLECULE_STREAM = range(4, 6)


@dataclasses.dataclass(frozen=True)
class Population:
    """Patients and their visits with the model that drew them; V visits, P patients.

    Attributes:
        config: the settings.
        seed: the seed of everything random.
        model: the parameters.
        patient_offsets: int64 (P + 1,); patient p has visits
            `patient_offsets[p] .. patient_offsets[p + 1] - 1`, in time order.
        diagnoses: indices into model.diagnoses, in random order within a visit.
        procedures: indices into model.procedures, in random order within a visit.
        medications: indices into model.medications, ascending within a visit.
    """

    config: SyntheticConfig
    seed: int
    model: Model
    patient_offsets: NDArray[np.int64]
    diagnoses: CodeLists
    procedures: CodeLists
    medications: CodeLists

    @property
    def num_visits(self) -> int:
        """V."""
        return int(self.patient_offsets[-1])

    def is_first_visit(self) -> Bools:
        """Says for every visit whether it is its patient's first, bool (V,)."""
        first = np.zeros(self.num_visits, np.bool_)
        first[self.patient_offsets[:-1]] = True
        return first


def previous(population: Population, lists: CodeLists) -> CodeLists:
    """Shifts lists by one visit within each patient; a first visit gets an empty list."""
    later = ~population.is_first_visit()
    shifted = lists.take(np.maximum(np.arange(population.num_visits) - 1, 0))
    kept = np.repeat(later, shifted.counts)
    offsets = np.concatenate([[0], np.cumsum(shifted.counts * later)])
    return CodeLists(shifted.ids[kept], offsets)


def stream(seed: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose (`MODEL_STREAM`, …), independent of the others'."""
    return np.random.default_rng(np.random.SeedSequence((seed, purpose)))


def generate(config: SyntheticConfig, seed: int) -> Population:
    """Draws a population.

    Each visit has at least one diagnosis, one procedure and one medication, by drawing again what
    lacks one; each patient at least two visits. The same config and seed give the same population.
    """
    model = draw_model(config, stream(seed, MODEL_STREAM))
    rng = stream(seed, PATIENT_STREAM)
    counts = visit_counts(config.num_patients, config.num_visits, rng)
    found: list[tuple[_Pairs, _Pairs]] = []
    first = 0
    for start in range(0, len(counts), _CHUNK_PATIENTS):
        chunk = counts[start : start + _CHUNK_PATIENTS]
        found += _draw_patients(model, chunk, first, rng)
        first += int(chunk.sum())
    codes = _Pairs.joined([pairs for pairs, _ in found])
    medications = _Pairs.joined([pairs for _, pairs in found])
    is_procedure = codes.code >= len(model.diagnoses)
    return Population(
        config=config,
        seed=seed,
        model=model,
        patient_offsets=np.concatenate([[0], np.cumsum(counts)]),
        diagnoses=codes.where(~is_procedure, 0).lists(first, rng.random(len(codes.code))),
        procedures=codes.where(is_procedure, len(model.diagnoses)).lists(
            first, rng.random(len(codes.code))
        ),
        medications=medications.lists(first, medications.code),
    )


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Codes that are present: a visit and a code each."""

    visit: NDArray[np.int64]
    code: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: list["_Pairs"]) -> "_Pairs":
        return cls(
            np.concatenate([part.visit for part in parts]),
            np.concatenate([part.code for part in parts]),
        )

    def where(self, chosen: Bools, subtract: int) -> "_Pairs":
        return _Pairs(self.visit[chosen], self.code[chosen] - subtract)

    def lists(self, num_visits: int, key: NDArray[np.float64] | NDArray[np.int64]) -> CodeLists:
        """Code lists of the visits, ordered by `key` within a visit."""
        order = np.lexsort((key[: len(self.visit)], self.visit))
        counts = np.bincount(self.visit, minlength=num_visits)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return CodeLists(self.code[order].astype(np.int32), offsets)


def _draw_patients(
    model: Model, counts: NDArray[np.int64], first: int, rng: np.random.Generator
) -> list[tuple[_Pairs, _Pairs]]:
    """Draws patients visit by visit, all patients' t-th visits at once.

    Args:
        model: the parameters.
        counts: (patients,), visits of each.
        first: index of the first patient's first visit.
        rng: source of the noise.

    Returns:
        For each t, the (visit, code) and (visit, medication) pairs.
    """
    starts = first + np.cumsum(counts) - counts
    found = []
    codes: Bools | None = None
    medications = np.zeros((len(counts), len(model.medications)), np.bool_)
    before = np.arange(len(counts))
    for t in range(int(counts.max())):
        patients = np.flatnonzero(counts > t)
        still = np.searchsorted(before, patients)
        previous = None if codes is None else codes[:, still]
        codes = draw_codes(model, len(patients), previous, rng)
        row, code = np.nonzero(codes.T)
        present = sparse.csr_array(
            (np.ones(len(row)), (row, code)), shape=(len(patients), model.num_codes)
        )
        log_miss = draft_log_miss(model, present, medications[still])
        medications = draw_medications(model, log_miss, rng)
        visits = starts[patients] + t
        medication_row, medication = np.nonzero(medications)
        found.append((_Pairs(visits[row], code), _Pairs(visits[medication_row], medication)))
        before = patients
    return found
