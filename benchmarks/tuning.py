#!/usr/bin/env python3
"""Measures sweeps: what they cost beside training, against plain Optuna, and what they find.

    python benchmarks/tuning.py --quick
    python benchmarks/tuning.py --json benchmarks/results/tuning.json
    python benchmarks/tuning.py --work FOLDER --only sweep --only optuna_joblib

The cohort is that of jobs/prepare.py data=synthetic and jobs/discover.py; every process has one
thread. `--only` names cases:

`sweep`: 32 trials of about --trial-s seconds, what `python jobs/tune.py search=paper
search.sampler=random search.scheduler=none` draws, on two slots, by `tuning.run`, Ray being up.
`overhead` is the wall time over the trials' own training time divided by the slots, less 1; a
trial's training time is the sum of its epochs' in the sweep's history, so that starts, checkpoints,
reports and the slot that is empty at the end all count as overhead. `start_s_per_trial` is from a
trial's first line, imports done, to the first batch that enters its model, `checkpoint_s_per_epoch`
what is left of a trial's time: checkpoints and reports. `first_line_s` is from the sweep's start to
the first trial's first line. `peak_mb_per_trial` is the largest resident memory of a process that
runs trials, torch and the shared cohort included. `scaling_efficiency` is the trials an hour of two
slots over twice those of one (half as many trials, so that it takes as long).

`optuna_joblib`: the same parameters and seeds by plain Optuna in two processes of joblib's, without
checkpoints (benchmarks/sweeps/plain.py), in turn with the sweep: one, other, other, one. Both give
the same Jaccard for every trial, which is checked. `trials_per_hour_ratio` is the sweep's over it.
Ray would run its workers at a niceness of 15; here they have that of joblib's.

`tpe_asha_vs_random`: for each of ten seeds 60 seconds of either search on two slots, on the cohort
of data=synthetic_demo (benchmarks/sweeps/race.py); `wins_of_10` counts the seeds where TPE with
ASHA found a better validation Jaccard.

`ddp workers=2`: one fit of the default model, dropout 0, by two workers (`search.num_workers=2`)
and by `training.fit` alone, in turn. `efficiency` is the median epoch alone over twice that of the
two, which share every batch of 32 patients, and in the case `ddp workers=2 batch=128` of 128.

With --quick: the small cohort, four short trials, one seed; the figures mean little.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy is loaded, here and in all processes
os.environ["PYTHONPATH"] = str(PROJECT)  # for Ray's and joblib's
# That of joblib's processes; Ray's own, 15, yields to whatever else runs.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import models  # noqa: E402
from benchmarks.recommenders import cohorts  # noqa: E402
from benchmarks.sweeps import measured, plain, race, together  # noqa: E402
from benchmarks.sweeps.measured import Sweep  # noqa: E402
from benchmarks.sweeps.plain import Fixed, Study  # noqa: E402
from cafemed import cluster, experiment, training  # noqa: E402
from cafemed.experiment import Experiment  # noqa: E402
from cafemed.sweep_plan import SweepPlan  # noqa: E402
from cafemed.trials import TrialData  # noqa: E402

SLOTS = 2
CASES = ("sweep", "optuna_joblib", "ddp", "tpe_asha_vs_random")
#: case, metric, value, unit
Row = tuple[str, str, float, str]


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        data: population of the sweep.
        trials: of a sweep.
        trial_s: training time of each, about.
        rounds: what runs in turn.
        epochs: of a fit by workers, and of one alone.
        fits: of either.
        searches: seeds of the race.
        search_s: seconds of a search.
    """

    data: str
    trials: int
    trial_s: float
    rounds: str
    epochs: int
    fits: int
    searches: int
    search_s: float


FULL = Size("synthetic", 32, 14.0, "sweep plain plain sweep", 8, 3, 10, 60.0)
QUICK = Size("synthetic_demo", 4, 1.0, "sweep plain", 4, 1, 1, 9.0)


