"""What is counted reaches Ray's metrics."""

from collections.abc import Mapping
from typing import Any

import pytest
from ray.serve import metrics

from serve.metrics import Meters


def test_counts_and_values_are_handed_on_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[str, float, dict[str, str]]] = []

    def inc(self: Any, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        handed.append((self._name, value, dict(tags or {})))

    monkeypatch.setattr(metrics.Counter, "inc", inc)

    def observe(self: Any, value: float, tags: Mapping[str, str] | None = None) -> None:
        handed.append((self._name, value, dict(tags or {})))

    monkeypatch.setattr(metrics.Histogram, "observe", observe)
    meters = Meters(
        *("cafemed_requests", "cafemed_codes", "cafemed_patients"),
        *("cafemed_request_latency_ms", "cafemed_run_patients"),
    )
    for status in ("200", "200", "422"):
        meters.count("cafemed_requests", route="/v1/recommend", status=status)
    meters.count("cafemed_codes", 7)
    meters.count("cafemed_codes", 4)
    meters.count("cafemed_patients", 0)  # which Ray refuses
    assert handed == []
    meters.flush()
    meters.flush()
    route = {"route": "/v1/recommend"}
    assert sorted(handed, key=str) == sorted(
        [
            ("cafemed_requests", 2.0, {**route, "status": "200"}),
            ("cafemed_requests", 1.0, {**route, "status": "422"}),
            ("cafemed_codes", 11.0, {}),
        ],
        key=str,
    )
    meters.count("cafemed_codes", 1)
    for took_ms in (2.0, 3.0, 2.0):
        meters.observe("cafemed_request_latency_ms", took_ms, route="/v1/recommend")
    meters.observe("cafemed_run_patients", 4)
    assert len(handed) == 3
    meters.flush()
    meters.flush()
    assert handed[3:] == [
        ("cafemed_codes", 1.0, {}),
        *[("cafemed_request_latency_ms", took_ms, route) for took_ms in (2.0, 3.0, 2.0)],
        ("cafemed_run_patients", 4, {}),
    ]
