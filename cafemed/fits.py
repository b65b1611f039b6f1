"""The artifact of a single training run, stage "fit", and what it measured.

Files: `model.safetensors` (weights of the best epoch), `config.json` (model and training),
`metrics.json`, `history.json` (every epoch), `manifest.json`. Nothing at patient level.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import artifacts, calibration, metrics, training
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.calibration import Decision, Predictions
from cafemed.cohort import Split
from cafemed.config import Range
from cafemed.training import Builder, EpochReport, FitConfig, FitResult

STAGE = "fit"

_MEASURED: tuple[Split, ...] = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Together:
    """How many processes train.

    Attributes:
        num_workers: 1 trains in the job's own process; more, see cafemed/distributed.py.
    """

    num_workers: Annotated[int, Range(1)] = 1

    def here(self, device: str) -> str:
        """Where the job's own process computes; workers may have their GPUs elsewhere."""
        return "auto" if self.num_workers > 1 and device == "cuda" else device

    def settings(self) -> dict[str, int]:
        """What decides the result besides the configuration of one process."""
        return {"num_workers": self.num_workers} if self.num_workers > 1 else {}

    def describe(self, device: torch.device) -> str:
        """Where the model is trained, in a few words."""
        return f"on {device}" if self.num_workers == 1 else f"by {self.num_workers} workers"


def train(
    build: Builder,
    model_name: str,
    model_options: Mapping[str, Any],
    inputs: ModelInputs,
    arrays: VisitArrays,
    patients: Mapping[Split, NDArray[np.int64]],
    config: FitConfig,
    on_epoch: Callable[[EpochReport], bool | None],
    checkpoint_dir: Path,
    device: torch.device | str,
    num_workers: int,
) -> FitResult:
    """Trains in this process (`training.fit`), or by several workers on Ray.

    Args:
        build: see `training.fit`, as for all that is not named here.
        model_name: see there.
        model_options: see there.
        inputs: see there.
        arrays: see there.
        patients: of "train" and "validation".
        config: see there.
        on_epoch: see there.
        checkpoint_dir: see there.
        device: see there; of workers, see `distributed.fit_alone`.
        num_workers: how many processes train.

    Raises:
        UserError: see `training.fit` and `distributed.fit_alone`.
    """
    split = patients["train"], patients["validation"]
    if num_workers == 1:
        return training.fit(
            *(build, model_name, model_options, inputs, arrays, *split, config),
            on_epoch=on_epoch,
            checkpoint_dir=checkpoint_dir,
            device=device,
        )
    from cafemed import distributed  # Ray takes a second to import

    return distributed.fit_alone(
        distributed.FitData(build, inputs, arrays, *split),
        *(model_name, model_options, config, num_workers, str(device)),
        on_epoch=on_epoch,
        checkpoint_dir=checkpoint_dir,
    )


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
