import asyncio
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafemed import bundle as bundles
from cafemed import registry
from cafemed.bundle import Bundle
from serve.asking import of_request, packed, read
from serve.example import example_request
from serve.recommender import Recommender
from serve.schema import RecommendRequest
from serve.shadow import Answered, Comparison, Sampling, ShadowModel, report


class Noted:
    """Numbers as they come."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.values: list[tuple[str, float]] = []

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        self.counts[f"{name} {labels['result']}"] += int(number)

    def set(self, name: str, value: float) -> None:
        raise AssertionError((name, value))

    def observe(self, name: str, value: float, **_: str) -> None:
        self.values.append((name, value))


@pytest.fixture
def registry_dir(served: Bundle, other: Bundle, tmp_path: Path) -> Path:
    """Version 1 in production; version 2 is there."""
    for name, bundle in (("a", served), ("b", other)):
        bundles.write(tmp_path / name, bundle)
        registry.publish(tmp_path / "registry", tmp_path / name, {})
    registry.promote(tmp_path / "registry", 1)
    return tmp_path / "registry"


@pytest.fixture
def request_of_two(served: Bundle) -> RecommendRequest:
    [patient] = example_request(served)["patients"]
    patients = [patient, {**patient, "visits": patient["visits"][:1]}]
    return RecommendRequest.model_validate({"patients": patients})


def answered(bundle: Bundle, request: RecommendRequest) -> Answered:
    recommender = Recommender(bundle, 1)
    rows = list(recommender.probabilities(recommender.encode(request)))
    return Answered(1, bundle.vocabularies["medication"], bundle.preprocessing.threshold, rows)


def sent(request: RecommendRequest) -> bytes:
    return packed(of_request(request).patients)


def test_two_models_are_compared(
    registry_dir: Path, served: Bundle, other: Bundle, request_of_two: RecommendRequest
) -> None:
    """By hand, with dictionaries of names; the served model has other medications besides."""
    whole = answered(served, request_of_two)
    order = [5, 0, 3, 11]  # some of its medications, in another order
    names = (*(whole.medications[i] for i in order), "atc:Z99Z")
    rows = [np.append(row[order], np.float32(0.9)) for row in whole.rows]
    given = Answered(1, names, 0.5, rows)
    found = ShadowModel(registry_dir, 2).compare(sent(request_of_two), given)
    shadow = Recommender(other, 2)
    theirs = shadow.probabilities(shadow.encode(request_of_two))
    assert found is not None
    assert len(found) == 2
    for comparison, row, their_row in zip(found, rows, theirs, strict=True):
        ours = dict(zip(names, row.tolist(), strict=True))
        their = dict(zip(other.vocabularies["medication"], their_row.tolist(), strict=True))
        first = {name for name, p in ours.items() if p >= 0.5}
        second = {name for name, p in their.items() if p >= other.preprocessing.threshold}
        assert comparison.jaccard == len(first & second) / len(first | second)
        both = ours.keys() & their.keys()
        assert len(both) == 4
        mean = sum(abs(ours[name] - their[name]) for name in both) / 4
        assert comparison.difference == pytest.approx(mean, rel=1e-6)


def test_a_request_is_compared_alike_whichever_way_it_was_read(
    registry_dir: Path, served: Bundle, request_of_two: RecommendRequest
) -> None:
    given = answered(served, request_of_two)
    shadow = ShadowModel(registry_dir, 2)
    asked = read(request_of_two.model_dump_json(exclude_unset=True).encode())
    assert asked is not None
    found = shadow.compare(packed(asked.patients), given)
    assert found is not None
    assert found == shadow.compare(sent(request_of_two), given)
    first = RecommendRequest(patients=request_of_two.patients[:1])
    assert found[:1] == shadow.compare(sent(first), dataclasses.replace(given, rows=given.rows[:1]))


def test_models_without_a_common_medication(
    registry_dir: Path, request_of_two: RecommendRequest
) -> None:
    rows = [np.zeros(1, np.float32)] * 2
    found = ShadowModel(registry_dir, 2).compare(
        sent(request_of_two), Answered(1, ("atc:Z99Z",), 0.5, rows)
    )
    assert found is not None
    assert [comparison.difference for comparison in found] == [None, None]
    told = Noted()
    report(told, [*found, Comparison(1.0, 0.25)])
    assert [name for name, _ in told.values].count("cafemed_shadow_difference") == 1
    assert [name for name, _ in told.values].count("cafemed_shadow_jaccard") == 3


def test_a_version_is_not_compared_with_itself(
    registry_dir: Path, served: Bundle, request_of_two: RecommendRequest
) -> None:
    shadow = ShadowModel(registry_dir, "production")
    assert shadow.compare(sent(request_of_two), answered(served, request_of_two)) is None
    registry.promote(registry_dir, 2)
    shadow.refresh()
    assert shadow.version == 2
    assert shadow.compare(sent(request_of_two), answered(served, request_of_two)) is not None


def test_a_shadow_that_fails_as_no_one_thought_is_none(
    registry_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where its start failed, so would that of the whole application."""

    def fail(*_: Any) -> None:
        raise RuntimeError("MARKER4711")

    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "load", fail)
        shadow = ShadowModel(registry_dir, 2)
        shadow.refresh()
        assert shadow.version is None
    assert [record.message for record in caplog.records] == ["no shadow yet: RuntimeError"]
    shadow.refresh()
    assert shadow.version == 2


