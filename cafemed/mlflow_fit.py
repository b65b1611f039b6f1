"""A single training run in MLflow: one run, with what a trial of a sweep has there.

What is sent is what the server has not got, as of a sweep (cafemed/mlflow_sweep.py).
"""

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cafemed import artifacts, fits, mlflow_points
from cafemed.mlflow_client import Client
from cafemed.mlflow_sweep import Runs
from cafemed.tracking import Progress

#: Names a run of its own, whatever its id is.
_KEY, _SENT = "cafemed.fit", "cafemed.sent"
_COUNTED = "validation/jaccard"
#: Not the weights: they are in the experiment, and may be large.
_ARTIFACTS = ("config.json", "metrics.json", "history.json", "manifest.json")


class FitRun:
    """Sends a training run to a tracking store; each method sends what is missing there.

    All of them raise as `Client`'s do, and may be called again then.

    Args:
        client: of the store.
        runs: where it is tracked; `parent` is its run, once there is one.
        name: of the experiment.
        params: what it is told of it, besides its epochs.
        save: called when the run's id is new.
    """

    def __init__(
        self,
        client: Client,
        runs: Runs,
        name: str,
        params: Mapping[str, Any],
        save: Callable[[Runs], None],
    ) -> None:
        self._client, self._runs, self._name = client, runs, name
        self._params, self._save = params, save
        self._open = False
        self._epochs: int | None = None

    def begin(self) -> str:
        """The run, which goes on from here."""
        if self._open and self._runs.parent is not None:
            return self._runs.parent
        experiment = self._client.experiment(self._runs.experiment)
        run = self._runs.parent or self._client.find(experiment, {_KEY: self._runs.key})
        if run is None:
            tags = {_KEY: self._runs.key, **mlflow_points.origin("jobs/train.py")}
            run = self._client.create(experiment, self._name, mlflow_points.now_ms(), tags)
        if self._runs.parent != run:
            self._runs.parent = run
            self._save(self._runs)
        there = self._client.read(run)
        missing = {k: v for k, v in self._params.items() if k not in there.params}
        self._client.log(run, (), missing, {"host": socket.gethostname()})
        if there.status != "RUNNING":
            self._client.reopen(run)
        self._open = True
        return run

    def send(self, fit: Progress) -> None:
        """Sends the epochs that are missing."""
        run = self.begin()
        known, self._epochs = self._epochs, None  # nothing is known for sure until all is sent
        if known is None:
            there = self._client.read(run)
            known = self._client.last_step(run, _COUNTED) if _COUNTED in there.metrics else 0
        points = mlflow_points.points(fit, known)
        if points:
            self._client.log(run, points)
        self._epochs = len(fit.history)

    def finish(self, folder: Path) -> bool:
        """Sends what is missing of a run that is over, with its files, and ends it.

        Args:
            folder: of the artifact that became of it; see cafemed/fits.py.

        Returns:
            Whether there was anything to send.
        """
        made = artifacts.read_manifest(folder, fits.STAGE)
        if self._runs.parent is not None:
            there = self._client.read(self._runs.parent)
            if there.status == "FINISHED" and there.tags.get(_SENT) == made.fingerprint:
                return False
        run = self.begin()
        history = json.loads((folder / "history.json").read_text())
        whole = Progress(0, {}, 0, history)
        self.send(whole)
        points = mlflow_points.best_points(whole)
        for split in ("validation", "test"):
            if split in made.report["metrics"]:  # as it is served: calibrated
                found = made.report["metrics"][split]["metrics"]
                points += mlflow_points.measured(found, f"served/{split}", made.report["epochs"])
        for name in _ARTIFACTS:
            self._client.upload(run, folder / name)
        seconds = sum(epoch["seconds"] for epoch in history)
        tags = {"best_epoch": made.report["best_epoch"], "seconds": f"{seconds:.3f}"}
        self._client.log(run, points, tags={**tags, _SENT: made.fingerprint})
        self._client.end(run, "FINISHED")
        return True

    def stopped(self, status: str) -> None:
        """Says that it does not go on, at least for now: "FAILED" or "KILLED"."""
        if self._open and self._runs.parent is not None:
            self._client.end(self._runs.parent, status)
            self._open = False
