"""What benchmarks/tuning.py computes from sweeps, and that both sides of it train the same."""

import dataclasses
import datetime
import importlib.util

import pytest
import torch

import models
from benchmarks.epochs import data
from benchmarks.sweeps import measured, plain, race
from benchmarks.sweeps.measured import Sweep
from benchmarks.sweeps.plain import Fixed, Study
from cafemed import cluster, paths, training
from cafemed.batches import collate
from cafemed.sweep import METRICS, TrialRecord
from cafemed.trials import TrialData

TINY = data.SHAPES["tiny"]


@pytest.fixture(scope="module")
def program():
    path = paths.PROJECT_DIR / "benchmarks" / "tuning.py"
    spec = importlib.util.spec_from_file_location("benchmarks_tuning", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH"):
            patch.setenv(name, "")  # the program sets them for its processes
        spec.loader.exec_module(module)
        yield module


def trial_of(number, jaccards, seconds):
    history = tuple(
        {"epoch": i, "seconds": seconds, "metrics": dict.fromkeys(METRICS, 0.1) | {"jaccard": j}}
        for i, j in enumerate(jaccards, 1)
    )
    began = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return TrialRecord(
        number, {}, number, "finished", None, history, began, 9.0, "h", 1.0, 0.0, None
    )


def sweep_of(num_trials, wall_s, slots, start_s=0.5, peak_mb=500.0):
    trials = tuple(trial_of(i, (round(0.3 + i / 100, 2), 0.2), 2.5) for i in range(num_trials))
    return Sweep(trials, slots, wall_s, 3.0, (start_s,) * num_trials, (peak_mb, 400.0))


def test_overhead_is_what_is_beside_the_trials_own_training(program):
    sweeps = [sweep_of(4, 11.0, 2), sweep_of(4, 12.0, 2, 0.7, 600.0)]
    rows = list(program.sweep_rows(sweeps, sweep_of(2, 11.5, 1)))
    assert {case for case, *_ in rows} == {"sweep"}
    found = {metric: value for _, metric, value, _ in rows}
    assert found["overhead"] == pytest.approx(0.15)  # 23 s for 8 trials of 5 s on 2 slots
    assert found["start_s_per_trial"] == pytest.approx(0.6)
    assert found["start_s_slowest"] == pytest.approx(0.7)
    assert found["peak_mb_per_trial"] == 600
    assert found["training_s_shortest"] == found["training_s_longest"] == pytest.approx(5)
    assert found["trials_per_hour"] == pytest.approx(3600 * 8 / 23)
    assert found["checkpoint_s_per_epoch"] == pytest.approx((9 - 5 - 0.6) / 2)
    assert found["overhead_one_slot"] == pytest.approx(0.15)
    assert found["scaling_efficiency"] == pytest.approx(1)


def test_the_same_trials_are_compared_by_their_numbers_an_hour(program):
    sweeps = [sweep_of(4, 11.0, 2), sweep_of(4, 12.0, 2)]
    study = Study(10.0, (0.3, 0.31, 0.32, 0.33), (4.0,) * 4)
    rows = list(program.plain_rows([study, dataclasses.replace(study, wall_s=12.0)], sweeps))
    found = {metric: value for _, metric, value, _ in rows}
    assert found["trials_per_hour"] == pytest.approx(3600 * 8 / 22)
    assert found["overhead"] == pytest.approx(22 / 16 - 1)
    assert found["trials_per_hour_ratio"] == pytest.approx(22 / 23)
    other = dataclasses.replace(study, jaccard=(0.3, 0.31, 0.32, 0.34))
    with pytest.raises(SystemExit, match="trial 3 is another one"):
        list(program.plain_rows([other], sweeps))


def test_the_sweeps_are_what_the_job_would_run(program):
    plan = program.sweep_plan(32, 14, 5)
    assert (plan.search.num_samples, plan.search.seed, plan.fit.epochs) == (32, 5, 14)
    assert plan.fit.patience == 14
    assert set(plan.space.entries) >= {"model.modulation_strength", "train.ddi_coefficient"}
    assert set(race.SEARCHES) == {"tpe_asha", "random"}


def test_the_first_batch_of_a_model_leaves_a_note_and_no_other(tmp_path):
    inputs, arrays = data.inputs(TINY, 1), data.arrays(TINY, 1)
    model = measured.noting_build(tmp_path, models.build, "cafemed", inputs, {"dimension": 8}, 7)
    assert list(tmp_path.iterdir()) == []
    batch = collate(arrays, TINY.train[:4])
    with torch.inference_mode():
        first = model(batch)
        note = (tmp_path / "7").read_text()
        model(batch)
    assert (tmp_path / "7").read_text() == note
    assert first.shape[-1] == TINY.sizes[2]


@pytest.mark.slow
def test_a_sweep_and_plain_optuna_train_the_same_trials(program, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(paths.PROJECT_DIR))
    plan = program.sweep_plan(3, 2, 4)
    shared = TrialData(
        build=models.build,
        model_name=plan.model_name,
        models=plan.models,
        inputs=data.inputs(TINY, 1),
        arrays=data.arrays(TINY, 1),
        train_patients=TINY.train,
        validation_patients=TINY.test,
        config=plan.fit,
    )
    with cluster.ray_cluster(2):
        sweep = measured.run(plan, shared, 2)
    assert [trial.status for trial in sweep.trials] == ["finished"] * 3
    assert sweep.wall_s > sweep.first_line_s > 0
    assert len(sweep.start_s) == 3
    assert all(0 < start < 5 for start in sweep.start_s)
    assert all(100 < peak < 2000 for peak in sweep.peak_mb)
    fixed = [Fixed(trial.parameters, trial.seed) for trial in sweep.trials]
    study = plain.run(fixed, plan.space, shared, 2)
    rows = list(program.plain_rows([study], [sweep]))  # refuses other trials
    assert rows[-1][1] == "trials_per_hour_ratio"
    options, config = shared.varied(fixed[1].parameters, fixed[1].seed)
    fitted = training.fit(
        models.build,
        "cafemed",
        options,
        shared.inputs,
        shared.arrays,
        TINY.train,
        TINY.test,
        config,
    )
    assert study.jaccard[1] == fitted.metrics.jaccard
