"""A sweep in MLflow: a parent run, and in it a run for every trial.

What is sent is what the server has not got: it is asked for that whenever it is not known for
sure, so nothing is logged twice, whatever was interrupted. Nothing about patients is sent but
metrics over all of them.
"""

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cafemed import artifacts, findings, mlflow_points, sweep
from cafemed.errors import ArtifactError
from cafemed.mlflow_client import Client
from cafemed.sweep_plan import FREE, kept
from cafemed.tracking import Progress

#: In a sweep's ledger and in its folder: where it is tracked, and as which runs.
FILE = "tracking.json"

#: Names a sweep, and a trial in it, whatever the runs' ids are.
_KEY, _TRIAL = "cafemed.sweep", "cafemed.trial"
_PARENT = "mlflow.parentRunId"
_SENT, _EVALUATED = "cafemed.sent", "cafemed.evaluated"
#: An epoch's metric that tells how many epochs the server has.
_COUNTED = "validation/jaccard"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_ARTIFACTS = (
    "report.html",
    "sweep.parquet",
    "best.json",
    "manifest.json",
    findings.TESTED,
    findings.RETRAINED,
)


@dataclasses.dataclass
class Runs:
    """Where a sweep is tracked; content of `tracking.json`.

    Attributes:
        uri: of the store.
        experiment: MLflow's, by name.
        key: the sweep's own.
        parent: id of its run; None until there is one.
        trials: number (text, as JSON has it) → id of its run.
    """

    uri: str
    experiment: str
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    parent: str | None = None
    trials: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, content: Any, where: str) -> "Runs":
        """What was written.

        Raises:
            ArtifactError: if it is something else.
        """
        try:
            return cls(**content)
        except TypeError as err:
            raise ArtifactError(
                f"{where}: not the runs of a sweep ({type(err).__name__}); remove it to track "
                "the sweep anew"
            ) from err


