"""A replica's own object, without Ray: how it ends, and what it keeps of an earlier version."""

import asyncio
import functools
import gc
import io
import json
import logging
import pickle
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray._common.formatters import JSONFormatter  # as in a replica
from ray.serve import metrics
from ray.serve._private.constants import RAY_SERVE_FREEZE_GC_ON_STARTUP

from cafemed import bundle as bundles
from cafemed import registry
from cafemed.bundle import Bundle
from serve import app
from serve.example import example_request
from serve.lines import GatheredLines
from serve.recommender import Recommender
from serve.settings import ServeConfig
from serve.shadow import ShadowModel

#: What Ray makes of the class, and the class.
INGRESS: Any = app.Endpoint.func_or_class  # type: ignore[attr-defined]
ENDPOINT = INGRESS.__mro__[1]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The log's text; nothing is written or handed to Ray by the clock."""
    text = io.StringIO()
    logger, handler = logging.Logger("test"), logging.StreamHandler(text)
    handler.setFormatter(JSONFormatter())
    logger.addHandler(handler)
    monkeypatch.setattr(app, "_log_with_ray", lambda: logger)
    monkeypatch.setattr(app, "GatheredLines", functools.partial(GatheredLines, wait_s=60.0))
    monkeypatch.setattr(app, "_REPORT_S", 60.0)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    return text


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What Ray's counters were handed, by name."""
    seen: Counter[str] = Counter()

    def inc(self: Any, value: float = 1.0, **_: Any) -> None:
        seen[self._name] += int(value)

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    return seen


async def started(registry_dir: Path, compared: Any = None, **settings: Any) -> Any:
    endpoint = ENDPOINT.__new__(ENDPOINT)
    await endpoint.__init__(str(registry_dir), ServeConfig(**settings), compared)
    await asyncio.sleep(0)  # its tasks begin
    return endpoint


class Shadowed:
    """In place of the shadow's handle, which pickles what it is given in the event loop."""

    def __init__(self) -> None:
        self.compare = self
        self.came: list[bytes] = []

    async def remote(self, *given: Any) -> str:
        self.came.append(pickle.dumps(given))
        return "compared"


