"""What came out of a sweep: every trial, the best one, and the files that hold them.

Files of a sweep folder (stage "sweep"): `sweep.parquet`, one row a trial; `best.json`; `bundle/`,
the best trial's model; `manifest.json`.
"""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cafemed import pareto
from cafemed.errors import ArtifactError, TrainingError

STAGE = "sweep"

#: "finished": all epochs, or no more patience; "stopped": by the scheduler; "failed": an error.
Status = Literal["finished", "stopped", "failed"]

#: What a trial reports to Ray Tune after every epoch: its number, every epoch until now
#: (`training.EpochReport.as_dict`), when it started (seconds since 1970), how long it has trained,
#: and what it raised, if that ended it and would again.
EPOCH, HISTORY, STARTED, SECONDS, ERROR = "epoch", "history", "started", "train_seconds", "error"

METRICS = ("jaccard", "f1", "prauc", "ddi_rate", "num_medications")
_LOSSES = ("loss", "bce", "margin", "ddi")


def whereabouts(told: Mapping[str, Any]) -> dict[str, Any]:
    """When, for how long and where a trial ran, of what Ray Tune knows of it.

    Args:
        told: the trial's last report, with Ray Tune's "hostname"; empty if there was none.

    Returns:
        Keywords of `Conductor.stops` and `Conductor.end`.
    """
    return {
        "started": told.get(STARTED),
        "seconds": float(told.get(SECONDS, 0.0)),
        "host": str(told.get("hostname", "")),
    }


