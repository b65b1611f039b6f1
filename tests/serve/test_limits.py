"""What a body may be: against real sockets, and against what the work would have cost."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from serve import access, limits
from serve.limits import BodyLimit, UnreadableError, parse
from serve.schema import MAX_BODY_BYTES, RecommendRequest

MAX = 1000
TIMEOUT_S = 0.3


async def echo(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Answers with how many bytes came, and in how many pieces."""
    sizes = []
    while True:
        message = await receive()
        sizes.append(len(message["body"]))
        if not message["more_body"]:
            break
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]}
    )
    await send({"type": "http.response.body", "body": b"%4d %3d" % (sum(sizes), len(sizes))})
    assert scope["type"] == "http"


def busy(scope: Any, retry_after_s: int) -> JSONResponse:
    return JSONResponse({"path": scope["path"]}, 503, {"Retry-After": str(retry_after_s)})


def limited(app: Any, timeout_s: float = TIMEOUT_S) -> BodyLimit:
    return BodyLimit(app, MAX, timeout_s, busy)


def posted(path: str = "/v1/recommend", method: str = "POST") -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": method, "path": path, "headers": headers}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = limited(echo)
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def talk(port: int, *parts: bytes | float) -> bytes:
    """Sends parts, pausing for numbers of seconds; gives all that is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for part in parts:
            if isinstance(part, float):
                time.sleep(part)
            else:
                connection.sendall(part)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if answer.startswith(b"HTTP/1.1 200") and len(answer.partition(b"\r\n\r\n")[2]) == 8:
                break  # only what is refused closes the connection
    return answer


def test_a_body_comes_in_one_piece(port: int) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    got = talk(port, chunked, b"3\r\nabc\r\n", 0.05, b"2\r\nde\r\n", 0.05, b"0\r\n\r\n")
    assert got.endswith(b"   5   1")
    assert talk(port, HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000).endswith(b"1000   1")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([HEAD + b"Content-Length: 1001\r\n\r\n"], b"413"),  # nothing of it has to come
        ([HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"], b"4"),
        ([HEAD + b"Content-Length: -1\r\n\r\n"], b"400"),
        ([HEAD + b"Content-Length: 1_0\r\n\r\n0123456789"], b"400"),
        (
            [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"x" * 100 + b"\r\n"] * 1,
            b"408",
        ),
        (
            [
                HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
                *([b"64\r\n" + b"x" * 100 + b"\r\n"] * 11),
            ],
            b"413",
        ),
        ([HEAD + b"Content-Length: 10\r\n\r\n", b"{", 0.2, b" ", 0.2, b" "], b"408"),  # slow
        ([HEAD + b"X: " + b"x" * 17_000 + b"\r\nContent-Length: 0\r\n\r\n"], b"431"),
        (
            [HEAD.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}"],
            b"415",
        ),
        ([HEAD.replace(b"Content-Type", b"X-Type") + b"Content-Length: 2\r\n\r\n{}"], b"415"),
    ],
)
def test_a_body_that_is_none_is_refused_and_the_connection_closed(
    port: int, sent: list[bytes | float], status: bytes
) -> None:
    started = time.monotonic()
    got = talk(port, *sent)
    assert got.startswith(b"HTTP/1.1 " + status)
    assert time.monotonic() - started < TIMEOUT_S + 1


@pytest.mark.parametrize("kind", [b"application/json; charset=utf-8", b"Application/JSON"])
def test_ways_to_write_the_type(port: int, kind: bytes) -> None:
    head = HEAD.replace(b"application/json", kind)
    assert talk(port, head + b"Content-Length: 2\r\n\r\n{}").endswith(b"   2   1")


def test_a_client_that_goes_away_is_not_answered() -> None:
    """Neither does the application see half a body."""

    async def never(*_: Any) -> None:
        pytest.fail("the application was called")

    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    asyncio.run(limited(never)(posted(), receive, never))
    assert messages == []


def test_empty_chunks_are_not_kept() -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.sleep(0)

    async def yielding() -> Any:
        await asyncio.sleep(0)
        return await receive()

    asyncio.run(limited(echo, 0.1)(posted(), yielding, send))
    assert sent[0]["status"] == 408


OPEN = HEAD.replace(b"/v1/recommend", b"/healthz")


@pytest.mark.parametrize(
    "sent",
    [
        OPEN + b"Content-Length: 1\r\n\r\n",
        OPEN + b"Transfer-Encoding: chunked\r\n\r\n",
        HEAD.replace(b"POST /v1/recommend", b"GET /") + b"Content-Length: 1\r\n\r\n",
        HEAD.replace(b"POST /v1/recommend", b"POST /static/x") + b"Content-Length: 9\r\n\r\n",
        HEAD.replace(b"POST", b"GET") + b"Content-Length: 1\r\n\r\n",
        HEAD.replace(b"POST", b"HEAD") + b"Transfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_nothing_is_read_where_no_body_is_taken(port: int, sent: bytes) -> None:
    started = time.monotonic()
    assert talk(port, sent).startswith(b"HTTP/1.1 413")  # nothing of it has come
    assert time.monotonic() - started < TIMEOUT_S


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_where_no_body_is_taken_none_is_waited_for(method: str) -> None:
    """Whatever the server has to say of it."""

    async def never() -> Any:
        pytest.fail("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(limited(echo)(posted("/healthz", method), never, send))
    assert sent[1]["body"].split() == [b"0", b"1"]


class Slow:
    """Clients each of whom sends a piece of a body and then waits."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece
        self.go_on = asyncio.Event()

    async def ask(self, app: BodyLimit, key: str = "") -> int:
        pieces = [self.piece, b"."]

        async def receive() -> Any:
            if len(pieces) == 1:
                await self.go_on.wait()
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app(posted() | ({access.KEY: key} if key else {}), receive, send)
        if sent[0]["status"] == 503:
            assert (b"retry-after", b"1") in sent[0]["headers"]
        return int(sent[0]["status"])


