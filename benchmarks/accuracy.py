#!/usr/bin/env python3
"""Compares the models, their ablations and plain recommenders on the synthetic population.

    python benchmarks/accuracy.py --quick
    python benchmarks/accuracy.py --work FOLDER --workers 2 \\
        --json benchmarks/results/accuracy.json

Cohort and graph are those of jobs/prepare.py data=synthetic_mimic3 and jobs/discover.py. Every
variant is trained with five seeds, each fit on one thread with the defaults of `train` unless the
table says otherwise; the epoch with the best validation Jaccard is used. Where a variant chooses
(C of the logistic regression; "searched": dropout 0.7, 0.3 or 0.1), it does so by the validation
Jaccard of the first seed. Scores are of the test patients, at threshold 0.5 and, "tuned", at each
run's own threshold of the best validation Jaccard. Intervals (95 %) and p-values against cafemed
are a bootstrap of test patients and seeds (benchmarks/recommenders/scores.py).

Finished runs stay in the work folder and are not done again, so that the program can be
interrupted, and called again when there are more variants. With --quick: a small cohort, one seed,
two epochs; the figures mean nothing.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy is loaded, here and in the workers

import numpy as np  # noqa: E402
import sklearn  # noqa: E402
import torch  # noqa: E402

from benchmarks.recommenders import cohorts, scores, workers  # noqa: E402
from benchmarks.recommenders.runs import Bench, Run, Task  # noqa: E402
from benchmarks.recommenders.scores import Sample, Sets  # noqa: E402
from benchmarks.recommenders.variants import (  # noqa: E402
    CEILING,
    REFERENCE,
    Learner,
    Variant,
    quick,
    variants,
)
from cafemed import metrics  # noqa: E402

UNITS = {"num_medications": "medications", "cpu_s": "s", "epochs": "epochs", "best_epoch": "epochs"}


class Chosen(NamedTuple):
    """A variant with what it chose and its runs, one a seed, with their thresholds.

    Attributes:
        variant: which.
        learner: the chosen candidate.
        runs: of every seed.
        thresholds: of every run.
    """

    variant: Variant
    learner: Learner
    runs: list[Run]
    thresholds: list[float]


def header() -> str:
    """Machine, load, versions."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {versions()}"


def versions() -> str:
    """What the figures were measured with."""
    return (
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"scikit-learn {sklearn.__version__}"
    )


def choose(bench: Bench, variant: Variant, tuned: bool) -> Learner | None:
    """The candidate with the best validation Jaccard of the first seed; None if one is missing.

    Args:
        bench: with the runs.
        variant: to choose for.
        tuned: at its best threshold instead of at 0.5.
    """
    candidates = variant.candidates()
    if len(candidates) == 1:
        return candidates[0]
    found = [bench.load(candidate, 0) for candidate in candidates]
    if any(run is None for run in found):
        return None
    targets, offsets = bench.sets("validation")

    def score(run: Run | None) -> float:
        assert run is not None
        if tuned:
            return metrics.best_threshold(run.validation, targets, offsets)[1]
        return metrics.evaluate(run.validation, targets, offsets, bench.given.inputs.ddi).jaccard

    best = int(np.argmax([score(run) for run in found]))
    return candidates[best]


def train(
    bench: Bench,
    wanted: list[Variant],
    seeds: int,
    num_workers: int,
    thresholds: tuple[bool, ...] = (False, True),
) -> None:
    """Does every run that is not kept yet: first what there is to choose among, then the rest.

    Args:
        bench: keeps the runs.
        wanted: what to train.
        seeds: of each that has any.
        num_workers: processes.
        thresholds: whether to choose at 0.5 (False), tuned (True) or either way.
    """
    first = [Task(v.name, c, 0) for v in wanted if v.search for c in v.candidates()]
    workers.do_all(bench.work, bench.folder, _missing(bench, first), num_workers)
    rest = [
        Task(v.name, learner, seed)
        for v in wanted
        for tuned in thresholds
        for seed in range(seeds if v.seeded else 1)
        if (learner := choose(bench, v, tuned)) is not None
    ]
    workers.do_all(bench.work, bench.folder, _missing(bench, rest), num_workers)


def _missing(bench: Bench, tasks: list[Task]) -> list[Task]:
    kept: dict[tuple[str, int], Task] = {}
    for task in tasks:
        key = (json.dumps([task.learner.kind, task.learner.settings()]), task.seed)
        if key not in kept and bench.find(task.learner, task.seed) is None:
            kept[key] = task
    return list(kept.values())


def chosen_runs(bench: Bench, variant: Variant, seeds: int, tuned: bool) -> Chosen | None:
    """A variant's runs that are there, or None where there is none or nothing to choose from."""
    learner = choose(bench, variant, tuned)
    if learner is None:
        return None
    found = [bench.load(learner, seed) for seed in range(seeds if variant.seeded else 1)]
    runs = [run for run in found if run is not None]
    if not runs:
        return None
    if len(runs) < len(found):
        print(f"{variant.name}: {len(runs)} of {len(found)} seeds")
    targets, offsets = bench.sets("validation")
    thresholds = [
        metrics.best_threshold(run.validation, targets, offsets)[0] if tuned else 0.5
        for run in runs
    ]
    return Chosen(variant, learner, runs, thresholds)


def measure(bench: Bench, wanted: list[Variant], seeds: int, tuned: bool, seed: int) -> list[Any]:
    """Metrics of every variant that has its runs: (Chosen, Sample) pairs."""
    sets = Sets(*bench.sets("test"), bench.given.inputs.ddi)
    found = []
    for number, variant in enumerate(wanted):
        chosen = chosen_runs(bench, variant, seeds, tuned)
        if chosen is None:
            print(f"{variant.name}: no runs, left out")
            continue
        terms = [
            sets.terms(run.test, threshold)
            for run, threshold in zip(chosen.runs, chosen.thresholds, strict=True)
        ]
        found.append((chosen, scores.sample(terms, number, seed=seed)))
    return found


