"""The artifact of a single training run, stage "fit", and what it measured.

Files: `model.safetensors` (weights of the best epoch), `config.json` (model and training),
`metrics.json`, `history.json` (every epoch), `manifest.json`. Nothing at patient level.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import artifacts, calibration, metrics
from cafemed.batches import VisitArrays
from cafemed.calibration import Decision, Predictions
from cafemed.cohort import Split
from cafemed.training import FitResult

STAGE = "fit"

_MEASURED: tuple[Split, ...] = ("validation", "test")


def write(
    folder: Path,
    sources: Mapping[str, str],
    config: Mapping[str, Any],
    result: FitResult,
    measured: Mapping[str, Any],
) -> None:
    """Writes the artifact, whole or not at all.

    Args:
        folder: of the artifact.
        sources: fingerprints of cohort and graph.
        config: {"model": {"name", "options"}, "train": {…}, "calibration": {…}}; JSON values.
        result: of `training.fit`.
        measured: of `measure`.
    """
    with artifacts.new_folder(folder, STAGE, sources, config) as (partial, report):
        safetensors.torch.save_file(
            {name: t.contiguous() for name, t in result.weights.items()},
            partial / "model.safetensors",
        )
        history = [epoch.as_dict() for epoch in result.history]
        contents = {"config": config, "metrics": measured, "history": history}
        for name, content in contents.items():
            (partial / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        report |= {"best_epoch": result.best_epoch, "epochs": len(history), "metrics": measured}


def predict(
    model: nn.Module,
    arrays: VisitArrays,
    patients: Mapping[Split, NDArray[np.int64]],
    device: torch.device | str = "cpu",
) -> dict[Split, Predictions]:
    """Runs a model, which is on `device`, on the validation and test patients.

    Args:
        model: trained.
        arrays: of the whole cohort.
        patients: of "validation" (at least one) and "test" (left out if there are none).
        device: where the model is.
    """
    return {
        split: Predictions.of(model, arrays, patients[split], device)
        for split in _MEASURED
        if len(patients[split])
    }


def measure(
    predictions: Mapping[Split, Predictions],
    ddi: NDArray[np.bool_],
    decision: Decision,
    seed: int,
) -> dict[str, Any]:
    """Measures what is recommended, and what would be at the threshold best for validation Jaccard.

    Args:
        predictions: of "validation" and perhaps "test".
        ddi: bool (N_m, N_m).
        decision: temperature and threshold.
        seed: of the bootstraps.

    Returns:
        JSON values: "temperature", "threshold", "best_threshold" (after temperature), and for each
        split its numbers of "patients" and "visits", "metrics" with "intervals" (name → [low,
        high]), "bootstrap_mean" and "bootstrap_sd", "metrics_at_best_threshold", and "calibration"
        (`calibration.measure`).
    """
    probabilities = {
        split: found.probabilities(decision.temperature) for split, found in predictions.items()
    }
    chosen = predictions["validation"]
    best, _ = metrics.best_threshold(
        probabilities["validation"], chosen.targets, chosen.patient_offsets
    )
    measured: dict[str, Any] = {**dataclasses.asdict(decision), "best_threshold": best}
    for split, found in predictions.items():
        offsets = found.patient_offsets
        scores = metrics.score_visits(probabilities[split], found.targets, ddi, decision.threshold)
        at_best = metrics.evaluate(probabilities[split], found.targets, offsets, ddi, best)
        drawn = metrics.bootstrap(scores, offsets, seed=seed)
        measured[split] = {
            "patients": found.num_patients,
            "visits": found.num_visits,
            "metrics": metrics.aggregate(scores, offsets).as_dict(),
            "intervals": metrics.intervals(scores, offsets, seed=seed).as_dict(),
            "bootstrap_mean": drawn.mean.as_dict(),
            "bootstrap_sd": drawn.sd.as_dict(),
            "metrics_at_best_threshold": at_best.as_dict(),
            "calibration": calibration.measure(found, decision.temperature),
        }
    return measured


def describe(measured: Mapping[str, Any]) -> str:
    """A table of `measure`'s result, one row a split and threshold; ± is the bootstrap's."""
    names = [field.name for field in dataclasses.fields(metrics.Metrics)]
    lines = [f"{'split':<11} {'threshold':>9} " + " ".join(f"{name:>16}" for name in names)]
    for split in _MEASURED:
        if split not in measured:
            continue
        row = measured[split]
        cells = [f"{row['metrics'][n]:.4f} ±{row['bootstrap_sd'][n]:.4f}" for n in names]
        lines.append(_row(split, measured["threshold"], cells))
        if measured["best_threshold"] != measured["threshold"]:
            cells = [f"{row['metrics_at_best_threshold'][name]:.4f}" for name in names]
            lines.append(_row(split, measured["best_threshold"], cells))
    return "\n".join([*lines, *calibration_lines(measured)])


def calibration_lines(measured: Mapping[str, Any]) -> list[str]:
    """What the temperature did, one line a split of `measure`'s result."""
    lines = []
    for split in _MEASURED:
        if split in measured:
            before, after = (measured[split]["calibration"][name] for name in ("before", "after"))
            lines.append(
                f"{split:<11} temperature {measured['temperature']:.3f}: calibration error "
                f"{before['ece']:.4f} → {after['ece']:.4f}, log loss {before['log_loss']:.4f} → "
                f"{after['log_loss']:.4f}"
            )
    return lines


def _row(split: str, threshold: float, cells: list[str]) -> str:
    return f"{split:<11} {threshold:>9.2f} " + " ".join(f"{cell:>16}" for cell in cells)
