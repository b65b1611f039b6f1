"""The winner trained anew: on whom, for how long, and what is still said of validation patients."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from cafemed import (
    artifacts,
    bundle,
    card_text,
    cluster,
    findings,
    fits,
    promotion,
    randomness,
    registry,
    retraining,
    stepping,
    sweep,
    training,
)
from cafemed.bundle import Preprocessing
from cafemed.calibration import CalibrationConfig, Decision, Predictions
from cafemed.experiment import Experiment
from cafemed.sweep import SweepResult
from cafemed.sweep_plan import SweepPlan
from cafemed.training import FitConfig
from cafemed.trials import TrialData

INPUTS = {"cohort": "c0", "graph": "a0"}
PARAMETERS = {"train.learning_rate": 0.02, "model.dropout": 0.7, "model.reduction_ratio": 2}
SEED = 5


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def plan(sweeps: Any) -> SweepPlan:
    made = sweeps.plan_of(num_samples=1, max_ddi_rate=0.9)
    return dataclasses.replace(made, fit=FitConfig(epochs=3, patience=3, batch_size=8))


@pytest.fixture(scope="module")
def swept(
    plan: SweepPlan, given: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, sweep.TrialRecord]:
    """An experiment whose sweep has one trial, trained for real, and its bundle."""
    folder = tmp_path_factory.mktemp("experiment")
    data = TrialData.of(plan, given, models.build)
    options, config = data.varied(PARAMETERS, SEED)
    found = training.fit(
        models.build,
        plan.model_name,
        options,
        given.inputs,
        given.arrays,
        data.train_patients,
        data.validation_patients,
        config,
        checkpoint_dir=folder / "trial",
    )
    assert found.best_epoch > 1  # or the epochs would say nothing
    history = tuple(epoch.as_dict() for epoch in found.history)
    trial = sweep.TrialRecord(
        0, PARAMETERS, SEED, "finished", None, history, None, 1.0, "", 1.0, 0.0, folder / "trial"
    )
    chosen = CalibrationConfig(threshold="validation")
    made = promotion.make_bundle(trial, data, given, Preprocessing(), chosen)
    stage = (folder / "sweep", sweep.STAGE, INPUTS, plan.settings())
    with artifacts.new_folder(*stage) as (partial, report):
        fingerprint = promotion.write_bundle(partial / "bundle", made)
        result = SweepResult((trial,), max_ddi_rate=0.9)
        sweep.write(result, partial, fingerprint)
        report |= sweep.summary(result, 1.0)
    return folder, trial


@pytest.fixture
def experiment(swept: tuple[Path, Any], given: Experiment, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(retraining.experiment, "load_inputs", lambda _: given)
    monkeypatch.setattr(retraining.experiment, "read_sources", lambda _: INPUTS)
    return swept[0]


@pytest.fixture
def retrained(experiment: Path, plan: SweepPlan) -> bundle.Bundle:
    folder = retraining.run(experiment, plan, models.build, False)
    assert folder == experiment / "retrained"
    return bundle.load(folder / "bundle")


def by_hand(given: Experiment, trained: bundle.Bundle, epochs: int) -> dict[str, torch.Tensor]:
    """As many passes over training and validation patients, without `training.fit`."""
    split = given.cohort.split
    patients = np.flatnonzero((split == 0) | (split == 1))
    assert len(patients) == 50
    config = FitConfig(batch_size=8, learning_rate=0.02, seed=SEED)
    cpu = torch.device("cpu")
    with randomness.reproducible(SEED, 1, cpu):
        model = models.build("cafemed", given.inputs, dict(trained.model_options), SEED)
        randomness.diverge(SEED, 0)
        stepper = stepping.Stepper(model, given.inputs.ddi, config, cpu)
        for number in range(1, epochs + 1):
            stepper.epoch(given.arrays, patients, number)
    return dict(model.state_dict())


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(one[name], two[name]) for name in {**one, **two})


def test_it_is_trained_on_both_for_the_trials_best_number_of_epochs(
    experiment: Path, retrained: bundle.Bundle, given: Experiment
):
    best = sweep.read_best(experiment / "sweep")
    assert same(retrained.weights, by_hand(given, retrained, best["epoch"]))
    assert not same(retrained.weights, by_hand(given, retrained, best["epoch"] - 1))
    history = json.loads((experiment / "retrained" / "history.json").read_text())
    assert len(history) == best["epoch"]
    assert retrained.model_options["dropout"] == 0.7


def test_what_was_chosen_and_measured_on_validation_patients_stays_the_trials(
    experiment: Path, retrained: bundle.Bundle
):
    trial = bundle.load(experiment / "sweep" / "bundle")
    assert retrained.preprocessing == trial.preprocessing
    assert retrained.preprocessing.temperature != 1
    assert retrained.preprocessing.threshold != 0.5
    np.testing.assert_array_equal(retrained.reference.scores.shares, trial.reference.scores.shares)
    epochs = sweep.read_best(experiment / "sweep")["epoch"]
    told = {"trial": 0, "epochs": epochs, "patients": 50}
    assert retrained.metrics == {**trial.metrics, "retrained": told}
    assert not same(retrained.weights, trial.weights)
    bundle.restore_model(retrained, models.build)  # its self-check is of the new weights
    served = {name: t.clone() for name, t in trial.weights.items()}
    with pytest.raises(Exception, match="self_check: expected"):
        bundle.restore_model(dataclasses.replace(retrained, weights=served), models.build)


def test_test_patients_have_no_influence(
    experiment: Path,
    plan: SweepPlan,
    retrained: bundle.Bundle,
    given: Experiment,
    monkeypatch: pytest.MonkeyPatch,
):
    offsets, targets = given.arrays.patient_offsets, given.arrays.targets.copy()
    for patient in given.cohort.patients_of("test"):
        targets[offsets[patient] : offsets[patient + 1]] ^= True
    other = dataclasses.replace(given, arrays=dataclasses.replace(given.arrays, targets=targets))
    monkeypatch.setattr(retraining.experiment, "load_inputs", lambda _: other)
    retraining.run(experiment, plan, models.build, True)
    again = bundle.load(experiment / "retrained" / "bundle")
    assert again.fingerprint == retrained.fingerprint


def test_it_is_done_once_and_goes_on_where_it_was_interrupted(
    experiment: Path,
    plan: SweepPlan,
    retrained: bundle.Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    retraining.run(experiment, plan, models.build, False)
    assert "unchanged, skipped" in capsys.readouterr().out
    (experiment / "retrained").rename(experiment / "aside")
    epoch, numbers = stepping.Stepper.epoch, list[int]()

    def interrupted(self: Any, arrays: Any, patients: Any, number: int) -> Any:
        numbers.append(number)
        if number == 2 and numbers.count(2) == 1:
            raise KeyboardInterrupt
        return epoch(self, arrays, patients, number)

    monkeypatch.setattr(stepping.Stepper, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        retraining.run(experiment, plan, models.build, False)
    assert not (experiment / "retrained").exists()
    retraining.run(experiment, plan, models.build, False)
    epochs = sweep.read_best(experiment / "sweep")["epoch"]
    assert numbers == [1, 2, *range(2, epochs + 1)]
    again = bundle.load(experiment / "retrained" / "bundle")
    assert again.fingerprint == retrained.fingerprint
    assert not list((experiment / "checkpoints").iterdir())


def test_a_sweep_without_a_choice_has_nothing_to_retrain(
    tmp_path: Path, plan: SweepPlan, sweeps: Any
):
    result = SweepResult((sweeps.record_of(0, {"train.learning_rate": 0.01}),), max_ddi_rate=0.0)
    with artifacts.new_folder(tmp_path / "sweep", sweep.STAGE, {}, plan.settings()) as (partial, _):
        sweep.write(result, partial, None)
    assert retraining.run(tmp_path, plan, models.build, False) is None


def test_that_a_version_serves_without_a_model_card_is_said(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, home = experiment / "sweep", tmp_path / "registry"
    assert promotion.publish_best(folder, home, False) == 1
    assert "evaluate.py" not in capsys.readouterr().out
    assert promotion.publish_best(folder, home, True) == 1
    assert "none before jobs/evaluate.py measures version 0001" in capsys.readouterr().out
    other = tmp_path / "other"
    promotion.publish_best(folder, other, False)
    registry.write_card(other, 1, {"format_version": 1, "model": {}}, "")
    capsys.readouterr()
    promotion.publish_best(folder, other, True)
    out = capsys.readouterr().out
    assert "is candidate and production" in out
    assert "evaluate.py" not in out


def test_what_is_published_and_told_of_it(
    experiment: Path, retrained: bundle.Bundle, tmp_path: Path
):
    folder, home = experiment / "sweep", tmp_path / "registry"
    target = experiment / "retrained"
    assert promotion.publish_best(folder, home, True) == 1
    assert promotion.publish_best(folder, home, True, target) == 2
    assert promotion.publish_best(folder, home, True, target) == 2
    assert registry.resolve_version(home, "production") == 2
    served = bundle.load(registry.resolve(home, "production"))
    assert served.fingerprint == retrained.fingerprint
    told = registry.version(home, 2).record["produced_by"]
    assert told["retrained"]["patients"] == 50
    assert told["seed"] == SEED
    assert "retrained" not in registry.version(home, 1).record["produced_by"]

    assert findings.published(folder) == sweep.read_best(folder)["bundle"]
    assert "anew" not in findings.read(folder).decision()
    (folder / "test.json").write_text("{}")
    assert retraining.note(folder, target)
    assert not (folder / "test.json").exists()  # they were the other model's
    assert not retraining.note(folder, target)
    assert findings.published(folder) == retrained.fingerprint
    epochs = sweep.read_best(folder)["epoch"]
    said = f"for {epochs} epochs on 50 training and validation patients; test metrics are that"
    assert said in findings.read(folder).decision()
    assert retraining.note(folder, None)
    assert not retraining.note(folder, None)
    assert findings.published(folder) == sweep.read_best(folder)["bundle"]
    artifacts.verify(folder, sweep.STAGE)


def test_an_evaluation_says_nothing_of_validation_patients_but_what_the_trial_reached(
    retrained: bundle.Bundle, given: Experiment
):
    model = bundle.restore_model(retrained, models.build)
    predictions = {
        split: Predictions.of(model, given.arrays, given.cohort.patients_of(split))
        for split in ("validation", "test")
    }
    decision = Decision(retrained.preprocessing.temperature, retrained.preprocessing.threshold)
    raw = fits.measure(predictions, given.inputs.ddi, decision, 0)
    assert raw["validation"]["metrics"] != retrained.metrics["validation"]
    found = retraining.measured(raw, retrained.metrics)
    assert found["validation"]["metrics"] == retrained.metrics["validation"]
    assert found["validation"]["intervals"] == retrained.metrics["validation_intervals"]
    assert found["validation"]["calibration"] == retrained.metrics["validation_calibration"]
    assert found["best_threshold"] == found["threshold"] == decision.threshold
    assert found["test"]["metrics"] == raw["test"]["metrics"]
    assert found["test"]["metrics_at_best_threshold"] == raw["test"]["metrics"]
    assert set(raw["validation"]) - set(found["validation"]) == {"bootstrap_mean"}
    assert fits.describe(found).count("\n") == 4


def test_the_model_card_says_how_it_was_retrained():
    text = {"epochs": 7, "patients": 1234}
    training_of = {"train": {}, "calibration": {}, "job": "tune", "trial": 0, "epoch": 7, "seed": 1}
    data = {"source": "x", "protocol": "y", "patients": 1, "visits": 1, "split": {"test": 1}}
    data |= {"inputs": "current", "target_window_h": None, "medication_level": "atc3"}
    card = {"model": {"published": "now", "options": {}}, "data": {**data, "fingerprints": {}}}
    rows = card_text.facts({**card, "training": {**training_of, "retrained": text}})
    assert ["retrained", "7 epochs on 1,234 training and validation patients"] in rows
    assert "retrained" not in dict(card_text.facts({**card, "training": training_of}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray Train
def test_on_ray_it_is_trained_as_without(
    experiment: Path,
    plan: SweepPlan,
    retrained: bundle.Bundle,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with cluster.ray_cluster(2.0):
        monkeypatch.setenv("RAY_ADDRESS", "the one that this process is connected to")
        retraining.run(experiment, plan, models.build, True)
    again = bundle.load(experiment / "retrained" / "bundle")
    assert same(again.weights, retrained.weights)
    assert again.metrics == retrained.metrics


def test_what_validation_patients_say_meanwhile_has_no_influence(
    experiment: Path,
    plan: SweepPlan,
    retrained: bundle.Bundle,
    monkeypatch: pytest.MonkeyPatch,
):
    evaluate, heights = training.metrics.evaluate, itertools.count(1)

    def falling(*arguments: Any) -> Any:
        return dataclasses.replace(evaluate(*arguments), jaccard=1 / next(heights))

    monkeypatch.setattr(training.metrics, "evaluate", falling)
    one = dataclasses.replace(plan, fit=dataclasses.replace(plan.fit, patience=1))
    retraining.run(experiment, one, models.build, True)
    assert next(heights) > 3  # it was asked
    again = bundle.load(experiment / "retrained" / "bundle")
    assert again.fingerprint == retrained.fingerprint
