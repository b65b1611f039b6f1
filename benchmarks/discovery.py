#!/usr/bin/env python3
"""Times the discovery engine on planted graphs, beside other packages, and compares with the truth.

    make bench-env                                  # the other packages, once
    python benchmarks/discovery.py --quick          # under a minute
    python benchmarks/discovery.py --json benchmarks/results/discovery.json

Every case runs in a process of its own, on one thread, on the same rows for all. CPU seconds are
those of the search with the data in memory, after one run that loads the compiled kernels: the
fastest of three runs up to 500 columns (one run for "best", and for other packages). `peak_mb` is
the largest resident memory of the process, data included. `score` is that of the graph, whoever
found it, by one scorer. A package that is not installed, fails or takes longer than --limit is
reported in one line and left out.
"""

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.graphs import measures, planted, rivals, visits  # noqa: E402
from benchmarks.graphs.cases import Case, cases  # noqa: E402

UNITS = {"cpu_s": "s", "statistics_cpu_s": "s", "peak_mb": "MB", "score": "nats", "limit_s": "s"}
UNITS |= {"pair_cpu_s": "s", "dowhy_pair_cpu_s": "s"}


def versions() -> str:
    """What the figures were measured with."""
    import numba
    import scipy

    return (
        f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"numba {numba.__version__}"
    )


def header() -> str:
    """The machine and its load, versions, threads."""
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    return f"load {load} on {os.cpu_count()} cores; 1 thread; {versions()}"


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, so that this one stays small and keeps nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def draw_to(path: Path, kind: str, columns: int, seed: int) -> None:
    """Draws a data set and writes it."""
    planted.draw(kind, columns, seed).save(path)


def run_case(case: Case, path: Path, limit_s: float) -> tuple[dict[str, float], str]:
    """Metrics of one case and the versions it ran with.

    Raises:
        rivals.FailedError: if another package gave no graph.
    """
    if case.search not in rivals.ENVIRONMENTS:
        return in_process(measures.measure, case, path), versions()
    answer = rivals.run(case.search, path, limit_s)
    found = {"cpu_s": answer.cpu_s, "peak_mb": answer.peak_mb}
    return found | in_process(measures.judge, case, path, answer.values), answer.versions


class Table:
    """Prints cases as they are measured and keeps them as JSON rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.found: dict[Case, dict[str, float]] = {}

    def add(self, name: str, values: dict[str, float], measured_with: str) -> None:
        """Keeps the metrics of a case."""
        origin = {"date": datetime.date.today().isoformat(), "versions": measured_with}
        self.rows += [
            {"case": name, "metric": key, "value": value, "unit": UNITS.get(key, ""), **origin}
            for key, value in values.items()
        ]

    def measure(self, case: Case, path: Path, limit_s: float) -> None:
        """Runs, prints and keeps one case."""
        try:
            values, measured_with = run_case(case, path, limit_s)
        except rivals.FailedError as error:
            print(f"{case.name:64s} {error}", flush=True)
            if isinstance(error, rivals.TooLateError):
                self.add(case.name, {"limit_s": limit_s}, "")
            return
        self.found[case] = values
        self.add(case.name, values, measured_with)
        print(
            f"{case.name:64s} {values['cpu_s']:8.3f} {values['peak_mb']:6.0f} "
            f"{values['score']:14.2f} {values['edges']:6.0f} {values['precision']:.2f}  "
            f"{values['recall']:.2f} {values['shd']:5.0f}",
            flush=True,
        )

    def free(self, name: str, function: Callable[..., dict[str, float]], *arguments: Any) -> None:
        """Runs, prints and keeps a case that has metrics of its own."""
        try:
            values = in_process(function, *arguments)
        except rivals.FailedError as error:
            print(f"{name:40s} {error}", flush=True)
            return
        self.add(name, values, versions())
        shown = ", ".join(f"{key} {value:.10g}" for key, value in values.items())
        print(f"{name:40s} {shown}", flush=True)

    def compare(self) -> None:
        """Prints what "best" finds beyond every other search of the same data and score."""
        print(f"\n{'best against':64s} {'score':>10s} {'CPU seconds':>14s}")
        for case, values in self.found.items():
            best = self.found.get(case._replace(search="best"))
            if best is not None and case.search != "best":
                print(
                    f"{case.name:64s} {best['score'] - values['score']:+10.2f} "
                    f"{best['cpu_s'] / max(values['cpu_s'], 1e-9):11.4f} x"
                )


def main() -> None:
    """Measures, prints the table and writes the JSON rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, help="seconds for each run of another package")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    limit_s = given.limit or (20.0 if given.quick else 300.0)
    print(header(), flush=True)
    print(f"{'case':64s} {'cpu s':>8s} {'MB':>6s} {'score':>14s} {'edges':>6s} prec  rec   shd")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        in_process(measures.compile_kernels)
        for data, group in itertools.groupby(cases(given.quick), lambda case: case[:2]):
            in_process(draw_to, path, *data, given.seed)
            for case in group:
                table.measure(case, path, limit_s)
        pairs = 10 if given.quick else 100
        table.free(
            "raw effects dowhy", measures.effects_like_dowhy, path, given.seed, pairs, limit_s
        )
    for run in () if given.quick else visits.CASES:
        table.free(run.name, visits.measure, run, given.seed)
    table.compare()
    if given.json:
        given.json.write_text(json.dumps(table.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"  # before numpy is loaded in the processes that measure
    os.environ["PYTHONPATH"] = str(PROJECT)
    main()
