"""What a replica tells about its requests: a line of JSON each, and metrics; nothing of patients.

A request's `Record` is filled on the way (`current`); when the answer is sent, it is counted and
logged. It has numbers and names of ours alone: no code, age or probability.
"""

import contextvars
import dataclasses
import functools
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cafemed.drift import ScoreWindow
from cafemed.reference import ScoreHistogram
from serve.answers import Recommendation
from serve.asgi import Application, Message, Receive, Send, route_path
from serve.asking import Asked
from serve.encoding import EncodedPatient
from serve.lines import Lines

if TYPE_CHECKING:  # these import this module
    from serve.recommender import Recommender
    from serve.shadow import Sampling

_ID_HEADER = b"x-request-id"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: The route of whatever the application does not have; a path is the client's own text.
_NO_ROUTE = "other"
#: Paths of ours that are told although middleware refuses a request before it has a route.
_KNOWN = frozenset({"/v1/recommend", "/v1/codes", "/v1/model"})
#: Not worth a line a second: they are asked by proxies and monitors.
_UNLOGGED = ("/healthz", "/readyz")
_LOG_STATUS_MAX = 399
#: Ray gives every line the header as it came, under this name; `OwnId` puts the answer's id there.
_LOGGED_ID = "request_id"


@dataclasses.dataclass
class Record:
    """What is told about one request.

    Attributes:
        request_id: as in the answer.
        key: name of the API key.
        patients: asked about.
        run: patients in the run of the model that the first of them was in.
        codes: codes and laboratory items, of all patients.
        unknown: those that the model does not know.
        medications: recommended.
        pairs: of medications recommended to the same patient.
        interacting: pairs that interact.
        version: of the model.
        after: called once the answer is sent.
    """

    request_id: str
    key: str | None = None
    patients: int = 0
    run: int = 0
    codes: int = 0
    unknown: int = 0
    medications: int = 0
    pairs: int = 0
    interacting: int = 0
    version: int | None = None
    after: Callable[[], None] | None = None


_current: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)


def current() -> Record | None:
    """The record of the request that is being answered; None where nobody observes."""
    return _current.get()


class Counts(Protocol):
    """Where numbers go; serve.metrics.Meters."""

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        """Adds to a counter."""

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""


class Observer:
    """Counts and logs for one replica; used from one event loop."""

    def __init__(
        self,
        meters: Counts,
        lines: Lines | None,
        drift_patients: int,
        sampling: "Sampling[Asked] | None" = None,
    ) -> None:
        """Starts with nothing seen.

        Args:
            meters: where numbers go.
            lines: gets one a request; None: none.
            drift_patients: width of the window that drift is measured over.
            sampling: sends requests to the shadow, where there is one.
        """
        self._meters = meters
        self._sampling = sampling
        self._lines = lines
        self._drift_patients = drift_patients
        self._scores: ScoreWindow | None = None
        self._version: int | None = None

    def serves(self, version: int, reference: ScoreHistogram) -> None:
        """Says which model answers from now on; drift is measured anew."""
        if self._scores is not None:
            # What Ray leaves out of a scrape: the value was the former model's.
            self._meters.set("cafemed_score_drift_psi", math.nan)
        self._scores = ScoreWindow(reference, self._drift_patients)
        self._version = version
        self._meters.set("cafemed_model_version", version)

    def recommended(
        self,
        asked: Asked,
        recommender: "Recommender",
        patients: Sequence[EncodedPatient],
        rows: Sequence[NDArray[np.float32]],
        recommendations: Sequence[Recommendation],
    ) -> None:
        """Takes note of an answer that is about to be sent, all lists as long as the request's."""
        # Around a change of version the old one still answers what it has begun.
        if self._scores is not None and recommender.name.version == self._version:
            for row in rows:
                self._scores.add(row)
        record = current()
        if record is None:
            return
        record.version = recommender.name.version
        record.patients = len(patients)
        record.codes = asked.num_codes
        record.unknown = sum(len(patient.unknown) for patient in patients)
        sizes = [len(answer.medications) for answer in recommendations]
        record.medications = sum(sizes)
        record.pairs = sum(size * (size - 1) // 2 for size in sizes)
        record.interacting = sum(len(answer.interactions) for answer in recommendations)
        if self._sampling is not None:
            offer = functools.partial(self._sampling.offer, asked, recommender, rows)
            record.after = offer

    def ran(self, patients: int) -> None:
        """Takes note of a run of the model."""
        self._meters.observe("cafemed_run_patients", patients)

    def refused_version(self) -> None:
        """Takes note of a promoted version that did not work."""
        self._meters.count("cafemed_refused_versions")

    def report(self, in_progress: int, waiting: int) -> None:
        """Sets what is a state rather than an event; to be called every few seconds."""
        self._meters.set("cafemed_requests_in_progress", in_progress)
        self._meters.set("cafemed_waiting_patients", waiting)
        index = self._scores.index if self._scores else None
        if index is not None:
            self._meters.set("cafemed_score_drift_psi", index)

    def refused(self) -> None:
        """Takes note of a request refused by admission."""
        self._meters.count("cafemed_refused_requests")

    def answered(self, method: str, route: str, status: int, took_s: float, record: Record) -> None:
        """Counts and logs a request."""
        took_ms = 1000 * took_s
        meters = self._meters
        meters.count("cafemed_requests", route=route, status=str(status))
        meters.observe("cafemed_request_latency_ms", took_ms, route=route)
        if record.patients:
            meters.count("cafemed_patients", record.patients)
            meters.count("cafemed_codes", record.codes)
            meters.count("cafemed_unknown_codes", record.unknown)
            meters.count("cafemed_medications", record.medications)
            meters.count("cafemed_pairs", record.pairs)
            meters.count("cafemed_interacting_pairs", record.interacting)
        if self._lines is None or (route in _UNLOGGED and status <= _LOG_STATUS_MAX):
            return
        told = {
            _LOGGED_ID: record.request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(took_ms, 1),
            "patients": record.patients,
            "run_patients": record.run,
            "model_version": record.version,
            "key": record.key,
        }
        self._lines.info("%s %s %d", method, route, status, extra=told)


class OwnId(logging.Filter):
    """Gives log lines the id of the answer, and never the header of the request.

    To be added behind Ray's own filters, which take the header as it came: a client's own text.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces the id of a line; always keeps the line."""
        of_request = current()
        if of_request is not None:
            setattr(record, _LOGGED_ID, of_request.request_id)
        elif hasattr(record, _LOGGED_ID):
            delattr(record, _LOGGED_ID)
        return True


class Observed:
    """ASGI middleware, the outermost: gives each request its record and tells of it at the end."""

    def __init__(self, app: Application, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(request_id(scope["headers"]))
        _current.set(record)  # each request is a task of its own, with its own context
        started = time.perf_counter()
        status = 500  # where nothing is answered, the server does

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            asked = route_path(scope)
            path = asked if asked in _KNOWN else _NO_ROUTE
            route = str(getattr(scope.get("route"), "path", path))
            took_s = time.perf_counter() - started
            self._observer.answered(scope["method"], route, status, took_s, record)
        if record.after is not None:
            record.after()


def request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The request's own id, which Ray Serve's proxy gives it; a new one where that is not one."""
    given = next((value.decode("latin-1") for name, value in headers if name == _ID_HEADER), "")
    return given if _ID.fullmatch(given) else str(uuid.uuid4())
