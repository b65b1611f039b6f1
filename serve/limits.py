"""What a body may be, checked before any of it is looked at as a request.

A hostile body of four megabytes could otherwise hold a replica for many seconds and gigabytes: by
hundreds of thousands of fields or objects, each wrong in its own way and each with its own message.
"""

import asyncio
import email.message
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from serve.access import KEY, is_open
from serve.asgi import Application, Message, Receive, Send, route_path
from serve.problems import problem
from serve.schema import MAX_OBJECTS

#: Fields of one JSON object; no object of the schema has half as many.
MAX_FIELDS = 32
#: Bytes of all headers together.
MAX_HEADER_BYTES = 16 * 1024
#: Bodies that a replica gathers at once, and their bytes together. Nearly all come in one piece. A
#: key gets no more of either than is free: whoever sends slowly cannot keep the others out.
MAX_GATHERED = 256
MAX_GATHERED_BYTES = 32 * 1024 * 1024
#: Longer bodies are read in a thread, one at a time: a thousand codes take about ten milliseconds.
SHORT_BYTES = 32 * 1024
#: Where the length of a body is told to what is further in.
SIZE = "cafemed.body_bytes"
#: When a client whose body found no room should come again, in seconds: most bodies are there by
#: then.
_RETRY_S = 1


class BodyLimit:
    """ASGI middleware: gathers a body that is of our type, not too large and not too slow.

    It is refused by its announced length, else once too much has come. The application gets it in
    one piece. Only a POST that the gate has looked at may have one: of any other request nothing
    is read, so that nobody without a key makes a replica wait or keep anything.
    """

    def __init__(
        self,
        app: Application,
        max_bytes: int,
        timeout_s: float,
        refuse: Callable[[Message, int], JSONResponse],
    ) -> None:
        """Wraps an application.

        Args:
            app: to wrap.
            max_bytes: of a body.
            timeout_s: how long a body may take to come.
            refuse: gives the answer to a request's scope where there is no room for its body, for
                the seconds to wait.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._refuse = refuse
        self._gathered = 0
        self._gathered_bytes = 0
        self._bodies_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body: bytes | None = None
        takes_body = scope["method"] == "POST" and not is_open(route_path(scope))
        refusal = self._refuse_announced(scope, takes_body)
        if refusal is None and not takes_body:
            body = b""
        elif refusal is None:
            body, refusal = await self._gather_in_time(scope, receive)
        if refusal is not None:
            # What has not come yet is not waited for.
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        scope[SIZE] = len(body)
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    def _refuse_announced(self, scope: Message, takes_body: bool) -> JSONResponse | None:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return problem(scope, status, f"the headers may have {MAX_HEADER_BYTES} bytes together")
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit():
            return problem(scope, HTTPStatus.BAD_REQUEST, "Content-Length: expected a number")
        # Not every number of digits can be converted.
        if len(length) > len(str(self._max_bytes)) or int(length) > self._max_bytes:
            return self._refuse_size(scope)
        if not takes_body:
            if int(length) == 0 and all(name != b"transfer-encoding" for name, _ in headers):
                return None
            message = "no body is taken here"
            return problem(scope, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        if not _is_json(headers):
            message = "expected Content-Type: application/json"
            return problem(scope, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)
        return None

    async def _gather_in_time(
        self, scope: Message, receive: Receive
    ) -> tuple[bytes | None, JSONResponse | None]:
        """As `asyncio.timeout` around `_gather`, which takes three times as long to set up."""
        task = asyncio.current_task()
        assert task is not None
        is_late = False

        def give_up() -> None:
            nonlocal is_late
            is_late = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(self._timeout_s, give_up)
        try:
            return await self._gather(scope, receive)
        except asyncio.CancelledError:
            if not is_late or task.uncancel():  # somebody else cancels, too
                raise
        finally:
            timer.cancel()
        message = f"the body did not come within {self._timeout_s:g} s"
        return None, problem(scope, HTTPStatus.REQUEST_TIMEOUT, message)

    async def _gather(
        self, scope: Message, receive: Receive
    ) -> tuple[bytes | None, JSONResponse | None]:
        # "" where nobody needs one: the endpoint then serves its own machine alone.
        key: str = scope.get(KEY, "")
        if self._gathered + (self._bodies_of[key] if key else 0) >= MAX_GATHERED:
            return None, self._refuse(scope, _RETRY_S)
        chunks: list[bytes] = []
        size = 0
        self._gathered += 1
        self._bodies_of[key] += 1
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None, None
                chunk = message.get("body", b"")
                if size + len(chunk) > self._max_bytes:
                    return None, self._refuse_size(scope)
                of_key = self._bytes_of[key] if key else 0
                if self._gathered_bytes + of_key + len(chunk) > MAX_GATHERED_BYTES:
                    return None, self._refuse(scope, _RETRY_S)
                if chunk:  # else a client could send any number of empty ones
                    chunks.append(chunk)
                    size += len(chunk)
                    self._gathered_bytes += len(chunk)
                    self._bytes_of[key] += len(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks), None
        finally:
            self._gathered -= 1
            self._gathered_bytes -= size
            self._bytes_of[key] -= size
            self._bodies_of[key] -= 1
            if not self._bodies_of[key]:  # keys come and go
                del self._bodies_of[key], self._bytes_of[key]

    def _refuse_size(self, scope: Message) -> JSONResponse:
        message = f"the body may have at most {self._max_bytes} bytes; send fewer patients at once"
        return problem(scope, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


class StrictRoute(APIRoute):
    """A route whose JSON is read by `parse`; where it is long, outside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()
        field = self.body_field
        expected: TypeAdapter[Any] | None = None
        if field is not None and field.field_info.annotation is not None:
            expected = TypeAdapter(field.field_info.annotation)
        one_at_a_time = asyncio.Lock()

        async def strictly(request: Request) -> Response:
            if expected is None:
                return await handle(request)
            body = await request.body()
            if not body:  # FastAPI says that it is required
                return await handle(request)
            if len(body) <= SHORT_BYTES:
                content = _valid(expected, body)
            else:
                async with one_at_a_time:  # each takes many times its length of memory meanwhile
                    content = await asyncio.to_thread(_valid, expected, body)
            return await handle(_ReadRequest(request.scope, content))

        return strictly


