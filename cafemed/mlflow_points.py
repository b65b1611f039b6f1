"""What runs are told of in MLflow: epochs, parameters, whose they are."""

import datetime
import getpass
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from cafemed import event_files
from cafemed.mlflow_client import Point
from cafemed.tracking import Progress


def points(trial: Progress, sent: int) -> list[Point]:
    """The epochs after the first `sent`."""
    started = None if trial.record is None else trial.record.started
    clock = time.time() if started is None else started.timestamp()
    points = []
    for number, epoch in enumerate(trial.history, 1):
        clock += 0.0 if started is None else float(epoch["seconds"])
        if number > sent:
            points += [
                Point(key, value, number, int(clock * 1000))
                for key, value in event_files.scalars(epoch).items()
                if math.isfinite(value)
            ]
    return points


def best_points(trial: Progress) -> list[Point]:
    """Of the best epoch of a trial that ended."""
    best, step = event_files.best_scalars(trial.history)
    return [Point(k, v, step, end_ms(trial)) for k, v in best.items() if math.isfinite(v)]


def measured(metrics: Mapping[str, Any], group: str, step: int) -> list[Point]:
    """Metrics of a whole run: "GROUP/NAME"."""
    return [
        Point(f"{group}/{name}", float(value), step, now_ms())
        for name, value in metrics.items()
        if math.isfinite(value)
    ]


def params(settings: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Settings (section → name → value), and the fingerprints of what a run was made from."""
    flat = {
        f"{section}.{name}": value if isinstance(value, str) else json.dumps(value)
        for section, values in settings.items()
        for name, value in values.items()
    }
    return flat | {f"fingerprint.{name}": value for name, value in inputs.items()}


def end_ms(trial: Progress) -> int:
    """When a trial ended, in milliseconds since 1970; now, where it has not."""
    record = trial.record
    if record is None or record.started is None:
        return now_ms()
    return int((record.started + datetime.timedelta(seconds=record.seconds)).timestamp() * 1000)


def origin(job: str) -> dict[str, str]:
    """Which job runs, and whose, as MLflow's pages show it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": job, "mlflow.source.type": "JOB"}


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
