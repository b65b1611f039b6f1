"""The routes over HTTP, without Ray: any object with a recommender can stand behind them.

No answer holds a stack trace and no log line holds a code: a failure is logged as its type and
place in the program, never with its message, because that may quote a request.
"""

import functools
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray

from cafemed.card import INTENDED_USE
from serve import observing
from serve.admission import Admission, Admitted
from serve.answers import Health, ModelCard, Ready, RecommendResponse
from serve.encoding import EncodedPatient, UnknownSystemError
from serve.observing import Observed, Observer
from serve.recommender import Recommender
from serve.schema import (
    MAX_BODY_BYTES,
    MAX_MESSAGES,
    FieldProblem,
    Problem,
    RecommendRequest,
    field_path,
)

logger = logging.getLogger(__name__)

_INVALID = "the request is not valid"
_MAX_FIELD_LENGTH = 200
_REFUSED_BY_FRAMEWORK = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
)

# ASGI's own names (https://asgi.readthedocs.io/en/latest/specs/main.html).
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_ASGIApp = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE.value: {"model": Problem},
    HTTPStatus.UNPROCESSABLE_ENTITY.value: {"model": Problem},
    HTTPStatus.INTERNAL_SERVER_ERROR.value: {"model": Problem},
    HTTPStatus.SERVICE_UNAVAILABLE.value: {"model": Problem},
}


class Service(Protocol):
    """What the routes need."""

    @property
    def recommender(self) -> Recommender:
        """The recommender in use; another one after a promotion."""

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[NDArray[np.float32]]:
        """Runs the model, batched with other requests; one row (N_m,) a patient."""


def create_api(
    service: Service, *, admission: Admission | None = None, observer: Observer | None = None
) -> FastAPI:
    """Gives the ASGI application of a service.

    Args:
        service: what answers.
        admission: refuses requests over a limit; None: there is none.
        observer: is told of every request.
    """
    api = FastAPI(title="CafeMed", version="1", description=INTENDED_USE)
    # What is added later is further out.
    if admission is not None:
        refuse = functools.partial(_refuse_busy, observer)
        api.add_middleware(Admitted, admission=admission, refuse=refuse)
    api.add_middleware(_BodyLimit, max_bytes=MAX_BODY_BYTES)
    if observer is not None:
        api.add_middleware(Observed, observer=observer)
    api.add_exception_handler(RequestValidationError, _refuse_invalid)
    api.add_exception_handler(UnknownSystemError, _refuse_system)
    for status in _REFUSED_BY_FRAMEWORK:
        api.add_exception_handler(status, functools.partial(_refuse_other, status=status))

    @api.post("/v1/recommend", response_model=RecommendResponse, responses=_PROBLEMS)
    async def recommend(
        body: RecommendRequest, request: Request
    ) -> RecommendResponse | JSONResponse:
        """Recommends medications for the current visit of every patient."""
        recommender = service.recommender
        patients = recommender.encode(body)
        try:
            explainer = recommender.explainer
            plans = [explainer.plan(p) for p in patients] if body.options.explain else []
            everyone = [*patients, *(one for plan in plans for one in plan.reduced)]
            scores = await service.probabilities(recommender, everyone)
            explanations = (
                explainer.explanations(plans, scores) if plans else [None] * len(patients)
            )
            rows = scores[: len(patients)]
            answers = [
                recommender.answer(patient, row, body.options, explanation)
                for patient, row, explanation in zip(patients, rows, explanations, strict=True)
            ]
            if observer is not None:
                observer.recommended(body, recommender, patients, rows, answers)
            return RecommendResponse(
                request_id=_id_of(request), model=recommender.name, recommendations=answers
            )
        except Exception as err:  # noqa: BLE001 - the server would log the message with its codes
            return _failed(request, err)

    @api.get("/v1/model")
    async def model() -> ModelCard:
        """Describes the model that answers."""
        return service.recommender.card

    @api.get("/healthz")
    async def healthz() -> Health:
        """Says that the process answers."""
        return Health(status="ok")

    @api.get("/readyz")
    async def readyz() -> Ready:
        """Says which model is loaded; before one is, nothing is routed here."""
        return Ready(status="ok", model=service.recommender.name)

    return api


class _BodyLimit:
    """Refuses a body over the limit: by its announced length, else once that much has come."""

    def __init__(self, app: _ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received: list[_Message] = []
        come = 0
        size = int(dict(scope["headers"]).get(b"content-length", b"0"))
        more = True
        while more and size <= self._max_bytes:
            message = await receive()
            received.append(message)
            more = message["type"] == "http.request" and message.get("more_body", False)
            come += len(message.get("body", b""))
            size = max(size, come)
        if size > self._max_bytes:
            answer = _problem(
                Request(scope),
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body may have at most {self._max_bytes} bytes; send fewer patients at once",
            )
            await answer(scope, receive, send)
            return

        async def replay() -> _Message:
            return received.pop(0) if received else await receive()

        await self._app(scope, replay, send)


def _refuse_busy(observer: Observer | None, scope: _Message, retry_after_s: int) -> JSONResponse:
    if observer is not None:
        observer.refused()
    message = f"too many requests are in progress; retry in {retry_after_s} s"
    answer = _problem(Request(scope), HTTPStatus.SERVICE_UNAVAILABLE, message)
    answer.headers["Retry-After"] = str(retry_after_s)
    return answer


async def _refuse_invalid(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, RequestValidationError)
    problems = [
        FieldProblem(
            # The first part of a location is always "body"; a part may be the client's own key.
            field=field_path(tuple(error["loc"])[1:])[:_MAX_FIELD_LENGTH] or "body",
            message=str(error["msg"]).removeprefix("Value error, "),
        )
        for error in err.errors()
        if error["type"] != "json_invalid"
    ] or [FieldProblem(field="body", message="not JSON")]
    return _problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, problems[:MAX_MESSAGES])


async def _refuse_system(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, UnknownSystemError)
    problem = FieldProblem(field=err.field, message=str(err))
    return _problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, [problem])


async def _refuse_other(request: Request, err: Exception, status: HTTPStatus) -> JSONResponse:
    if status == HTTPStatus.BAD_REQUEST:
        # What FastAPI says of a body that is not even text, or nested too deeply.
        problem = FieldProblem(field="body", message="not JSON")
        return _problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, [problem])
    answer = _problem(request, status, status.phrase)
    answer.headers.update(getattr(err, "headers", None) or {})
    return answer


def _failed(request: Request, err: Exception) -> JSONResponse:
    place = traceback.extract_tb(err.__traceback__)[-1]
    answer = Problem(message="the request failed in the server", request_id=_id_of(request))
    logger.error(
        "request %s failed: %s at %s:%s",
        answer.request_id,
        type(err).__name__,
        place.filename,
        place.lineno,
    )
    return JSONResponse(answer.model_dump(), HTTPStatus.INTERNAL_SERVER_ERROR)


def _problem(
    request: Request, status: HTTPStatus, message: str, problems: Sequence[FieldProblem] = ()
) -> JSONResponse:
    answer = Problem(message=message, problems=list(problems), request_id=_id_of(request))
    return JSONResponse(answer.model_dump(), status)


def _id_of(request: Request) -> str:
    record = observing.current()
    return record.request_id if record else observing.request_id(request.scope["headers"])
