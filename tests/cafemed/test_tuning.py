"""Real sweeps on a Ray of their own: trials, failures, the seed, and the best trial's bundle."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from scipy import special
from torch import nn

import models
from cafemed import (
    artifacts,
    bundle,
    calibration,
    checkpoints,
    cluster,
    metrics,
    promotion,
    reference,
    registry,
    scaling,
    sweep,
    sweep_plan,
    training,
    tuning,
    tuning_hooks,
)
from cafemed.batches import ModelInputs
from cafemed.calibration import Predictions
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError, ConfigError, TrainingError
from cafemed.evaluation import EvaluationSet
from cafemed.experiment import Experiment
from cafemed.ledger import Header, Ledger
from cafemed.sampling import trial_seed
from cafemed.scaling import Scaling
from cafemed.sweep import SweepResult, TrialRecord
from cafemed.tracking import Progress
from cafemed.training import FitConfig
from cafemed.trials import TrialData

# The builders below are sent to workers, which cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPACE = {
    "model": {
        "modulation_strength": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
        "reduction_ratio": {"type": "categorical", "choices": [2, 4]},
    },
    "train": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
}
MODEL = {"name": "cafemed", "dimension": 8, "dropout": 0.1}
TRAIN = {"epochs": 3, "batch_size": 8, "learning_rate": 2e-3}


def fails_on_ratio_2(
    name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int
) -> nn.Module:
    if options["reduction_ratio"] == 2:
        raise RuntimeError("no ratio of 2\nmore lines")
    return models.build(name, inputs, options, seed)


def slow_to_build(
    name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int
) -> nn.Module:
    time.sleep(_BUILD_S)
    return models.build(name, inputs, options, seed)


def pausing(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
    """A model that waits in the middle of its second epoch."""
    model, calls = models.build(name, inputs, options, seed), itertools.count(1)
    model.register_forward_pre_hook(lambda *_: time.sleep(_PAUSE_S * (next(calls) == 9)))
    return model


#: Longer than the other worker may take to have an epoch, and Ray Tune to end both.
_PAUSE_S = 60.0
#: Longer than the other worker takes to import torch.
_BUILD_S = 10.0
#: Probabilities and sets as in the sweep.
AS_TRAINED = calibration.CalibrationConfig(temperature="fixed", threshold="fixed")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with cluster.ray_cluster(2) as where:
            assert where == "a local Ray: 2 CPUs"
            yield


def plan_of(**search: Any) -> sweep_plan.SweepPlan:
    settings = {"space": SPACE, "num_samples": 4, "max_concurrent": 2, "grace_period": 3}
    values = {"model": MODEL, "train": TRAIN, "search": settings | search}
    return sweep_plan.read(values, models.options_class, models.NAMES)


def run(
    given: Experiment, storage: Path, build: Any = models.build, **search: Any
) -> tuple[SweepResult, list[TrialRecord], TrialData]:
    plan = plan_of(**search)
    data, ended = TrialData.of(plan, given, build), list[TrialRecord]()
    ledger = Ledger(storage / "trials")
    if not ledger.exists():
        ledger.open(Header("f", {}, plan.settings(), {}))
    conductor = Conductor(plan, ledger, (), ended.append)
    tuning.run(conductor, data)
    return conductor.result(), ended, data


def with_checkpoint(trial: TrialRecord, storage: Path) -> TrialRecord:
    found = Ledger(storage / "trials").checkpoint(trial.number)
    assert found is not None
    return dataclasses.replace(trial, checkpoint=Path(found[0]))


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_ends_in_a_published_model(given: Experiment, tmp_path: Path):
    result, ended, data = run(given, tmp_path)
    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]
    assert sorted(trial.number for trial in ended) == [0, 1, 2, 3]
    assert {trial.status for trial in result.trials} == {"finished"}
    # The first trial has the configured values, the others what the sampler drew.
    assert result.trials[0].parameters == plan_of().starts[0]
    assert len({trial.parameters["train.learning_rate"] for trial in result.trials}) == 4
    assert [trial.seed for trial in result.trials] == [trial_seed(0, i) for i in range(4)]
    best = result.best
    # Those that are beaten have none any more.
    ledger = Ledger(tmp_path / "trials")
    kept = {trial.number for trial in result.trials if ledger.checkpoint(trial.number)}
    assert kept == result.unbeaten
    assert (
        max(t.best_epoch["metrics"]["jaccard"] for t in result.trials if t.best_epoch)
        == (
            best.best_epoch["metrics"]["jaccard"]  # type: ignore[index]
        )
    )

    best = with_checkpoint(best, tmp_path)
    made = promotion.make_bundle(best, data, given, bundle.Preprocessing(), AS_TRAINED)
    assert made.preprocessing.scaling == scaling.fit(given.cohort) != Scaling()
    assert made.molecules == given.cohort.molecules
    fingerprint = promotion.write_bundle(tmp_path / "bundle", made)
    with artifacts.new_folder(tmp_path / "sweep", sweep.STAGE, {}, {}) as (folder, _):
        sweep.write(result, folder, fingerprint)
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.model_options["reduction_ratio"] == best.parameters["model.reduction_ratio"]
    assert loaded.metrics["validation"] == best.best_epoch["metrics"]  # type: ignore[index]
    restored = bundle.restore_model(loaded, models.build)
    chosen = EvaluationSet.of(given.arrays, data.validation_patients)
    again = metrics.evaluate(
        chosen.predict(restored), chosen.targets, chosen.patient_offsets, given.inputs.ddi, 0.5
    )
    assert again.as_dict() == loaded.metrics["validation"]
    check_table(tmp_path / "sweep" / "sweep.parquet", result)
    assert sweep.read_best(tmp_path / "sweep")["parameters"] == best.parameters


def check_table(path: Path, result: SweepResult) -> None:
    rows = pq.read_table(path).to_pylist()
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    for row, trial in zip(rows, result.trials, strict=True):
        assert {name: row[name] for name in trial.parameters} == dict(trial.parameters)
        assert (row["seed"], row["status"], row["error"]) == (trial.seed, "finished", None)
        assert [epoch["epoch"] for epoch in row["history"]] == [1, 2, 3]
        assert row["jaccard"] == max(epoch["jaccard"] for epoch in row["history"])
        assert row["seconds"] > 0
        assert row["started"].year > 2000
        assert row["cpus"] == 1
        assert row["host"]


@pytest.mark.usefixtures("local_ray")
def test_data_are_sent_once_and_processes_are_used_for_one_trial_after_another(
    given: Experiment, tmp_path: Path, sweeps: Any
):
    place = tmp_path / "built"
    place.mkdir()

    def noted(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        (place / f"{seed} {os.getpid()} {inputs.effects.flags.writeable}").touch()
        return models.build(name, inputs, options, seed)

    build = sweeps.CountedBuilder(noted)
    result, _, _ = run(given, tmp_path, build, num_samples=3)
    assert result.count("finished") == 3
    built = [path.name.split() for path in place.iterdir()]
    assert sorted(int(seed) for seed, *_ in built) == sorted(trial_seed(0, i) for i in range(3))
    assert len({process for _, process, _ in built}) <= 2  # max_concurrent
    assert build.pickled == 1
    # They are read where the object store has them; a copy could be written to.
    assert {writeable for *_, writeable in built} == {"False"}


@pytest.mark.usefixtures("local_ray")
def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(given: Experiment, tmp_path: Path):
    result, _, _ = run(given, tmp_path, fails_on_ratio_2, num_samples=3, seed=1, max_failures=1)
    failed = [t for t in result.trials if t.parameters["model.reduction_ratio"] == 2]
    assert 1 <= len(failed) < 3
    assert all((t.status, t.error) == ("failed", "RuntimeError: no ratio of 2") for t in failed)
    assert {t.attempts for t in failed} == {2}
    assert result.count("failed") == len(failed)
    assert result.best.parameters["model.reduction_ratio"] == 4
    table = result.table()
    assert table["error"].null_count == 3 - len(failed)
    assert table["jaccard"].null_count == len(failed)


def test_when_all_trials_fail_the_first_error_is_given():
    failed = [
        TrialRecord(i, {}, 0, "failed", f"RuntimeError: {i}", (), None, 0.0, "", 1.0, 0.0, None)
        for i in range(2)
    ]
    with pytest.raises(TrainingError, match="all 2 trials failed; the first with RuntimeError: 0"):
        _ = SweepResult(tuple(failed)).best


@pytest.mark.usefixtures("local_ray")
def test_one_trial_at_a_time_gives_the_same_sweep_and_stops_poor_trials(
    given: Experiment, tmp_path: Path
):
    def sweep_of_seed_7() -> SweepResult:
        search = {"num_samples": 5, "max_concurrent": 1, "grace_period": 1, "seed": 7}
        return run(given, tmp_path / str(len(list(tmp_path.iterdir()))), **search)[0]

    result = sweep_of_seed_7()
    assert outcome(result) == outcome(sweep_of_seed_7())
    stopped = [trial for trial in result.trials if trial.status == "stopped"]
    assert stopped
    assert all(len(trial.history) < 3 for trial in stopped)
    assert result.best.status == "finished"


@pytest.mark.usefixtures("local_ray")
def test_when_the_time_is_up_trials_that_run_are_ended_with_place_and_time(
    given: Experiment, tmp_path: Path
):
    """Ray Tune ends them without a word to anybody."""
    plan, begun = plan_of(max_hours=1e-3, num_samples=3), time.time()
    ledger = Ledger(tmp_path / "trials")
    ledger.open(Header("f", {}, plan.settings(), {}))
    with_epoch = set[int]()

    def tell(trial: Progress) -> None:
        with_epoch.update({trial.number} if trial.history else ())

    # The time is up as soon as two trials have had an epoch.
    conductor = Conductor(plan, ledger, clock=lambda: 3.6 * (len(with_epoch) == 2), tell=tell)
    tuning.run(conductor, TrialData.of(plan, given, pausing))
    took = time.time() - begun
    rows = conductor.result().table().to_pylist()
    assert [(row["trial"], row["status"], row["epochs"]) for row in rows] == [
        (0, "stopped", 1),
        (1, "stopped", 1),
    ]
    for row in rows:
        assert row["host"] == socket.gethostname()
        assert begun < row["started"].timestamp() < begun + took
        assert 0 < row["seconds"] < took
        # More than its epoch: from the first line on, as of any other trial.
        assert row["seconds"] > row["history"][0]["seconds"]


@pytest.mark.usefixtures("local_ray")
def test_more_than_a_node_has_is_refused_before_the_first_trial(given: Experiment, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"search\.cpus: a trial reserves 64, but the largest"):
        run(given, tmp_path, cpus=64.0)
    with pytest.raises(ConfigError, match=r"search\.gpus: a trial reserves 0\.5"):
        run(given, tmp_path, gpus=0.5)
    with pytest.raises(ConfigError, match=r"search\.memory_gb: a trial reserves 64000, but .* GB;"):
        run(given, tmp_path, memory_gb=64e3)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_trials_run_together_as_far_as_the_memory_reserved_allows(
    given: Experiment, tmp_path: Path
):
    has = ray.cluster_resources()["memory"] / 1e9
    for share, together in ((0.4, True), (0.6, False)):
        search = {"num_samples": 2, "memory_gb": has * share, "scheduler": "none"}
        result, _, _ = run(given, tmp_path / str(share), slow_to_build, **search)
        first, second = sorted(trial.started.timestamp() for trial in result.trials)  # type: ignore[union-attr]
        assert (second - first < _BUILD_S) == together


def test_a_bundle_has_the_best_epochs_weights_and_they_are_tested_again(
    given: Experiment, tmp_path: Path
):
    plan = plan_of()
    # Steps so large that the last epoch is not the best one.
    data = dataclasses.replace(
        TrialData.of(plan, given, models.build), config=FitConfig(epochs=6, learning_rate=0.3)
    )
    fitted = training.fit(
        models.build,
        data.model_name,
        data.models[data.model_name],
        data.inputs,
        data.arrays,
        data.train_patients,
        data.validation_patients,
        data.config,
        checkpoint_dir=tmp_path,
    )
    assert fitted.best_epoch < 6
    history = tuple(epoch.as_dict() for epoch in fitted.history)
    trial = TrialRecord(0, {}, 0, "finished", None, history, None, 1.0, "h", 1.0, 0.0, tmp_path)
    made = promotion.make_bundle(trial, data, given, bundle.Preprocessing(), AS_TRAINED)
    assert made.metrics["validation"] == fitted.metrics.as_dict()
    for name, tensor in fitted.weights.items():
        assert made.weights[name].equal(tensor)

    better = {**history[0], "metrics": {**history[0]["metrics"], "jaccard": 0.99}}
    with pytest.raises(ArtifactError, match=r"trial 0 reported a Jaccard of 0\.9900, but its"):
        promotion.make_bundle(
            dataclasses.replace(trial, history=(better,)),
            data,
            given,
            bundle.Preprocessing(),
            AS_TRAINED,
        )

    for threshold in ("fixed", "validation"):
        tuned = calibration.CalibrationConfig(threshold=threshold)
        made = promotion.make_bundle(trial, data, given, bundle.Preprocessing(), tuned)
        check_calibrated(made, data, given, threshold == "validation")


def check_calibrated(made: bundle.Bundle, data: TrialData, given: Experiment, tuned: bool) -> None:
    """The bundle's metrics are those of its own temperature and threshold."""
    model = bundle.restore_model(made, models.build)
    found = Predictions.of(model, given.arrays, data.validation_patients)
    served = made.preprocessing
    assert served.temperature == calibration.fit_temperature(found.logits, found.targets) != 1
    scaled = special.expit(found.logits.astype(np.float64) / served.temperature)
    best, _ = metrics.best_threshold(scaled, found.targets, found.patient_offsets)
    assert served.threshold == (best if tuned else 0.5)
    expected = metrics.evaluate(
        scaled, found.targets, found.patient_offsets, given.inputs.ddi, served.threshold
    )
    assert made.metrics["validation"] == pytest.approx(expected.as_dict())
    assert made.metrics["validation_calibration"]["after"]["ece"] == pytest.approx(
        calibration.expected_error(scaled, found.targets), abs=1e-6
    )
    shares = np.histogram(scaled, bins=20, range=(0, 1))[0] / scaled.size
    np.testing.assert_allclose(made.reference.scores.shares, shares, atol=0.01)


