"""Who is answered: with keys, without, from which host, how often, and what logs say of it."""

import asyncio
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from cafemed.errors import ConfigError
from serve import keys
from serve.access import Access, is_loopback, require_guarded, with_keys_file
from serve.api import create_api
from serve.encoding import EncodedPatient
from serve.observing import Observer
from serve.recommender import Recommender
from serve.replying import Service
from serve.settings import AccessConfig

MARKER = "MARKER4711"
BODY = {"patients": [{"visits": [{}]}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def send(api: FastAPI, method: str, path: str, host: str = "ward", **content: Any) -> Any:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, **content)

    return asyncio.run(call())


def ask(api: FastAPI, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return send(api, "POST", "/v1/recommend", json=BODY, headers=named)


def test_a_key_opens_every_route_and_nothing_else_does(service: Service, path: Path) -> None:
    secret = keys.create(path, "ward-3", 600)
    api = create_api(service, access=Access(keys.Keys(path)))
    assert ask(api, Authorization=f"Bearer {secret}").status_code == 200
    assert ask(api, Authorization=f"bearer  {secret} ").status_code == 200
    assert ask(api, X_API_Key=secret).status_code == 200
    wrong = (
        {},
        {"Authorization": secret},
        {"Authorization": f"Basic {secret}"},
        {"Authorization": f"Bearer {secret[:-1]}"},
        {"Authorization": "Bearer ", "X_API_Key": secret},  # what is presented counts
        {"X_API_Key": ""},
        {"Cookie": f"key={secret}"},
    )
    for headers in wrong:
        got = ask(api, **headers)
        assert got.status_code == 401, headers
        assert got.headers["www-authenticate"] == 'Bearer realm="cafemed"'
        assert "Authorization: Bearer KEY" in got.json()["message"]
        assert got.json()["request_id"]


def test_only_health_and_the_page_are_open(service: Service, path: Path) -> None:
    keys.create(path, "ward-3", 600)
    api = create_api(service, access=Access(keys.Keys(path)))
    assert send(api, "GET", "/healthz").status_code == 200
    assert send(api, "GET", "/readyz").status_code == 200
    assert send(api, "GET", "/static/none.js").status_code == 404
    closed = [path for path in (str(getattr(r, "path", "")) for r in api.routes) if "/v1" in path]
    assert len(closed) >= 2
    closed += [
        "/openapi.json",
        "/none",
        "//healthz",
        "/healthz/",
        "/static",
        "/healthz/../v1/model",
    ]
    assert {status_of(api, "GET", one) for one in closed} == {401}
    # No route is below the open folder but the page's files.
    assert status_of(api, "GET", "/static/../v1/model") == 404


def status_of(api: FastAPI, method: str, path: str) -> int:
    """The status of a request whose path nobody tidies up on the way."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(api(scope, receive, collect))
    return int(sent[0]["status"])


@pytest.mark.parametrize("prefix", ["/x", "/static", "/v1"])
def test_below_a_prefix_the_same_is_open_and_the_same_is_not(
    service: Service, path: Path, prefix: str
) -> None:
    """Ray Serve 2.60 gives the whole `path`, and a `route_prefix` as `root_path`."""
    secret = keys.create(path, "ward-3", 600)
    api = create_api(service, access=Access(keys.Keys(path)))

    def ask_below(method: str, below: str, **content: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=api, root_path=prefix)
            async with httpx.AsyncClient(transport=transport, base_url="http://ward") as client:
                return await client.request(method, prefix + below, **content)

        return asyncio.run(call())

    for below in ("/", "/healthz", "/readyz", "/static/page.js"):
        assert ask_below("GET", below).status_code == 200, below
        refused = ask_below("POST", below, json=BODY)  # nobody without a key sends one
        assert refused.json()["message"] == "no body is taken here"
    closed = ("/v1/model", "/v1/codes", "/openapi.json", "/none", "/healthz/", "x", "")
    assert {ask_below("GET", below).status_code for below in closed} == {401}
    assert ask_below("POST", "/v1/recommend", json=BODY).status_code == 401
    key = {"X-API-Key": secret}
    assert ask_below("POST", "/v1/recommend", json=BODY, headers=key).status_code == 200


def test_a_body_is_not_read_without_a_key(service: Service, path: Path) -> None:
    keys.create(path, "ward-3", 600)
    api = create_api(service, access=Access(keys.Keys(path)))
    sent: list[Any] = []

    async def receive() -> Any:
        pytest.fail("the body was read")

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "headers": []}
    asyncio.run(api({**scope, "query_string": b"", "http_version": "1.1"}, receive, collect))
    assert sent[0]["status"] == 401


def test_a_websocket_is_closed(service: Service) -> None:
    api = create_api(service, access=Access())
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/recommend", "headers": [], "query_string": b""}
    asyncio.run(api(scope, receive, collect))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_who_asks_too_often_is_told_when_to_come_back(service: Service, path: Path) -> None:
    often, other = keys.create(path, "often", 3), keys.create(path, "other", 3)
    api = create_api(service, access=Access(keys.Keys(path)))
    got = [ask(api, X_API_Key=often) for _ in range(4)]
    assert [one.status_code for one in got] == [200, 200, 200, 429]
    assert 1 <= int(got[-1].headers["retry-after"]) <= 20
    assert "'often' may ask 3 times a minute" in got[-1].json()["message"]
    assert ask(api, X_API_Key=other).status_code == 200
    assert ask(api).status_code == 401  # costs nobody anything


def followed(path: Path) -> Access:
    return Access.of(AccessConfig(auth="keys", keys_file=str(path)))


def wait_until_asking_gives(status: int, api: FastAPI, secret: str) -> None:
    deadline = time.monotonic() + 20
    while ask(api, X_API_Key=secret).status_code != status:
        assert time.monotonic() < deadline


def test_a_revoked_key_is_refused_without_a_restart(
    service: Service, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REREAD_S", 0.01)
    first = keys.create(path, "first", 1_000_000)
    api = create_api(service, access=followed(path))
    second = keys.create(path, "second", 1_000_000)
    assert ask(api, X_API_Key=first).status_code == 200
    wait_until_asking_gives(200, api, second)
    keys.revoke(path, "first")
    wait_until_asking_gives(401, api, first)
    assert ask(api, X_API_Key=second).status_code == 200


def test_a_folder_that_hangs_takes_one_thread_and_holds_up_nobody(
    service: Service, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REREAD_S", 0.001)
    secret = keys.create(path, "ward-3", 1_000_000)
    read, hanging, answers = keys.read, [], threading.Event()

    def hang(file: Path) -> tuple[keys.Key, ...]:
        hanging.append(threading.current_thread())
        answers.wait()
        return read(file)

    monkeypatch.setattr(keys, "read", hang)
    answers.set()
    api = create_api(service, access=followed(path))
    answers.clear()
    hanging.clear()
    os.utime(path, (0, 0))

    async def ask_for_long() -> None:
        headers = {"X-API-Key": secret}
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://ward") as client:
            for _ in range(100):  # more often than there are threads in the loop's pool
                await asyncio.sleep(0.005)
                got = await client.post("/v1/recommend", json=BODY, headers=headers)
                assert got.status_code == 200
        assert await asyncio.to_thread(lambda: "free") == "free"

    async def ask_in_time() -> None:
        try:
            await asyncio.wait_for(ask_for_long(), 60)
        finally:
            seen.extend(hanging)
            answers.set()  # the loop waits for its threads when it ends

    seen: list[threading.Thread] = []
    asyncio.run(ask_in_time())
    assert len(seen) == 1
    monkeypatch.setattr(keys, "read", read)
    keys.revoke(path, "ward-3")
    wait_until_asking_gives(401, api, secret)


def test_logs_name_the_key_and_never_hold_it(
    service: Service, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Log lines and metric labels of a request that is answered and of those that are refused."""

    class Labels:
        def __init__(self) -> None:
            self.all: list[str | float] = []

        def count(self, name: str, number: float = 1, **labels: str) -> None:
            self.all += [name, number, *labels.values()]

        def set(self, name: str, value: float) -> None:
            self.all += [name, value]

        def observe(self, name: str, value: float, **labels: str) -> None:
            self.all += [name, value, *labels.values()]

    labels = Labels()
    log = logging.getLogger("test_access")
    secret = keys.create(path, "ward-3", 3)
    observer = Observer(labels, log, 100)
    api = create_api(service, access=Access(keys.Keys(path)), observer=observer)
    codes = [{"system": "icd9", "code": code} for code in ("401.0", "4011", MARKER)]
    marked = {"patients": [{"visits": [{"diagnoses": codes}]}]}
    with caplog.at_level(logging.DEBUG):
        headers = {"Authorization": f"Bearer {secret}"}
        for body in (marked, {MARKER: 1}, [MARKER], marked):
            send(api, "POST", "/v1/recommend", json=body, headers=headers)
        send(api, "POST", "/v1/recommend", json=marked, headers={"X-API-Key": MARKER})
        send(api, "GET", f"/{MARKER}?{MARKER}={MARKER}", headers={MARKER: MARKER})
    told = [vars(record) for record in caplog.records if record.name == "test_access"]
    assert [(one["status"], one["key"]) for one in told] == [
        (200, "ward-3"),
        (422, "ward-3"),
        (422, "ward-3"),
        (429, "ward-3"),
        (401, None),
        (401, None),
    ]
    ours = [record for record in caplog.records if record.name != "httpx"]  # logs what it asks for
    everything = str([(record.getMessage(), vars(record)) for record in ours]) + str(labels.all)
    assert MARKER not in everything
    assert secret not in everything
    assert "429" in labels.all


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("127.1.2.3", 200),
        ("[::1]:8000", 200),
        ("evil.example.org", 403),
        ("localhost.evil.example.org", 403),
        ("127.0.0.1.evil.example.org:8000", 403),
        ("[::1].evil.org", 403),
        ("10.0.0.1", 403),
        ("0.0.0.0", 403),
        ("", 403),
    ],
)
def test_without_keys_only_the_loopback_is_answered(
    service: Service, host: str, status: int
) -> None:
    api = create_api(service, access=Access())
    got = send(api, "GET", "/v1/model", headers={"Host": host})
    assert got.status_code == status
    if status == 403:
        assert "only requests to localhost" in got.json()["message"]


