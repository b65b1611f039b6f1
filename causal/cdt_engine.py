"""What cdt calls R for: `cdt.causality.graph.GIES` (pcalg) behind the interface of our own engine,
and the structural intervention distance.

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
    """Runs cdt's GIES on one table and reads its answer."""
    try:
        answer: NDArray[np.int8] = _in_process({"table": table, "gaps": gaps}, time_limit_s)
    except TimeoutError:
        raise DataError(
            f"causal.engine=cdt: R did not end within {time_limit_s:g} s and was stopped; "
            "raise the limit, take smaller blocks, or set causal.engine=native"
        ) from None
    except _RFailedError as err:
        if err.missing:
            raise MissingProgramError(_INSTALL) from None
        raise DataError(f"causal.engine=cdt: {err}") from None
    return answer


def intervention_distance(
    true: NDArray[np.bool_], found: NDArray[np.bool_], *, time_limit_s: float = 600.0
) -> tuple[float, float]:
    """`cdt.metrics.SID_CPDAG`: smallest and largest distance over the found graph's members.

    Peters and Bühlmann 2015 (Neural Computation 27(3)): ordered pairs of nodes for which parents
    in the found graph are the wrong set to adjust for.

    Args:
        true: (p, p), a DAG.
        found: (p, p), an essential graph.
        time_limit_s: R is ended after this many seconds.

    Raises:
        MissingProgramError: if it cannot be had: no R, no package SID, no answer in time.
    """
    try:
        both = {"target": true.astype(np.int8), "predicted": found.astype(np.int8)}
        low, high = _in_process(both, time_limit_s)
    except TimeoutError:
        raise MissingProgramError(f"R did not end within {time_limit_s:g} s") from None
    except _RFailedError as err:
        raise MissingProgramError(
            "needs R with the package SID (CRAN)" if err.missing else str(err)
        ) from None
    return float(low), float(high)


class _RFailedError(Exception):
    """R is missing, or a package of it is (`missing`), or it failed."""

    def __init__(self, message: str, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


def _in_process(given: dict[str, NDArray[Any]], time_limit_s: float) -> NDArray[Any]:
    """Runs `causal.cdt_process` on some arrays and reads its answer.

    Raises:
        TimeoutError: if R did not end in time.
        _RFailedError: if it is missing or failed.
    """
    if shutil.which("Rscript") is None:
        raise _RFailedError("R is not installed", missing=True)
    with tempfile.TemporaryDirectory(prefix="cafemed-cdt-") as name:
        folder = Path(name)
        np.savez(folder / "input.npz", **given)  # type: ignore[arg-type]
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
                raise TimeoutError from None
            finally:
                _end_group(process)
            if status != 0:
                messages.seek(0)
                _explain(messages.read())
        result: NDArray[Any] = np.load(folder / "answer.npy", allow_pickle=False)
    return result


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it started: R runs below it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain(messages: str) -> None:
    """Raises the error that R's messages stand for, without the data that may be in them."""
    if "there is no package called" in messages:
        raise _RFailedError("an R package is not installed", missing=True)
    errors = [line for line in messages.splitlines() if line.startswith("Error")]
    raise _RFailedError(
        f"R failed{': ' + errors[0][:200] if errors else ' without a message'}", missing=False
    )
