"""Invented visits of the shape of MIMIC-III's and MIMIC-IV's cohorts, made in seconds.

Only the shape is theirs: numbers of patients, visits and codes, and their spread. Codes are drawn
independently, some far oftener than others; node classes are drawn, and so are effects, of which
EDGES are above 0.2 (CausalMed's edges). Nothing can be learned from them.
"""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cafemed.batches import ModelInputs, VisitArrays

#: Share of pairs of code and medication with an effect above 0.2.
EDGES = 0.05
#: Interacting pairs of medications, and molecules, of MIMIC-III's tables.
DDI_PAIRS, MOLECULES = 448, 284
#: Most visits of a patient.
MAX_VISITS = 29
#: Spread of the numbers of visits and of codes: shapes of the gamma distributions of their means.
_VISITS_SPREAD, _CODES_SPREAD = 0.04, 4.0
#: How much oftener some codes are than others: code = N u^3.
_SKEW = 3
#: Cause, orphan, middle, effect.
_CLASSES = (0.2, 0.55, 0.1, 0.15)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a cohort is like.

    Attributes:
        name: in the table.
        splits: (patients, visits) of the training and the test split, and of all others.
        sizes: (N_d, N_p, N_m).
        codes: mean diagnoses, procedures and medications of a visit.
    """

    name: str
    splits: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    sizes: tuple[int, int, int]
    codes: tuple[float, float, float]

    @property
    def train(self) -> NDArray[np.int64]:
        """Indices of the training patients."""
        return np.arange(self.splits[0][0])

    @property
    def test(self) -> NDArray[np.int64]:
        """Indices of the test patients."""
        return self.splits[0][0] + np.arange(self.splits[1][0])


_MIMIC3 = ((4_233, 10_006), (1_058, 2_552), (1_059, 2_474))
_MIMIC4 = ((40_083, 104_540), (10_021, 26_135), (10_021, 26_135))
_LIGHT, _HEAVY = (10.5, 3.8, 11.6), (14.0, 4.8, 19.5)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mimic3 light", _MIMIC3, (1_958, 1_430, 131), _LIGHT),
        Shape("mimic3 heavy", _MIMIC3, (1_958, 1_430, 131), _HEAVY),
        Shape("mimic4 light", _MIMIC4, (2_000, 1_500, 131), _LIGHT),
        Shape("tiny", ((64, 150), (16, 40), (8, 20)), (60, 40, 20), (4.0, 2.0, 4.0)),
    )
}


def arrays(shape: Shape, seed: int) -> VisitArrays:
    """Draws the visits of a whole cohort: training, test and other patients."""
    rng = np.random.default_rng(seed)
    visits = np.concatenate([_visits(rng, *split) for split in shape.splits])
    offsets = np.concatenate([[0], np.cumsum(visits)])
    is_first = np.zeros(offsets[-1], np.bool_)
    is_first[offsets[:-1]] = True
    drawn = [
        _codes(rng, len(is_first), *pair) for pair in zip(shape.sizes, shape.codes, strict=True)
    ]
    given, num_given = drawn[2]
    targets = np.zeros((len(is_first), shape.sizes[2]), np.bool_)
    exists = np.arange(given.shape[1]) < num_given[:, None]
    targets[np.nonzero(exists)[0], given[exists]] = True
    drawn[2] = (np.roll(given, 1, 0), np.where(is_first, 0, np.roll(num_given, 1)))
    counts = np.stack([number for _, number in drawn], 1).astype(np.int32)
    codes = np.zeros((len(is_first), 3, int(counts.max())), np.int32)
    for k, (ids, number) in enumerate(drawn):
        width = int(number.max())
        codes[:, k, :width] = np.where(np.arange(width) < number[:, None], ids[:, :width], 0)
    return VisitArrays(
        codes=codes,
        counts=counts,
        classes=rng.choice(len(_CLASSES), codes.shape, p=_CLASSES).astype(np.int8),
        targets=targets,
        patient_offsets=offsets,
        sex=rng.integers(0, 3, len(visits)).astype(np.int8),
        age=rng.standard_normal(len(is_first), np.float32),
        laboratory_items=np.zeros((len(is_first), 0), np.int32),
        laboratory_values=np.zeros((len(is_first), 0), np.float32),
        laboratory_counts=np.zeros(len(is_first), np.int32),
        sizes=shape.sizes,
    )


def inputs(shape: Shape, seed: int) -> ModelInputs:
    """Draws effects, interacting pairs and molecules."""
    rng = np.random.default_rng((seed, 1))
    num_codes, num_medications = sum(shape.sizes[:2]), shape.sizes[2]
    effects = rng.normal(0, 0.03, (num_codes, num_medications))
    large = rng.random(effects.shape) < EDGES
    effects[large] = rng.uniform(0.2, 0.9, int(large.sum()))
    upper = np.argwhere(np.triu(np.ones((num_medications, num_medications), np.bool_), 1))
    pairs = upper[rng.choice(len(upper), min(DDI_PAIRS, len(upper) // 2), replace=False)]
    ddi = np.zeros((num_medications, num_medications), np.bool_)
    ddi[pairs[:, 0], pairs[:, 1]] = ddi[pairs[:, 1], pairs[:, 0]] = True
    molecules = np.zeros((num_medications, MOLECULES), np.bool_)
    molecules[rng.integers(0, num_medications, MOLECULES), np.arange(MOLECULES)] = True
    return ModelInputs(shape.sizes, effects.astype(np.float32), ddi, 0, molecules)


def prefixes(arrays: VisitArrays, visits: NDArray[np.int64]) -> VisitArrays:
    """Gives each of the visits a patient of its own: its patient's visits up to it."""
    owner = np.searchsorted(arrays.patient_offsets, visits, side="right") - 1
    starts = arrays.patient_offsets[owner]
    rows = np.concatenate([np.arange(a, v + 1) for a, v in zip(starts, visits, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(visits + 1 - starts)])
    per_visit = {
        field.name: getattr(arrays, field.name)[rows]
        for field in dataclasses.fields(arrays)
        if field.name not in ("patient_offsets", "sex", "sizes")
    }
    changed = {**per_visit, "patient_offsets": offsets, "sex": arrays.sex[owner]}
    return dataclasses.replace(arrays, **changed)


def save(arrays: VisitArrays, folder: Path) -> None:
    """Writes the arrays into a new folder, a file each."""
    folder.mkdir()
    for field in dataclasses.fields(arrays):
        np.save(folder / f"{field.name}.npy", np.asarray(getattr(arrays, field.name)))


def load(folder: Path) -> VisitArrays:
    """Reads what `save` wrote."""
    found = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    return VisitArrays(**{**found, "sizes": tuple(found["sizes"].tolist())})


def _visits(rng: np.random.Generator, num_patients: int, num_visits: int) -> NDArray[np.int64]:
    """Numbers of visits, at least 2 and at most MAX_VISITS, `num_visits` in all; few have many."""
    chance = rng.gamma(_VISITS_SPREAD, size=num_patients)
    visits = np.full(num_patients, 2)
    while (left := num_visits - int(visits.sum())) > 0:
        open_ = np.where(visits < MAX_VISITS, chance + 1e-12, 0)
        visits = np.minimum(visits + rng.multinomial(left, open_ / open_.sum()), MAX_VISITS)
    return visits


def _codes(
    rng: np.random.Generator, num_visits: int, size: int, mean: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws lists of different codes; int (V, L), and how many of each row count, int (V,)."""
    rate = rng.gamma(_CODES_SPREAD, mean / _CODES_SPREAD, num_visits)
    number = np.minimum(rng.poisson(rate), size // 2)
    width = int(number.max())
    # Sorted draws from a vocabulary too small by `width`, moved apart, differ; then shuffled.
    chosen = ((size - width) * rng.random((num_visits, width)) ** _SKEW).astype(np.int64)
    chosen = np.sort(chosen, axis=1) + np.arange(width)
    return rng.permuted(chosen, axis=1), number
