import json

import numpy as np
import pytest
import safetensors.torch
import torch

from cafemed import artifacts, calibration, evaluation, fits, metrics
from cafemed.calibration import CalibrationConfig, Decision
from cafemed.training import FitConfig, fit

PATIENTS = {
    "train": np.arange(0, 20),
    "validation": np.arange(20, 32),
    "test": np.arange(32, 40),
}


@pytest.fixture
def model(build_bag, small_inputs):
    return build_bag("bag", small_inputs, {}, 1)


def test_measure_reports_each_split_at_both_thresholds(model, small_arrays, small_inputs):
    predictions = fits.predict(model, small_arrays, PATIENTS)
    got = fits.measure(predictions, small_inputs.ddi, Decision(1.0, 0.4), seed=3)
    chosen, _ = metrics.best_threshold(
        evaluation.predict(model, small_arrays, PATIENTS["validation"]),
        evaluation.targets(small_arrays, PATIENTS["validation"]),
        evaluation.patient_offsets(small_arrays, PATIENTS["validation"]),
    )
    assert (got["temperature"], got["threshold"], got["best_threshold"]) == (1.0, 0.4, chosen)
    for split in ("validation", "test"):
        probabilities = evaluation.predict(model, small_arrays, PATIENTS[split])
        targets = evaluation.targets(small_arrays, PATIENTS[split])
        offsets = evaluation.patient_offsets(small_arrays, PATIENTS[split])
        at, best = (
            metrics.score_visits(probabilities, targets, small_inputs.ddi, t) for t in (0.4, chosen)
        )
        assert got[split]["metrics"] == metrics.aggregate(at, offsets).as_dict()
        assert got[split]["metrics_at_best_threshold"] == metrics.aggregate(best, offsets).as_dict()
        assert got[split]["bootstrap_sd"] == metrics.bootstrap(at, offsets, seed=3).sd.as_dict()
        assert got[split]["patients"] == len(PATIENTS[split])
        for name, value in got[split]["metrics"].items():
            low, high = got[split]["intervals"][name]
            assert low <= value <= high
        assert got[split]["calibration"]["before"] == got[split]["calibration"]["after"]
    table = fits.describe(got)
    assert "test" in table
    assert table.count("\n") == 6  # a heading, two rows and a line of calibration a split


def test_everything_is_measured_after_temperature(model, small_arrays, small_inputs):
    predictions = fits.predict(model, small_arrays, PATIENTS)
    ddi = small_inputs.ddi
    cold, warm = (fits.measure(predictions, ddi, Decision(t, 0.4), seed=3) for t in (1.0, 5.0))
    test = predictions["test"]
    p = 1 / (1 + np.exp(-test.logits.astype(np.float64) / 5))
    expected = metrics.evaluate(p, test.targets, test.patient_offsets, ddi, 0.4)
    assert warm["test"]["metrics"] == pytest.approx(expected.as_dict())
    assert warm["test"]["metrics"]["num_medications"] != cold["test"]["metrics"]["num_medications"]
    after = warm["test"]["calibration"]["after"]
    loss = -np.log(np.where(test.targets, p, 1 - p)).mean()
    assert after["log_loss"] == pytest.approx(loss)
    assert after["ece"] == pytest.approx(calibration.expected_error(p, test.targets))
    assert warm["test"]["calibration"]["before"] == cold["test"]["calibration"]["before"]
    # At a half the temperature decides nothing.
    half = [fits.measure(predictions, ddi, Decision(t, 0.5), seed=3)["test"] for t in (1.0, 5.0)]
    for name in ("jaccard", "f1", "ddi_rate", "num_medications"):
        assert half[0]["metrics"][name] == half[1]["metrics"][name]


def test_a_tuned_threshold_is_shown_once(model, small_arrays, small_inputs):
    predictions = fits.predict(model, small_arrays, PATIENTS)
    tuned = CalibrationConfig(threshold="validation")
    decision = calibration.choose(predictions["validation"], tuned, 0.5)
    got = fits.measure(predictions, small_inputs.ddi, decision, seed=3)
    assert got["threshold"] == got["best_threshold"]
    assert got["validation"]["metrics"] == got["validation"]["metrics_at_best_threshold"]
    assert fits.describe(got).count("\n") == 4


def test_a_split_without_test_patients_is_left_out(model, small_arrays, small_inputs):
    patients = PATIENTS | {"test": np.zeros(0, np.int64)}
    predictions = fits.predict(model, small_arrays, patients)
    got = fits.measure(predictions, small_inputs.ddi, Decision(), seed=0)
    assert "test" not in got
    assert "test" not in fits.describe(got)


def test_the_artifact_holds_weights_configuration_metrics_and_history(
    tmp_path, build_bag, small_arrays, small_inputs
):
    config = FitConfig(epochs=2, learning_rate=0.02)
    splits = PATIENTS["train"], PATIENTS["validation"]
    result = fit(build_bag, "bag", {}, small_inputs, small_arrays, *splits, config)
    settings = {"model": {"name": "bag", "options": {}}, "train": {"epochs": 2}}
    measured = {"threshold": 0.5, "test": {"patients": 8}}
    fits.write(tmp_path / "fit", {"cohort": "a", "graph": "b"}, settings, result, measured)

    manifest = artifacts.verify(tmp_path / "fit", "fit")
    assert manifest.inputs == {"cohort": "a", "graph": "b"}
    assert manifest.fingerprint == artifacts.fingerprint(
        "fit", {"cohort": "a", "graph": "b"}, settings
    )
    weights = safetensors.torch.load_file(tmp_path / "fit" / "model.safetensors")
    assert weights.keys() == result.weights.keys()
    assert all(torch.equal(weights[name], t) for name, t in result.weights.items())
    assert json.loads((tmp_path / "fit" / "config.json").read_text()) == settings
    assert json.loads((tmp_path / "fit" / "metrics.json").read_text()) == measured
    history = json.loads((tmp_path / "fit" / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history] == [1, 2]
