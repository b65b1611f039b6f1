"""What is measured of one case: time, memory, score, and distance to the planted graph."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.graphs import rivals
from benchmarks.graphs.cases import SEARCHES, Case
from benchmarks.graphs.planted import Planted, draw
from benchmarks.graphs.rival_process import peak_mb


def statistics_of(data: Planted) -> Any:
    """The engine's sufficient statistics of a data set."""
    from scipy import sparse

    from causal import statistics

    if data.rows.dtype == np.int8:
        return statistics.from_sparse(sparse.csr_array(data.rows))
    return statistics.from_dense(data.rows, data.environments, data.target_lists())


def compile_kernels() -> None:
    """Runs every score and search once, so that no process measured later has to compile."""
    from causal import gies, scores

    moments = statistics_of(draw("binary", 5, 0))
    for score in scores.SCORES:
        for search in SEARCHES:
            gies.fit_statistics(moments, score=score, search=search)


def measure(case: Case, path: Path) -> dict[str, float]:
    """Runs one case of the engine, in a process of its own."""
    from causal import gies

    data = Planted.load(path)
    begin = time.process_time()
    moments = statistics_of(data)
    collected = time.process_time() - begin
    options = {"score": case.score, "search": case.search, **dict(case.options)}
    gies.fit_statistics(moments.take(range(3)), **options)
    times = []
    for _ in range(3 if case.columns <= 500 and case.search != "best" else 1):
        begin = time.process_time()
        found = gies.fit_statistics(moments, **options)
        times.append(time.process_time() - begin)
    return {
        "cpu_s": min(times),
        "statistics_cpu_s": collected,
        "peak_mb": peak_mb(),
        "score": found.score,
        **distances(found.adjacency, data),
    }


def judge(case: Case, path: Path, adjacency: NDArray[Any]) -> dict[str, float]:
    """Scores and compares a graph that another package found."""
    from causal import essential, gies

    data = Planted.load(path)
    member = essential.extend_to_dag(adjacency != 0)
    if member is None:
        raise rivals.FailedError("its graph is not that of an equivalence class")
    score = gies.score_dag(statistics_of(data), member, score=case.score, **dict(case.options))
    return {"score": score, **distances(adjacency, data)}


def distances(adjacency: NDArray[Any], data: Planted) -> dict[str, float]:
    """Edges found, precision and recall of the skeleton, and pairs that differ from the truth."""
    from causal import essential

    kinds = essential.node_kinds(len(data.dag), data.target_lists())
    truth = essential.dag_to_essential(data.dag, kinds)
    ours, real = adjacency != 0, truth != 0
    number = int(np.triu(ours | ours.T).sum())
    hits = int(np.triu((ours | ours.T) & (real | real.T)).sum())
    existing = int(np.triu(real | real.T).sum())
    differs = (ours != real) | (ours != real).T
    return {
        "edges": number,
        "precision": hits / number if number else 1.0,
        "recall": hits / existing if existing else 1.0,
        "shd": int(np.triu(differs).sum()),
    }


def effects_like_dowhy(path: Path, seed: int, pairs: int, limit_s: float) -> dict[str, float]:
    """The raw effects of random pairs of 0/1 columns, here and by DoWhy: difference and time."""
    from scipy import sparse

    from causal import regression
    from causal.columns import Columns

    data = draw("binary", 50, seed)
    p = data.rows.shape[1]
    flat = np.random.default_rng(seed).choice(p * (p - 1), pairs, replace=False)
    chosen = np.stack([flat // (p - 1), flat % (p - 1)], axis=1)
    chosen[:, 1] += chosen[:, 1] >= chosen[:, 0]  # never a column with itself
    np.savez(path, rows=data.rows, pairs=chosen)
    theirs = rivals.run("dowhy", path, limit_s)
    table = sparse.csr_array(data.rows.astype(np.int64))
    names = tuple(f"diagnosis/{j}" for j in range(p))
    columns = Columns(names, table, np.zeros(p, np.int64), np.zeros(len(data.rows), np.int8))
    begin = time.process_time()
    ours = regression.regress(columns, np.arange(p), [np.zeros(0, np.int64)] * p, table)[0]
    cpu_s = time.process_time() - begin
    return {
        "largest_difference": float(abs(ours[chosen[:, 0], chosen[:, 1]] - theirs.values).max()),
        "pairs": pairs,
        "pair_cpu_s": cpu_s / p**2,
        "dowhy_pair_cpu_s": theirs.cpu_s / pairs,
    }