def test_a_candidate_may_come_later(
    registry_dir: Path, served: Bundle, request_of_two: RecommendRequest
) -> None:
    shadow = ShadowModel(registry_dir, "candidate")
    assert shadow.version is None
    assert shadow.compare(sent(request_of_two), answered(served, request_of_two)) is None
    registry.promote(registry_dir, 2, "candidate")
    shadow.refresh()
    assert shadow.version == 2


def test_a_share_is_sampled_and_no_more_than_fits(
    served: Bundle, request_of_two: RecommendRequest
) -> None:
    recommender = Recommender(served, 1)
    rows = answered(served, request_of_two).rows
    told = Noted()
    came: list[Answered] = []

    async def run() -> None:
        free = asyncio.Event()

        async def ask(_request: RecommendRequest, given: Answered) -> str:
            came.append(given)
            await free.wait()
            return "compared"

        all_of_them = Sampling(ask, told, share=1.0, most=3)
        for _ in range(10):
            all_of_them.offer(request_of_two, recommender, rows)  # returns at once
        await asyncio.sleep(0)
        assert len(came) == 3
        free.set()
        await asyncio.sleep(0.01)
        all_of_them.offer(request_of_two, recommender, rows)
        await asyncio.sleep(0.01)

        few = Sampling(ask, Noted(), share=0.2, most=1000)
        before = len(came)
        for _ in range(1000):
            few.offer(request_of_two, recommender, rows)
        await asyncio.sleep(0.01)
        # 0.2 of 1000, and five standard deviations of the binomial on either side.
        assert abs(len(came) - before - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5

    asyncio.run(run())
    assert told.counts == {
        "cafemed_shadow_requests dropped": 7,
        "cafemed_shadow_requests compared": 4,
    }
    assert came[0].version == 1
    assert came[0].rows[1].tobytes() == rows[1].tobytes()


def test_a_failing_shadow_is_counted_alone(
    served: Bundle, request_of_two: RecommendRequest, caplog: pytest.LogCaptureFixture
) -> None:
    told = Noted()

    async def run() -> None:
        async def ask(*_: Any) -> str:
            raise RuntimeError("MARKER4711")

        sampling = Sampling(ask, told, share=1.0, most=3)
        rows = answered(served, request_of_two).rows
        sampling.offer(request_of_two, Recommender(served, 1), rows)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert told.counts == {"cafemed_shadow_requests failed": 1}
    assert caplog.text == ""