@pytest.mark.parametrize(("bodies", "together", "room"), [(5, 10**6, 5), (100, 700, 7)])
def test_bodies_that_are_being_gathered_are_bounded(
    monkeypatch: pytest.MonkeyPatch, bodies: int, together: int, room: int
) -> None:
    monkeypatch.setattr(limits, "MAX_GATHERED", bodies)
    monkeypatch.setattr(limits, "MAX_GATHERED_BYTES", together)

    async def crowd() -> tuple[list[int], int]:
        app = limited(echo, 5.0)
        slow = Slow(b"x" * 99)
        asked = [asyncio.create_task(slow.ask(app)) for _ in range(9)]
        await asyncio.sleep(0.05)
        early = [task.result() for task in asked if task.done()]
        slow.go_on.set()
        assert early == [503] * (9 - room)
        return await asyncio.gather(*asked), await slow.ask(app)

    statuses, afterwards = asyncio.run(crowd())
    assert sorted(statuses) == [200] * room + [503] * (9 - room)
    assert afterwards == 200  # every one gave its room back


# A body that grows is refused where its key's share is used up by then: two of the greedy one's.
@pytest.mark.parametrize(("bodies", "together", "greedy"), [(8, 10**6, 4), (100, 800, 2)])
def test_whoever_sends_slowly_leaves_room_for_the_others(
    monkeypatch: pytest.MonkeyPatch, bodies: int, together: int, greedy: int
) -> None:
    """A key gets as much as is left free: one a half, and another then half of the rest."""
    monkeypatch.setattr(limits, "MAX_GATHERED", bodies)
    monkeypatch.setattr(limits, "MAX_GATHERED_BYTES", together)

    async def crowd() -> None:
        app = limited(echo, 5.0)
        slow = Slow(b"x" * 99)
        asked: dict[str, list[asyncio.Task[int]]] = {}
        admitted = {}
        for key in ("greedy", "second", "third"):
            asked[key] = [asyncio.create_task(slow.ask(app, key)) for _ in range(9)]
            await asyncio.sleep(0.02)
            admitted[key] = sum(not task.done() for task in asked[key])
        assert admitted == {"greedy": 4, "second": 2, "third": 1}
        slow.go_on.set()
        for (key, tasks), answered in zip(asked.items(), (greedy, 2, 1), strict=True):
            statuses = await asyncio.gather(*tasks)
            assert sorted(statuses) == [200] * answered + [503] * (9 - answered), key
        assert [await slow.ask(app, "greedy") for _ in range(2)] == [200, 200]
        assert app._gathered == app._gathered_bytes == 0
        assert not app._bodies_of
        assert not app._bytes_of

    asyncio.run(crowd())


