"""A single training run's trackers: what it is followed with, and what is sent when it is over."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafemed import artifacts, checkpoints, config, console, mlflow_points, tracking
from cafemed.errors import ArtifactError
from cafemed.invocation import Invocation
from cafemed.tracking import Background, FitEvents, Progress, TrackingConfig

if TYPE_CHECKING:
    from cafemed.mlflow_client import Client
    from cafemed.mlflow_fit import FitRun
    from cafemed.mlflow_sweep import Runs
    from cafemed.training import EpochReport

#: In the experiment's folder: which run of MLflow its fit is, and of which settings.
FILE = "fit-tracking.json"
#: Seconds that the end of a run, or of an interrupted one, waits for what is not sent yet.
_CLOSE_S = 10.0


class FitTracking:
    """What `tracking` says of one experiment's training run.

    Args:
        values: the section `tracking`.
        told: where the experiment is.
        settings: section → option → value.
        sources: name → fingerprint of what the run is made from.
        fingerprint: of the artifact that it becomes.

    Raises:
        ConfigError: if a value is wrong.
        MissingProgramError: if MLflow is asked for and its client is not installed.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        told: Invocation,
        settings: Mapping[str, Mapping[str, Any]],
        sources: Mapping[str, str],
        fingerprint: str,
    ) -> None:
        self.config = config.from_mapping(TrackingConfig, values, "tracking")
        self._folder, self._name, self._force = told.experiment, told.name, told.force
        self._settings, self._sources, self._fingerprint = settings, sources, fingerprint
        self._client: Client | None = None
        if self.config.name == "mlflow":
            from cafemed import mlflow_client

            self._client = mlflow_client.Client(tracking.require_uri(self.config, told.root))

    def require_ready(self, checkpoint: Path) -> None:
        """Asks the tracking server for its experiment, before a new run begins.

        Args:
            checkpoint: folder that the run goes on from; one that does so needs no server.

        Raises:
            TrackingError: if it does not answer.
        """
        if self._client is not None and not checkpoint.exists():
            tracking.require_answer(self._client, self._experiment)

    @contextlib.contextmanager
    def following(self, checkpoint: Path) -> Iterator[Callable[["EpochReport"], None]]:
        """Gives what to tell of every epoch while the block trains and writes the artifact.

        An error makes the run in MLflow FAILED, an interruption KILLED; it goes on from either.

        Args:
            checkpoint: folder that the run goes on from; without one it begins anew.
        """
        earlier = checkpoints.load(checkpoint, None)
        history = [] if earlier is None else list(earlier.history)
        events = None
        if self.config.tensorboard:
            events = FitEvents(self._folder, checkpoint, self._settings)
        run = self._run(anew=self._force)
        background = None if run is None else Background(run.send, self._uri)

        def tell(epoch: "EpochReport") -> None:
            history.append(epoch.as_dict())
            if events is not None:
                events.follow(epoch)
            if background is not None:
                background.tell(Progress(0, {}, 0, tuple(history)))

        try:
            yield tell
        except BaseException as err:
            if background is not None and run is not None and background.close(_CLOSE_S):
                with tracking.forgiving("the run stays RUNNING there"):
                    run.stopped("FAILED" if isinstance(err, Exception) else "KILLED")
            raise
        if events is not None:
            events.end()
        if background is not None:
            background.close(_CLOSE_S)

    def finish(self, target: Path) -> None:
        """Sends what MLflow has not got of a run that is over, unless it was not tracked there.

        Args:
            target: the artifact.
        """
        run = self._run(anew=False) if self._noted() is not None else None
        if run is None or self._client is None:
            return
        with tracking.forgiving("run the same command again to send what is missing"):
            if run.finish(target):
                console.say("tracking", f"a run in {self._experiment} of {self._client.uri}")

    @property
    def _experiment(self) -> str:
        return self.config.experiment or f"cafemed/{self._name}"

    @property
    def _uri(self) -> str:
        assert self._client is not None
        return self._client.uri

    def _run(self, anew: bool) -> "FitRun | None":
        """The run of this fit: the one that was begun, or with `anew` another one."""
        if self._client is None:
            return None
        from cafemed.mlflow_fit import FitRun
        from cafemed.mlflow_sweep import Runs

        runs = None if anew else self._noted()
        if runs is None:
            runs = Runs(self._client.uri, self._experiment)
            self._note(runs)
        params = mlflow_points.params(_sections(self._settings), self._sources)
        return FitRun(self._client, runs, self._name, params, self._note)

    def _noted(self) -> "Runs | None":
        """Where this fit is tracked, if it is, and where `tracking` says."""
        from cafemed.mlflow_sweep import Runs

        path = self._folder / FILE
        if self._client is None or not path.is_file():
            return None
        try:
            content = dict(json.loads(path.read_text()))
            of = content.pop("fit", None)
        except (ValueError, TypeError) as err:
            raise ArtifactError(f"{path}: not a run; remove it to track the run anew") from err
        runs = Runs.read(content, str(path))
        same = (runs.uri, runs.experiment) == (self._client.uri, self._experiment)
        return runs if same and of == self._fingerprint else None

    def _note(self, runs: "Runs") -> None:
        content = {"fit": self._fingerprint, **vars(runs)}
        artifacts.write_text(self._folder / FILE, json.dumps(content, indent=1) + "\n")


def _sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Section → option → value, of a fit's settings, which also have single values."""
    model = settings["model"]
    return {
        "model": {"name": model["name"], **model["options"]},
        "train": settings["train"],
        "calibration": settings["calibration"],
        "resources": {"num_workers": settings.get("num_workers", 1)},
    }
