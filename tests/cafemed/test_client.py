"""The client against a server on a socket that answers, refuses, dies and comes back."""

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from cafemed import client as clients
from cafemed.client import Client, ClientError, RefusedError, UnreachableError
from serve.schema import RecommendRequest

MARKER = "MARKER4711"
PATIENTS = [{"visits": [{"diagnoses": [{"system": "icd9", "code": MARKER}]}]}]
ANSWER = {"request_id": "1", "recommendations": []}


def http(status: int, content: Any = ANSWER, **headers: str) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


RESET = b"RESET"
CLOSED = b""


class Server:
    """Answers one connection after the other with what it was given, and keeps what was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.asked: list[bytes] = []
        self._answers = list(answers)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._listening.accept()
            with connection:
                self.asked.append(_read(connection))
                if answer == RESET:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    connection.sendall(answer)

    def close(self) -> None:
        self._listening.close()


def _read(connection: socket.socket) -> bytes:
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += connection.recv(65536)
    head, _, body = raw.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].split(b":")[1]) if lengths else 0
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*answers: bytes) -> Server:
        started.append(Server(*answers))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Naps(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def asking(server: Server, naps: Naps, **options: Any) -> Client:
    return Client(server.url, sleep=naps, **options)


def test_a_request_is_what_the_endpoint_takes(serving: Callable[..., Server]) -> None:
    server = serving(http(200), http(200), http(200, {"codes": [{"code": "4280"}]}))
    with Client(server.url + "/", key="cafemed_x") as client:
        assert client.recommend(PATIENTS, max_ddi_rate=0.0, top_k=3, explain=True) == ANSWER
        client.recommend(PATIENTS)
        assert client.codes("428 ä", kind="diagnosis") == [{"code": "4280"}]
    first, second, third = server.asked
    head, _, body = first.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/recommend HTTP/1.1\r\n")
    assert b"authorization: bearer cafemed_x" in head.lower()
    assert b"content-type: application/json" in head.lower()
    options = {"max_ddi_rate": 0.0, "top_k": 3, "explain": True}
    assert json.loads(body) == {"patients": PATIENTS, "options": options}
    assert json.loads(second.partition(b"\r\n\r\n")[2]) == {"patients": PATIENTS}
    assert third.startswith(b"GET /v1/codes?query=428+%C3%A4&kind=diagnosis HTTP/1.1\r\n") or (
        third.startswith(b"GET /v1/codes?query=428%20%C3%A4&kind=diagnosis HTTP/1.1\r\n")
    )


def test_the_key_comes_from_the_environment(
    serving: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving(http(200), http(200))
    monkeypatch.setenv(clients.KEY_VARIABLE, "cafemed_env")
    with Client(server.url) as client:
        client.model()
        assert "cafemed_env" not in repr(client)
    monkeypatch.delenv(clients.KEY_VARIABLE)
    with Client(server.url) as client:
        client.model()
    assert b"Bearer cafemed_env" in server.asked[0]
    assert b"uthorization" not in server.asked[1]


@pytest.mark.parametrize("first", [RESET, CLOSED, *(http(s) for s in (500, 502, 503, 504))])
def test_one_failure_is_made_good(serving: Callable[..., Server], first: bytes) -> None:
    naps = Naps()
    server = serving(first, http(200))
    with asking(server, naps) as client:
        assert client.recommend(PATIENTS) == ANSWER
    assert server.asked[0] == server.asked[1]
    assert len(naps) == 1
    assert 0.05 <= naps[0] <= 0.15


def test_two_failures_are_told(serving: Callable[..., Server]) -> None:
    server = serving(RESET, RESET, http(503), http(503))
    with asking(server, Naps()) as client:
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+: no answer \(ReadError\)"):
            client.recommend(PATIENTS)
        with pytest.raises(RefusedError) as caught:
            client.recommend(PATIENTS)
    assert caught.value.status == 503
    assert len(server.asked) == 4


def test_nobody_listening_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
    with Client(url, sleep=Naps()) as client, pytest.raises(UnreachableError, match="ConnectError"):
        client.model()


def test_an_endpoint_that_is_being_replaced_is_waited_for(serving: Callable[..., Server]) -> None:
    """Its port is closed for a while, also after the one retry has begun."""
    server = serving(http(200), RESET)
    port = int(server.url.rpartition(":")[2])
    replaced: list[socket.socket] = []
    naps = Naps()

    def sleep(seconds: float) -> None:
        naps(seconds)
        if len(naps) == 1:
            server.close()
        if len(naps) == 9:
            replaced.append(socket.create_server(("127.0.0.1", port)))
            answering = threading.Thread(target=answer, args=(replaced[0],), daemon=True)
            answering.start()

    def answer(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            _read(connection)
            connection.sendall(http(200))

    with Client(server.url, sleep=sleep) as client:
        client.model()
        assert client.recommend(PATIENTS) == ANSWER
    replaced[0].close()
    assert naps[1:] == [0.25] * 8


def test_but_not_for_ever_nor_where_nobody_ever_answered(serving: Callable[..., Server]) -> None:
    server, naps = serving(http(200)), Naps()
    with asking(server, naps, reconnect_s=2.0) as client:
        client.model()
        server.close()
        with pytest.raises(UnreachableError, match="ConnectError"):
            client.model()
    assert len(naps) == 9  # eight within two seconds, and the one retry
    with asking(server, stranger := Naps()) as client, pytest.raises(UnreachableError):
        client.model()
    assert len(stranger) == 1


def test_the_time_that_attempts_to_connect_take_counts(
    serving: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else names that are found slowly would make minutes of `reconnect_s`."""
    server, naps = serving(http(200)), Naps()
    with asking(server, naps, reconnect_s=1.0) as client:
        client.model()
        server.close()
        found = socket.getaddrinfo

        def slowly(*given: Any, **named: Any) -> Any:
            time.sleep(0.1)
            return found(*given, **named)

        monkeypatch.setattr(socket, "getaddrinfo", slowly)
        with pytest.raises(UnreachableError, match="ConnectError"):
            client.model()
    assert len(naps) <= 4  # three, and the one retry