def versions() -> str:
    """What the figures were measured with."""
    import optuna
    import ray
    import torch

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}, "
        f"Optuna {optuna.__version__}"
    )


def epochs_of(given: Experiment, seconds: float) -> int:
    """Epochs that take about so long here, now, after one that warms up."""
    fitted = training.fit(
        models.build,
        "cafemed",
        {},
        given.inputs,
        given.arrays,
        given.cohort.patients_of("train"),
        given.cohort.patients_of("validation"),
        training.FitConfig(epochs=4),
    )
    return max(2, round(seconds / min(epoch.seconds for epoch in fitted.history[1:])))


def sweep_plan(trials: int, epochs: int, seed: int) -> SweepPlan:
    """Fixed trials that all have all their epochs."""
    return measured.plan_of(
        "search=paper",
        "search.sampler=random",
        "search.scheduler=none",
        f"search.num_samples={trials}",
        f"search.seed={seed}",
        f"train.epochs={epochs}",
        f"train.patience={epochs}",
    )


def sweep_rows(sweeps: list[Sweep], single: Sweep) -> Iterator[Row]:
    """What sweeps on SLOTS slots took, together; `single` ran on one."""
    walls, training_s = sum(s.wall_s for s in sweeps), [t for s in sweeps for t in s.training_s]
    starts = [start for s in sweeps for start in s.start_s]
    case = "sweep"
    yield case, "overhead", walls * SLOTS / sum(training_s) - 1, "1"
    yield case, "start_s_per_trial", statistics.fmean(starts), "s"
    yield case, "start_s_slowest", max(starts), "s"
    yield case, "first_line_s", statistics.fmean(s.first_line_s for s in sweeps), "s"
    yield case, "peak_mb_per_trial", max(peak for s in sweeps for peak in s.peak_mb), "MB"
    yield case, "training_s_shortest", min(training_s), "s"
    yield case, "training_s_longest", max(training_s), "s"
    per_hour = 3600 * len(training_s) / walls
    yield case, "trials_per_hour", per_hour, "1/h"
    trials = [trial for s in sweeps for trial in s.trials]
    beside = sum(trial.seconds for trial in trials) - sum(training_s) - sum(starts)
    epochs = sum(len(trial.history) for trial in trials)
    yield case, "checkpoint_s_per_epoch", beside / epochs, "s"
    alone = 3600 * len(single.trials) / single.wall_s
    yield case, "trials_per_hour_one_slot", alone, "1/h"
    yield case, "overhead_one_slot", single.wall_s / sum(single.training_s) - 1, "1"
    yield case, "scaling_efficiency", per_hour / (SLOTS * alone), "1"


def plain_rows(studies: list[Study], sweeps: list[Sweep]) -> Iterator[Row]:
    """The same trials by either way.

    Raises:
        SystemExit: if they are not the same.
    """
    case = "optuna_joblib"
    for study in studies:
        for trial, jaccard in zip(sweeps[0].trials, study.jaccard, strict=True):
            if not trial.best_so_far or trial.best_so_far[-1] != jaccard:
                raise SystemExit(f"trial {trial.number} is another one in Optuna with joblib")
    walls = sum(study.wall_s for study in studies)
    training_s = [t for study in studies for t in study.training_s]
    per_hour = 3600 * len(training_s) / walls
    ours = 3600 * sum(len(s.trials) for s in sweeps) / sum(s.wall_s for s in sweeps)
    yield case, "trials_per_hour", per_hour, "1/h"
    yield case, "overhead", walls * SLOTS / sum(training_s) - 1, "1"
    yield case, "trials_per_hour_ratio", ours / per_hour, "1"


