#!/usr/bin/env python3
"""Times the discovery engine on planted graphs, and compares what it finds with the truth.

    python benchmarks/discovery.py --quick          # under a minute
    python benchmarks/discovery.py --json FILE      # all sizes, up to 3,519 columns

CPU seconds are those of the search, statistics in memory, the fastest of three runs up to 500
columns, after one run that loads the compiled kernels. One thread.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PROJECT = Path(__file__).resolve().parent.parent
ROWS = 10_000
DEGREE = 2.5


class Case(NamedTuple):
    """One data set and one way to search it."""

    kind: str
    columns: int
    score: str
    search: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As in the table and the JSON rows."""
        extra = "".join(f" {key}={value:g}" for key, value in self.options)
        return f"{self.kind} p={self.columns} {self.score}{extra} {self.search}"


def planted_dag(p: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A random DAG of mean degree 2.5, bool (p, p), and one of its orders."""
    order = rng.permutation(p)
    dag = np.zeros((p, p), np.bool_)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < DEGREE / (p - 1), 1)
    return dag, order


def gaussian_rows(
    p: int, targets: list[list[int]], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Linear Gaussian rows, N(2, 1) where a node is a target; the DAG; the environments."""
    dag, order = planted_dag(p, rng)
    weights = dag * rng.uniform(0.5, 1.5, (p, p)) * rng.choice([-1, 1], (p, p))
    environments = np.repeat(np.arange(len(targets)), ROWS // len(targets))
    rows = rng.normal(size=(ROWS, p)) * rng.uniform(0.5, 1.5, p)
    for j in order:
        rows[:, j] += rows[:, dag[:, j]] @ weights[dag[:, j], j]
        for e, nodes in enumerate(targets):
            if j in nodes:
                rows[environments == e, j] = rng.normal(2, 1, (environments == e).sum())
    return rows, dag, environments


def noisy_or_rows(p: int, rng: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """0/1 rows of a noisy-or DAG, leaks between 40 % and 0.2 % (Zipf); the DAG."""
    dag, order = planted_dag(p, rng)
    leak = rng.permutation(np.maximum(0.4 / np.arange(1, p + 1), 0.002))
    rows = np.zeros((ROWS, p), np.int8)
    for j in order:
        off = np.full(ROWS, 1 - leak[j])
        for i in np.flatnonzero(dag[:, j]):
            off *= 1 - rng.uniform(0.2, 0.6) * rows[:, i]
        rows[:, j] = rng.random(ROWS) > off
    return rows, dag


def draw(
    kind: str, p: int, seed: int
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64] | None, list[list[int]] | None]:
    """Rows, true DAG, environments and targets of a case."""
    rng = np.random.default_rng([seed, p])
    if kind == "binary":
        return *noisy_or_rows(p, rng), None, None
    if kind == "independent":
        rare = np.maximum(0.4 / np.arange(1, p + 1), 0.002)
        drawn = (rng.random((ROWS, p)) < rare).astype(np.int8)
        return drawn, np.zeros((p, p), np.bool_), None, None
    if kind == "int":
        targets = [[int(t)] for t in rng.choice(p, 10, replace=False)]
        rows, dag, environments = gaussian_rows(p, targets, rng)
        return rows, dag, environments, targets
    rows, dag, _ = gaussian_rows(p, [[]], rng)
    return rows, dag, None, None


def measure(case: Case, seed: int) -> dict[str, float]:
    """Runs one case (in a process of its own, so that the peak of memory is its own)."""
    from causal import essential, gies, statistics

    rows, dag, environments, targets = draw(case.kind, case.columns, seed)
    collected = time.process_time()
    moments = statistics.from_dense(rows, environments, targets)
    collected = time.process_time() - collected
    options = {"score": case.score, "search": case.search, **dict(case.options)}
    gies.fit_statistics(moments.take(range(3)), search="fast")
    times = []
    for _ in range(3 if case.columns <= 500 and case.search != "best" else 1):
        begin = time.process_time()
        found = gies.fit_statistics(moments, **options)
        times.append(time.process_time() - begin)
    truth = essential.dag_to_essential(dag, essential.node_kinds(len(dag), targets or ((),)))
    ours, real = found.adjacency != 0, truth != 0
    number = int(np.triu(ours | ours.T).sum())
    hits = int(np.triu((ours | ours.T) & (real | real.T)).sum())
    existing = int(np.triu(real | real.T).sum())
    differs = (ours != real) | (ours != real).T
    return {
        "cpu_s": min(times),
        "statistics_cpu_s": collected,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "score": found.score,
        "edges": number,
        "precision": hits / number if number else 1.0,
        "recall": hits / existing if existing else 1.0,
        "shd": int(np.triu(differs).sum()),
    }


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    sizes = (50, 200) if quick else (50, 100, 200, 500)
    plain = [
        Case(kind, p, "gaussian_bic", search)
        for kind in ("gauss", "binary", "int")
        for p in sizes
        for search in ("fast", "textbook", "best")
    ]
    strict = [
        Case("binary", p, score, "fast", options)
        for p in (sizes[-1:] if quick else (200, 500))
        for score, options in (
            ("gaussian_bic", (("penalty", 3.0),)),
            ("gaussian_bic", (("penalty", 5.0),)),
            ("gaussian_bic", (("penalty", 5.0), ("min_support", 10))),
            ("extended_bic", (("gamma", 1.0),)),
            ("extended_bic", (("gamma", 1.0), ("min_support", 10))),
            ("extended_bic", (("gamma", 3.0),)),
        )
    ]
    alone = [
        Case("independent", p, "gaussian_bic", "fast", options)
        for p in sizes[-1:]
        for options in ((), (("penalty", 5.0),), (("penalty", 5.0), ("min_support", 10)))
    ]
    large = [
        Case(kind, p, "gaussian_bic", "fast", options)
        for p in (() if quick else (1958, 3519))
        for kind, options in (("gauss", ()), ("binary", (("penalty", 5.0),)))
    ]
    return plain + strict + alone + large


UNITS = {"cpu_s": "s", "statistics_cpu_s": "s", "peak_mb": "MB", "score": "nats"}


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


def main() -> None:
    """Measures, prints the table and writes the JSON rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(header(), flush=True)
    print(f"{'case':58s} {'cpu s':>8s} {'MB':>6s} {'score':>14s} {'edges':>6s} prec  rec   shd")
    rows: list[dict[str, object]] = []
    measured = {"date": datetime.date.today().isoformat(), "versions": versions()}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        for case in cases(given.quick):
            found = process.submit(measure, case, given.seed).result()
            print(
                f"{case.name:58s} {found['cpu_s']:8.3f} {found['peak_mb']:6.0f} "
                f"{found['score']:14.2f} {found['edges']:6.0f} {found['precision']:.2f}  "
                f"{found['recall']:.2f} {found['shd']:5.0f}",
                flush=True,
            )
            rows += [
                {
                    "case": case.name,
                    "metric": key,
                    "value": value,
                    "unit": UNITS.get(key, ""),
                    **measured,
                }
                for key, value in found.items()
            ]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"  # before numpy is loaded in the processes that measure
    sys.path.insert(0, str(PROJECT))
    os.environ["PYTHONPATH"] = str(PROJECT)
    main()
