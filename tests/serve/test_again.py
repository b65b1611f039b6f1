"""The proxy's second attempt, around an application as Ray's proxy behaves."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve._private import http_util
from ray.serve._private.utils import call_function_from_import_path

from serve import again

Message = dict[str, Any]
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.disconnect"}


class Proxy:
    """Reads a request to its end; answers nothing as often as a replica ends under it."""

    def __init__(self, deaths: int, started: bool = False, until: str = "body") -> None:
        self.deaths = deaths
        self.started = started
        self.until = until
        self.bodies: list[bytes] = []
        self.headers: list[list[Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["headers"].append((b"x-added", b"1"))
        self.headers.append(scope["headers"])
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if self.until == "disconnect":
            assert await receive() == END
        self.bodies.append(body)
        self.deaths -= 1
        if self.deaths >= 0 and not self.started:
            return
        await send(START)
        if self.deaths < 0:
            await send({"type": "http.response.body", "body": body})


def ask(proxy: Proxy, parts: list[bytes]) -> list[Message]:
    """What is sent to a client that sends these parts of a body and then goes."""
    messages = [
        {"type": "http.request", "body": part, "more_body": place < len(parts) - 1}
        for place, part in enumerate(parts)
    ]
    coming = iter([*messages, END])
    sent: list[Message] = []

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"a", b"b")]}
    asyncio.run(again.Again(proxy)(scope, receive, send))
    assert scope["headers"] == [(b"a", b"b")]
    return sent


def test_what_a_replica_ended_under_is_asked_once_more() -> None:
    proxy = Proxy(deaths=1)
    assert ask(proxy, [b"on", b"e"]) == [START, {"type": "http.response.body", "body": b"one"}]
    assert proxy.bodies == [b"one", b"one"]
    assert proxy.headers == [[(b"a", b"b"), (b"x-added", b"1")]] * 2


def test_an_answer_is_passed_on_as_it_is() -> None:
    proxy = Proxy(deaths=0)
    assert ask(proxy, [b"one"])[0] is START
    assert proxy.bodies == [b"one"]


@pytest.mark.parametrize(
    ("proxy", "parts", "attempts"),
    [
        (lambda: Proxy(deaths=2), [b"one"], 2),  # and then no more
        (lambda: Proxy(deaths=1, started=True), [b"one"], 1),  # a part of an answer was sent
        (lambda: Proxy(deaths=1, until="disconnect"), [b"one"], 1),  # nobody waits
        (lambda: Proxy(deaths=1), [b"x" * 40000, b"x" * 40000], 1),  # too long to keep
    ],
)
def test_otherwise_it_is_not(proxy: Callable[[], Proxy], parts: list[bytes], attempts: int) -> None:
    tried = proxy()
    sent = ask(tried, parts)
    assert sent == ([START] if tried.started else [])
    assert tried.bodies == [b"".join(parts)] * attempts


def test_others_than_requests_are_passed_on() -> None:
    async def lifespan(_scope: Any, receive: Any, send: Any) -> None:
        await send(await receive())

    sent: list[Message] = []

    async def receive() -> Any:
        return END

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(again.Again(lifespan)({"type": "lifespan"}, receive, send))
    assert sent == [END]


def test_ray_finds_it_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(again.VARIABLE, raising=False)
    assert hasattr(http_util, again.VARIABLE)  # this version of Ray reads it
    with again.environment():
        found = call_function_from_import_path(os.environ[again.VARIABLE])
        assert [one.cls for one in http_util.validate_http_proxy_callback_return(found)] == [
            again.Unlisted,
            again.Again,
        ]
    assert again.VARIABLE not in os.environ
    monkeypatch.setenv(again.VARIABLE, "mine:own")
    with again.environment():
        assert os.environ[again.VARIABLE] == "mine:own"
    assert os.environ[again.VARIABLE] == "mine:own"
