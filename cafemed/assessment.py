"""What a published model reaches on the test patients, beside baselines and the ceiling.

The artifact of `jobs/evaluate.py`, stage "evaluation": `report.json`, `report.html`,
`model_card.json`, `model_card.md`. Nothing in it is at patient level.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import (
    artifacts,
    baselines,
    card_text,
    evaluation,
    evaluation_page,
    fits,
    metrics,
    subgroups,
    suppression,
)
from cafemed.batches import VisitArrays
from cafemed.calibration import Decision, Predictions, Reliability
from cafemed.cohort import Cohort, Split
from cafemed.config import Range
from cafemed.errors import DataError

STAGE = "evaluation"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is evaluated (section `evaluation`).

    Attributes:
        seed: of the bootstraps, and of the ceiling's simulation.
        ceiling_draws: simulated visits behind each probability of the ceiling, where one has to be
            simulated.
    """

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    ceiling_draws: Annotated[int, Range(2)] = 200


_NAMES = tuple(field.name for field in dataclasses.fields(metrics.Metrics))

#: Characters of a value with its interval.
_WIDTH = {name: 20 if name == "num_medications" else 22 for name in _NAMES}


def measure(
    model: nn.Module,
    arrays: VisitArrays,
    cohort: Cohort,
    decision: Decision,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measures a model on validation and test patients, and the baselines on the test patients.

    Args:
        model: on `device`.
        arrays: of the whole cohort, with the model's graph.
        cohort: gives split, interacting pairs, sex, ages and previous medications.
        decision: temperature and threshold, as they are served.
        seed: of the bootstraps.
        device: where the model is.

    Returns:
        JSON values: "model" (`fits.measure`), and on the test patients "subgroups"
        (`subgroups.measure`), "reliability" ("before" and "after" temperature, rows of
        `reliability`), and "baselines", name → "metrics", "intervals", "bootstrap_mean" and
        "bootstrap_sd".

    Raises:
        DataError: if a split has no patients.
    """
    patients: dict[Split, NDArray[np.int64]] = {
        "train": cohort.patients_of("train"),
        "validation": cohort.patients_of("validation"),
        "test": cohort.patients_of("test"),
    }
    for split, found in patients.items():
        if len(found) == 0:
            raise DataError(f"the {split} split has no patients; expected at least one")
    test = patients["test"]
    makers = {"most frequent": baselines.most_frequent, "last visit": baselines.last_visit}
    scores = {name: make(arrays, patients["train"], test) for name, make in makers.items()}
    predictions = fits.predict(model, arrays, patients, device)
    of_test = predictions["test"]
    return {
        "model": fits.measure(predictions, cohort.ddi, decision, seed),
        "subgroups": subgroups.measure(
            of_test.probabilities(decision.temperature),
            of_test.targets,
            subgroups.Visits.of(cohort, test),
            cohort.ddi,
            decision.threshold,
            seed,
        ),
        "reliability": {
            "before": reliability(of_test, 1.0),
            "after": reliability(of_test, decision.temperature),
        },
        "baselines": {
            name: _measure(values, of_test, cohort.ddi, seed) for name, values in scores.items()
        },
    }


def has_ceiling(made_from: Mapping[str, Any], truth_folder: Path) -> bool:
    """Says whether the best possible predictions can be known for a cohort.

    Args:
        made_from: the configuration in the cohort's manifest. `protocol=published` orders visits by
            identifier, and then the previous visit of the population is not that of the cohort.
        truth_folder: where the population's truth would be.
    """
    known = made_from["source"] == "synthetic" and made_from["protocol"] == "clean"
    return known and truth_folder.is_dir()


def measure_ceiling(
    truth_folder: Path,
    cohort: Cohort,
    arrays: VisitArrays,
    config: EvaluationConfig,
    target_window_h: float | None,
) -> dict[str, Any]:
    """Measures the best possible predictions for the test patients of a synthetic cohort.

    Args:
        truth_folder: of the population that the cohort was made from.
        cohort: see `ceiling.bayes_probabilities`.
        arrays: of the whole cohort.
        config: see EvaluationConfig.
        target_window_h: the cohort's.

    Returns:
        JSON values of `ceiling.Summary`.
    """
    from cafemed.synthetic import ceiling  # needed for synthetic cohorts alone

    test = cohort.patients_of("test")
    probabilities, errors = ceiling.bayes_probabilities(
        truth_folder,
        cohort,
        cohort.visits_of(test),
        num_draws=config.ceiling_draws,
        seed=config.seed,
        target_window_h=target_window_h,
    )
    found = ceiling.summary(
        probabilities,
        errors,
        evaluation.targets(arrays, test),
        evaluation.patient_offsets(arrays, test),
        cohort.ddi,
        seed=config.seed,
    )
    return found.as_dict()


def write(
    folder: Path,
    sources: Mapping[str, str],
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Writes the artifact, whole or not at all.

    Args:
        folder: of the artifact.
        sources: fingerprints of cohort and bundle.
        config: what else decides the result; JSON values.
        report: of `measure`, with "ceiling" where there is one.
        card: of `card.make`.
    """
    contents = {
        "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "report.html": evaluation_page.render(card, report["reliability"]),
        "model_card.json": json.dumps(card, indent=1, allow_nan=False) + "\n",
        "model_card.md": card_text.markdown(card),
    }
    with artifacts.new_folder(folder, STAGE, sources, config) as (partial, summary):
        for name, text in contents.items():
            (partial / name).write_text(text)
        summary |= {
            name: report[name] for name in ("model", "baselines", "ceiling") if name in report
        }


def describe(report: Mapping[str, Any]) -> str:
    """The report as a table, one row for each of model, baselines and ceiling on the test split.

    In brackets the 95 % interval over patients.
    """
    model = report["model"]
    test = model["test"]
    rows = [("model", f"{model['threshold']:.2f}", test["metrics"], test["intervals"])]
    if model["best_threshold"] != model["threshold"]:
        at_best = test["metrics_at_best_threshold"]
        rows.append(("model", f"{model['best_threshold']:.2f}", at_best, None))
    rows += [
        (name, "", found["metrics"], found["intervals"])
        for name, found in report["baselines"].items()
    ]
    ceiling = report.get("ceiling")
    if ceiling is not None:
        rows.append(("ceiling", "0.50", ceiling["at_half"], None))
        rows.append(("ceiling", f"{ceiling['threshold']:.2f}", ceiling["at_best"], None))
    lines = [
        f"{test['patients']:,} test patients, {test['visits']:,} visits",
        f"{'':<14} {'threshold':>9} {' '.join(f'{n:<{_WIDTH[n]}}' for n in _NAMES)}".rstrip(),
    ]
    for name, threshold, found, ends in rows:
        cells = [_cell(n, found[n], None if ends is None else ends[n]) for n in _NAMES]
        lines.append(f"{name:<14} {threshold:>9} {' '.join(cells)}".rstrip())
    return "\n".join([*lines, *fits.calibration_lines(model)])


def _cell(name: str, value: float, ends: list[float] | None) -> str:
    digits = 2 if name == "num_medications" else 4
    text = f"{value:.{digits}f}"
    if ends is not None:
        text += f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{text:<{_WIDTH[name]}}"


def _measure(
    scores: NDArray[np.float32], given: Predictions, ddi: NDArray[np.bool_], seed: int
) -> dict[str, Any]:
    """Metrics of a baseline's scores for the visits of `given`."""
    offsets = given.patient_offsets
    of_visits = metrics.score_visits(scores, given.targets, ddi)
    drawn = metrics.bootstrap(of_visits, offsets, seed=seed)
    return {
        "metrics": metrics.aggregate(of_visits, offsets).as_dict(),
        "intervals": metrics.intervals(of_visits, offsets, seed=seed).as_dict(),
        "bootstrap_mean": drawn.mean.as_dict(),
        "bootstrap_sd": drawn.sd.as_dict(),
    }


def reliability(predictions: Predictions, temperature: float) -> list[dict[str, Any]]:
    """The reliability table, a row for every bin with pairs.

    Each has its edges "low" and "high", and either "hidden" (too few patients) or its "pairs",
    mean "probability" and the "share" of them that were given.
    """
    table = Reliability.of(predictions, temperature)
    kept_back = suppression.hidden(table.present, counted=False)
    rows = []
    for b in np.flatnonzero(table.pairs).tolist():
        row: dict[str, Any] = {"low": float(table.edges[b]), "high": float(table.edges[b + 1])}
        if kept_back[b]:
            row["hidden"] = True
        else:
            row["pairs"] = int(table.pairs[b])
            row["probability"] = float(table.probability[b])
            row["share"] = float(table.share[b])
        rows.append(row)
    return rows
