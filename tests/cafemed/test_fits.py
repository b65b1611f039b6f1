import json

import numpy as np
import pytest
import safetensors.torch
import torch

from cafemed import artifacts, evaluation, fits, metrics
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
    got = fits.measure(model, small_arrays, PATIENTS, small_inputs.ddi, 0.4, seed=3)
    chosen, _ = metrics.best_threshold(
        evaluation.predict(model, small_arrays, PATIENTS["validation"]),
        evaluation.targets(small_arrays, PATIENTS["validation"]),
        evaluation.patient_offsets(small_arrays, PATIENTS["validation"]),
    )
    assert (got["threshold"], got["best_threshold"]) == (0.4, chosen)
    for split in ("validation", "test"):
        at, best = (
            evaluation.evaluate(model, small_arrays, PATIENTS[split], small_inputs.ddi, t, seed=3)
            for t in (0.4, chosen)
        )
        assert got[split]["metrics"] == at.metrics.as_dict()
        assert got[split]["metrics_at_best_threshold"] == best.metrics.as_dict()
        assert got[split]["bootstrap_sd"] == at.bootstrap.sd.as_dict()
        assert got[split]["patients"] == len(PATIENTS[split])
    assert "test" in fits.describe(got)


def test_a_split_without_test_patients_is_left_out(model, small_arrays, small_inputs):
    patients = PATIENTS | {"test": np.zeros(0, np.int64)}
    got = fits.measure(model, small_arrays, patients, small_inputs.ddi, 0.5, seed=0)
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