async def post(endpoint: Any, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(app=await endpoint.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return await client.post("/v1/recommend", json=body)


def test_what_was_counted_and_logged_last_is_not_lost_when_a_replica_ends(
    root: Path, served: Bundle, written: io.StringIO, counted: Counter[str]
) -> None:
    async def ask_and_end() -> httpx.Response:
        endpoint = await started(root / "registry" / "tiny")
        answer = await post(endpoint, example_request(served))
        assert (counted["cafemed_requests"], written.getvalue()) == (0, "")
        await INGRESS.__del__(endpoint)  # as Ray Serve does
        assert counted["cafemed_requests"] == counted["cafemed_patients"] == 1
        [line] = written.getvalue().splitlines()
        assert json.loads(line)["request_id"] == answer.json()["request_id"]
        await INGRESS.__del__(endpoint)
        return answer

    assert asyncio.run(ask_and_end()).status_code == 200
    assert counted["cafemed_requests"] == len(written.getvalue().splitlines()) == 1


def test_one_without_a_log_of_requests_ends_too(
    root: Path, served: Bundle, written: io.StringIO, counted: Counter[str]
) -> None:
    async def ask_and_end() -> None:
        endpoint = await started(root / "registry" / "tiny", log_requests=False)
        await post(endpoint, example_request(served))
        await INGRESS.__del__(endpoint)

    asyncio.run(ask_and_end())
    assert (counted["cafemed_requests"], written.getvalue()) == (1, "")


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("unusual", [False, True])
def test_a_long_request_to_the_shadow_does_not_hold_the_loop(
    root: Path, served: Bundle, other: Bundle, tmp_path: Path, unusual: bool
) -> None:
    """To read it once more there, or to pickle it, took a quarter of a second a megabyte."""
    [patient] = example_request(served)["patients"]
    full = {"diagnoses": [{"system": "icd9", "code": "401.0"}] * 128}
    if unusual:  # it is escaped, and left to the schema
        full["diagnoses"][:1] = [{"system": "icd9", "code": "401.0\t"}]
    body = {"patients": [{**patient, "visits": [full, patient["visits"][0]]}] * 200}
    assert len(json.dumps(body)) > 1_000_000
    shadowed = Shadowed()

    async def ask() -> float:
        endpoint = await started(
            root / "registry" / "tiny", shadowed, shadow="candidate", shadow_share=1.0
        )
        assert (await post(endpoint, body)).status_code == 200
        assert not shadowed.came
        began = time.thread_time()
        while not shadowed.came:
            await asyncio.sleep(0)
        return time.thread_time() - began

    assert asyncio.run(ask()) < 0.05
    bundles.write(tmp_path / "bundle", other)
    registry.publish(tmp_path / "registry", root / "bundle", {})
    registry.publish(tmp_path / "registry", tmp_path / "bundle", {})
    [patients, answered] = pickle.loads(shadowed.came[0])  # noqa: S301 - our own
    found = ShadowModel(tmp_path / "registry", 2).compare(patients, answered)
    assert found is not None
    assert len(found) == 200
    assert set(found) == {found[0]}  # each is the same patient


class UnforeseenError(Exception):
    """Nothing in the program foresees it."""


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Counter[str]:
    """Has a method fail the next time that it is called; its calls are counted."""
    calls: Counter[str] = Counter()
    real = getattr(owner, name)

    def method(*given: Any) -> Any:
        calls[name] += 1
        if calls[name] == 1:
            raise UnforeseenError("MARKER4711")
        return real(*given)

    monkeypatch.setattr(owner, name, method)
    return calls


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ["refresh", "_tell_model", "report", "flush"])
@pytest.mark.usefixtures("written")
def test_following_and_reporting_go_on_after_a_failure(
    served: Bundle,
    other: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setattr(app, "_REPORT_S", 0.02)
    for folder, bundle in (("a", served), ("b", other)):
        bundles.write(tmp_path / folder, bundle)
        registry.publish(tmp_path / "registry", tmp_path / folder, {})
    registry.promote(tmp_path / "registry", 1)

    async def fail_and_go_on() -> None:
        endpoint = await started(tmp_path / "registry", refresh_s=0.02)
        owner = {
            "refresh": endpoint._model,
            "_tell_model": endpoint,
            "report": endpoint._observer,
            "flush": endpoint._meters,
        }[name]
        calls = failing_once(monkeypatch, owner, name)
        registry.promote(tmp_path / "registry", 2)
        await until(lambda: calls[name] > 0 and endpoint.recommender.name.version == 2)
        registry.promote(tmp_path / "registry", 1)
        await until(lambda: calls[name] > 1 and endpoint.recommender.name.version == 1)

    asyncio.run(fail_and_go_on())
    [told] = [record for record in caplog.records if record.name == "serve.problems"]
    what = "following the registry" if name in ("refresh", "_tell_model") else "reporting metrics"
    assert told.getMessage().startswith(
        f"{what} failed and goes on: UnforeseenError at {__file__}:"
    )
    assert "MARKER4711" not in caplog.text


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("name", ["refresh", "set"])
def test_a_shadow_goes_on_after_a_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    cls: Any = app.Shadow.func_or_class  # type: ignore[attr-defined]

    async def fail_and_go_on() -> None:
        shadow = cls.__new__(cls)
        config = ServeConfig(shadow="production", refresh_s=0.02)
        await shadow.__init__(str(root / "registry" / "tiny"), config)
        owner = shadow._model if name == "refresh" else shadow._meters
        calls = failing_once(monkeypatch, owner, name)
        await until(lambda: calls[name] > 2)

    asyncio.run(fail_and_go_on())
    [told] = [record for record in caplog.records if record.name == "serve.problems"]
    assert " failed and goes on: UnforeseenError at " in told.getMessage()
    assert "MARKER4711" not in caplog.text


def test_ray_freezes_what_a_replica_has_when_it_has_started() -> None:
    """As long as it does, a full collection does not hold up all answers for 0.15 s."""
    assert RAY_SERVE_FREEZE_GC_ON_STARTUP


@pytest.fixture
def freeze() -> Iterator[Callable[[], None]]:
    """Does what Ray Serve does when a replica has started: collections pass over what it has."""

    def collect_and_freeze() -> None:
        gc.collect()
        gc.freeze()

    yield collect_and_freeze
    gc.unfreeze()


@pytest.mark.usefixtures("written")
def test_an_earlier_version_is_given_back_although_what_a_replica_started_with_is_frozen(
    served_model: Bundle, other: Bundle, tmp_path: Path, freeze: Callable[[], None]
) -> None:
    """Its weights would stay in memory for ever if it held itself."""
    for name, bundle in (("a", served_model), ("b", other)):
        bundles.write(tmp_path / name, bundle)
        registry.publish(tmp_path / "registry", tmp_path / name, {})
    registry.promote(tmp_path / "registry", 1)
    body = example_request(served_model) | {"options": {"explain": True}}

    def held(recommender: Recommender) -> list[Callable[[], object]]:
        weights = [*recommender._model.parameters(), *recommender.bundle.weights.values()]
        parts = [recommender, recommender.bundle, recommender.explainer, *weights]
        return [weakref.ref(part) for part in parts]

    async def change() -> list[object]:
        endpoint = await started(tmp_path / "registry", refresh_s=0.05)
        freeze()
        first = held(endpoint.recommender)
        assert (await post(endpoint, body)).status_code == 200
        registry.promote(tmp_path / "registry", 2)
        deadline = time.monotonic() + 10
        # The thread that has loaded the second may be just about to give the first back.
        while time.monotonic() < deadline and any(part() is not None for part in first):
            await asyncio.sleep(0.05)
            gc.collect()
        assert endpoint.recommender.name.version == 2
        return [part() for part in first if part() is not None]

    assert asyncio.run(change()) == []
