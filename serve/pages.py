"""The page at `/`: plain HTML, JavaScript and CSS from serve/page, with nothing from elsewhere.

Everything the page knows it asks of the same routes as any other client. It has no script or style
of its own inside, so that the policy it is sent with (serve/hardening.py) can forbid all of those.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


def add_page(api: FastAPI) -> None:
    """Adds the page at `/` and its files under `/static/`; they are read once, here."""
    for path in sorted(_FOLDER.iterdir()):
        route = "/" if path.name == "index.html" else f"/static/{path.name}"
        api.add_api_route(route, _file(path), methods=["GET", "HEAD"], include_in_schema=False)


def _file(path: Path) -> Callable[[], Awaitable[Response]]:
    content = path.read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=_TYPES[path.suffix])

    return answer
