"""Sweeps as `jobs/tune.py` runs them, and what they take beside training."""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf
from torch import nn

import models
from cafemed import paths, sweep_plan, tuning
from cafemed.batches import ModelInputs
from cafemed.conductor import Conductor
from cafemed.ledger import Header, Ledger
from cafemed.sweep import TrialRecord
from cafemed.sweep_plan import SweepPlan
from cafemed.training import Builder
from cafemed.trials import TrialData


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep that is over.

    Attributes:
        trials: by number.
        slots: trials at the same time.
        wall_s: from an empty ledger to the return of `tuning.run`; Ray was up before.
        first_line_s: of these, until the first trial's first line: processes started, torch loaded.
        start_s: of each trial, from its first line to the first batch that enters its model.
        peak_mb: largest resident memory of each process that had trials.
    """

    trials: tuple[TrialRecord, ...]
    slots: int
    wall_s: float
    first_line_s: float
    start_s: tuple[float, ...]
    peak_mb: tuple[float, ...]

    @property
    def training_s(self) -> list[float]:
        """Of each trial: all its epochs, training and validation, as its history has them."""
        return [sum(epoch["seconds"] for epoch in trial.history) for trial in self.trials]


def plan_of(*overrides: str) -> SweepPlan:
    """The plan of `python jobs/tune.py OVERRIDES`."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        values = OmegaConf.to_container(hydra.compose("tune", list(overrides)), resolve=True)
    return sweep_plan.read(dict(values), models.options_class, models.NAMES)  # type: ignore[arg-type]


def noting_build(
    notes: Path,
    build: Builder,
    name: str,
    inputs: ModelInputs,
    options: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """What `build` gives; when its first batch comes, time and process go to NOTES/SEED."""
    model = build(name, inputs, options, seed)

    def note(*_: Any) -> None:
        handle.remove()
        (notes / str(seed)).write_text(f"{time.time()} {os.getpid()}")

    handle = model.register_forward_pre_hook(note)
    return model


def run(plan: SweepPlan, data: TrialData, slots: int) -> Sweep:
    """Runs a sweep in a new folder, on the Ray that this process is connected to.

    Args:
        plan: see SweepPlan; `slots` trials at the same time, whatever it says.
        data: see TrialData.
        slots: at least 1.
    """
    search = dataclasses.replace(plan.search, max_concurrent=slots)
    plan, peaks = dataclasses.replace(plan, search=search), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        notes = Path(name) / "notes"
        notes.mkdir()
        noting = functools.partial(noting_build, notes, data.build)

        def ended(trial: TrialRecord) -> None:
            if (note := notes / str(trial.seed)).exists():
                process = note.read_text().split()[1]
                peaks[process] = _peak_mb(process, peaks.get(process, 0.0))

        began, from_s = time.time(), time.perf_counter()
        ledger = Ledger(Path(name) / "trials")
        ledger.open(Header("", {}, plan.settings(), {}))
        conductor = Conductor(plan, ledger, (), ended)
        tuning.run(conductor, dataclasses.replace(data, build=noting))
        wall_s = time.perf_counter() - from_s
        trials = conductor.result().trials
        first_lines = {t.seed: t.started.timestamp() for t in trials if t.started is not None}
        first_steps = {int(p.name): float(p.read_text().split()[0]) for p in notes.iterdir()}
    return Sweep(
        trials=trials,
        slots=slots,
        wall_s=wall_s,
        first_line_s=min(first_lines.values()) - began,
        start_s=tuple(first_steps[seed] - line for seed, line in first_lines.items()),
        peak_mb=tuple(peaks.values()),
    )


def _peak_mb(process: str, before: float) -> float:
    """Largest resident memory of a process until now; what was known of it if it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return before
    return float(status.split("VmHWM:")[1].split()[0]) / 1024
