"""A sweep's files read together, and what they say in words: how it went, which trial is best."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cafemed import artifacts, importance, pareto, reproduction, sweep
from cafemed.errors import ArtifactError

#: What evaluated trials reached on the test patients, where there are any.
TESTED = "test.json"
#: That the chosen trial was trained anew, and how; see cafemed/retraining.py.
RETRAINED = "retrained.json"

_STATUSES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a sweep.

    Attributes:
        table: one row a trial, see `sweep.SweepResult.table`.
        best: of `best.json`: "trial", "parameters", "seed", "objectives" (one or both of "jaccard"
            and "ddi_rate") and "constraint" (None or {"ddi_rate": highest allowed}); "trial" None
            and a "reason" where none is good enough; empty if every trial failed.
        settings: `SweepPlan.settings()`.
        name: of the experiment.
        cohort: its fingerprint; "" if it is not known.
        tested: number of a trial (text) → what it reached on the test patients: "patients",
            "visits", "metrics" and "intervals", as `fits.measure` gives them.
        root: `paths.root`, where it was given.
        retrained: "epochs" and "patients", if the chosen trial was trained anew on the validation
            patients, too; None if it was not.
    """

    table: pa.Table
    best: Mapping[str, Any]
    settings: Mapping[str, Any]
    name: str
    cohort: str
    tested: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    root: str | None = None
    retrained: Mapping[str, Any] | None = None

    @functools.cached_property
    def trials(self) -> list[dict[str, Any]]:
        """The table's rows, without the history of their epochs."""
        names = [name for name in self.table.column_names if name != "history"]
        return list(self.table.select(names).to_pylist())

    @functools.cached_property
    def jaccard(self) -> NDArray[np.float64]:
        """(trials,), NaN where a trial failed."""
        return self._metric("jaccard")

    @functools.cached_property
    def ddi_rate(self) -> NDArray[np.float64]:
        """(trials,), NaN where a trial failed."""
        return self._metric("ddi_rate")

    @property
    def space(self) -> Mapping[str, Any]:
        """What was searched, as configured: section → option → entry."""
        return dict(self.settings["search"].get("space", {}))

    @property
    def limit(self) -> float | None:
        """The highest DDI rate that the sweep's constraint allows."""
        limit = (self.best.get("constraint") or {}).get("ddi_rate")
        return None if limit is None else float(limit)

    @functools.cached_property
    def chosen(self) -> dict[str, Any] | None:
        """The row of the best trial."""
        number = self.best.get("trial")
        return next((row for row in self.trials if row["trial"] == number), None)

    def front(self) -> list[bool]:
        """Which trials are on the Pareto front of Jaccard and DDI rate."""
        return list(pareto.front(self.jaccard, self.ddi_rate).tolist())

    def ranking(self) -> list[int]:
        """Rows from the best down: the chosen one, those within the limit, by Jaccard."""
        limit = math.inf if self.limit is None else self.limit

        def order(row: int) -> tuple[bool, bool, float, int]:
            chosen = self.trials[row] is self.chosen
            return (not chosen, not self.ddi_rate[row] <= limit, -self.jaccard[row], row)

        return sorted((int(row) for row in np.flatnonzero(np.isfinite(self.jaccard))), key=order)

    def command(self) -> list[str]:
        """The command that trains the best trial again, argument by argument; [] without one."""
        row = self.chosen
        if row is None:
            return []
        epochs = row["epochs"] if row["status"] == "stopped" else None
        configured = reproduction.configuration(
            self.settings, self.best["parameters"], self.best["seed"], epochs, row["gpus"]
        )
        return reproduction.command(self.name, configured, self.root)

    def decision(self) -> str:
        """The best trial in a sentence or two, with the reason for it, and if it was retrained."""
        if self.retrained is None or self.chosen is None:
            return self._choice()
        return (
            f"{self._choice()} What is published is its model trained anew, for "
            f"{self.retrained['epochs']} epochs on {self.retrained['patients']} training and "
            "validation patients; test metrics are that model's."
        )

    def _choice(self) -> str:
        row = self.chosen
        if row is None:
            return self._why_none()
        found = (
            f"Jaccard {row['jaccard']:.4f} and DDI rate {row['ddi_rate']:.4f} on the validation "
            f"patients, in epoch {row['best_epoch']}"
        )
        trial, limit = f"Trial {row['trial']}", self.limit
        within = self.jaccard if limit is None else self.jaccard[self.ddi_rate <= limit]
        within = within[np.isfinite(within)]
        highest = len(within) > 0 and row["jaccard"] >= within.max()
        if limit is None:
            if len(within) == 1:
                return f"{trial} is the only one that gave a model: {found}."
            if highest:
                return f"{trial} has the highest Jaccard of {len(within)} trials: {found}."
            return f"{trial} is chosen of {len(within)} trials: {found}."
        if row["ddi_rate"] > limit:
            return f"{trial} is chosen: {found}. That is more than the DDI rate of {limit:g} asked."
        if len(within) == 1:
            return f"{trial} is the only one with a DDI rate of at most {limit:g}: {found}."
        place = "has the highest Jaccard" if highest else "is chosen"
        return (
            f"{trial} {place} of the {len(within)} with a DDI rate of at most {limit:g}: {found}."
        )

    def facts(self) -> list[tuple[str, str]]:
        """How the sweep went: titles and texts."""
        statuses = [row["status"] for row in self.trials]
        counts = [f"{statuses.count(s)} {words}" for s, words in _STATUSES.items() if s in statuses]
        seconds = pc.sum(self.table["seconds"]).as_py() or 0.0
        search = self.settings["search"]
        return [
            *self._when(),
            ("Model", ", ".join(self._models())),
            ("Trials", f"{len(statuses)}" + (f": {', '.join(counts)}" if counts else "")),
            ("Training time", f"{duration(seconds)} in all trials together"),
            *(
                (key.capitalize(), str(search[key]))
                for key in ("sampler", "scheduler")
                if key in search
            ),
            ("Cohort", self.cohort[:12] or "not known"),
        ]

    def _metric(self, name: str) -> NDArray[np.float64]:
        values = [row[name] if row["status"] != "failed" else None for row in self.trials]
        return np.array(values, np.float64)

    def _why_none(self) -> str:
        if "reason" in self.best:
            return f"No trial is chosen: {self.best['reason']}"
        if not self.trials:
            return "The sweep has no trials."
        first = next((f" The first with {row['error']}" for row in self.trials if row["error"]), "")
        return f"No trial gave a model: all {len(self.trials)} failed.{first}"

    def _models(self) -> list[str]:
        varied = {str(row[importance.MODEL]) for row in self.trials if row.get(importance.MODEL)}
        return sorted(varied) or [self.settings["model"]["name"]]

    def _when(self) -> list[tuple[str, str]]:
        begun = [row for row in self.trials if row["started"] is not None]
        if not begun:
            return []
        first = min(row["started"] for row in begun)
        last = max(row["started"].timestamp() + (row["seconds"] or 0.0) for row in begun)
        span = duration(last - first.timestamp())
        return [("Run", f"{first:%Y-%m-%d %H:%M} UTC, for {span}")]