def test_an_endpoint_that_hangs_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = Client(url, timeout_s=0.05, sleep=Naps())
        with client, pytest.raises(UnreachableError, match="ReadTimeout"):
            client.model()


@pytest.mark.parametrize("status", [429, 503])
def test_the_time_told_is_waited(serving: Callable[..., Server], status: int) -> None:
    naps = Naps()
    server = serving(http(status, Retry_After="7"), http(200))
    with asking(server, naps) as client:
        client.model()
    [nap] = naps
    assert 7 < nap < 7.2


def test_too_long_a_wait_is_the_callers_to_decide(serving: Callable[..., Server]) -> None:
    naps = Naps()
    server = serving(http(429, Retry_After="60"))
    with asking(server, naps) as client, pytest.raises(RefusedError) as caught:
        client.model()
    assert caught.value.retry_after_s == 60
    assert naps == []


def test_a_retry_after_that_is_a_date_or_nonsense_is_passed_over(
    serving: Callable[..., Server],
) -> None:
    naps = Naps()
    server = serving(http(503, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"), http(200))
    with asking(server, naps) as client:
        client.model()
    assert naps[0] < 0.2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_would_be_refused_again_is_not_asked_again(
    serving: Callable[..., Server], status: int
) -> None:
    server = serving(http(status, {"message": "no", "request_id": "abc"}))
    with asking(server, Naps()) as client, pytest.raises(RefusedError) as caught:
        client.recommend(PATIENTS)
    assert (caught.value.status, caught.value.request_id) == (status, "abc")
    assert str(caught.value) == f"{server.url}: status {status}: no"


def test_the_fields_messages_are_told(serving: Callable[..., Server]) -> None:
    problems = [{"field": f"patients[{i}].age", "message": "too old"} for i in range(7)]
    server = serving(http(422, {"message": "the request is not valid", "problems": problems}))
    with asking(server, Naps()) as client, pytest.raises(RefusedError) as caught:
        client.recommend(PATIENTS)
    assert caught.value.problems[6] == ("patients[6].age", "too old")
    told = str(caught.value)
    assert "the request is not valid: patients[0].age: too old; patients[1]" in told
    assert told.endswith("; …")
    assert "\n" not in told


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"\xff", b'{"problems": [1, {}, null]}'])
def test_a_proxys_own_answer_is_told_too(serving: Callable[..., Server], content: bytes) -> None:
    server = serving(http(404, content))
    with asking(server, Naps()) as client, pytest.raises(RefusedError, match="status 404: Because"):
        client.model()