def test_publishing_again_changes_nothing(given: Experiment, tmp_path: Path):
    folder, home = make_published(given, tmp_path)
    assert promotion.publish(home, folder, {"job": "tune"}, promote=True) == (1, False)
    assert [version.number for version in registry.versions(home)] == [1]
    other = tmp_path / "other"
    made = bundle.load(folder)
    bundle.write(other, dataclasses.replace(made, sources={"cohort": "c1"}))
    assert promotion.publish(home, other, {"job": "tune"}, promote=False) == (2, True)
    assert registry.resolve_version(home, "candidate") == 2
    assert registry.resolve_version(home, "production") == 1
    # What an interruption left undone is done, what was rolled back stays so.
    assert promotion.publish(home, other, {"job": "tune"}, promote=True) == (2, True)
    registry.rollback(home)
    assert promotion.publish(home, other, {"job": "tune"}, promote=True) == (2, False)
    assert registry.resolve_version(home, "production") == 1


def make_published(given: Experiment, tmp_path: Path) -> tuple[Path, Path]:
    plan = plan_of()
    options = plan.models[plan.model_name]
    model = models.build(plan.model_name, given.inputs, options)
    made = bundle.Bundle(
        plan.model_name,
        options,
        model.state_dict(),
        given.cohort.vocabularies,
        given.graph,
        given.effects,
        given.inputs.ddi,
        bundle.Preprocessing(),
        reference.Reference(
            reference.score_histogram(np.zeros(1)),
            reference.make_self_check(model, given.graph, given.cohort.vocabularies, Scaling()),
        ),
        {},
        given.sources,
    )
    bundle.write(tmp_path / "bundle", made)
    home = tmp_path / "registry"
    assert promotion.publish(home, tmp_path / "bundle", {"job": "tune"}, promote=True) == (1, True)
    return tmp_path / "bundle", home