@dataclasses.dataclass(frozen=True)
class About:
    """What the parent run says of a sweep.

    Attributes:
        name: of the experiment.
        settings: see SweepPlan.settings.
        inputs: name → fingerprint.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]


class SweepRuns:
    """Sends a sweep to a tracking store; each method sends what is missing there.

    All of them raise as `Client`'s do, and may be called again then.

    Args:
        client: of the store.
        runs: ids so far; they are changed.
        about: the sweep.
        save: called when an id is new.
    """

    def __init__(
        self, client: Client, runs: Runs, about: About, save: Callable[[Runs], None]
    ) -> None:
        self._client, self._runs, self._about, self._save = client, runs, about, save
        self._experiment: str | None = None
        self._open = False
        self._epochs: dict[int, int] = {}
        self._ended: set[int] = set()

    def begin(self) -> str:
        """The parent run, which goes on from here."""
        if self._open and self._runs.parent is not None:
            return self._runs.parent
        if self._experiment is None:
            self._experiment = self._client.experiment(self._runs.experiment)
        run = self._runs.parent or self._client.find(
            self._experiment, {_KEY: self._runs.key, _TRIAL: "parent"}
        )
        if run is None:
            tags = {_KEY: self._runs.key, _TRIAL: "parent", **mlflow_points.origin("jobs/tune.py")}
            run = self._client.create(
                self._experiment, self._about.name, mlflow_points.now_ms(), tags
            )
        if self._runs.parent != run:
            self._runs.parent = run
            self._save(self._runs)
        there = self._client.read(run)
        params = {k: v for k, v in _params(self._about).items() if k not in there.params}
        search = self._about.settings["search"]
        free = {f"search.{name}": search[name] for name in FREE if name != "storage"}
        self._client.log(run, (), params, free)
        if there.status != "RUNNING":
            self._client.reopen(run)
        self._open = True
        return run

    def send(self, trial: Progress) -> None:
        """Sends what is missing of a trial: the run, parameters, epochs, and how it ended."""
        if trial.number in self._ended:
            return
        self.begin()
        known = self._epochs.pop(trial.number, None)  # nothing is known for sure until all is sent
        run = self._runs.trials.get(str(trial.number)) or self._run_of(trial)
        sent, over, best_sent = (known, False, False)
        if known is None:
            there = self._client.read(run)
            over, best_sent = there.status != "RUNNING", "best/jaccard" in there.metrics
            sent = self._client.last_step(run, _COUNTED) if _COUNTED in there.metrics else 0
            params = {**trial.parameters, "seed": trial.seed, **self._resources()}
            missing = {k: v for k, v in params.items() if k not in there.params}
            if missing:
                self._client.log(run, params=missing)
        points = mlflow_points.points(trial, sent or 0)
        if trial.record is None:
            if points:
                self._client.log(run, points)
        elif not over:
            more = [] if best_sent else mlflow_points.best_points(trial)
            self._client.log(run, [*points, *more], tags=_ending(trial))
            self._client.end(run, _STATUS[trial.record.status], mlflow_points.end_ms(trial))
        self._epochs[trial.number] = len(trial.history)
        if trial.record is not None:
            self._ended.add(trial.number)

    def finish(self, folder: Path, facts: Mapping[str, Any]) -> bool:
        """Sends what is missing of a sweep that is over, with its files; ends the parent run.

        Args:
            folder: of the finished sweep.
            facts: more to say of it, as tags.

        Returns:
            Whether there was anything to send.
        """
        made = artifacts.read_manifest(folder, sweep.STAGE)
        state = f"{made.fingerprint}:{made.report['trials']}:{facts.get('registry.version')}"
        if self._runs.parent is not None:
            there = self._client.read(self._runs.parent)
            if there.status == "FINISHED" and there.tags.get(_SENT) == state:
                return False
        parent = self.begin()
        for record in sweep.read_trials(folder / "sweep.parquet"):
            self.send(Progress.of(record))
        best = sweep.read_best(folder)
        points = mlflow_points.measured(best.get("validation", {}), "best", made.report["trials"])
        self._upload(parent, [folder / name for name in _ARTIFACTS])
        chosen = {"cafemed.best_trial": best["trial"], "cafemed.bundle": best.get("bundle")}
        tags = {name: value for name, value in {**chosen, **facts}.items() if value is not None}
        self._client.log(parent, points, tags={**tags, _SENT: state})
        self._client.end(parent, "FINISHED")
        return True

    def evaluated(self, folder: Path, evaluation: Path) -> bool:
        """Sends an evaluation of the sweep's model, with the model card.

        Args:
            folder: of the finished sweep, whose report has the evaluation by now.
            evaluation: of `jobs/evaluate.py`.

        Returns:
            Whether there was anything to send.
        """
        parent = self._runs.parent
        if parent is None:
            return False
        made = artifacts.read_manifest(evaluation, "evaluation")
        if self._client.read(parent).tags.get(_EVALUATED) == made.fingerprint:
            return False
        points = mlflow_points.measured(made.report["model"]["test"]["metrics"], "test", 0)
        self._upload(parent, [folder / name for name in _ARTIFACTS])
        self._upload(parent, [evaluation / name for name in sorted(made.files)], "evaluation")
        self._client.log(parent, points, tags={_EVALUATED: made.fingerprint})
        return True

    def stopped(self, status: str) -> None:
        """Says that the sweep does not go on, at least for now: "FAILED" or "KILLED"."""
        if self._open and self._runs.parent is not None:
            self._client.end(self._runs.parent, status)
            self._open = False

    def _run_of(self, trial: Progress) -> str:
        assert self._experiment is not None
        assert self._runs.parent is not None
        names = {_KEY: self._runs.key, _TRIAL: str(trial.number)}
        run = self._client.find(self._experiment, names)
        if run is None:
            record = trial.record
            started = None if record is None else record.started
            begun = mlflow_points.now_ms() if started is None else int(started.timestamp() * 1000)
            tags = {**names, _PARENT: self._runs.parent, **mlflow_points.origin("jobs/tune.py")}
            run = self._client.create(self._experiment, f"trial-{trial.number:05d}", begun, tags)
        self._runs.trials[str(trial.number)] = run
        self._save(self._runs)
        return run

    def _resources(self) -> dict[str, Any]:
        search = self._about.settings["search"]
        return {name: search[name] for name in ("num_workers", "cpus", "gpus", "memory_gb")}

    def _upload(self, run: str, paths: Sequence[Path], folder: str | None = None) -> None:
        for path in paths:
            if path.is_file():
                self._client.upload(run, path, folder)


def _ending(trial: Progress) -> dict[str, Any]:
    record = trial.record
    assert record is not None
    told = {
        "status": record.status,
        "host": record.host,
        "attempts": record.attempts,
        "seconds": f"{record.seconds:.3f}",
        "error": record.error,
    }
    return {name: value for name, value in told.items() if value not in (None, "")}


def _params(about: About) -> dict[str, Any]:
    """What the sweep keeps, and what it was run on."""
    return mlflow_points.params(kept(about.settings), about.inputs)
