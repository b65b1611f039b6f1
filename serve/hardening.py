"""The outermost layer: headers for browsers and caches, and no fault that reaches the server.

What an exception says may quote a request, and the server would write it into its log.
"""

import base64
import hashlib
import re
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

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
_SWAGGER_HOST = "https://cdn.jsdelivr.net"


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
            await send(message)

        try:
            await self._app(scope, receive, harden)
        except Exception as err:  # noqa: BLE001 - the server would log the message with its codes
            answer = failed(scope, err)
            if started:
                raise RuntimeError("an answer was cut short by a fault") from None
            await answer(scope, receive, harden)


def add_documentation(api: FastAPI) -> None:
    """Adds `/docs`, with a policy for the one script that Swagger UI has inline.

    FastAPI's own page loads Swagger UI from another host, which only a browser that shows this
    page does.
    """
    page = get_swagger_ui_html(openapi_url="/openapi.json", title=str(api.title)).body
    text = bytes(page).decode()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {_SWAGGER_HOST} {hashes}; "
        f"style-src {_SWAGGER_HOST} 'unsafe-inline'; img-src 'self' data: "
        "https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    )

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})


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
