"""What came out of a sweep: every trial, the best one, and the files that hold them.

Files of a sweep folder (stage "sweep"): `sweep.parquet`, one row a trial; `best.json`; `bundle/`,
the best trial's model; `manifest.json`.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cafemed.errors import ArtifactError, TrainingError

STAGE = "sweep"

#: "finished": all epochs, or no more patience; "stopped": by the scheduler; "failed": an error.
Status = Literal["finished", "stopped", "failed"]

#: What a trial reports to Ray Tune after every epoch: its number, the best validation Jaccard so
#: far, every epoch until now (`training.EpochReport.as_dict`), and when it started (seconds, UTC).
EPOCH, OBJECTIVE, HISTORY, STARTED = "epoch", "best_jaccard", "history", "started"

METRICS = ("jaccard", "f1", "prauc", "ddi_rate", "num_medications")
_LOSSES = ("loss", "bce", "margin", "ddi")


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 0, in the order in which they were drawn.
        parameters: "train.learning_rate" → value.
        seed: of its training.
        status: see Status.
        error: the error's type and first line; None unless failed.
        history: every epoch, as `training.EpochReport.as_dict` gives it.
        started: when its first line ran, UTC; None if it failed before its first report.
        seconds: from there to its last report, as Ray Tune counts it.
        host: where it ran; "" if it failed before its first report.
        cpus, gpus: what was reserved for it.
        checkpoint: folder of its last checkpoint; None if there is none.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    status: Status
    error: str | None
    history: tuple[Mapping[str, Any], ...]
    started: datetime.datetime | None
    seconds: float
    host: str
    cpus: float
    gpus: float
    checkpoint: Path | None

    @property
    def best_epoch(self) -> Mapping[str, Any] | None:
        """The epoch with the best validation Jaccard, the first of equal ones."""
        return max(self.history, key=lambda e: float(e["metrics"]["jaccard"]), default=None)

    def describe(self) -> str:
        """One line: what was measured, and with which parameters."""
        values = ", ".join(
            f"{name.split('.', 1)[1]}={value:.4g}"
            if isinstance(value, float)
            else f"{name.split('.', 1)[1]}={value}"
            for name, value in self.parameters.items()
        )
        best = self.best_epoch
        if self.status == "failed" or best is None:
            return f"trial {self.number} failed: {self.error}; {values}"
        found = best["metrics"]
        return (
            f"trial {self.number} {self.status} after {len(self.history)} epochs in "
            f"{self.seconds:.1f} s: Jaccard {found['jaccard']:.4f}, DDI {found['ddi_rate']:.4f} "
            f"in epoch {best['epoch']}; {values}"
        )


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, by number."""

    trials: tuple[TrialRecord, ...]

    @property
    def best(self) -> TrialRecord:
        """The trial with the best validation Jaccard, the first of equal ones.

        Raises:
            TrainingError: if every trial failed; names the first error.
        """
        usable = [t for t in self.trials if t.status != "failed" and t.best_epoch is not None]
        if not usable:
            first = self.trials[0].error if self.trials else "none was started"
            raise TrainingError(f"all {len(self.trials)} trials failed; the first with {first}")
        return max(usable, key=_jaccard)

    def count(self, status: str) -> int:
        """Number of trials with this status."""
        return sum(trial.status == status for trial in self.trials)

    def table(self) -> pa.Table:
        """One row a trial; a parameter that takes values of several types is written as text."""
        trials = self.trials
        best = [trial.best_epoch for trial in trials]
        columns: dict[str, pa.Array] = {
            "trial": pa.array([t.number for t in trials], pa.int32()),
            "status": pa.array([t.status for t in trials], pa.string()),
            "error": pa.array([t.error for t in trials], pa.string()),
            "seed": pa.array([t.seed for t in trials], pa.int64()),
        }
        for name in sorted({name for trial in trials for name in trial.parameters}):
            columns[name] = _column([trial.parameters.get(name) for trial in trials])
        columns["epochs"] = pa.array([len(t.history) for t in trials], pa.int32())
        columns["best_epoch"] = pa.array([b and b["epoch"] for b in best], pa.int32())
        for name in METRICS:
            columns[name] = pa.array([b and b["metrics"][name] for b in best], pa.float64())
        columns |= {
            "started": pa.array([t.started for t in trials], pa.timestamp("ms", "UTC")),
            "seconds": pa.array([t.seconds for t in trials], pa.float64()),
            "host": pa.array([t.host for t in trials], pa.string()),
            "cpus": pa.array([t.cpus for t in trials], pa.float64()),
            "gpus": pa.array([t.gpus for t in trials], pa.float64()),
            "history": pa.array([_epochs(t) for t in trials], pa.list_(_EPOCH_TYPE)),
        }
        return pa.table(columns)


def parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among what a trial is given, which has its number and seed beside them."""
    return {name: value for name, value in config.items() if name not in ("trial", "seed")}


def write(result: SweepResult, folder: Path, bundle_fingerprint: str) -> None:
    """Writes `sweep.parquet` and `best.json` into a folder that `artifacts.new_folder` gave."""
    pq.write_table(result.table(), folder / "sweep.parquet")
    content = {**_best(result), "bundle": bundle_fingerprint}
    (folder / "best.json").write_text(json.dumps(content, indent=1) + "\n")


def read_best(folder: Path) -> dict[str, Any]:
    """The content of `best.json`: the best trial's number, parameters, seed and metrics.

    Raises:
        ArtifactError: if it is missing or damaged.
    """
    path = folder / "best.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: not the best trial of a sweep; run it again") from err
    return dict(content)


def summary(result: SweepResult) -> dict[str, Any]:
    """What the manifest says of a sweep: how many trials of each status, and the best one."""
    counts = {status: result.count(status) for status in ("finished", "stopped", "failed")}
    return {"trials": len(result.trials), **counts, "best": _best(result)}


def _best(result: SweepResult) -> dict[str, Any]:
    best = result.best
    epoch = best.best_epoch or {}
    return {
        "trial": best.number,
        "parameters": dict(best.parameters),
        "seed": best.seed,
        "epoch": epoch["epoch"],
        "validation": epoch["metrics"],
        "seconds": best.seconds,
    }


_EPOCH_TYPE = pa.struct(
    [("epoch", pa.int32()), ("seconds", pa.float64())]
    + [(f"train_{name}", pa.float64()) for name in _LOSSES]
    + [(name, pa.float64()) for name in METRICS]
)


def _epochs(trial: TrialRecord) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch["epoch"],
            "seconds": epoch["seconds"],
            **{f"train_{name}": epoch["losses"][name] for name in _LOSSES},
            **{name: epoch["metrics"][name] for name in METRICS},
        }
        for epoch in trial.history
    ]


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values)


def _jaccard(trial: TrialRecord) -> float:
    best = trial.best_epoch
    return -1.0 if best is None else float(best["metrics"]["jaccard"])
