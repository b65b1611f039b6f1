"""The cohort that models are compared on, made by the jobs themselves."""

import os
import subprocess
import sys
from pathlib import Path

from causal import compiled

PROJECT = Path(__file__).resolve().parents[2]


def prepare(work: Path, data: str, seed: int) -> Path:
    """Draws a synthetic population, makes its cohort and graph; gives the experiment's folder.

    `jobs/prepare.py` and `jobs/discover.py` with their defaults, on two workers; skipped where
    that was done before.

    Args:
        work: the experiment goes to WORK/root/experiments/DATA-SEED.
        data: an option of the group "data".
        seed: of population and split.

    Raises:
        RuntimeError: if a job fails, with what it said.
    """
    name = f"{data}-{seed}"
    common = [f"name={name}", f"paths.root={work / 'root'}"]
    seeds = [f"data={data}", f"data.seed={seed}", f"data.cohort.seed={seed}"]
    for arguments in (["prepare.py", *seeds], ["discover.py", "causal.workers=2"]):
        done = subprocess.run(
            [sys.executable, str(PROJECT / "jobs" / arguments[0]), *arguments[1:], *common],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(PROJECT),
                "NUMBA_CACHE_DIR": str(compiled.cache_dir()),  # WORK may be a new folder each time
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{arguments[0]} failed:\n{done.stdout}{done.stderr}")
    return work / "root" / "experiments" / name
