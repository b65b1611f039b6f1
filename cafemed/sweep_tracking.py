"""A sweep's trackers: what it is followed with while it runs, and what is sent when it is over."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafemed import config, console, tracking
from cafemed.errors import ArtifactError
from cafemed.invocation import Invocation
from cafemed.lease import TakenOverError
from cafemed.ledger import Ledger
from cafemed.sweep_plan import SweepPlan, completed
from cafemed.tracking import Background, Progress, Tell, TensorBoard, TrackingConfig

if TYPE_CHECKING:
    from cafemed.mlflow_client import Client
    from cafemed.mlflow_sweep import Runs, SweepRuns

#: Seconds that the end of a sweep, or of an interrupted one, waits for what is not sent yet.
_CLOSE_S = 10.0


class SweepTracking:
    """What `tracking` says of one experiment's sweep.

    Args:
        values: the section `tracking`.
        told: where the experiment is.

    Raises:
        ConfigError: if a value is wrong.
        MissingProgramError: if MLflow is asked for and its client is not installed.
    """

    def __init__(self, values: Mapping[str, Any], told: Invocation) -> None:
        self.config = config.from_mapping(TrackingConfig, values, "tracking")
        self._name, self._folder = told.name, told.experiment
        self._client: Client | None = None
        self._uri: str | None = None
        self._sending: SweepRuns | None = None
        if self.config.name == "mlflow":
            from cafemed import mlflow_client

            self._uri = tracking.require_uri(self.config, told.root)
            self._client = mlflow_client.Client(self._uri)

    @property
    def _experiment(self) -> str:
        return self.config.experiment or f"cafemed/{self._name}"

    def require_ready(self, ledger: Ledger) -> None:
        """Asks the tracking server for its experiment, before a new sweep drops or starts anything.

        Raises:
            TrackingError: if it does not answer. A sweep that goes on does so without it.
        """
        if self._client is not None and not ledger.exists():
            tracking.require_answer(self._client, self._experiment)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Ends the sweep's run in MLflow as the block ends, unless `finish` came first.

        An error makes it FAILED, an interruption KILLED; it goes on from either. Of a sweep that
        another process took over, it is that one's.
        """
        try:
            yield
        except TakenOverError:
            raise
        except BaseException as err:
            if self._sending is not None:
                with tracking.forgiving("the sweep's run stays RUNNING there"):
                    self._sending.stopped("FAILED" if isinstance(err, Exception) else "KILLED")
            raise

    @contextlib.contextmanager
    def following(
        self, plan: SweepPlan, ledger: Ledger, inputs: Mapping[str, str]
    ) -> Iterator[Tell]:
        """Gives what to tell of every trial's progress while the block runs, in one of `ending`.

        Args:
            plan: see SweepPlan.
            ledger: made ready by `sweep_start.prepare`; has the sweep's runs.
            inputs: name → fingerprint.
        """
        goes_on, followers = bool(ledger.entries()), list[Tell]()
        if not goes_on:
            tracking.clear(self._events)
        if self.config.tensorboard:
            followers.append(TensorBoard(self._events).tell)
        sender, background = self._sender(plan, ledger, inputs, goes_on), None
        if sender is not None:
            assert self._uri is not None
            background = Background(sender.send, self._uri)
            followers.append(background.tell)

        def tell(trial: Progress) -> None:
            for follower in followers:
                follower(trial)

        try:
            yield tell
        finally:
            if background is not None and background.close(_CLOSE_S):
                self._sending = sender

    def keep(self, ledger: Ledger, target: Path) -> None:
        """Puts the sweep's runs into the folder that is made of it; without MLflow nothing."""
        from cafemed.mlflow_sweep import FILE

        content = ledger.tracking() if self._client is not None else None
        if content is not None:
            (target / FILE).write_text(json.dumps(content, indent=1) + "\n")

    def finish(self, folder: Path, version: int | None) -> None:
        """Sends what MLflow has not got of a finished sweep, unless it was not tracked there.

        Args:
            folder: of the sweep.
            version: of the registry that its best trial became; None where none was chosen.
        """
        runs = None if self._client is None else runs_in(folder)
        if self._client is None or runs is None or runs.uri != self._uri:
            return
        facts = {} if version is None else {"registry.version": version}
        with tracking.forgiving("run the same command again to send what is missing"):
            if _sweep_runs(self._client, folder, runs).finish(folder, facts):
                console.say("tracking", f"run {runs.parent} in {runs.experiment} of {runs.uri}")
        self._sending = None

    @property
    def _events(self) -> Path:
        return self._folder / tracking.TENSORBOARD / "sweep"

    def _sender(
        self, plan: SweepPlan, ledger: Ledger, inputs: Mapping[str, str], goes_on: bool
    ) -> "SweepRuns | None":
        if self._client is None or self._uri is None:
            return None
        from cafemed.mlflow_sweep import About, Runs, SweepRuns

        content = ledger.tracking()
        runs = None if content is None else Runs.read(content, ledger.storage)
        if runs is None and goes_on:
            runs = runs_in(self._folder / "sweep")
        if runs is None or (runs.uri, runs.experiment) != (self._uri, self._experiment):
            runs = Runs(self._uri, self._experiment)
        about = About(self._name, plan.settings(), inputs)
        ledger.keep_tracking(vars(runs))

        def save(found: Runs) -> None:
            # Ids that are not noted are found again; whoever took the sweep over has noted its own.
            with contextlib.suppress(OSError, TakenOverError):
                ledger.keep_tracking(vars(found))

        return SweepRuns(self._client, runs, about, save)


def send_evaluation(folder: Path, evaluation: Path, bundle: str) -> None:
    """Sends an evaluation of a sweep's model to where the sweep is tracked, if it is.

    Args:
        folder: of the finished sweep.
        evaluation: of `jobs/evaluate.py`.
        bundle: fingerprint of the bundle that was evaluated.
    """
    runs = runs_in(folder)
    if runs is None:
        return
    from cafemed import findings, mlflow_client

    if findings.published(folder) != bundle:
        return

    with tracking.forgiving("run the same command again to send the evaluation"):
        client = mlflow_client.Client(runs.uri)
        if _sweep_runs(client, folder, runs).evaluated(folder, evaluation):
            console.say("tracking", f"run {runs.parent} in {runs.experiment} of {runs.uri}")


def runs_in(folder: Path) -> "Runs | None":
    """The runs of a finished sweep; None if it was not tracked.

    Raises:
        ArtifactError: if the file is damaged.
    """
    from cafemed.mlflow_sweep import FILE, Runs

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Runs.read(json.loads(path.read_text()), str(path))
    except ValueError as err:
        raise ArtifactError(f"{path}: not the runs of a sweep; run jobs/tune.py again") from err


def _sweep_runs(client: "Client", folder: Path, runs: "Runs") -> "SweepRuns":
    """Of a finished sweep, whose file of runs is sealed: ids that are new are found again."""
    from cafemed import artifacts, sweep
    from cafemed.mlflow_sweep import About, SweepRuns

    made = artifacts.read_manifest(folder, sweep.STAGE)
    about = About(folder.parent.name, completed(made.config), made.inputs)
    return SweepRuns(client, runs, about, lambda _: None)
