"""What is counted about the endpoint, as Ray exports it on every node's metrics port.

Ray puts `ray_` before each name and `_total` after a counter's, and adds the labels `application`,
`deployment` and `replica`. No label holds a code or anything else of a request but its route.
"""

import dataclasses
from collections import defaultdict
from typing import Any, Literal

from ray.serve import metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: counter, gauge or histogram.
        name: without Ray's prefix.
        description: in one line.
        labels: of its own.
        boundaries: upper edges of a histogram's bins.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that a scrape has."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return tuple(f"{name}_{part}" for part in ("bucket", "sum", "count"))
        return (f"{name}_total",) if self.kind == "counter" else (name,)


_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_TIMES_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_DIFFERENCES = (1e-6, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

METRICS = {
    metric.name: metric
    for metric in (
        Metric("counter", "cafemed_requests", "Requests answered", ("route", "status")),
        Metric(
            "histogram",
            "cafemed_request_latency_ms",
            "Time from a request's first byte at the replica to its answer's last",
            ("route",),
            _TIMES_MS,
        ),
        Metric("counter", "cafemed_refused_requests", "Requests refused because too many were in"),
        Metric("gauge", "cafemed_requests_in_progress", "Admitted requests not yet answered"),
        Metric("gauge", "cafemed_waiting_patients", "Patients that wait for a run of the model"),
        Metric(
            "histogram",
            "cafemed_run_patients",
            "Patients that a run of the model took together",
            (),
            _SIZES,
        ),
        Metric("counter", "cafemed_patients", "Patients recommended for"),
        Metric("counter", "cafemed_codes", "Codes and laboratory items asked about"),
        Metric("counter", "cafemed_unknown_codes", "Those that the model does not know"),
        Metric("counter", "cafemed_medications", "Medications recommended"),
        Metric("counter", "cafemed_pairs", "Pairs of medications recommended together"),
        Metric("counter", "cafemed_interacting_pairs", "Those that interact"),
        Metric("gauge", "cafemed_model_version", "Version of the registry that answers"),
        Metric(
            "counter", "cafemed_refused_versions", "Promoted versions that did not load and pass"
        ),
        Metric(
            "gauge",
            "cafemed_score_drift_psi",
            "Population stability index of the last patients' scores against the reference",
        ),
        Metric("counter", "cafemed_shadow_requests", "Requests given to the shadow", ("result",)),
        Metric(
            "histogram",
            "cafemed_shadow_jaccard",
            "Jaccard similarity of the shadow's and the served medications of a patient",
            (),
            _SHARES,
        ),
        Metric(
            "histogram",
            "cafemed_shadow_difference",
            "Mean absolute difference of the probabilities of medications that both models know",
            (),
            _DIFFERENCES,
        ),
        Metric("gauge", "cafemed_shadow_version", "Version of the registry that is the shadow"),
    )
}


class Meters:
    """The metrics of one process.

    Counts and values are gathered until `flush`: one by one, among all else that a request needs,
    each takes some microseconds to hand to Ray. Used from one event loop.
    """

    def __init__(self, *names: str) -> None:
        """Registers the named ones of METRICS; all of them without names."""
        self._meters: dict[str, Any] = {name: _meter(METRICS[name]) for name in (names or METRICS)}
        self._counted: defaultdict[tuple[Any, ...], float] = defaultdict(float)
        self._observed: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        self._counted[name, *labels.items()] += number

    def flush(self) -> None:
        """Hands what was counted and observed to Ray, which exports it every few seconds."""
        counted, self._counted = self._counted, defaultdict(float)
        for (name, *labels), number in counted.items():
            if number:  # Ray's counters take no zeros
                self._meters[name].inc(number, tags=dict(labels))
        observed, self._observed = self._observed, defaultdict(list)
        for (name, *labels), seen in observed.items():
            tags = dict(labels)
            for value in seen:
                self._meters[name].observe(value, tags=tags)

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self._meters[name].set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""
        self._observed[name, *labels.items()].append(value)


def _meter(metric: Metric) -> Any:
    options: dict[str, Any] = {"description": metric.description, "tag_keys": metric.labels}
    if metric.kind == "counter":
        return metrics.Counter(metric.name, **options)
    if metric.kind == "gauge":
        return metrics.Gauge(metric.name, **options)
    return metrics.Histogram(metric.name, boundaries=list(metric.boundaries), **options)
