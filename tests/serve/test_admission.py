import asyncio
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from serve import limits
from serve.admission import MAX_RETRY_S, MIN_RETRY_S, Admission, Admitted, places_of
from serve.asking import read


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_as_many_as_the_limit_are_admitted() -> None:
    admission = Admission(2)
    first, second = admission.enter(), admission.enter()
    assert first is not None
    assert second is not None
    assert admission.enter() is None
    assert (admission.in_progress, admission.refused) == (2, 1)
    admission.leave(first)
    assert admission.enter() is not None


def test_a_long_request_takes_the_places_of_several() -> None:
    admission = Admission(4)
    alone = admission.enter(9)  # more than there are, but nobody else asks
    assert alone is not None
    assert admission.enter() is None
    admission.leave(alone)
    three = admission.enter(3)
    assert three is not None
    assert admission.enter(2) is None
    assert admission.enter() is not None
    assert (admission.in_progress, admission.refused) == (2, 2)


def test_a_request_takes_more_places_once_it_is_read() -> None:
    admission = Admission(10)
    first, second = admission.enter(2), admission.enter()
    assert first is not None
    assert second is not None
    assert not admission.extend(second, 9)
    assert admission.refused == 1
    assert admission.extend(second, 8)  # with the other's, all that there are
    assert admission.extend(second, 5)  # never fewer
    assert admission.enter() is None
    admission.leave(first)
    assert admission.extend(second, 99)  # alone
    assert admission.enter() is None
    admission.leave(second)
    assert admission.enter(10) is not None


CODE = {"system": "icd9", "code": "1"}


@pytest.mark.parametrize(
    ("codes", "options", "places"),
    [
        ([128] * 256, {}, 0),
        ([128] * 256, {"top_k": 1}, 0),
        ([1] * 256, {"max_ddi_rate": 0}, 64),
        ([1] * 5, {"max_ddi_rate": 1}, 2),
        ([0], {"explain": True}, 0),
        ([64], {"explain": True}, 2),  # 64 times 64 codes
        ([64, 65], {"explain": True}, 5),
        ([128 + 17], {"explain": True}, 11),
        ([300], {"explain": True}, 16),  # not more than are computed
        ([2000] * 8, {"explain": True}, 128),
        ([2000] * 8, {"explain": True, "max_ddi_rate": 0.1}, 130),
    ],
)
def test_places_of_options(codes: list[int], options: dict[str, Any], places: int) -> None:
    patients = []
    for number in codes:
        full, rest = divmod(number, 128)
        visits = [{"diagnoses": [CODE] * 128}] * (full // 2)
        visits += [{"procedures": [CODE] * 64, "medications": [CODE] * 64}] * (full - full // 2)
        value = {"item": "1", "value": 1}
        patients.append({"visits": [*visits, {"laboratory": [value] * rest}]})
    asked = read(json.dumps({"patients": patients, "options": options}).encode())
    assert asked is not None
    assert places_of(asked) == places


@pytest.mark.parametrize(("took_s", "said"), [(0.01, MIN_RETRY_S), (3.2, 4), (1000.0, MAX_RETRY_S)])
def test_retry_after_is_what_requests_take(took_s: float, said: int) -> None:
    clock = Clock()
    admission = Admission(1, clock)
    assert admission.retry_after_s == MIN_RETRY_S  # nothing measured yet
    for _ in range(50):
        started = admission.enter()
        assert started is not None
        clock.now += took_s
        admission.leave(started)
    assert admission.retry_after_s == said


def test_the_estimate_follows_a_change() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    for took_s in [1.5] * 5 + [8.0] * 100:
        started = admission.enter()
        assert started is not None
        clock.now += took_s
        admission.leave(started)
    assert admission.retry_after_s == 8


def run(app: Any, method: str, told: Mapping[str, Any] = MappingProxyType({})) -> str:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    said: list[str] = []

    async def send(message: Any) -> None:
        said.append(message["said"])

    asyncio.run(app({"type": "http", "method": method, **told}, receive, send))
    return said[0]


@pytest.fixture
def admission() -> Admission:
    return Admission(1)


@pytest.fixture
def app(admission: Admission) -> Admitted:
    async def answers(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"said": "answered"})

    def refuse(_scope: Any, retry_after_s: int) -> Any:
        async def refused(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"said": f"refused {retry_after_s}"})

        return refused

    return Admitted(answers, admission, refuse)


def test_posts_are_refused_over_the_limit_and_others_never(
    app: Admitted, admission: Admission
) -> None:
    assert run(app, "POST") == "answered"
    assert admission.in_progress == 0
    admission.enter()
    assert run(app, "POST") == f"refused {MIN_RETRY_S}"
    assert run(app, "GET") == "answered"
    assert admission.in_progress == 1


@pytest.mark.parametrize(("size", "said"), [(0, "a"), (65536, "a"), (65537, "r"), (4 << 20, "r")])
def test_places_go_by_the_length_of_the_body(size: int, said: str) -> None:
    admission = Admission(2)
    admission.enter()

    async def answers(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"said": "a"})

    def refuse(*_: Any) -> Any:
        async def refused(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"said": "r"})

        return refused

    app = Admitted(answers, admission, refuse)
    assert run(app, "POST", {limits.SIZE: size}) == said
    assert run(app, "POST") == "a"  # whatever was taken has been given back


def test_a_failure_gives_its_place_back(admission: Admission) -> None:
    async def fails(_scope: Any, _receive: Any, _send: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(Admitted(fails, admission, lambda *_: fails), "POST")
    assert admission.in_progress == 0