def test_what_is_a_loopback() -> None:
    assert all(
        map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost."))
    )
    others = ("", "0.0.0.0", "::", "10.0.0.1", "127.0.0.1.x", "localhost.x", "::ffff:10.0.0.1")
    assert not any(map(is_loopback, others))


def test_listening_elsewhere_needs_keys(path: Path) -> None:
    require_guarded("127.0.0.1", AccessConfig())
    for host in ("0.0.0.0", "", "::", "10.0.0.1", "meds.example.org"):
        with pytest.raises(ConfigError, match=r"'none' is only for the loopback .* create=NAME"):
            require_guarded(host, AccessConfig())
    config = AccessConfig(auth="keys", keys_file=str(path))
    with pytest.raises(keys.KeysError, match="no API keys"):
        require_guarded("0.0.0.0", config)
    secret = keys.create(path, "ward-3", 600)
    require_guarded("0.0.0.0", config)
    opened = Access.of(config).keys
    assert opened is not None
    assert opened.find(secret.encode()) is not None
    keys.revoke(path, "ward-3")
    with pytest.raises(keys.KeysError, match="no API keys"):
        require_guarded("127.0.0.1", config)


def test_where_the_keys_are(tmp_path: Path) -> None:
    assert with_keys_file(AccessConfig(), tmp_path, "tiny") == AccessConfig()
    config = AccessConfig(auth="keys")
    filled = with_keys_file(config, tmp_path, "tiny")
    assert filled == dataclasses.replace(config, keys_file=str(tmp_path / "access" / "tiny.json"))
    given = AccessConfig(auth="keys", keys_file="/shared/keys.json")
    assert with_keys_file(given, tmp_path, "tiny") == given
    with pytest.raises(ConfigError, match="expected an absolute path"):
        with_keys_file(AccessConfig(auth="keys", keys_file="keys.json"), tmp_path, "tiny")


