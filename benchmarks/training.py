#!/usr/bin/env python3
"""Times training and inference of every model, batched and one visit at a time.

    python benchmarks/training.py --quick                    # under a minute
    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --only "cafemed mimic3 light" --only causalmed

Every case runs in a process of its own on the same invented visits (benchmarks/epochs/data.py: the
shape of MIMIC-III's and MIMIC-IV's cohorts, drawn codes). An epoch is the training pass that
`training.fit` makes, validation apart: batches cut out, forward, loss, backward, Adam. Fastest of
three passes; where a pass would take longer than --limit CPU seconds, a drawn share of the patients
is taken and scaled by visits (`share_of_epoch`; on MIMIC-IV's shape one pass of twice the limit).

`one-visit` is the same model as the published loop runs it, one visit with those before it, a step
each: 200 drawn visits, scaled to an epoch and to the test split. `inference_s` and
`inference_cpu_s` are one pass over the test split from the arrays on, fastest of five. `peak_mb` is
the largest resident memory of the process, torch and the data included. `matmul_share`: operations
of the matrix products of an epoch, forward and backward, over `epoch_cpu_s` and over torch's own
one-thread float32 rate on 1024 x 1024 products in the same process.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import models  # noqa: E402
from benchmarks.epochs import data  # noqa: E402
from benchmarks.epochs.measures import COLUMNS, Case, Effort, measure, shown  # noqa: E402

UNITS = {
    **dict.fromkeys(("epoch_s", "epoch_cpu_s", "epoch_cpu_s_slowest"), "s"),
    **dict.fromkeys(("inference_s", "inference_cpu_s"), "s"),
    **{"ms_a_visit": "ms", "peak_mb": "MB", "gflop": "GFLOP", "gflop_s_1024": "GFLOP/s"},
}
#: Options that are measured beside the defaults.
VARIANTS: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {"cafemed": ((("direct", "none"),),)}


def cases(quick: bool) -> list[Case]:
    """What is measured; cases of one shape together."""
    if quick:
        return [Case(name, "mimic3 light", batch) for name in models.NAMES for batch in (32, 0)]
    found = []
    for shape in ("mimic3 light", "mimic3 heavy"):
        for name in models.NAMES:
            batched = [Case(name, shape, batch, t) for batch in (32, 64) for t in (1, 2)]
            found += [*batched, Case(name, shape, 0)]
            if shape == "mimic3 light":
                variants = VARIANTS.get(name, ())
                found += [Case(name, shape, b, 1, v) for v in variants for b in (32, 64)]
    found.append(Case("cafemed", "mimic3 light", 32, 1, (), "bfloat16"))
    for name in models.NAMES:
        found += [Case(name, "mimic4 light", 32), Case(name, "mimic4 light", 64)]
        found += [Case(name, "mimic4 light", 32, 2)] if name == "cafemed" else []
    return found


def effort(case: Case, quick: bool, limit_s: float) -> Effort:
    """How long a case may measure."""
    if quick:
        return Effort(passes=1, limit_s=min(limit_s, 2.0), one_visits=25, predictions=2)
    if case.shape.startswith("mimic4"):
        return Effort(passes=1, limit_s=2 * limit_s, predictions=1)
    return Effort(limit_s=limit_s)


def versions() -> str:
    """What the figures were measured with."""
    import numpy
    import torch

    return (
        f"Python {platform.python_version()}, numpy {numpy.__version__}, torch {torch.__version__}"
    )


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, whose memory and threads are its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def draw_to(folder: Path, shape: str, seed: int) -> None:
    """Draws a cohort and writes it."""
    data.save(data.arrays(data.SHAPES[shape], seed), folder)


def main() -> None:
    """Measures, prints the table and writes the JSON rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MIMIC-III light, one pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=6.0, help="CPU seconds of a pass")
    parser.add_argument("--only", action="append", help="cases whose names begin so; repeatable")
    given = parser.parse_args()
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    print(f"load {load} on {os.cpu_count()} cores; threads as in each case; {versions()}")
    print(f"{'case':56s} " + " ".join(f"{k:>{w.split('.')[0]}s}" for k, w in COLUMNS.items()))
    origin = {"date": datetime.date.today().isoformat(), "versions": versions(), "load": load}
    rows: list[dict[str, object]] = []
    chosen = [
        case for case in cases(given.quick) if case.name.startswith(tuple(given.only or [""]))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            folder = Path(temporary) / case.shape.replace(" ", "-")
            if not folder.exists():
                in_process(draw_to, folder, case.shape, given.seed)
            limits = effort(case, given.quick, given.limit)
            values = in_process(measure, case, folder, given.seed, limits)
            print(f"{case.name:56s} {shown(values)}", flush=True)
            rows += [
                {"case": case.name, "metric": key, "value": value, "unit": UNITS.get(key, "")}
                | origin
                for key, value in values.items()
            ]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a case sets its own
    os.environ["PYTHONPATH"] = str(PROJECT)
    main()
