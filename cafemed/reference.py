"""What a served model is held against: the scores it gave when it was made, and a self-check.

The self-check is a handful of invented patients, drawn at random from the vocabularies and like
nobody, with the logits that the model gave them. A program that loads the model elsewhere (another
machine, another build of torch, an edited option) computes them again and compares.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import untrusted
from cafemed.batches import VisitArrays, collate, visit_arrays
from cafemed.codes import KINDS, LABORATORY, CodeLists
from cafemed.cohort import SEXES
from cafemed.errors import ArtifactError
from cafemed.graphs import CausalGraph
from cafemed.laboratory import Laboratory
from cafemed.scaling import Scaling

NUM_BINS = 20
#: Largest difference of a logit between machines that is still rounding: float32 sums of a few
#: thousand terms differ by about 1e-5 between instruction sets (an assumption, with a margin).
TOLERANCE = 1e-3

_VISITS_PER_PATIENT = (1, 2, 4)
_MAX_CODES = 6
#: What a self-check that somebody else wrote may have; ours has a tenth of it.
_MAX_VISITS, _MAX_LISTED, _MAX_AGE = 100, 100, 200.0
_MAX_REASON = 100
_LISTS = ("diagnoses", "procedures", "previous_medications")  # keys in the order of KINDS


@dataclasses.dataclass(frozen=True)
class ScoreHistogram:
    """How a model's probabilities on the validation visits were spread; drift is measured from it.

    Attributes:
        edges: float64 (bins + 1,), ascending from 0 to 1.
        shares: float64 (bins,), share of all (visit, medication) probabilities; sums to 1.
    """

    edges: NDArray[np.float64]
    shares: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """Invented patients and the logits that a model has to give them.

    Attributes:
        patients: one mapping a patient: `sex` and `visits`, each with `age` (years), the code
            lists `diagnoses`, `procedures`, `previous_medications`, and `laboratory`, a mapping of
            item to value in the item's unit.
        logits: float32 (visits of all patients, N_m).
        tolerance: largest allowed absolute difference of a logit.
    """

    patients: tuple[Mapping[str, Any], ...]
    logits: NDArray[np.float32]
    tolerance: float = TOLERANCE


@dataclasses.dataclass(frozen=True)
class Reference:
    """Content of `reference.json`."""

    scores: ScoreHistogram
    self_check: SelfCheck


def score_histogram(probabilities: NDArray[np.floating]) -> ScoreHistogram:
    """Counts probabilities (any shape, in [0, 1]) into NUM_BINS equal bins."""
    counts, edges = np.histogram(probabilities, bins=NUM_BINS, range=(0.0, 1.0))
    return ScoreHistogram(edges, counts / max(counts.sum(), 1))


def invent_patients(
    vocabularies: Mapping[str, tuple[str, ...]], scaling: Scaling, seed: int = 0
) -> tuple[dict[str, Any], ...]:
    """Draws patients for a self-check: random codes, at most six of a kind in a visit.

    Laboratory values are drawn around each item's mean.
    """
    random = np.random.default_rng(seed)

    def draw(kind: str) -> list[str]:
        vocabulary = vocabularies[kind]
        if not vocabulary:  # a cohort without procedures
            return []
        most = min(_MAX_CODES, len(vocabulary))
        chosen = random.choice(len(vocabulary), int(random.integers(1, most + 1)), replace=False)
        return [vocabulary[i] for i in chosen]

    def measure() -> dict[str, float]:
        items = vocabularies.get(LABORATORY, ())
        if not items:
            return {}
        most = min(_MAX_CODES, len(items))
        chosen = random.choice(len(items), int(random.integers(0, most + 1)), replace=False)
        mean, sd = scaling.laboratory_mean, scaling.laboratory_sd
        return {items[i]: mean[i] + sd[i] * float(random.normal()) for i in chosen}

    def visit(number: int) -> dict[str, Any]:
        lists = {key: draw(kind) for key, kind in zip(_LISTS, KINDS, strict=True)}
        if number == 0:  # nothing was prescribed before a first visit
            lists["previous_medications"] = []
        age = float(random.integers(20, 90))
        return {"age": age, **lists, "laboratory": measure()}

    return tuple(
        {"sex": SEXES[i % len(SEXES)], "visits": [visit(t) for t in range(length)]}
        for i, length in enumerate(_VISITS_PER_PATIENT)
    )


def make_self_check(
    model: nn.Module,
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
) -> SelfCheck:
    """Invents patients and records what the model answers."""
    patients = invent_patients(vocabularies, scaling)
    return SelfCheck(patients, _logits(model, patients, graph, vocabularies, scaling))


def run_self_check(
    check: SelfCheck,
    model: nn.Module,
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
) -> float:
    """Computes the logits again; gives the largest absolute difference.

    Raises:
        ArtifactError: if a logit differs by more than the tolerance, or is not finite.
    """
    logits = _logits(model, check.patients, graph, vocabularies, scaling)
    difference = float(np.max(np.abs(logits - check.logits), initial=0.0))
    if not difference <= check.tolerance:  # also refuses NaN
        raise ArtifactError(
            f"reference.json: self_check: expected the recorded logits within {check.tolerance:g}, "
            f"got a difference of {difference:.3g}; this model or torch build is not the one that "
            "was evaluated"
        )
    return difference


def to_json(reference: Reference) -> dict[str, Any]:
    """The plain content of `reference.json`."""
    return {
        "score_histogram": {
            "edges": reference.scores.edges.tolist(),
            "shares": reference.scores.shares.tolist(),
        },
        "self_check": {
            "patients": list(reference.self_check.patients),
            "logits": reference.self_check.logits.astype(float).tolist(),
            "tolerance": reference.self_check.tolerance,
        },
    }


def from_json(content: Mapping[str, Any], vocabularies: Mapping[str, tuple[str, ...]]) -> Reference:
    """Reads the content of `reference.json` and holds it against the vocabularies.

    Raises:
        ArtifactError: for missing keys, wrong shapes, unknown codes, and numbers that are not
            finite.
    """
    try:
        histogram, check = content["score_histogram"], content["self_check"]
        reference = Reference(
            ScoreHistogram(
                np.array(histogram["edges"], np.float64), np.array(histogram["shares"], np.float64)
            ),
            SelfCheck(
                tuple(check["patients"]),
                np.array(check["logits"], np.float32),
                float(check["tolerance"]),
            ),
        )
        _require_few(reference.self_check.patients)
        offsets, _ = _code_lists(reference.self_check.patients, vocabularies)
        measured = _laboratory(reference.self_check.patients, vocabularies).values
    except untrusted.STRANGE as err:
        reason = f"{type(err).__name__}: {str(err)[:_MAX_REASON]}"
        raise ArtifactError(
            f"reference.json: not a reference of this vocabulary ({reason})"
        ) from err
    _require_shapes(reference, int(offsets[-1]), len(vocabularies["medication"]))
    if not np.isfinite(measured).all():
        raise ArtifactError("reference.json: expected finite laboratory values")
    return reference


def _require_few(patients: tuple[Mapping[str, Any], ...]) -> None:
    """Bounds the work of a self-check; ValueError for more, or what is no patient."""
    visits = [visit for patient in patients for visit in patient["visits"]]
    if len(visits) > _MAX_VISITS:
        raise ValueError(f"expected at most {_MAX_VISITS} visits")
    for patient in patients:
        if patient["sex"] not in SEXES or not patient["visits"]:
            raise ValueError("expected a sex and visits of every patient")
    for visit in visits:
        if not math.isfinite(visit["age"]) or abs(visit["age"]) > _MAX_AGE:
            raise ValueError("expected an age of every visit")
        if any(len(visit[key]) > _MAX_LISTED for key in (*_LISTS, "laboratory")):
            raise ValueError(f"expected at most {_MAX_LISTED} codes of a kind in a visit")


def _require_shapes(reference: Reference, num_visits: int, num_medications: int) -> None:
    scores, check = reference.scores, reference.self_check
    if scores.edges.ndim != 1 or scores.shares.shape != (len(scores.edges) - 1,):
        raise ArtifactError(
            f"reference.json: score_histogram: {scores.edges.shape} edges do not bound "
            f"{scores.shares.shape} shares"
        )
    if check.logits.shape != (num_visits, num_medications):
        raise ArtifactError(
            f"reference.json: self_check.logits: expected shape {(num_visits, num_medications)}, "
            f"got {check.logits.shape}"
        )
    finite = all(np.isfinite(x).all() for x in (scores.edges, scores.shares, check.logits))
    if not finite or not 0 < check.tolerance <= TOLERANCE:
        raise ArtifactError(
            f"reference.json: expected finite numbers and a tolerance in (0, {TOLERANCE:g}]"
        )


def _code_lists(
    patients: tuple[Mapping[str, Any], ...], vocabularies: Mapping[str, tuple[str, ...]]
) -> tuple[NDArray[np.int64], tuple[CodeLists, CodeLists, CodeLists]]:
    """Patient offsets and the indices of every visit's codes; KeyError for an unknown code."""
    lengths = [len(patient["visits"]) for patient in patients]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    visits = [visit for patient in patients for visit in patient["visits"]]

    def indices(key: str, kind: str) -> CodeLists:
        position = {code: i for i, code in enumerate(vocabularies[kind])}
        return CodeLists.of([[position[code] for code in visit[key]] for visit in visits])

    diagnoses, procedures, medications = map(indices, _LISTS, KINDS)
    return offsets, (diagnoses, procedures, medications)