ORIGIN = "https://ward.example.org"


def preflight(api: FastAPI, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    got: httpx.Response = send(api, "OPTIONS", "/v1/recommend", "localhost", headers=headers)
    return got


def test_pages_of_other_sites_may_not_ask_unless_they_are_listed(
    service: Service, path: Path
) -> None:
    closed = create_api(service, access=Access())
    assert preflight(closed, ORIGIN).status_code == 405
    got = send(closed, "GET", "/v1/model", "localhost", headers={"Origin": ORIGIN})
    assert not [name for name in got.headers if name.startswith("access-control-")]

    secret = keys.create(path, "ward-3", 600)
    api = create_api(service, access=Access(keys.Keys(path), (ORIGIN,)))
    allowed = preflight(api, ORIGIN)  # carries no key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in allowed.headers
    assert preflight(api, "https://evil.example.org").status_code == 400
    for headers, status in (({"X-API-Key": secret}, 200), ({}, 401)):
        got = send(api, "GET", "/v1/model", headers={"Origin": ORIGIN, **headers})
        assert got.status_code == status
        assert got.headers["access-control-allow-origin"] == ORIGIN
    other = send(api, "GET", "/v1/model", headers={"Origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["*", "ward.example.org", "https://a.org/x", "null", ""])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins: expected origins like"):
        AccessConfig(cors_origins=(origin,))


def test_answers_are_for_nobody_to_keep_frame_or_run(service: Service) -> None:
    api = create_api(service, access=Access())
    for method, route, status in (
        ("POST", "/v1/recommend", 200),
        ("GET", "/v1/model", 200),
        ("GET", "/none", 404),
        ("GET", "/v1/recommend", 405),
    ):
        content = {"json": BODY} if method == "POST" else {}
        got = send(api, method, route, "localhost", **content)
        assert got.status_code == status
        assert got.headers["cache-control"] == "no-store"
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["referrer-policy"] == "no-referrer"
        assert got.headers["x-frame-options"] == "DENY"
        assert got.headers["content-security-policy"] == (
            "default-src 'none'; frame-ancestors 'none'"
        )
    assert json.loads(got.content)["message"] == "Method Not Allowed"


def test_a_page_may_use_its_own_files_alone(service: Service) -> None:
    api = create_api(service)

    @api.get("/page")
    async def page() -> HTMLResponse:
        return HTMLResponse("")

    headers = send(api, "GET", "/page").headers
    assert (
        "default-src 'none'; script-src 'self'; style-src 'self'"
        in (headers["content-security-policy"])
    )
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-cache"


class Broken:
    """Fails where no route expects it."""

    @property
    def recommender(self) -> Recommender:
        raise KeyError(MARKER)

    async def probabilities(
        self, _recommender: Recommender, _patients: Sequence[EncodedPatient]
    ) -> list[Any]:
        raise AssertionError("there is nothing to ask with")


def test_a_fault_anywhere_is_an_answer_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = create_api(Broken())
    with caplog.at_level(logging.DEBUG):
        for method, route in (("GET", "/v1/model"), ("POST", "/v1/recommend")):
            content = {"json": BODY} if method == "POST" else {}
            got = send(api, method, route, **content)
            assert got.status_code == 500
            assert got.json()["message"] == "the request failed in the server"
            assert got.headers["cache-control"] == "no-store"
            assert MARKER not in got.text
    assert MARKER not in caplog.text
    assert "failed: KeyError at " in caplog.text


@pytest.mark.parametrize(("scheme", "told"), [("https", "max-age=31536000"), ("http", None)])
def test_over_https_browsers_are_told_to_stay_there(
    service: Service, scheme: str, told: str | None
) -> None:
    api = create_api(service)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url=f"{scheme}://ward") as client:
            return await client.get("/healthz")

    assert asyncio.run(ask()).headers.get("strict-transport-security") == told
