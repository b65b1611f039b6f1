"""One training run and what is kept of it in the work folder.

ROOT/runs/NAME-SEED-…/ holds `run.json` (settings, seed, data, best epoch, history) and
`predictions.npz` (probabilities on the validation and test visits of a synthetic cohort). A run is
recognised by its settings, seed and data; a version with an option more finds the runs of the one
without it again, if `_WITHOUT` says what that one did.
"""

import dataclasses
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import models
from benchmarks.recommenders import learners
from benchmarks.recommenders.learners import Data, Learned
from benchmarks.recommenders.variants import CEILING, Learner
from cafemed import baselines, config, evaluation, experiment, metrics, training
from cafemed.cohort import SPLITS
from cafemed.evaluation import EvaluationSet
from cafemed.experiment import Experiment
from cafemed.synthetic import ceiling
from cafemed.training import FitConfig

#: Options that came later → the value that does what versions without them did.
_WITHOUT = {"train.objective": "mixture", "train.precision": "float32", "model.direct": "none"}
_MISSING = object()


class Task(NamedTuple):
    """A run to do."""

    name: str
    learner: Learner
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. V validation and T test visits.

    Attributes:
        validation, test: probabilities, float32 (V, N_m) and (T, N_m).
        record: what run.json says.
    """

    validation: NDArray[np.float32]
    test: NDArray[np.float32]
    record: Mapping[str, Any]


class Bench:
    """A cohort with its graph, and the runs on it that are kept in a work folder.

    Args:
        work: the work folder, of any number of cohorts.
        folder: the experiment with "tables" (of the synthetic population), "cohort" and "graph".
    """

    def __init__(self, work: Path, folder: Path) -> None:
        self.work, self.folder = work, folder
        self.given = experiment.load_inputs(folder)
        self.patients = {split: self.given.cohort.patients_of(split) for split in SPLITS}
        self.fingerprint = fingerprint(self.given)

    def sets(self, split: str) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Targets bool (v, N_m) and patients' offsets of a split's visits."""
        patients = self.patients[split]  # type: ignore[index]
        arrays = self.given.arrays
        return evaluation.targets(arrays, patients), evaluation.patient_offsets(arrays, patients)

    def find(self, learner: Learner, seed: int) -> Path | None:
        """Where this run is kept, if it is."""
        wanted = learner.settings()
        for path in sorted(self.work.glob("runs/*/run.json")):
            record = json.loads(path.read_text())
            known = _WITHOUT | record["settings"]
            same = (record["kind"], record["seed"], record["data"])
            if same == (learner.kind, seed, self.fingerprint) and all(
                known.get(key, _MISSING) == value for key, value in wanted.items()
            ):
                return path.parent
        return None

    def load(self, learner: Learner, seed: int) -> Run | None:
        """The kept run, if there is one."""
        if (folder := self.find(learner, seed)) is None:
            return None
        with np.load(folder / "predictions.npz") as arrays:
            record = json.loads((folder / "run.json").read_text())
            return Run(arrays["validation"], arrays["test"], record)

    def do(self, task: Task) -> str:
        """Trains, predicts and keeps, unless it is kept already; gives a line about it."""
        if self.find(task.learner, task.seed) is not None:
            return f"{task.name} seed {task.seed}: kept"
        settings = task.learner.settings()
        text = json.dumps([settings, task.seed, self.fingerprint], sort_keys=True)
        name = f"{_slug(task.name)}-{task.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        checkpoint = self.work / "checkpoints" / name
        started = time.process_time()
        resumed = checkpoint.exists()
        learned, history = self._learn(task, checkpoint)
        # Of an interrupted run nobody knows it.
        spent = None if resumed else time.process_time() - started
        record = {
            "name": task.name,
            "kind": task.learner.kind,
            "settings": settings,
            "seed": task.seed,
            "data": self.fingerprint,
            "best_epoch": learned.best_epoch,
            "epochs": learned.epochs,
            "cpu_s": spent,
            "date": datetime.date.today().isoformat(),
            "history": history,
        }
        self._write(name, record, learned)
        shutil.rmtree(checkpoint, ignore_errors=True)
        targets, offsets = self.sets("validation")
        found = metrics.evaluate(learned.validation, targets, offsets, self.given.inputs.ddi)
        changes = " ".join(f"{key}={value}" for key, value in task.learner.changes)
        effort = "" if spent is None else f", {spent:.0f} CPU-s"
        return (
            f"{task.name} [{changes}] seed {task.seed}: epoch {learned.best_epoch} of "
            f"{learned.epochs}{effort}, validation Jaccard {found.jaccard:.4f}"
        )

    def _write(self, name: str, record: Mapping[str, Any], learned: Learned) -> None:
        """Writes a run, whole or not at all."""
        partial, target = self.work / "unfinished" / name, self.work / "runs" / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.savez(partial / "predictions.npz", validation=learned.validation, test=learned.test)
        (partial / "run.json").write_text(json.dumps(record) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        partial.rename(target)

    def _learn(self, task: Task, checkpoint: Path) -> tuple[Learned, list[Any]]:
        """Predictions and, of a model, its epochs."""
        learner, given, patients = task.learner, self.given, self.patients
        if learner.kind in models.NAMES:
            return self._fit(learner, task.seed, checkpoint)
        if learner.kind == CEILING:
            truth = self.folder / "tables" / "truth"
            parts = [
                ceiling.bayes_probabilities(truth, given.cohort, given.cohort.visits_of(p))[0]
                for p in (patients["validation"], patients["test"])
            ]
            return Learned(parts[0], parts[1]), []
        if learner.kind in ("most_frequent", "last_visit"):
            make = getattr(baselines, learner.kind)
            train = patients["train"]
            parts = [make(given.arrays, train, patients[s]) for s in ("validation", "test")]
            return Learned(parts[0], parts[1]), []
        data = Data(given.cohort)
        if learner.kind == "logistic_regression":
            options = learner.section("learner")
            return learners.logistic_regression(data, data.inputs.shape[1], **options), []
        if learner.kind != "noisy_or":
            raise ValueError(f"no learner is called {learner.kind!r}")
        _, offsets = self.sets("validation")
        ddi = given.inputs.ddi
        fit = config.from_mapping(FitConfig, learner.section("train"), "train")
        return learners.noisy_or(
            data,
            task.seed,
            lambda p, wanted: metrics.evaluate(p, wanted, offsets, ddi).jaccard,
            fit.epochs,
            fit.patience,
        ), []

    def _fit(self, learner: Learner, seed: int, checkpoint: Path) -> tuple[Learned, list[Any]]:
        given, patients, options = self.given, self.patients, learner.section("model")
        fit = config.from_mapping(FitConfig, learner.section("train"), "train")
        clock = [time.process_time()]
        result = training.fit(
            models.build,
            learner.kind,
            options,
            given.inputs,
            given.arrays,
            patients["train"],
            patients["validation"],
            dataclasses.replace(fit, seed=seed, num_threads=1),
            on_epoch=lambda _: clock.append(time.process_time()),
            checkpoint_dir=checkpoint,
        )
        model = models.build(learner.kind, given.inputs, options, seed)
        model.load_state_dict(result.weights)
        parts = [
            EvaluationSet.of(given.arrays, patients[split]).predict(model)
            for split in ("validation", "test")
        ]
        # Of those epochs that this process did, if any: others were before an interruption.
        done = len(clock) - 1
        epoch_cpu_s = (clock[-1] - clock[0]) / done if done else None
        history = [epoch.as_dict() | {"cpu_s": epoch_cpu_s} for epoch in result.history]
        return Learned(parts[0], parts[1], result.best_epoch, len(history)), history


def fingerprint(given: Experiment) -> str:
    """SHA-256 of what a model learns from.

    Visits, split, effects and interacting pairs; laboratory events and molecules where there are
    any. Node classes, sex and age are not in it: they come with the effects' graph and the visits.
    """
    cohort, digest = given.cohort, hashlib.sha256()
    lists = (cohort.diagnoses, cohort.procedures, cohort.medications, cohort.targets)
    contents = [cohort.patient_offsets, given.inputs.effects, given.inputs.ddi]
    contents += [part for codes in lists for part in (codes.ids, codes.offsets)]
    contents += [cohort.patients_of(split) for split in SPLITS]
    arrays = given.arrays
    if arrays.laboratory_items.size:
        contents += [arrays.laboratory_items, arrays.laboratory_values, arrays.laboratory_counts]
    if given.inputs.molecules is not None:
        contents.append(given.inputs.molecules)
    for content in contents:
        digest.update(np.ascontiguousarray(content).tobytes())
    return digest.hexdigest()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
