"""The little of MLflow's client that is used, with its errors as one line.

MLflow's client retries for minutes, prints, and reports its own use over the network; here it does
none of it. The package, mlflow-skinny, is only needed for `tracking=mlflow`.
"""

import contextlib
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cafemed.errors import (
    ConfigError,
    MissingProgramError,
    TrackingError,
    TrackingRefusedError,
)

#: Unless the user's environment says otherwise. Who calls tries again himself, when he has asked
#: what became of it; a request that a slow server gets twice would begin a run twice.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # a machine without git is told nothing
}
_LOGGERS = ("mlflow", "alembic", "urllib3", "sqlalchemy", "git")
#: What a server refuses now it refuses later too.
_REFUSALS = {
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
}
#: Of a message, in characters: MLflow's hold whole requests.
_MOST = 200
#: That MLflow takes of a parameter's value and of a tag's, and how many entries of a batch.
_MAX_VALUE, _MAX_TAG, _MAX_BATCH = 6000, 5000, 100


@dataclasses.dataclass(frozen=True)
class Point:
    """A value of a metric.

    Attributes:
        key: its name.
        value: finite.
        step: an epoch.
        time_ms: since 1970.
    """

    key: str
    value: float
    step: int
    time_ms: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a server has of a run.

    Attributes:
        status: "RUNNING", "FINISHED", "FAILED", "KILLED" …
        params, metrics, tags: their names; tags with values.
    """

    status: str
    params: frozenset[str]
    metrics: frozenset[str]
    tags: Mapping[str, str]


def resolve(uri: str | None, root: Path) -> str:
    """The URI of a tracking store: a server's URL, or SQLite in a folder.

    Args:
        uri: as configured; None: the folder `root`/mlflow.
        root: of all the project's files.

    Raises:
        ConfigError: if it is none of an http(s) URL, a folder and sqlite:///FILE, or has a
            password in it, which would get into files and messages.
    """
    text = str(root / "mlflow") if uri is None else uri
    if text.startswith("file://"):
        text = urlsplit(text).path
    if text.startswith("/"):
        return f"sqlite:///{Path(text) / 'mlflow.db'}"
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ConfigError(
            "tracking.uri: expected a URL without a user's name and password; put them into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if (parts.scheme in ("http", "https") and parts.netloc) or re.match("sqlite:////", text):
        return text.rstrip("/")
    raise ConfigError(
        f"tracking.uri: expected a server's URL (http://host:5000), an absolute folder or "
        f"sqlite:////FILE, got {text!r}"
    )


class Client:
    """Speaks with one tracking store.

    Every method raises TrackingError if the store does not answer, and TrackingRefusedError if it
    answers that it will not.

    Args:
        uri: of `resolve`.

    Raises:
        MissingProgramError: if MLflow's client is not installed.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its dependencies, which nobody here can mend
                from mlflow import entities, exceptions
                from mlflow.tracking import MlflowClient
        except ImportError as err:
            raise MissingProgramError(
                "tracking=mlflow needs the package mlflow-skinny, which is not installed: "
                "pip install 'mlflow-skinny==3.17.2', or tracking=none"
            ) from err
        for name in _LOGGERS:  # it sets its own when it is imported
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._entities, self._error = entities, exceptions.MlflowException
        self._artifacts: str | None = None
        if uri.startswith("sqlite:///"):
            place = Path(uri.removeprefix("sqlite:///")).parent
            with self._guarded():
                place.mkdir(parents=True, exist_ok=True)
            self._artifacts = (place / "artifacts").as_uri()
        with self._guarded():
            self._client = MlflowClient(uri)

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is made if there is none."""
        with self._guarded():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                place = None if self._artifacts is None else f"{self._artifacts}/{name}"
                return str(self._client.create_experiment(name, artifact_location=place))
        if found.lifecycle_stage != "active":
            raise TrackingRefusedError(
                f"{self.uri}: the experiment {name!r} is deleted; restore it, or choose another "
                "with tracking.experiment"
            )
        return str(found.experiment_id)

    def find(self, experiment: str, tags: Mapping[str, str]) -> str | None:
        """The id of the run with these tags; None if there is none."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        with self._guarded():
            found = self._client.search_runs([experiment], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None

    def create(self, experiment: str, name: str, start_ms: int, tags: Mapping[str, str]) -> str:
        """Begins a run and gives its id."""
        with self._guarded():
            made = self._client.create_run(
                experiment, start_time=start_ms, tags=dict(tags), run_name=name
            )
        return str(made.info.run_id)

    def read(self, run: str) -> Stored:
        """What there is of a run."""
        with self._guarded():
            found = self._client.get_run(run)
        data = found.data
        return Stored(
            found.info.status, frozenset(data.params), frozenset(data.metrics), dict(data.tags)
        )

    def last_step(self, run: str, key: str) -> int:
        """The highest step of a metric; 0 if it has none."""
        with self._guarded():
            history = self._client.get_metric_history(run, key)
        return max((point.step for point in history), default=0)

    def log(
        self,
        run: str,
        points: Sequence[Point] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds to a run, in as few requests as MLflow's limits allow."""
        entities = self._entities
        metrics = [entities.Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        plain = [entities.Param(k, _text(v, _MAX_VALUE)) for k, v in (params or {}).items()]
        marks = [entities.RunTag(k, _text(v, _MAX_TAG)) for k, v in (tags or {}).items()]
        with self._guarded():
            while metrics or plain or marks:
                # A thousand entries in all, of which a hundred parameters and a hundred tags.
                room = 7 * _MAX_BATCH
                self._client.log_batch(run, metrics[:room], plain[:_MAX_BATCH], marks[:_MAX_BATCH])
                metrics, plain, marks = metrics[room:], plain[_MAX_BATCH:], marks[_MAX_BATCH:]

    def end(self, run: str, status: str, time_ms: int | None = None) -> None:
        """Ends a run: "FINISHED", "FAILED" or "KILLED"."""
        with self._guarded():
            self._client.set_terminated(run, status, time_ms)

    def reopen(self, run: str) -> None:
        """Makes a run one that goes on."""
        with self._guarded():
            self._client.update_run(run, status="RUNNING")

    def upload(self, run: str, path: Path, folder: str | None = None) -> None:
        """Puts a file beside a run, in place of one of that name."""
        with self._guarded():
            self._client.log_artifact(run, str(path), folder)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except self._error as err:
            said = _one_line(str(err))
            if getattr(err, "error_code", None) in _REFUSALS:
                raise TrackingRefusedError(f"{self.uri} refuses: {said}") from err
            raise TrackingError(f"{self.uri} does not answer ({said})") from err
        except OSError as err:
            raise TrackingError(f"{self.uri} does not answer ({_one_line(str(err))})") from err


def _text(value: Any, most: int) -> str:
    return str(value)[:most]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"