def test_json_is_read_as_json_reads_it() -> None:
    text = '{"a": [1, -2.5e3, "\\u00e9\\ud83d\\ude00", null, true, {"b": {}}], "c": NaN}'
    assert str(parse(text.encode())) == str(json.loads(text))
    assert parse(b'"\xc3\xa9"') == "é"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{}{}", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[" * 4_000_000, "nested too deeply"),
        (b'{"a":' * 800_000, "objects"),
        (b'{"a":' * 30_000, "nested too deeply"),
        (b"9" * 5000, "too many digits"),
        (b'{"a":1,"b":{"c":1,"c":2}}', "given twice"),
        (b"[" + b"{}," * 1_300_000 + b"{}]", "objects"),
        (json.dumps({f"k{i}": i for i in range(300_000)}).encode(), "more than 32 fields"),
    ],
)
def test_what_is_not_read_is_refused_at_once(body: bytes, said: str) -> None:
    started = time.process_time()
    with pytest.raises(UnreadableError) as caught:
        parse(body)
    assert said in caught.value.detail
    assert time.process_time() - started < 1.0  # up to four megabytes


def long_body(patients: int, visits: int, codes: int) -> bytes:
    """Of so many visits a patient and codes a visit."""
    of_visit = [{"system": "icd9", "code": str(i)} for i in range(codes)]
    lists = ("diagnoses", "procedures", "medications")
    visit = dict.fromkeys(lists[: -(-codes // 128)], of_visit[:128])
    one = {"visits": [visit] * visits}
    return json.dumps({"patients": [one] * patients}, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("patients", "visits", "codes"), [(256, 4, 32), (256, 16, 8), (1, 256, 128)]
)
def test_the_largest_valid_bodies_have_not_too_many_objects(
    patients: int, visits: int, codes: int
) -> None:
    body = long_body(patients, visits, codes)
    assert len(body) <= MAX_BODY_BYTES
    request = RecommendRequest.model_validate(parse(body))
    assert sum(v.num_codes for p in request.patients for v in p.visits) == 32_768


def test_more_codes_are_refused_and_far_more_before_anything_is_made() -> None:
    with pytest.raises(ValidationError, match="33024 codes and laboratory values together"):
        RecommendRequest.model_validate(parse(long_body(258 // 2, 2, 128)))
    body = long_body(1, 256, 384)
    assert 2_900_000 < len(body) <= MAX_BODY_BYTES
    started = time.process_time()
    with pytest.raises(UnreadableError, match="objects"):
        parse(body)
    assert time.process_time() - started < 0.05


def test_a_patient_of_ten_thousand_codes_is_read() -> None:
    body = long_body(1, 40, 256)
    assert body.count(b"icd9") == 10_240
    RecommendRequest.model_validate(parse(body))


def test_long_bodies_are_read_beside_the_event_loop_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = FastAPI()
    api.router.route_class = limits.StrictRoute
    threads: list[threading.Thread] = []
    reading = most = 0

    def watched(body: bytes) -> Any:
        nonlocal reading, most
        threads.append(threading.current_thread())
        reading += 1
        most = max(most, reading)
        time.sleep(0.02)
        reading -= 1
        return parse(body)

    monkeypatch.setattr(limits, "parse", watched)

    @api.post("/v1/recommend")
    async def recommend(body: RecommendRequest) -> int:
        return len(body.patients)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            head = {"Content-Type": "application/json"}
            sent = [long_body(n, 4, 32) for n in (1, 100, 100, 100)]
            asked = [client.post("/v1/recommend", content=one, headers=head) for one in sent]
            return [answer.json() for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [1, 100, 100, 100]
    main = threading.main_thread()
    assert [thread is main for thread in threads].count(True) == 1
    assert most <= 2  # the short one, and one of the long