def figures(chosen: Chosen, sample: Sample, best: Sample, reference: Sample) -> dict[str, float]:
    """The JSON metrics of a variant."""
    low, high = sample.interval()
    p_values = sample.p_values(reference)
    found: dict[str, float] = {}
    for i, name in enumerate(scores.METRICS):
        found |= {name: float(sample.value[i])}
        found |= {f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
        if chosen.variant.name != REFERENCE:
            found[f"{name}_p_value"] = float(p_values[i])
    share = sample.share_of(best)
    names = (
        "jaccard_share_of_ceiling",
        "jaccard_share_of_ceiling_low",
        "jaccard_share_of_ceiling_high",
    )
    found |= dict(zip(names, share, strict=True))
    found["threshold"] = float(np.mean(chosen.thresholds))
    found["seeds"] = len(chosen.runs)
    if chosen.runs[0].record["epochs"]:
        records = [run.record for run in chosen.runs]
        found["best_epoch"] = float(np.mean([r["best_epoch"] for r in records]))
        found["epochs"] = float(np.mean([r["epochs"] for r in records]))
        found["epochs_ran_out"] = sum(_ran_out(r) for r in records)
        spent = [r["cpu_s"] for r in records if r["cpu_s"] is not None]
        if spent:
            found["cpu_s"] = float(np.mean(spent))
    return found


def _ran_out(record: Any) -> bool:
    """Whether training ended because the epochs did, with patience left."""
    fit = record["settings"]
    waited = record["epochs"] - record["best_epoch"]
    return bool(record["epochs"] == fit["train.epochs"] and waited < fit["train.patience"])


def line(name: str, found: dict[str, float]) -> str:
    """A row of the table."""
    p_value = f"{found['jaccard_p_value']:7.4f}" if "jaccard_p_value" in found else " " * 7
    cells = [
        f"{found['jaccard']:.4f} [{found['jaccard_low']:.3f}, {found['jaccard_high']:.3f}]",
        f"{found['jaccard_share_of_ceiling']:.3f} [{found['jaccard_share_of_ceiling_low']:.3f}, "
        f"{found['jaccard_share_of_ceiling_high']:.3f}]",
        p_value,
        *(
            f"{found[m]:.4f} ±{(found[f'{m}_high'] - found[f'{m}_low']) / 2:.4f}"
            for m in ("f1", "prauc", "ddi_rate")
        ),
        f"{found['num_medications']:5.2f} ±"
        f"{(found['num_medications_high'] - found['num_medications_low']) / 2:.2f}",
    ]
    if "best_epoch" in found:
        cells.append(
            f"epoch {found['best_epoch']:.0f} of {found['epochs']:.0f}, "
            f"{found['epochs_ran_out']:.0f} of {found['seeds']:.0f} ran out"
        )
    return f"{name:<44}" + "  ".join(cells)


def report(bench: Bench, wanted: list[Variant], seeds: int, seed: int) -> list[dict[str, Any]]:
    """Prints both tables; gives the JSON rows."""
    origin = {"date": datetime.date.today().isoformat(), "versions": versions()}
    rows = []
    for tuned in (False, True):
        found = measure(bench, wanted, seeds, tuned, seed)
        of = {chosen.variant.name: sample for chosen, sample in found}
        if not {CEILING, REFERENCE} <= set(of):
            raise SystemExit(f"the runs of {CEILING} and {REFERENCE} are missing")
        print(f"\n{'threshold best on validation' if tuned else 'threshold 0.5'}; ± is half an")
        print("interval; p: Jaccard against cafemed")
        print(f"{'case':<44}{'Jaccard':<24}{'share of ceiling':<24}{'p':>5}  {'F1':<16}", end="")
        print(f"{'PRAUC':<16}{'DDI rate':<16}{'medications':<14}training")
        for chosen, sample in found:
            name = chosen.variant.name + (" tuned" if tuned else "")
            values = figures(chosen, sample, of[CEILING], of[REFERENCE])
            print(line(name, values))
            rows += [
                {"case": name, "metric": k, "value": v, "unit": UNITS.get(k, "1"), **origin}
                for k, v in values.items()
            ]
        for chosen, _ in found:
            if chosen.variant.search:
                print(f"{chosen.variant.name} chose {dict(chosen.learner.changes)}")
    return rows


def main() -> None:
    """Prepares, trains what is missing, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small cohort, one seed, few epochs")
    parser.add_argument("--data", default="synthetic_mimic3", help="another synthetic population")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="of population, split and bootstrap")
    parser.add_argument("--seeds", type=int, help="training seeds: 0 and up (default 5)")
    parser.add_argument("--work", type=Path, help="keep cohort and runs in this folder")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these variants and cafemed")
    parser.add_argument("--no-training", action="store_true", help="tables of what is there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(header(), flush=True)
    wanted = quick(variants()) if given.quick else variants()
    if given.only:
        wanted = [v for v in wanted if v.name in {CEILING, REFERENCE, *given.only}]
    seeds = given.seeds or (1 if given.quick else 5)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work.resolve() if given.work else Path(temporary)
        data = "synthetic_demo" if given.quick else given.data
        bench = Bench(work, cohorts.prepare(work, data, given.seed))
        if not given.no_training:
            train(bench, wanted, seeds, given.workers)
        rows = report(bench, wanted, seeds, given.seed)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
