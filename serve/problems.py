"""Answers that refuse: each says what is wrong, none quotes a request or holds a stack trace."""

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

from serve import observing
from serve.asgi import Message
from serve.schema import FieldProblem, Problem

logger = logging.getLogger(__name__)


def problem(
    scope: Message,
    status: HTTPStatus,
    message: str,
    problems: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer to a request that is refused."""
    answer = Problem(message=message, problems=list(problems), request_id=request_id(scope))
    return JSONResponse(answer.model_dump(), status, dict(headers or {}))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These answers as FastAPI documents them."""
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses
    }


def failed(scope: Message, err: Exception) -> JSONResponse:
    """The answer to a request that met a fault of ours; logs where, but not the message.

    The message of an exception may quote a request.
    """
    answer = problem(scope, HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed in the server")
    logger.error("request %s failed: %s", request_id(scope), _told(err))
    return answer


@contextlib.contextmanager
def going_on(work: str) -> Iterator[None]:
    """Lets a task that repeats some work go on after a fault; logs where, but not the message."""
    try:
        yield
    except Exception as err:  # noqa: BLE001 - nobody else would tell of it
        logger.error("%s failed and goes on: %s", work, _told(err))


def _told(err: Exception) -> str:
    """The type of an exception and its place in the program, without its message."""
    place = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__} at {place.filename}:{place.lineno}"


def request_id(scope: Message) -> str:
    """The request's own id where it has one, else a new one, the same all along."""
    record = observing.current()
    if record is not None:
        return record.request_id
    given: str | None = scope.get("cafemed.request_id")
    if given is None:
        given = scope["cafemed.request_id"] = observing.request_id(scope["headers"])
    return given