def _valid(expected: TypeAdapter[Any], body: bytes) -> Any:
    """What a route is given for a body.

    Raises:
        UnreadableError: as `parse`.
        RequestValidationError: if it is not what the route takes.
    """
    content = parse(body)
    try:
        return expected.validate_python(content, from_attributes=True)  # as FastAPI does
    except ValidationError as err:
        errors = err.errors(include_url=False)
    raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in errors])


class _ReadRequest(Request):
    """A request whose body has been read; FastAPI takes what is valid as it is."""

    def __init__(self, scope: Message, content: Any) -> None:
        super().__init__(scope)
        self._body = b"{}"  # not empty, so that FastAPI asks for the content
        self._json = content


class UnreadableError(HTTPException):
    """A body is not the JSON that a request may be; FastAPI lets only HTTPException through."""

    def __init__(self, reason: str) -> None:
        super().__init__(HTTPStatus.UNPROCESSABLE_ENTITY, reason)


def parse(body: bytes) -> Any:
    """Reads JSON that a request may be.

    Raises:
        UnreadableError: if it is not JSON or not text, is nested too deeply, has too many
            objects, an object with too many fields or with one twice, or a number too long to
            be one; the message quotes nothing of it.
    """
    try:
        if body.count(b"{") > MAX_OBJECTS:
            raise _RefusedError(
                f"more than {MAX_OBJECTS} objects (patients, visits, codes and values); send fewer "
                "patients at once"
            )
        return json.loads(body, object_pairs_hook=_fields)
    except _RefusedError as err:
        reason = str(err)
    except RecursionError:
        reason = "nested too deeply"
    except (json.JSONDecodeError, UnicodeDecodeError):
        reason = "not JSON"
    except ValueError:  # Python's limit on the digits of an integer
        reason = "a number has too many digits"
    raise UnreadableError(reason)


class _RefusedError(ValueError):
    pass


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _RefusedError("a field is given twice in one object")
    if len(fields) > MAX_FIELDS:
        raise _RefusedError(f"an object has more than {MAX_FIELDS} fields")
    return fields


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    given = next((value for name, value in headers if name == b"content-type"), b"")
    if given == b"application/json":  # as nearly all are
        return True
    message = email.message.Message()
    message["content-type"] = given.decode("latin-1")
    return bool(given) and message.get_content_type() == "application/json"
