#!/usr/bin/env python3
"""Time to the best validation score for batches of 1, 4, 32 and 128 patients.

    python benchmarks/batch_size.py --quick
    python benchmarks/batch_size.py --work FOLDER --workers 2 \\
        --json benchmarks/results/batch_size.json

CafeMed with its defaults on the cohort of jobs/prepare.py (data=synthetic). Each batch size has its
own learning rate, the one of three (two for single patients) with the best validation Jaccard of
the first seed, and is then trained with two seeds. Printed are, as means over seeds and of
validation alone: the best Jaccard, the epochs and CPU seconds (training and validating, one thread)
to come within 0.5 points of the best batch size's, and to the own best. Finished runs stay in the
work folder and are not done again. With --quick: a small cohort, one seed, two epochs; the figures
mean nothing.
"""

import argparse
import datetime
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks import accuracy  # noqa: E402  (sets one thread before numpy is loaded)
from benchmarks.recommenders import cohorts  # noqa: E402
from benchmarks.recommenders.runs import Bench  # noqa: E402
from benchmarks.recommenders.variants import Learner, Variant  # noqa: E402

import numpy as np  # noqa: E402  isort: skip

#: Patients a step → learning rates to choose from.
RATES = {
    128: (0.004, 0.01, 0.03),
    32: (0.002, 0.005, 0.015),
    4: (0.0006, 0.002, 0.006),
    1: (0.0003, 0.001),
}
#: Epochs without a better score before a run ends.
PATIENCE = 10
#: How near to the best counts as there.
NEAR = 0.005
UNITS = {"cpu_s_to_near_best": "s", "cpu_s_to_own_best": "s", "epoch_cpu_s": "s"}


def variants(quick: bool) -> list[Variant]:
    """One for each batch size, with its learning rates to choose among."""
    found = []
    for size, rates in RATES.items():
        fixed = (("train.batch_size", size), ("train.patience", PATIENCE))
        learner = Learner("cafemed").changed(fixed)
        if quick:
            learner = learner.changed((("train.epochs", 2),))
        search = tuple((("train.learning_rate", rate),) for rate in rates)
        found.append(Variant(f"cafemed batch={size}", learner, search[1:2] if quick else search))
    return found


def first_epoch(scores: Sequence[float], wanted: float) -> int | None:
    """The first epoch, from 1, that reaches a score; None if none does."""
    return next((i for i, score in enumerate(scores, 1) if score >= wanted), None)


def figures(histories: Sequence[Sequence[Any]], wanted: float) -> dict[str, float]:
    """The metrics of a batch size.

    Args:
        histories: of every seed, its epochs as run.json keeps them.
        wanted: the score to reach. Metrics of reaching it are left out where a seed does not.
    """
    scores = [[epoch["metrics"]["jaccard"] for epoch in history] for history in histories]
    seconds = [history[0]["cpu_s"] or np.nan for history in histories]
    own = [int(np.argmax(of_seed)) + 1 for of_seed in scores]
    reached = [first_epoch(of_seed, wanted) for of_seed in scores]
    found: dict[str, float] = {
        "best_jaccard": float(np.mean([max(of_seed) for of_seed in scores])),
        "best_jaccard_sd": float(np.std([max(of_seed) for of_seed in scores])),
        "epoch_cpu_s": float(np.mean(seconds)),
        "epochs_to_own_best": float(np.mean(own)),
        "cpu_s_to_own_best": float(np.mean(np.multiply(own, seconds))),
    }
    if None not in reached:
        epochs = np.array(reached, np.float64)
        found["epochs_to_near_best"] = float(epochs.mean())
        found["cpu_s_to_near_best"] = float((epochs * seconds).mean())
    # A run that was interrupted after its last epoch says no seconds.
    return {name: value for name, value in found.items() if not np.isnan(value)}


def report(bench: Bench, wanted: list[Variant], seeds: int) -> list[dict[str, Any]]:
    """Prints the table; gives the JSON rows."""
    of: dict[str, tuple[float, list[Any]]] = {}
    for variant in wanted:
        chosen = accuracy.chosen_runs(bench, variant, seeds, tuned=False)
        if chosen is None:
            print(f"{variant.name}: no runs, left out")
            continue
        rate = dict(chosen.learner.changes)["train.learning_rate"]
        of[variant.name] = rate, [run.record["history"] for run in chosen.runs]
    best = max(figures(histories, 0.0)["best_jaccard"] for _, histories in of.values())
    origin = {"date": datetime.date.today().isoformat(), "versions": accuracy.versions()}
    rows = []
    print(f"{'case':<20}{'rate':>8}{'best Jaccard':>16}{'CPU-s to near best':>20}", end="")
    print(f"{'epochs':>8}{'CPU-s to own best':>20}{'epochs':>8}{'CPU-s/epoch':>13}")
    for name, (rate, histories) in of.items():
        values = {"learning_rate": rate, **figures(histories, best - NEAR)}
        print(
            f"{name:<20}{rate:>8g}{values['best_jaccard']:>9.4f} ±{values['best_jaccard_sd']:.4f}"
            f"{values.get('cpu_s_to_near_best', np.nan):>20.1f}"
            f"{values.get('epochs_to_near_best', np.nan):>8.1f}"
            f"{values.get('cpu_s_to_own_best', np.nan):>20.1f}{values['epochs_to_own_best']:>8.1f}"
            f"{values.get('epoch_cpu_s', np.nan):>13.2f}"
        )
        rows += [
            {"case": name, "metric": k, "value": v, "unit": UNITS.get(k, "1"), **origin}
            for k, v in values.items()
        ]
    return rows


def main() -> None:
    """Prepares, trains what is missing, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small cohort, one seed, two epochs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="of population and split")
    parser.add_argument("--work", type=Path, help="keep cohort and runs in this folder")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--no-training", action="store_true", help="the table of what is there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(accuracy.header(), flush=True)
    wanted, seeds = variants(given.quick), 1 if given.quick else 2
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work.resolve() if given.work else Path(temporary)
        data = "synthetic_demo" if given.quick else "synthetic"
        bench = Bench(work, cohorts.prepare(work, data, given.seed))
        if not given.no_training:
            accuracy.train(bench, wanted, seeds, given.workers, thresholds=(False,))
        rows = report(bench, wanted, seeds)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
