"""The way of most requests: read and answered without the framework's routing and validation."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi.responses import Response

from serve.asgi import Application, Message, Receive, Send, route_path
from serve.asking import Asked, read
from serve.limits import SHORT_BYTES


class Straight:
    """ASGI middleware, the innermost: answers the POST requests to a path that `asking.read` reads.

    All else goes on to the application, whose route for the path answers the same and says what is
    wrong with a request.
    """

    def __init__(
        self,
        app: Application,
        path: str,
        answer: Callable[[Asked, Message], Awaitable[Response]],
    ) -> None:
        """Wraps an application.

        Args:
            app: gets the body of a request in one piece.
            path: of the requests.
            answer: gives the answer to what is asked and the request's scope.
        """
        self._app = app
        self._path = path
        self._answer = answer
        self._long = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) != self._path:
            await self._app(scope, receive, send)
            return
        message = await receive()
        body = message.get("body", b"")
        if len(body) <= SHORT_BYTES:
            asked = read(body)
        else:
            async with self._long:  # each takes many times its length of memory meanwhile
                asked = await asyncio.to_thread(read, body)
        if asked is not None:
            await (await self._answer(asked, scope))(scope, receive, send)
            return
        pending = [message]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)