def best_until(history: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """For each epoch the one with the best validation Jaccard until then, the first of equal ones.

    Args:
        history: see TrialRecord.
    """
    return itertools.accumulate(history, lambda best, epoch: max(best, epoch, key=_jaccard_of))


def _jaccard_of(epoch: Mapping[str, Any]) -> float:
    return float(epoch["metrics"]["jaccard"])


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
        seconds: from there to its last report, and its epochs before, if it was interrupted.
        host: where it ran; "" if it failed before its first report.
        cpus, gpus: what was reserved for it, all its workers together.
        checkpoint: folder of its last checkpoint; None if there is none.
        attempts: how often it was started.
        memory_gb: what was reserved for it, all its workers together, in units of 1e9 bytes; None
            if it was not counted, or not noted yet.
        num_workers: processes that trained its model together; None if not noted yet, by an earlier
            version.
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
    attempts: int = 1
    memory_gb: float | None = None
    num_workers: int | None = None

    @property
    def best_so_far(self) -> list[float]:
        """After each epoch, the best validation Jaccard until then."""
        return [float(epoch["metrics"]["jaccard"]) for epoch in best_until(self.history)]

    @property
    def best_epoch(self) -> Mapping[str, Any] | None:
        """The epoch with the best validation Jaccard, the first of equal ones."""
        return max(self.history, key=_jaccard_of, default=None)

    def describe(self) -> str:
        """One line: what was measured, and with which parameters."""
        values = ", ".join(
            f"{name.rsplit('.', 1)[1]}={value:.4g}"
            if isinstance(value, float)
            else f"{name.removeprefix('model.').rsplit('.', 1)[-1]}={value}"
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
    """All trials of a sweep, by number.

    Attributes:
        trials: see TrialRecord.
        objectives: what was searched for.
        max_ddi_rate: that the chosen trial has to keep; None: any.
    """

    trials: tuple[TrialRecord, ...]
    objectives: tuple[str, ...] = ("jaccard",)
    max_ddi_rate: float | None = None

    @property
    def usable(self) -> list[TrialRecord]:
        """The trials that have a model."""
        return [t for t in self.trials if t.status != "failed" and t.best_epoch is not None]

    @property
    def chosen(self) -> TrialRecord | None:
        """The trial to promote: the best validation Jaccard, the first of equal ones.

        None if every trial failed, or none keeps `max_ddi_rate`.
        """
        return max(filter(self._keeps, self.usable), key=_jaccard, default=None)

    @property
    def best(self) -> TrialRecord:
        """`chosen`, where there has to be one.

        Raises:
            TrainingError: if there is none; says why.
        """
        if (chosen := self.chosen) is None:
            raise TrainingError(self.unchosen())
        return chosen

    def unchosen(self) -> str:
        """Why no trial is chosen, in one line."""
        if not self.usable:
            first = self.trials[0].error if self.trials else "none was started"
            return f"all {len(self.trials)} trials failed; the first with {first}"
        nearest = min(self.usable, key=_ddi_rate)
        return (
            f"no trial keeps a DDI rate of at most {self.max_ddi_rate:g}, so none is promoted; the "
            f"lowest is {_ddi_rate(nearest):.4f}, of trial {nearest.number} with Jaccard "
            f"{_jaccard(nearest):.4f}; allow more with search.max_ddi_rate, or train towards less "
            "with train.ddi_target"
        )

    def _keeps(self, trial: TrialRecord) -> bool:
        return self.max_ddi_rate is None or _ddi_rate(trial) <= self.max_ddi_rate

    def pareto(self) -> list[bool]:
        """For each trial, whether none is as good in Jaccard and DDI rate and better in one."""
        known = {t.number for t in self.usable}
        points = [
            (_jaccard(t), _ddi_rate(t)) if t.number in known else (math.nan, math.nan)
            for t in self.trials
        ]
        found = pareto.front([p[0] for p in points], [p[1] for p in points])
        return [bool(on_it) for on_it in found]

    @property
    def unbeaten(self) -> set[int]:
        """Numbers of the chosen trial and of those on the front.

        One that is not among them is not either when more trials end.
        """
        front = {t.number for t, on_it in zip(self.trials, self.pareto(), strict=True) if on_it}
        return front if (chosen := self.chosen) is None else front | {chosen.number}

    def count(self, status: str) -> int:
        """Number of trials with this status."""
        return sum(trial.status == status for trial in self.trials)

    def table(self) -> pa.Table:
        """One row a trial; a parameter that takes values of several types is written as text."""
        trials, chosen = self.trials, self.chosen
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
            "memory_gb": pa.array([t.memory_gb for t in trials], pa.float64()),
            "num_workers": pa.array([t.num_workers for t in trials], pa.int32()),
            "attempts": pa.array([t.attempts for t in trials], pa.int32()),
            "chosen": pa.array([t is chosen for t in trials], pa.bool_()),
            "pareto": pa.array(self.pareto(), pa.bool_()),
            "history": pa.array([_epochs(t) for t in trials], pa.list_(_EPOCH_TYPE)),
        }
        return pa.table(columns)


def write(result: SweepResult, folder: Path, bundle_fingerprint: str | None) -> None:
    """Writes `sweep.parquet` and `best.json` into a folder that `artifacts.new_folder` gave.

    Args:
        result: see SweepResult.
        folder: where to write.
        bundle_fingerprint: of the chosen trial's bundle; None if none is chosen.
    """
    pq.write_table(result.table(), folder / "sweep.parquet")
    content = {**_best(result), "bundle": bundle_fingerprint}
    (folder / "best.json").write_text(json.dumps(content, indent=1) + "\n")


def read_trials(path: Path) -> tuple[TrialRecord, ...]:
    """Reads a `sweep.parquet`; parameters that it holds as text stay text.

    Raises:
        ArtifactError: if it is missing or no table of a sweep.
    """
    try:
        table = pq.read_table(path)
        names = [name for name in table.column_names if name.startswith(("model.", "train."))]
        return tuple(_record(row, names) for row in table.to_pylist())
    except (OSError, KeyError, TypeError, pa.ArrowException) as err:
        raise ArtifactError(
            f"{path}: expected the sweep.parquet of a sweep ({type(err).__name__})"
        ) from err


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


def summary(result: SweepResult, seconds: float) -> dict[str, Any]:
    """What the manifest says of a sweep.

    Args:
        result: see SweepResult.
        seconds: that it ran, in all.

    Returns:
        How many trials of each status, how long they took, and the best one.
    """
    counts = {status: result.count(status) for status in ("finished", "stopped", "failed")}
    return {"trials": len(result.trials), **counts, "seconds": seconds, "best": _best(result)}


def _best(result: SweepResult) -> dict[str, Any]:
    asked = {
        "objectives": list(result.objectives),
        "constraint": None if result.max_ddi_rate is None else {"ddi_rate": result.max_ddi_rate},
    }
    best = result.chosen
    if best is None:
        return {"trial": None, "reason": result.unchosen(), **asked}
    epoch = best.best_epoch or {}
    return {
        **asked,
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


def _record(row: Mapping[str, Any], names: list[str]) -> TrialRecord:
    """A row of the table as a record; a parameter without a value is left out."""
    history = [
        {
            "epoch": epoch["epoch"],
            "losses": {name: epoch[f"train_{name}"] for name in _LOSSES},
            "metrics": {name: epoch[name] for name in METRICS},
            "best": epoch["epoch"] == row["best_epoch"],
            "seconds": epoch["seconds"],
        }
        for epoch in row["history"]
    ]
    return TrialRecord(
        number=row["trial"],
        parameters={name: row[name] for name in names if row[name] is not None},
        seed=row["seed"],
        status=row["status"],
        error=row["error"],
        history=tuple(history),
        started=row["started"],
        seconds=row["seconds"],
        host=row["host"],
        cpus=row["cpus"],
        gpus=row["gpus"],
        checkpoint=None,
        # Tables of earlier versions have fewer columns.
        attempts=row.get("attempts", 1),
        memory_gb=row.get("memory_gb"),
        num_workers=row.get("num_workers"),
    )


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values)


def _jaccard(trial: TrialRecord) -> float:
    best = trial.best_epoch
    return -1.0 if best is None else float(best["metrics"]["jaccard"])


def _ddi_rate(trial: TrialRecord) -> float:
    best = trial.best_epoch
    return math.inf if best is None else float(best["metrics"]["ddi_rate"])
