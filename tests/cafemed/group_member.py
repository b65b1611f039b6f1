"""One process of a group: `group_member.py RANK SIZE STORE CASES OUT` trains each case in turn.

STORE is a file where the processes find each other, CASES a JSON list of cases as `fit_case` takes
them. What came of each is written to OUT, as JSON.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sweeps
import torch
from torch import distributed

import models
from cafemed import paths, stepping, training
from cafemed.errors import UserError
from cafemed.training import EpochReport, FitConfig, FitResult


def experiment() -> Any:
    """The invented one, with more interactions."""
    given = sweeps.invented_experiment()
    ddi = np.triu(np.random.default_rng(0).random(given.inputs.ddi.shape) < 0.3, 1)
    return dataclasses.replace(given, inputs=dataclasses.replace(given.inputs, ddi=ddi | ddi.T))


def fit_case(case: dict[str, Any], given: Any) -> FitResult:
    """Trains one model.

    Args:
        case: "model", "options", "train"; "checkpoint" (folder) and "stop" (epoch after which it is
            interrupted), where wanted; "patients": how many of the validation patients.
        given: the experiment.
    """

    def interrupt(report: EpochReport) -> None:
        if report.epoch == case.get("stop"):
            raise InterruptedError

    folder = case.get("checkpoint")
    return training.fit(
        models.build,
        case["model"],
        case["options"],
        given.inputs,
        given.arrays,
        given.cohort.patients_of("train"),
        given.cohort.patients_of("validation")[: case.get("patients")],
        FitConfig(**case["train"]),
        on_epoch=interrupt,
        checkpoint_dir=None if folder is None else Path(folder),
    )


def outcome(result: FitResult) -> dict[str, Any]:
    """Losses and metrics of every epoch, the best epoch, and its weights."""
    digest = hashlib.sha256()
    for name in sorted(result.weights):
        digest.update(result.weights[name].numpy().tobytes())
    return {
        "history": [[e.losses, dataclasses.asdict(e.metrics)] for e in result.history],
        "best": result.best_epoch,
        "weights": digest.hexdigest(),
    }


def together(folder: Path, cases: Sequence[dict[str, Any]], size: int = 2) -> list[list[Any]]:
    """What each process of a group found, by rank; all have to end well."""
    outs = [folder / f"out-{rank}" for rank in range(size)]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, str(rank), str(size)),
                *(str(folder / "store"), json.dumps(cases), str(out)),
            ],
            cwd=paths.PROJECT_DIR,
            env={"PYTHONPATH": str(paths.PROJECT_DIR), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    return [json.loads(out.read_text()) for out in outs]


def main() -> None:
    """Trains the cases."""
    rank, size, store, cases, out = sys.argv[1:]
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    given = experiment()
    cut: list[list[int]] = []
    collate = stepping.collate

    def noted(arrays: Any, patients: Any) -> Any:
        cut.append(patients.tolist())
        return collate(arrays, patients)

    stepping.collate = noted
    found: list[Any] = []
    for case in json.loads(cases):
        cut.clear()
        try:
            found.append(outcome(fit_case(case, given)) | {"batches": list(cut)})
        except (UserError, OSError) as err:
            found.append({"error": f"{type(err).__name__}: {err}"})
    Path(out).write_text(json.dumps(found))
    distributed.destroy_process_group()
    # Threads of a group that DDP has used outlive it. One that lets go of a tensor while the
    # interpreter ends would abort the process (PyTorch issue 190489).
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main()
