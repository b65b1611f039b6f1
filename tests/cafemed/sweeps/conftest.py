"""Made-up sweeps: what is read from the files of a real one."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import models
from cafemed.findings import Findings
from cafemed.sweep import SweepResult, TrialRecord
from cafemed.training import FitConfig

SPACE: dict[str, Any] = {
    "model": {
        "name": {"type": "categorical", "choices": ["cafemed", "causalmed"]},
        "dropout": {"type": "float", "low": 0.0, "high": 0.8},
        "cafemed": {
            "modulation_strength": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
            "cwg_hidden": {"type": "categorical", "choices": [None, 16, 32]},
        },
        "causalmed": {"effect_levels": {"type": "int", "low": 2, "high": 20, "log": True}},
    },
    "train": {
        "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "batch_size": {"type": "int", "low": 4, "high": 128, "log": True},
    },
}


def draw(rng: np.random.Generator) -> dict[str, Any]:
    name = str(rng.choice(["cafemed", "causalmed"]))
    parameters: dict[str, Any] = {"model.name": name, "model.dropout": rng.uniform(0, 0.8)}
    if name == "cafemed":
        parameters["model.cafemed.modulation_strength"] = 10 ** rng.uniform(-2, 0)
        parameters["model.cafemed.cwg_hidden"] = [None, 16, 32][rng.integers(3)]
    else:
        parameters["model.causalmed.effect_levels"] = int(rng.integers(2, 21))
    parameters["train.learning_rate"] = 10 ** rng.uniform(-4, -2)
    parameters["train.batch_size"] = int(rng.integers(4, 129))
    return parameters


def epochs_of(parameters: Mapping[str, Any], count: int, rng: np.random.Generator) -> Any:
    """Jaccard depends on the learning rate, the DDI rate on the dropout."""
    reached = 0.5 - 0.05 * (np.log10(parameters["train.learning_rate"]) + 2.5) ** 2
    for epoch in range(1, count + 1):
        jaccard = reached * (1 - np.exp(-epoch / 3)) + rng.normal(0, 0.002)
        ddi_rate = 0.05 + 0.04 * parameters["model.dropout"] + rng.normal(0, 0.001)
        yield {
            "epoch": epoch,
            "seconds": 1.5,
            "losses": {"loss": 1 / epoch, "bce": 0.3, "margin": 0.1, "ddi": 0.02},
            "metrics": {
                "jaccard": jaccard,
                "f1": jaccard + 0.1,
                "prauc": jaccard + 0.2,
                "ddi_rate": ddi_rate,
                "num_medications": 20.0,
            },
        }


def make_trials(count: int, epochs: int, seed: int, failed: int = 0) -> list[TrialRecord]:
    """Every third trial is stopped early; the last `failed` ones failed, half of them at once."""
    rng = np.random.default_rng(seed)
    begin = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    trials = []
    for number in range(count):
        parameters = draw(rng)
        bad = number >= count - failed
        lasted = 0 if bad and number % 2 else max(1, epochs // 3) if number % 3 == 2 else epochs
        trials.append(
            TrialRecord(
                number=number,
                parameters=parameters,
                seed=int(rng.integers(2**32)),
                status="failed" if bad else "stopped" if lasted < epochs else "finished",
                error="ValueError: too <large>" if bad else None,
                history=tuple(epochs_of(parameters, lasted, rng)),
                started=begin + datetime.timedelta(minutes=number) if lasted else None,
                seconds=1.5 * lasted,
                host="node-1" if lasted else "",
                cpus=1.0,
                gpus=0.5,
                checkpoint=None,
                memory_gb=1.5,
                num_workers=2,
            )
        )
    return trials


def settings(space: Mapping[str, Any]) -> dict[str, Any]:
    options = dataclasses.asdict(models.options_class("cafemed")())
    return {
        "model": {"name": "cafemed", "options": options},
        "train": dataclasses.asdict(FitConfig(epochs=12)),
        "search": {"space": space, "seed": 0},
    }


def make_findings(
    count: int = 30,
    epochs: int = 9,
    seed: int = 0,
    *,
    failed: int = 0,
    limit: float | None = None,
    trials: list[TrialRecord] | None = None,
    **changes: Any,
) -> Findings:
    """A sweep as it would be read; the best trial is the best within the limit, if there is one."""
    trials = make_trials(count, epochs, seed, failed) if trials is None else trials
    usable = [t for t in trials if t.status != "failed" and t.best_epoch]
    within = [t for t in usable if limit is None or metric(t, "ddi_rate") <= limit]
    best: dict[str, Any] = {}
    if chosen := max(within or usable, key=lambda t: metric(t, "jaccard"), default=None):
        best = {
            "trial": chosen.number,
            "parameters": dict(chosen.parameters),
            "seed": chosen.seed,
            "objectives": ["jaccard"],
            "constraint": None if limit is None else {"ddi_rate": limit},
        }
    given = {
        "table": SweepResult(tuple(trials)).table(),
        "best": best,
        "settings": settings(SPACE),
        "name": "hospital",
        "cohort": "ab12" * 16,
    }
    return Findings(**{**given, **changes})


def metric(trial: TrialRecord, name: str) -> float:
    assert trial.best_epoch is not None
    return float(trial.best_epoch["metrics"][name])


@pytest.fixture(scope="session")
def trials_of() -> Callable[..., list[TrialRecord]]:
    return make_trials


@pytest.fixture(scope="session")
def findings_of() -> Callable[..., Findings]:
    return make_findings
