"""What a run is followed with besides the terminal: TensorBoard's files, and MLflow if asked for.

Nothing here decides anything: trackers are told what there is, all of it every time, and send
what they have not sent. So one that was away, or a sweep that goes on, misses and repeats nothing.
"""

import contextlib
import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cafemed import console
from cafemed.errors import ConfigError, TrackingError, TrackingRefusedError, UserError
from cafemed.sweep import TrialRecord

if TYPE_CHECKING:
    from cafemed.mlflow_client import Client
    from cafemed.training import EpochReport  # torch takes seconds to import

#: Below an experiment's folder: what `tensorboard --logdir` is given.
TENSORBOARD = "tensorboard"

#: Seconds between two looks at what there is to send; whatever came meanwhile goes in one batch.
_TICK_S = 1.0
#: Seconds before a tracker that did not answer is asked again: the first wait, and the longest.
_RETRY_S = (2.0, 60.0)
#: Seconds that a single trial's requests may take, with all that the client tries.
_LAST_S = 60.0


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where runs are tracked (group `tracking`).

    Attributes:
        name: "mlflow", or "none".
        uri: an MLflow server's URL, an absolute folder, or sqlite:///FILE; None: what
            $MLFLOW_TRACKING_URI says, else the folder ROOT/mlflow.
        experiment: MLflow's experiment; None: cafemed/NAME.
        tensorboard: write TensorBoard's event files.
    """

    name: Literal["none", "mlflow"] = "none"
    uri: str | None = None
    experiment: str | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.name == "none" and (self.uri is not None or self.experiment is not None):
            raise ConfigError("uri and experiment: only with tracking=mlflow")


@dataclasses.dataclass(frozen=True)
class Progress:
    """A trial as far as it is.

    Attributes:
        number, parameters, seed: see TrialRecord.
        history: every epoch until now, as `training.EpochReport.as_dict` gives it.
        record: what came of it; None while it runs.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    history: Sequence[Mapping[str, Any]]
    record: TrialRecord | None = None

    @classmethod
    def of(cls, record: TrialRecord) -> "Progress":
        """That of a trial that ended."""
        return cls(record.number, record.parameters, record.seed, record.history, record)


Tell = Callable[[Progress], None]


class TensorBoard:
    """Event files, a folder a trial; told by the process that runs the sweep.

    Args:
        folder: of the sweep's event files.
    """

    def __init__(self, folder: Path) -> None:
        from cafemed.event_files import EventFile

        self._folder, self._make = folder, EventFile
        self._files: dict[int, EventFile] = {}
        self._failed = False

    def tell(self, trial: Progress) -> None:
        """Writes what is missing of a trial; a full disk costs event files, not the sweep."""
        place = self._folder / f"trial-{trial.number:05d}"
        file = self._files.setdefault(trial.number, self._make(place))
        try:
            if trial.record is None:
                file.follow(trial.history)
            else:
                parameters = {**trial.parameters, "seed": trial.seed}
                file.end(trial.history, parameters, trial.record.status == "failed")
                del self._files[trial.number]
        except OSError as err:
            self._files.pop(trial.number, None)
            if not self._failed:
                console.say("tracking", f"no event files: {err.strerror}: {self._folder}")
            self._failed = True


class FitEvents:
    """The event file of a single training run.

    Args:
        experiment: the experiment's folder.
        checkpoint: folder from which the run goes on; without one it begins anew.
        settings: section → option → value; for the end.
    """

    def __init__(
        self, experiment: Path, checkpoint: Path, settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        from cafemed import checkpoints
        from cafemed.event_files import EventFile

        folder, earlier = experiment / TENSORBOARD / "fit", checkpoints.load(checkpoint, None)
        self._history = [] if earlier is None else list(earlier.history)
        if not self._history:
            clear(folder)
        self._file, self._failed = EventFile(folder), False
        options = {**settings["model"]["options"], "name": settings["model"]["name"]}
        sections = {"model": options, "train": settings["train"]}
        self._parameters = {
            f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()
        }

    def follow(self, epoch: "EpochReport") -> None:
        """Writes an epoch."""
        self._history.append(epoch.as_dict())
        self._write(lambda: self._file.follow(self._history))

    def end(self) -> None:
        """Writes the best epoch and the parameters."""
        self._write(lambda: self._file.end(self._history, self._parameters))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as err:
            if not self._failed:
                console.say("tracking", f"no event file: {err.strerror}: {self._file.folder}")
            self._failed = True


class Background:
    """Sends trials' progress from a thread of its own, so that nobody waits for a server.

    Only the newest progress of a trial is kept; one that could not be sent is sent again later.

    Args:
        send: sends what is missing of a trial, or of all that it had before; may take its time.
        where: the tracker, in messages.
    """

    def __init__(self, send: Tell, where: str) -> None:
        self._send, self._where = send, where
        self._latest: dict[int, Progress] = {}
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing = self._given_up = False
        self._away = 0
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def tell(self, trial: Progress) -> None:
        """Takes note of a trial's progress and returns at once."""
        with self._lock:
            self._latest[trial.number] = trial
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Sends what is left, for so long at most, and ends the thread; says whether it ended.

        What is being sent then is waited for: who sends the rest must not meet it half-sent.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._given_up = True
        self._thread.join(_LAST_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            self._pause(_TICK_S)
            while not self._send_all() and not self._closing:
                first, longest = _RETRY_S
                self._pause(min(first * 2 ** (self._away - 1), longest))
        self._send_all()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._closing and time.monotonic() < until:
            time.sleep(0.05)

    def _send_all(self) -> bool:
        """Says whether all was sent."""
        with self._lock:
            waiting, self._latest = self._latest, {}
        while waiting and not self._given_up:
            number = next(iter(waiting))
            try:
                self._send(waiting[number])
            except TrackingRefusedError as err:
                console.say("tracking", f"trial {number}: {err}")
            except TrackingError as err:
                with self._lock:
                    self._latest = {**waiting, **self._latest}
                self._away += 1
                if self._away == 1:
                    console.say("tracking", f"{err}; what is missing is sent when it is back")
                return False
            del waiting[number]
            if self._away:
                console.say("tracking", f"{self._where} is back")
            self._away = 0
        return True


def require_uri(config: TrackingConfig, root: Path) -> str:
    """The place that MLflow's data goes to: a server's URL, or sqlite:///FILE.

    Raises:
        ConfigError: if it is none of what can be told.
    """
    from cafemed import mlflow_client

    return mlflow_client.resolve(config.uri or os.environ.get("MLFLOW_TRACKING_URI"), root)


def require_answer(client: "Client", experiment: str) -> None:
    """Asks a tracking server for an experiment, before something new is begun.

    Raises:
        TrackingError: if it does not answer.
    """
    try:
        client.experiment(experiment)
    except TrackingRefusedError:
        raise
    except TrackingError as err:
        raise TrackingError(f"{err}; start it, or choose tracking=none") from err


@contextlib.contextmanager
def forgiving(advice: str) -> Iterator[None]:
    """What goes wrong with tracking is said in one line, and is not the job's failure."""
    try:
        yield
    except UserError as err:
        console.say("tracking", f"{err}; {advice}")


def clear(folder: Path) -> None:
    """Removes event files of a run that is begun anew."""
    shutil.rmtree(folder, ignore_errors=True)