def test_an_answer_of_something_else_is_told(serving: Callable[..., Server]) -> None:
    server = serving(http(200, b"<html>hello</html>"))
    with asking(server, Naps()) as client, pytest.raises(ClientError, match="not one of a CafeMed"):
        client.model()


def test_no_exception_quotes_the_request(serving: Callable[..., Server]) -> None:
    """Not its text, and not what is chained to it."""
    unwritable = [{"visits": [{"diagnoses": [MARKER, {MARKER}]}]}]
    infinite = [{MARKER: float("nan")}]
    server = serving(RESET, RESET, http(500, {"message": "failed"}), http(500), http(422))
    with asking(server, Naps()) as client:
        for patients in (unwritable, infinite, PATIENTS, PATIENTS, PATIENTS):
            with pytest.raises(ClientError) as caught:
                client.recommend(patients)
            shown: BaseException | None = caught.value
            while shown is not None:
                assert MARKER not in str(shown)
                assert MARKER not in repr(shown)
                shown = shown.__cause__ or (
                    None if shown.__suppress_context__ else shown.__context__
                )


def test_a_url_or_key_that_is_none_is_one_line() -> None:
    with pytest.raises(ClientError, match="expected a URL"):
        Client("http://[::1", key="x")
    with pytest.raises(ClientError, match="ASCII key"):
        Client("http://localhost", key="clé")
    with Client("localhost:8000") as client, pytest.raises(UnreachableError, match="Unsupported"):
        client.model()


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("patients[0].John Smith", "patients[0].?"),
        ("patients[2].visits[1].diagnoses[0].code", "patients[2].visits[1].diagnoses[0].code"),
        ("options.JOHN", "options.?"),
        ("body", "body"),
        ("patients[0].visits[0].John[7].O'Hara [1]x", "patients[0].visits[0].?[7].?[1]?"),
    ],
)
def test_a_callers_own_field_is_not_quoted(
    serving: Callable[..., Server], field: str, shown: str
) -> None:
    told = {"message": "not valid", "problems": [{"field": field, "message": "wrong"}]}
    server = serving(http(422, told))
    with Client(server.url) as client, pytest.raises(RefusedError) as caught:
        client.recommend(PATIENTS)
    assert caught.value.problems == ((shown, "wrong"),)
    assert str(caught.value).endswith(f": {shown}: wrong")


def test_the_fields_of_a_request_are_known() -> None:
    schema = RecommendRequest.model_json_schema()
    of_all = [schema, *schema["$defs"].values()]
    assert {name for one in of_all for name in one["properties"]} <= clients._FIELDS


def test_a_search_is_in_no_log(
    serving: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = serving(http(200, {"codes": []}))
    with caplog.at_level(logging.INFO), Client(server.url) as client:
        assert client.codes(MARKER) == []
    assert MARKER.encode() in server.asked[0]
    assert MARKER not in caplog.text
    other = serving(http(200))
    with caplog.at_level(logging.INFO):
        httpx.get(other.url, trust_env=False)
    assert "HTTP Request" in caplog.text  # what is not ours is logged as before


def test_what_cannot_be_sent_or_read_is_an_error_of_the_client(
    serving: Callable[..., Server],
) -> None:
    server = serving(http(200, b"abc", Content_Encoding="gzip"))
    with Client(server.url) as client:
        with pytest.raises(ClientError, match="not one of a CafeMed endpoint"):
            client.codes("a")
        with pytest.raises(ClientError, match="cannot be sent") as caught:
            client.codes(f"{MARKER}\ud800")
    assert MARKER not in str(caught.value)


def test_proxies_of_the_environment_are_not_used(
    serving: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = serving(http(200)), serving(http(200))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    with Client(server.url) as client:
        client.recommend(PATIENTS)
    assert not proxy.asked
    with Client("http://nowhere.invalid", proxy=proxy.url) as client:
        client.recommend(PATIENTS)
    assert proxy.asked[0].startswith(b"POST http://nowhere.invalid/v1/recommend ")