def _laboratory(
    patients: tuple[Mapping[str, Any], ...], vocabularies: Mapping[str, tuple[str, ...]]
) -> Laboratory:
    """Laboratory values of every visit; KeyError for an unknown item."""
    position = {item: i for i, item in enumerate(vocabularies.get(LABORATORY, ()))}
    visits = [visit["laboratory"] for patient in patients for visit in patient["visits"]]
    items = CodeLists.of([[position[item] for item in measured] for measured in visits])
    return Laboratory(items, np.array([v for m in visits for v in m.values()], np.float32))


def _arrays(
    patients: tuple[Mapping[str, Any], ...],
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
) -> VisitArrays:
    offsets, known = _code_lists(patients, vocabularies)
    sex = np.array([SEXES.index(patient["sex"]) for patient in patients], np.int8)
    age = np.array([visit["age"] for p in patients for visit in p["visits"]], np.float32)
    laboratory = _laboratory(patients, vocabularies)
    return visit_arrays(known, None, offsets, graph, vocabularies, sex, age, scaling, laboratory)


def _logits(
    model: nn.Module,
    patients: tuple[Mapping[str, Any], ...],
    graph: CausalGraph,
    vocabularies: Mapping[str, tuple[str, ...]],
    scaling: Scaling,
) -> NDArray[np.float32]:
    """Logits of every visit in evaluation mode, float32 (V, N_m); the mode is put back."""
    arrays = _arrays(patients, graph, vocabularies, scaling)
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        batch = collate(arrays, np.arange(len(patients))).to(device)
        logits = batch.flatten(model(batch)).float().cpu().numpy()
    model.train(was_training)
    return np.asarray(logits, np.float32)
