"""Around Ray Serve's own proxy: it asks another replica where one ended without an answer.

HAProxy does so itself (serve/haproxy.py). Recommending twice does no harm. What Ray tells of the
applications to whoever asks, key or none, is told to nobody.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from fastapi.middleware import Middleware
from fastapi.responses import PlainTextResponse

from serve.asgi import Application, Message, Receive, Send

#: Names the function below; Ray's proxies read it once, from the environment they are started in.
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MIDDLEWARES = "serve.again:middlewares"
#: Longer requests are not kept, and so not made again, as behind HAProxy.
_MAX_KEPT_BYTES = 65536


@contextmanager
def environment() -> Iterator[None]:
    """Sets what a Ray that starts in the block needs, unless the user has a callback of his own."""
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = MIDDLEWARES
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves."""
    return [Middleware(Unlisted), Middleware(Again)]


class Unlisted:
    """ASGI middleware around a proxy, whose list of applications it keeps."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        is_listing = scope["type"] == "http" and scope["path"] == "/-/routes"
        answer = PlainTextResponse("not found", HTTPStatus.NOT_FOUND) if is_listing else self._app
        await answer(scope, receive, send)


class Again:
    """ASGI middleware around a proxy, which returns without an answer where a replica ended."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        kept = _Kept(receive)
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        # Each time as it came: the proxy adds to the headers.
        headers = list(scope["headers"])
        await self._app({**scope, "headers": list(headers)}, kept.receive, answer)
        if not answered and kept.whole:
            await self._app({**scope, "headers": headers}, kept.once_more(), send)


class _Kept:
    """A request's body as it is received.

    Attributes:
        whole: whether all that was received can be received again.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._bytes = 0
        self.whole = True

    async def receive(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or self._bytes > _MAX_KEPT_BYTES:
            self.whole = False  # nobody waits for an answer any more, or it is too long
            self._messages.clear()
        if self.whole:
            self._messages.append(message)
        return message

    def once_more(self) -> Receive:
        """Receives the same again, then what is still to come."""
        earlier = iter(self._messages)

        async def receive() -> Message:
            return next(earlier, None) or await self._receive()

        return receive
