"""The outermost layer: headers for browsers and caches, and no fault that reaches the server.

What an exception says may quote a request, and the server would write it into its log.
"""

from collections.abc import Sequence

from serve.asgi import Application, Message, Receive, Send
from serve.problems import failed

#: The page's own files alone: no inline script or style, no other host, in nobody's frame.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Answers are data: nothing in them is for a browser to run or show.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"

_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]

#: A browser that has been answered over HTTPS asks no other way, for a year.
_HTTPS_ALONE = (b"strict-transport-security", b"max-age=31536000")


class Hardened:
    """ASGI middleware: adds the headers, and answers where the application fails."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def harden(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = message["headers"] = list(message.get("headers", ()))
                headers += _missing(headers)
                if scope.get("scheme") == "https":
                    headers.append(_HTTPS_ALONE)
            await send(message)

        try:
            await self._app(scope, receive, harden)
        except Exception as err:  # noqa: BLE001 - the server would log the message with its codes
            answer = failed(scope, err)
            if started:
                raise RuntimeError("an answer was cut short by a fault") from None
            await answer(scope, receive, harden)


def _missing(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = dict(headers)
    added = list(_ALWAYS)
    is_page = given.get(b"content-type", b"").startswith(b"text/html")
    if b"content-security-policy" not in given:
        policy = PAGE_POLICY if is_page else DATA_POLICY
        added.append((b"content-security-policy", policy.encode()))
    if b"cache-control" not in given:
        # Answers are about patients; pages and files of ours may be kept but are asked about.
        data = given.get(b"content-type", b"").startswith(b"application/json")
        added.append((b"cache-control", b"no-store" if data else b"no-cache"))
    return added