def test_importing_tuning_needs_no_ray():
    code = "import sys, cafemed.tuning; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def harming(place: Path, kind: str) -> Any:
    """A builder whose models do harm in the middle of their second epoch."""

    def build(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        model, calls = models.build(name, inputs, options, seed), itertools.count(1)

        def harm(*_: Any) -> None:
            if next(calls) != 9:
                return
            if kind == "dies once":
                with contextlib.suppress(FileExistsError):
                    (place / f"{seed}").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "dies always" and options["reduction_ratio"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        model.register_forward_pre_hook(harm)
        return model

    return build


def outcome(result: SweepResult) -> list[Any]:
    return [
        (dict(t.parameters), t.seed, t.status, [(e["losses"], e["metrics"]) for e in t.history])
        for t in result.trials
    ]


ONE_BY_ONE: dict[str, Any] = {"num_samples": 4, "max_concurrent": 1, "grace_period": 1}


@pytest.fixture(scope="module")
def whole(
    given: Experiment,
    local_ray: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> SweepResult:
    """A sweep that nothing interrupts."""
    return run(given, tmp_path_factory.mktemp("whole"), **ONE_BY_ONE)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_killed_trials_go_on_from_their_checkpoints_with_the_same_scores(
    given: Experiment, tmp_path: Path, whole: SweepResult
):
    (tmp_path / "marks").mkdir()
    killed, _, _ = run(
        given, tmp_path / "killed", harming(tmp_path / "marks", "dies once"), **ONE_BY_ONE
    )
    reached = [trial for trial in killed.trials if len(trial.history) > 1]
    assert len(list((tmp_path / "marks").iterdir())) == len(reached) > 1
    assert {trial.attempts for trial in reached} == {2}
    assert outcome(killed) == outcome(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_trial_that_dies_each_time_is_recorded_and_the_sweep_goes_on(
    given: Experiment, tmp_path: Path
):
    build = harming(tmp_path, "dies always")
    result, _, _ = run(given, tmp_path, build, **ONE_BY_ONE, seed=1, max_failures=1)
    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert {t.parameters["model.reduction_ratio"] for t in failed} == {2}
    assert all("died" in str(t.error) and t.attempts == 2 for t in failed)
    assert {len(t.history) for t in failed} == {2}  # the second attempt began with the second epoch
    assert result.best.status == "finished"


@dataclasses.dataclass
class FullDisk:
    """A builder that comes with a disk: in the processes that it is sent to, checkpoints fill it.

    Attributes:
        full: a file that says for what there is no space, "all" tensors, or what comes "later" than
            a folder's first checkpoint: the tensors after the first parts of them, and when they
            are written again, the JSON that names them.
        victim: the first trial that this holds for.
    """

    full: Path
    victim: int

    def __call__(self, *given: Any) -> nn.Module:
        return models.build(*given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        mock.patch.stopall()  # of an earlier trial of the process
        write, write_text = checkpoints._write, artifacts.write_text

        def write_tensors(path: Path, parts: Iterable[Any], flush: bool) -> str:
            again = path.with_name(f"{path.name}.partial").exists()

            def written() -> Iterator[Any]:
                for number, part in enumerate(parts):
                    if number == 3 and not again:
                        self._require_space(path, "later")
                    yield part
                self._require_space(path, "all")

            return write(path, written(), flush)

        def write_json(path: Path, text: str) -> None:
            self._require_space(path, "later")
            write_text(path, text)

        mock.patch.object(checkpoints, "_write", write_tensors).start()
        mock.patch.object(artifacts, "write_text", write_json).start()

    def _require_space(self, path: Path, kind: str) -> None:
        due = kind == "all" or path.with_name(checkpoints.FILE).exists()
        is_victims = path.parent.parent.name >= f"trial-{self.victim:05d}"
        if due and is_victims and self.full.read_text() == kind:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_fails_no_trial_and_the_sweep_goes_on_when_it_is_freed(
    given: Experiment, tmp_path: Path, whole: SweepResult
):
    victim = next(trial.number for trial in whole.trials[1:] if len(trial.history) > 1)
    full, ledger = tmp_path / "full", Ledger(tmp_path / "trials")
    build, one, two = FullDisk(full, victim), "state-000001.safetensors", "state-000002.safetensors"
    # It is tried again, and run again, too early: then it cannot even take its checkpoint along.
    for run_of, kind, max_failures, attempts, at, left in (
        (1, "later", 1, 2, checkpoints.FILE, {one, two, checkpoints.FILE}),
        (2, "all", 0, 3, one, {f"{one}.partial"}),
    ):
        full.write_text(kind)
        with pytest.raises(OSError, match="No space left on device") as refused:
            run(given, tmp_path, build, **ONE_BY_ONE, max_failures=max_failures)
        trial = tmp_path / "trials" / f"run-{run_of:03d}" / f"trial-{victim:05d}"
        assert refused.value.filename == str(trial / tuning_hooks.KEPT / at)
        assert {path.name for path in (trial / tuning_hooks.KEPT).iterdir()} == left
        *before, interrupted = ledger.entries()
        assert [entry.number for entry in before] == list(range(victim))
        assert {entry.state for entry in before} <= {"finished", "stopped"}
        assert (interrupted.state, interrupted.attempts) == ("running", attempts)
        found = ledger.checkpoint(victim)
        assert found is not None
        assert found[1].epoch == 1

    full.write_text("nothing")
    result, ended, _ = run(given, tmp_path, build, **ONE_BY_ONE)
    assert outcome(result) == outcome(whole)
    # None was run twice: of those that ended these are the records, of the other one the epoch.
    assert [trial.number for trial in ended] == list(range(victim, 4))
    assert list(result.trials[:victim]) == [entry.record for entry in before]
    assert result.trials[victim].history[0] == found[1].history[0]
    assert result.trials[victim].attempts == 4
    sweep.write(result, tmp_path, None)
    rows = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert [(row["trial"], len(row["history"])) for row in rows] == [
        (trial.number, len(trial.history)) for trial in whole.trials
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_disk_that_is_full_for_ray_tune_too_is_told_as_such(
    given: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It writes what a trial raised to a file, before anybody learns of it."""

    real = cloudpickle.dump

    def dump(content: Any, *file: Any) -> None:
        if isinstance(content, ray.exceptions.RayError):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, *file)

    monkeypatch.setattr(cloudpickle, "dump", dump)
    (tmp_path / "full").write_text("all")
    build = FullDisk(tmp_path / "full", 0)
    with pytest.raises(OSError, match="No space left on device"):
        run(given, tmp_path, build, **ONE_BY_ONE)
    assert [entry.state for entry in Ledger(tmp_path / "trials").entries()] == ["running"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_ledger_without_space_loses_no_trial_and_no_epoch(
    given: Experiment, tmp_path: Path, whole: SweepResult, monkeypatch: pytest.MonkeyPatch
):
    """The disk is full for the process that runs the sweep; its trials have another one."""
    ledger, fsync = Ledger(tmp_path / "trials"), os.fsync

    def run_until_noting(state: str) -> None:
        """The disk is full when it is to be noted that trial 1 is in this state."""
        full: list[Path] = []

        def sync(handle: int) -> None:  # all is written by then, but for the new name
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.name.startswith(".00001.json."):
                full.extend([path] * (json.loads(path.read_text())["state"] == state))
            if full and path.name.startswith("."):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            run(given, tmp_path, **ONE_BY_ONE)

    for state, known in (("running", [0]), (whole.trials[1].status, [0, 1])):
        with pytest.raises(OSError, match="No space left on device"):
            run_until_noting(state)
        entries = ledger.entries()
        assert [entry.number for entry in entries] == known
        assert [entry.number for entry in entries if entry.record is not None] == [0]
        assert not list((tmp_path / "trials").glob(".*"))
    # It had been trained already; that is what is noted now.
    found = ledger.checkpoint(1)
    assert found is not None
    result, ended, _ = run(given, tmp_path, **ONE_BY_ONE)
    assert outcome(result) == outcome(whole)
    assert [trial.number for trial in ended] == [1, 2, 3]
    assert result.trials[0] == entries[0].record
    assert list(result.trials[1].history) == found[1].history
    assert [trial.attempts for trial in result.trials] == [1] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_would_fail_again_is_not_tried_again(given: Experiment, tmp_path: Path):
    def refuses(name: str, inputs: ModelInputs, options: Mapping[str, Any], seed: int) -> nn.Module:
        if options["reduction_ratio"] == 2:
            raise TrainingError("not a number")
        return models.build(name, inputs, options, seed)

    result, _, _ = run(given, tmp_path, refuses, **ONE_BY_ONE, seed=1)
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert failed
    assert {(t.error, t.attempts) for t in failed} == {("TrainingError: not a number", 1)}


@pytest.mark.usefixtures("local_ray")
def test_a_finished_sweep_is_extended_without_running_its_trials_again(
    given: Experiment, tmp_path: Path
):
    first, _, _ = run(given, tmp_path, num_samples=1, max_concurrent=1)
    longer, ended, _ = run(given, tmp_path, num_samples=2, max_concurrent=1)
    assert [trial.number for trial in ended] == [1]
    assert longer.trials[0] == first.trials[0]
