"""Other packages for causal discovery: each in its own environment and process, with a time limit.

`make bench-env` installs them; `rival_process.py` is what runs inside.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PROJECT = Path(__file__).resolve().parents[2]

#: What is run → the environment that it runs in.
ENVIRONMENTS = {
    "gies": "gies",
    "causal-learn": "causal-learn",
    "xges": "xges",
    "xges-0": "xges",
    "dowhy": "dowhy",
}


class Answer(NamedTuple):
    """What a package found.

    Attributes:
        values: the essential graph (p, p), or what else was asked for.
        cpu_s: CPU seconds of the search.
        peak_mb: largest resident memory of its process.
        versions: of Python and the packages.
    """

    values: NDArray[Any]
    cpu_s: float
    peak_mb: float
    versions: str


class FailedError(Exception):
    """A package gave no answer; the message says why in one line."""


class TooLateError(FailedError):
    """A package was ended at the time limit."""


def interpreter(name: str) -> Path:
    """The Python that has the package."""
    return _PROJECT / ".bench" / ENVIRONMENTS[name] / "bin" / "python"


def run(name: str, data: Path, limit_s: float) -> Answer:
    """Runs one package.

    Args:
        name: a key of `ENVIRONMENTS`.
        data: an npz file of `planted.Planted`.
        limit_s: wall seconds after which its process is ended.

    Raises:
        TooLateError: if it took longer.
        FailedError: if it is not installed or ended with an error.
    """
    python = interpreter(name)
    if not python.is_file():
        raise FailedError("no environment; make bench-env")
    answer = data.with_suffix(".answer.npz")
    program = Path(__file__).with_name("rival_process.py")
    process = subprocess.Popen(
        [python, "-P", program, name, data, answer],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it is ended with all that it may have started
    )
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TooLateError(f"ended at the limit of {limit_s:g} s") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise FailedError(last[0])
    with np.load(answer) as stored:
        found = Answer(
            stored["answer"],
            float(stored["cpu_s"]),
            float(stored["peak_mb"]),
            str(stored["versions"]),
        )
    answer.unlink()
    return found