def read(folder: Path, root: str | None = None) -> Findings:
    """Reads a sweep's folder.

    Args:
        folder: ROOT/experiments/NAME/sweep, with `sweep.parquet`, `best.json` unless every trial
            failed, and `test.json` where trials were evaluated.
        root: see Findings.

    Raises:
        ArtifactError: if a file is damaged, or they do not belong together.
    """
    manifest = artifacts.read_manifest(folder, sweep.STAGE)
    tested, again = folder / TESTED, folder / RETRAINED
    found = Findings(
        table=pq.read_table(folder / "sweep.parquet"),
        best=sweep.read_best(folder) if (folder / "best.json").exists() else {},
        settings=manifest.config,
        name=folder.parent.name,
        cohort=manifest.inputs.get("cohort", ""),
        tested=json.loads(tested.read_text()) if tested.exists() else {},
        root=root,
        retrained=json.loads(again.read_text()) if again.exists() else None,
    )
    number = found.best.get("trial")
    if number is not None and found.chosen is None:
        raise ArtifactError(
            f"{folder / 'best.json'}: names trial {number}, which sweep.parquet does not have; "
            "run jobs/tune.py with force=true"
        )
    return found


def published(folder: Path) -> str | None:
    """Fingerprint of the bundle that a sweep's best trial became; None if there is none.

    Raises:
        ArtifactError: if `best.json` is missing or damaged.
    """
    again = folder / RETRAINED
    content = json.loads(again.read_text()) if again.exists() else sweep.read_best(folder)
    found = content.get("bundle")
    return None if found is None else str(found)


def duration(seconds: float) -> str:
    """A length of time in its two largest units: "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    units = (("h", 3600), ("min", 60)) if whole >= 3600 else (("min", 60), ("s", 1))
    (large, size), (small, unit) = units
    rest = whole % size // unit
    return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