def measure_sweeps(given: Experiment, size: Size, seed: int, compared: bool) -> Iterator[Row]:
    """The cases `sweep` and, if `compared`, `optuna_joblib`."""
    epochs = epochs_of(given, size.trial_s)
    plan = sweep_plan(size.trials, epochs, seed)
    data = TrialData.of(plan, given, models.build)
    sweeps: list[Sweep] = []
    studies: list[Study] = []
    for name in size.rounds.split():
        if name == "sweep":
            sweeps.append(measured.run(plan, data, SLOTS))
        elif compared:
            fixed = [Fixed(trial.parameters, trial.seed) for trial in sweeps[0].trials]
            studies.append(plain.run(fixed, plan.space, data, SLOTS))
    single = measured.run(sweep_plan(size.trials // 2, epochs, seed), data, 1)
    yield from sweep_rows(sweeps, single)
    if compared:
        yield from plain_rows(studies, sweeps)


def measure_workers(given: Experiment, size: Size, seed: int) -> Iterator[Row]:
    """The case `ddp`."""
    plan = sweep_plan(1, size.epochs, seed)
    data = TrialData.of(plan, given, models.build)
    large = dataclasses.replace(data, config=dataclasses.replace(data.config, batch_size=128))
    cases = {f"ddp workers={SLOTS}": data}
    if size.trials > QUICK.trials:
        cases[f"ddp workers={SLOTS} batch=128"] = large
    for case, chosen in cases.items():
        pair = together.compare(chosen, SLOTS, size.fits)
        yield case, "epoch_s_alone", pair.alone_s, "s"
        yield case, "epoch_s", pair.together_s, "s"
        yield case, "efficiency", pair.alone_s / (SLOTS * pair.together_s), "1"


def measure_searches(given: Experiment, size: Size, seed: int) -> Iterator[Row]:
    """The case `tpe_asha_vs_random`."""
    case, wins = "tpe_asha_vs_random", 0
    for number in range(seed, seed + size.searches):
        found = {}
        for name in race.SEARCHES:
            found[name] = race.search(name, given, size.search_s, SLOTS, number)
            yield case, f"jaccard {name} seed={number}", found[name].jaccard, "1"
            yield case, f"trials {name} seed={number}", found[name].trials, "1"
        wins += found["tpe_asha"].jaccard > found["random"].jaccard
    yield case, f"wins_of_{size.searches}", wins, "1"


def measure(size: Size, work: Path, seed: int, chosen: list[str]) -> Iterator[Row]:
    """All rows of the chosen cases."""
    wanted = {QUICK.data if case == "tpe_asha_vs_random" else size.data for case in chosen}
    given = {
        data: experiment.load_inputs(cohorts.prepare(work, data, seed)) for data in sorted(wanted)
    }
    began = time.perf_counter()
    with cluster.ray_cluster(SLOTS):
        yield "ray", "start_s", time.perf_counter() - began, "s"
        if {"sweep", "optuna_joblib"} & set(chosen):
            yield from measure_sweeps(given[size.data], size, seed, "optuna_joblib" in chosen)
        if "ddp" in chosen:
            yield from measure_workers(given[size.data], size, seed)
        if "tpe_asha_vs_random" in chosen:
            yield from measure_searches(given[QUICK.data], size, seed)


def main() -> None:
    """Measures, prints the rows and writes them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four short trials, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="of cohort and sweeps; first of ten")
    parser.add_argument("--data", help="another population for the sweeps, as synthetic_mimic3")
    parser.add_argument("--trial-s", type=float, help="training time of a trial (14)")
    parser.add_argument("--work", type=Path, help="keep the cohorts in this folder")
    parser.add_argument("--only", action="append", choices=CASES, help="this case; repeatable")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    print(f"load {load} on {os.cpu_count()} cores; one thread a process; {versions()}", flush=True)
    size = QUICK if given.quick else FULL
    if given.trial_s is not None:
        size = size._replace(trial_s=given.trial_s)
    if given.data is not None:
        size = size._replace(data=given.data)
    origin = {"date": datetime.date.today().isoformat(), "versions": versions(), "load": load}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve()
        for case, metric, value, unit in measure(size, work, given.seed, given.only or [*CASES]):
            print(f"{case:22s} {metric:32s} {value:10.4g} {unit}", flush=True)
            rows.append({"case": case, "metric": metric, "value": value, "unit": unit, **origin})
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
