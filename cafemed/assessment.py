"""What a published model reaches on the test patients, beside baselines and the ceiling.

The artifact of `jobs/evaluate.py`, stage "evaluation": `report.json`. Nothing at patient level.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import baselines, evaluation, fits, metrics
from cafemed.batches import VisitArrays
from cafemed.cohort import Cohort, Split
from cafemed.config import Range
from cafemed.errors import DataError

STAGE = "evaluation"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is evaluated (section `evaluation`).

    Attributes:
        seed: of the bootstrap, and of the ceiling's simulation.
        ceiling_draws: simulated visits behind each probability of the ceiling, where one has to be
            simulated.
    """

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    ceiling_draws: Annotated[int, Range(2)] = 200


_NAMES = tuple(field.name for field in dataclasses.fields(metrics.Metrics))


def measure(
    model: nn.Module,
    arrays: VisitArrays,
    cohort: Cohort,
    threshold: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measures a model on validation and test patients, and the baselines on the test patients.

    Args:
        model: on `device`.
        arrays: of the whole cohort, with the model's graph.
        cohort: gives split and interacting pairs.
        threshold: of the predicted sets.
        seed: of the bootstrap.
        device: where the model is.

    Returns:
        JSON values: "model" (`fits.measure`) and "baselines", name → "metrics",
        "bootstrap_mean" and "bootstrap_sd" on the test patients.

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
    return {
        "model": fits.measure(
            model,
            arrays,
            {"validation": patients["validation"], "test": test},
            cohort.ddi,
            threshold,
            seed,
            device,
        ),
        "baselines": {
            name: _measure(values, arrays, test, cohort.ddi, seed)
            for name, values in scores.items()
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


def describe(report: Mapping[str, Any]) -> str:
    """The report as a table, one row for each of model, baselines and ceiling on the test split.

    ± is the spread of ten draws of 80 % of the patients, as the literature gives it.
    """
    model = report["model"]
    test = model["test"]
    rows = [("model", f"{model['threshold']:.2f}", test["metrics"], test["bootstrap_sd"])]
    rows.append(
        ("model", f"{model['best_threshold']:.2f}", test["metrics_at_best_threshold"], None)
    )
    rows += [
        (name, "", found["metrics"], found["bootstrap_sd"])
        for name, found in report["baselines"].items()
    ]
    ceiling = report.get("ceiling")
    if ceiling is not None:
        rows.append(("ceiling", "0.50", ceiling["at_half"], None))
        rows.append(("ceiling", f"{ceiling['threshold']:.2f}", ceiling["at_best"], None))
    lines = [
        f"{test['patients']:,} test patients, {test['visits']:,} visits",
        f"{'':<14} {'threshold':>9} " + " ".join(f"{name:>16}" for name in _NAMES),
    ]
    for name, threshold, found, spread in rows:
        cells = [
            f"{found[n]:.4f}" + ("" if spread is None else f" ±{spread[n]:.4f}") for n in _NAMES
        ]
        lines.append(f"{name:<14} {threshold:>9} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _measure(
    scores: NDArray[np.float32],
    arrays: VisitArrays,
    patients: NDArray[np.int64],
    ddi: NDArray[np.bool_],
    seed: int,
) -> dict[str, Any]:
    offsets = evaluation.patient_offsets(arrays, patients)
    of_visits = metrics.score_visits(scores, evaluation.targets(arrays, patients), ddi)
    drawn = metrics.bootstrap(of_visits, offsets, seed=seed)
    return {
        "metrics": metrics.aggregate(of_visits, offsets).as_dict(),
        "bootstrap_mean": drawn.mean.as_dict(),
        "bootstrap_sd": drawn.sd.as_dict(),
    }
