"""The routes over HTTP, without Ray: any object with a recommender can stand behind them.

No answer holds a stack trace and no log line holds a code: a failure is logged as its type and
place in the program, never with its message, because that may quote a request.
"""

import functools
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from cafemed.card import INTENDED_USE
from serve.access import Access, Gate, document_keys
from serve.admission import Admission, Admitted, has_room
from serve.answers import CodesFound, Health, Kind, ModelCard, Ready, RecommendResponse
from serve.asgi import Message
from serve.asking import Asked, of_request
from serve.encoding import RefusedError
from serve.hardening import Hardened
from serve.limits import BodyLimit, StrictRoute, UnreadableError
from serve.observing import Observed, Observer
from serve.pages import add_page
from serve.problems import documented, failed, problem, request_id
from serve.replying import Service, encoded, replied
from serve.schema import (
    MAX_BODY_BYTES,
    MAX_CODES_FOUND,
    MAX_MESSAGES,
    MAX_QUERY_LENGTH,
    FieldProblem,
    RecommendRequest,
    field_path,
)
from serve.settings import MAX_UNKNOWN_SHARE
from serve.straight import Straight

_RECOMMEND = "/v1/recommend"
_INVALID = "the request is not valid"
_MAX_FIELD_LENGTH = 200
_REFUSED_BY_FRAMEWORK = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)

#: What pages of the listed origins may send and read.
_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "X-API-Key", "Content-Type", "X-Request-ID"],
    "expose_headers": ["Retry-After"],
}

#: Whatever the route: a key, how often, from where, how long the headers, and faults.
_ANYWHERE = documented(400, 401, 403, 413, 429, 431, 500)
_PROBLEMS = _ANYWHERE | documented(408, 415, 422, 503)
_INVALID_QUERY = _ANYWHERE | documented(422)
_QUERY = (
    "the beginning of a code, with its system or without, dots and case not mattering; or words, "
    "each of which begins a word of the name"
)


def create_api(
    service: Service,
    *,
    access: Access | None = None,
    admission: Admission | None = None,
    observer: Observer | None = None,
    max_unknown_share: float = MAX_UNKNOWN_SHARE,
) -> FastAPI:
    """Gives the ASGI application of a service.

    Args:
        service: what answers.
        access: who may ask; None: whoever can, for tests and measurements.
        admission: refuses requests over a limit; None: there is none.
        observer: is told of every request.
        max_unknown_share: a patient with a larger share of unknown codes is refused.
    """
    api = FastAPI(
        title="CafeMed",
        version="1",
        description=INTENDED_USE,
        docs_url=None,
        redoc_url=None,
        # Spans would hold what is searched for.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    api.router.route_class = StrictRoute
    document_keys(api)

    async def answer(asked: Asked, scope: Message) -> Response:
        if admission is not None and not has_room(admission, scope, asked):
            return _refuse_busy(observer, scope, admission.retry_after_s)
        recommender = service.recommender
        try:
            patients = await encoded(recommender, asked, max_unknown_share)
        except RefusedError as err:
            return _refuse_content(scope, err)
        try:
            identity = request_id(scope)
            content = await replied(service, recommender, asked, patients, identity, observer)
        except Exception as err:  # noqa: BLE001 - the server would log the message with its codes
            return failed(scope, err)
        return _Answer(content)

    api.add_middleware(Straight, path=_RECOMMEND, answer=answer)
    _add_limits(api, access, admission, observer)
    _add_refusals(api)

    @api.post(_RECOMMEND, response_model=RecommendResponse, responses=_PROBLEMS)
    async def recommend(body: RecommendRequest, request: Request) -> Response:
        """Recommends medications for the current visit of every patient."""
        return await answer(of_request(body), request.scope)

    _add_descriptions(api, service)
    add_page(api)
    return api


def _add_limits(
    api: FastAPI, access: Access | None, admission: Admission | None, observer: Observer | None
) -> None:
    """Adds what a request passes before it is answered; what is added later is further out."""
    refuse = functools.partial(_refuse_busy, observer)
    if admission is not None:
        api.add_middleware(Admitted, admission=admission, refuse=refuse)
    timeout_s = access.body_timeout_s if access else Access.body_timeout_s
    api.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES, timeout_s=timeout_s, refuse=refuse)
    if access is not None:
        api.add_middleware(Gate, access=access)
        if access.cors_origins:
            api.add_middleware(CORSMiddleware, allow_origins=access.cors_origins, **_CORS)
    api.add_middleware(Hardened)
    if observer is not None:
        api.add_middleware(Observed, observer=observer)


def _add_refusals(api: FastAPI) -> None:
    """Adds the answers to what cannot be read and to what there is not."""
    api.add_exception_handler(RequestValidationError, _refuse_invalid)
    api.add_exception_handler(UnreadableError, _refuse_unreadable)
    for status in _REFUSED_BY_FRAMEWORK:
        api.add_exception_handler(status, functools.partial(_refuse_other, status=status))


def _add_descriptions(api: FastAPI, service: Service) -> None:
    """Adds what tells of the codes, the model and the process."""

    @api.get("/v1/codes", responses=_INVALID_QUERY)
    async def codes(
        query: Annotated[str, Query(max_length=MAX_QUERY_LENGTH, description=_QUERY)] = "",
        kind: Annotated[Kind | None, Query(description="of the codes; left out: any")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_CODES_FOUND)] = 20,
    ) -> CodesFound:
        """Searches the codes that the model knows."""
        return CodesFound(codes=service.recommender.vocabulary.search(query, kind, limit))

    @api.get("/v1/model", responses=_ANYWHERE)
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


class _Answer(Response):
    """An answer of JSON, without what finds out the headers of any other."""

    def __init__(self, content: bytes) -> None:
        self.status_code = HTTPStatus.OK
        self.background = None
        self.body = content
        length = b"%d" % len(content)
        self.raw_headers = [(b"content-length", length), (b"content-type", b"application/json")]


def _refuse_busy(observer: Observer | None, scope: Message, retry_after_s: int) -> JSONResponse:
    if observer is not None:
        observer.refused()
    message = f"too many requests are in progress; retry in {retry_after_s} s"
    answer = problem(scope, HTTPStatus.SERVICE_UNAVAILABLE, message)
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
    ]
    return problem(
        request.scope, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, problems[:MAX_MESSAGES]
    )


async def _refuse_unreadable(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, UnreadableError)
    wrong = FieldProblem(field="body", message=err.detail)
    return problem(request.scope, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, [wrong])


def _refuse_content(scope: Message, err: RefusedError) -> JSONResponse:
    wrong = FieldProblem(field=err.field, message=str(err))
    return problem(scope, HTTPStatus.UNPROCESSABLE_ENTITY, _INVALID, [wrong])


async def _refuse_other(request: Request, err: Exception, status: HTTPStatus) -> JSONResponse:
    headers = getattr(err, "headers", None)
    return problem(request.scope, status, status.phrase, headers=headers)
