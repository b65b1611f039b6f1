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

from cafemed import artifacts, metrics
from cafemed.batches import VisitArrays
from cafemed.cohort import Split
from cafemed.evaluation import EvaluationSet
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
        config: {"model": {"name", "options"}, "train": {…}}; JSON values.
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


def measure(
    model: nn.Module,
    arrays: VisitArrays,
    patients: Mapping[Split, NDArray[np.int64]],
    ddi: NDArray[np.bool_],
    threshold: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measures a trained model at its threshold and at the one best for validation Jaccard.

    Args:
        model: on `device`.
        arrays: of the whole cohort.
        patients: of "validation" (at least one) and "test" (left out if there are none).
        ddi: bool (N_m, N_m).
        threshold: of the predicted sets.
        seed: of the bootstrap.
        device: where the model is.

    Returns:
        JSON values: "threshold", "best_threshold", and for each split its numbers of "patients"
        and "visits", "metrics" with "bootstrap_mean" and "bootstrap_sd" at the threshold, and
        "metrics_at_best_threshold".
    """
    sets = {
        split: EvaluationSet.of(arrays, patients[split], device=device)
        for split in _MEASURED
        if len(patients[split])
    }
    predicted = {split: chosen.predict(model) for split, chosen in sets.items()}
    chosen = sets["validation"]
    best, _ = metrics.best_threshold(
        predicted["validation"], chosen.targets, chosen.patient_offsets
    )
    measured: dict[str, Any] = {"threshold": threshold, "best_threshold": best}
    for split, chosen in sets.items():
        offsets = chosen.patient_offsets
        scores = metrics.score_visits(predicted[split], chosen.targets, ddi, threshold)
        at_best = metrics.evaluate(predicted[split], chosen.targets, offsets, ddi, best)
        drawn = metrics.bootstrap(scores, offsets, seed=seed)
        measured[split] = {
            "patients": len(offsets) - 1,
            "visits": int(offsets[-1]),
            "metrics": metrics.aggregate(scores, offsets).as_dict(),
            "bootstrap_mean": drawn.mean.as_dict(),
            "bootstrap_sd": drawn.sd.as_dict(),
            "metrics_at_best_threshold": at_best.as_dict(),
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
        cells = [f"{row['metrics_at_best_threshold'][name]:.4f}" for name in names]
        lines.append(_row(split, measured["best_threshold"], cells))
    return "\n".join(lines)


def _row(split: str, threshold: float, cells: list[str]) -> str:
    return f"{split:<11} {threshold:>9.2f} " + " ".join(f"{cell:>16}" for cell in cells)
