"""`cdt.causality.graph.GIES`, which calls R's pcalg, behind the interface of our own engine.

What goes wrong when cdt is called as it is, and what is done here about it: it needs numeric
columns (they are floats), misreads a skeleton unless columns are sorted (they are), fails on an
empty table (answered without R), can hang for ever on a constant column (dropped), has no time
limit (it runs in a process group of its own, which is ended), starts R once more to look for pcalg
(skipped), and leaves the rows it was given in the common temporary folder (they go to a private
one, removed in any case).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed import paths
from cafemed.errors import ConfigError, DataError, MissingProgramError
from causal import essential, gies, statistics

_INSTALL = (
    "causal.engine=cdt needs R with the package pcalg: install R (apt-get install r-base), then in "
    'R: install.packages("BiocManager"); BiocManager::install(c("graph", "RBGL")); '
    'install.packages("pcalg"); or set causal.engine=native'
)


def fit_cdt(
    data: NDArray[Any],
    *,
    forbidden: NDArray[np.bool_] | None = None,
    time_limit_s: float = 600.0,
) -> gies.GiesResult:
    """pcalg's GIES on observational rows, through cdt: Gaussian BIC, textbook order.

    Args:
        data: (n, p), numbers or booleans.
        forbidden: bool (p, p), symmetric: pairs that must not be connected. cdt has no way to
            forbid one direction only.
        time_limit_s: R is ended after this many seconds.

    Raises:
        MissingProgramError: if Rscript or pcalg is not installed.
        DataError: if R did not end in time, or failed.
        ConfigError: if `forbidden` is not symmetric.
    """
    moments = statistics.from_dense(data)
    p = moments.num_columns
    gaps = np.zeros((p, p), np.bool_) if forbidden is None else np.asarray(forbidden) != 0
    if gaps.shape != (p, p) or (gaps != gaps.T).any():
        raise ConfigError("forbidden: cdt can only forbid pairs in both directions")
    dropped = gies.dropped_columns(moments)
    keep = np.array([j for j in range(p) if j not in dropped], np.int64)
    square = np.ix_(keep, keep)
    adjacency, dag = np.zeros((p, p), np.int8), np.zeros((p, p), np.int8)
    if len(keep):
        table = np.asarray(data, np.float64)[:, keep]
        adjacency[square] = _run(table, gaps[square], time_limit_s)
    member = essential.extend_to_dag(adjacency)
    if member is None:
        raise DataError("causal.engine=cdt: R answered with a graph that has no member")
    dag = member
    score = gies.score_dag(moments.take(keep), dag[square])
    return gies.GiesResult(adjacency, score, dag, False, dropped, 0)


def _run(
    table: NDArray[np.float64], gaps: NDArray[np.bool_], time_limit_s: float
) -> NDArray[np.int8]:
    """Runs `causal.cdt_process` on one table and reads its answer."""
    if shutil.which("Rscript") is None:
        raise MissingProgramError(_INSTALL)
    with tempfile.TemporaryDirectory(prefix="cafemed-cdt-") as name:
        folder = Path(name)
        np.savez(folder / "input.npz", table=table, gaps=gaps)
        environment = dict(os.environ, TMPDIR=name, OMP_NUM_THREADS="1")
        search_path = [str(paths.PROJECT_DIR), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
        with (folder / "messages").open("w+", encoding="utf-8", errors="replace") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "causal.cdt_process", name],
                stdout=messages,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=time_limit_s)
            except subprocess.TimeoutExpired:
                raise DataError(
                    f"causal.engine=cdt: R did not end within {time_limit_s:g} s and was stopped; "
                    "raise the limit, take smaller blocks, or set causal.engine=native"
                ) from None
            finally:
                _end_group(process)
            if status != 0:
                messages.seek(0)
                _explain(messages.read())
        answer: NDArray[np.int8] = np.load(folder / "answer.npy", allow_pickle=False)
    return answer


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it started: R runs below it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain(messages: str) -> None:
    """Raises the error that R's messages stand for, without the data that may be in them."""
    if "there is no package called" in messages:
        raise MissingProgramError(_INSTALL)
    errors = [line for line in messages.splitlines() if line.startswith("Error")]
    raise DataError(
        f"causal.engine=cdt: R failed{': ' + errors[0][:200] if errors else ' without a message'}"
    )
