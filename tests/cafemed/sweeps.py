"""For tests of sweeps: an invented experiment, and sweeps without Ray, by a formula."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from cafemed import batches, checkpoints, sweep_plan
from cafemed.codes import CodeLists, node_name
from cafemed.cohort import Cohort
from cafemed.conductor import Conductor, Start
from cafemed.experiment import Experiment
from cafemed.graphs import CausalGraph, EffectTable
from cafemed.randomness import RandomStates
from cafemed.sweep import METRICS, TrialRecord

SPACE = {
    "model": {
        "dropout": {"type": "float", "low": 0.0, "high": 0.8},
        "reduction_ratio": {"type": "categorical", "choices": [2, 4, 8]},
    },
    "train": {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
}
EPOCHS = 9


def plan_of(**search: Any) -> sweep_plan.SweepPlan:
    settings = {"space": SPACE, "num_samples": 12, "grace_period": 2} | search
    train = {"epochs": EPOCHS, "patience": 5}
    values = {"model": {"name": "cafemed"}, "train": train, "search": settings}
    return sweep_plan.read(values, models.options_class, models.NAMES)


def history_of(parameters: dict[str, Any], epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """Epochs of a trial, whose height, pace and DDI rate follow from its parameters."""
    rate = parameters["train.learning_rate"]
    height = 0.6 - abs(math.log10(rate) + 2.0) / 5 - abs(parameters.get("model.dropout", 0.4) - 0.4)
    return [
        {
            "epoch": epoch,
            "losses": dict.fromkeys(("loss", "bce", "margin", "ddi"), 1.0 / epoch),
            "metrics": dict.fromkeys(METRICS, 0.5)
            | {"jaccard": height * (1 - 0.7**epoch), "ddi_rate": 0.05 + rate / 10},
            "best": True,
            "seconds": 0.25,
        }
        for epoch in range(1, epochs + 1)
    ]


def record_of(
    number: int, parameters: dict[str, Any], status: Any = "finished", epochs: int = EPOCHS
) -> TrialRecord:
    error = "RuntimeError: no" if status == "failed" else None
    history = tuple(history_of(parameters, epochs))
    return TrialRecord(
        number, parameters, number, status, error, history, None, 1.0, "h", 1.0, 0.0, None
    )


class CountedBuilder:
    """Builds models as another builder does, and counts how often it is pickled with trials' data.

    Attributes:
        pickled: how often, in this process.
    """

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build, self.pickled = build, 0

    def __call__(self, *told: Any) -> Any:
        return self._build(*told)

    def __reduce__(self) -> Any:
        self.pickled += 1
        return functools.partial, (self._build,)


class SweepCutError(BaseException):
    """Stands for a process that is gone, as KeyboardInterrupt does; no error of its own."""


def play(conductor: Conductor, tick: Callable[[], None] = lambda: None, slots: int = 1) -> None:
    """Runs trials as Ray Tune would, `slots` at a time in turn; `tick` may raise at any event."""
    running: list[tuple[Start, list[dict[str, Any]]]] = []
    while True:
        while len(running) < slots and (start := conductor.next()) is not None:
            tick()
            conductor.started(start.number)
            running.append((start, _earlier(start)))
        if not running or conductor.over():
            return
        start, history = running.pop(0)
        full = history_of(dict(start.parameters))
        if len(history) < len(full):
            history.append(full[len(history)])
            tick()
            _save(conductor, start.number, history)
        tick()
        if conductor.stops(start.number, history) or len(history) == len(full):
            tick()
            conductor.end(start.number, history, seconds=1.0)
        else:
            running.append((start, history))


def _earlier(start: Start) -> list[dict[str, Any]]:
    if start.checkpoint is None:
        return []
    found = checkpoints.load(Path(start.checkpoint), None)
    assert found is not None
    return found.history


def _save(conductor: Conductor, number: int, history: list[dict[str, Any]]) -> None:
    folder = conductor.ledger.folder
    assert folder is not None
    place = folder / "run-001" / f"trial-{number:05d}" / f"checkpoint_{len(history):06d}"
    weights = {"w": torch.zeros(1)}
    checkpoints.save(
        place,
        checkpoints.Checkpoint(
            "", len(history), 1, weights, weights, {}, RandomStates({}, {}), list(history)
        ),
        flush=False,  # as trials do
    )


def outcome(conductor: Conductor) -> list[Any]:
    """What a sweep came to, without times."""
    return [
        (trial.number, dict(trial.parameters), trial.seed, trial.status, trial.history)
        for trial in conductor.result().trials
    ]


def invented_experiment() -> Experiment:
    """Sixty invented patients whose medications follow from their diagnoses."""
    random = np.random.default_rng(0)
    visits = random.integers(2, 5, 60)
    total = int(visits.sum())
    sizes = {"diagnosis": 12, "procedure": 6, "medication": 8}
    vocabularies = {k: tuple(f"x:{k[0].upper()}{i}" for i in range(n)) for k, n in sizes.items()}
    diagnoses = [
        sorted(random.choice(12, random.integers(1, 5), replace=False)) for _ in range(total)
    ]
    procedures = [
        sorted(random.choice(6, random.integers(0, 3), replace=False)) for _ in range(total)
    ]
    medications = CodeLists.of([sorted({d % 8 for d in codes}) for codes in diagnoses])
    ddi = np.zeros((8, 8), np.bool_)
    ddi[0, 1] = ddi[1, 0] = True
    cohort = Cohort(
        patient_offsets=np.concatenate([[0], np.cumsum(visits)]).astype(np.int64),
        patient_ids=tuple(f"p{i}" for i in range(60)),
        visit_ids=tuple(f"v{i}" for i in range(total)),
        admitted=np.full(total, "NaT", "datetime64[s]"),
        diagnoses=CodeLists.of(diagnoses),
        procedures=CodeLists.of(procedures),
        medications=medications,
        targets=medications,
        vocabularies=vocabularies,
        ddi=ddi,
        split=np.repeat(np.array([0, 1, 2], np.int8), [40, 10, 10]),
        sex=np.zeros(60, np.int8),
        age=np.linspace(20, 90, total, dtype=np.float32),
        molecules={vocabularies["medication"][3]: ("C", "CO")},
        fingerprint="c0",
    )
    rows = tuple(node_name(k, c) for k in ("diagnosis", "procedure") for c in vocabularies[k])
    columns = tuple(node_name("medication", c) for c in vocabularies["medication"])
    effect = random.normal(size=(18, 8)).astype(np.float32) / 10
    effects = EffectTable.known(rows, columns, effect, np.zeros_like(effect), "raw")
    none = np.zeros(0, np.int32)
    floats = none.astype(np.float32)
    graph = CausalGraph((), none, none, none > 0, floats, none.astype(np.int64), floats)
    return Experiment(
        cohort=cohort,
        graph=graph,
        effects=effects,
        arrays=batches.cohort_arrays(cohort, graph),
        inputs=batches.model_inputs(vocabularies, effects, ddi),
        sources={"cohort": "c0", "graph": "a0"},
    )
