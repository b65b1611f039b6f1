import dataclasses
import random

import numpy as np
import pytest
import torch

from cafemed import evaluation, metrics
from cafemed.batches import collate
from cafemed.errors import ArtifactError, ConfigError, DataError, TrainingError
from cafemed.training import EpochReport, FitConfig, choose_device, fit

TRAIN, VALIDATION = np.arange(0, 28), np.arange(28, 40)
CONFIG = FitConfig(epochs=6, patience=6, batch_size=8, learning_rate=0.02, seed=3)


@pytest.fixture
def run(build_bag, small_inputs, small_arrays):
    """Calls fit on the tiny cohort; keywords replace arguments of fit or fields of CONFIG."""

    def call(**changes):
        fields = {f.name for f in dataclasses.fields(FitConfig)}
        chosen = dataclasses.replace(CONFIG, **{k: v for k, v in changes.items() if k in fields})
        arguments = {
            "build": build_bag,
            "model_name": "bag",
            "model_options": {"dropout": 0.3},
            "inputs": small_inputs,
            "arrays": small_arrays,
            "train_patients": TRAIN,
            "validation_patients": VALIDATION,
            "config": chosen,
        }
        return fit(**arguments | {k: v for k, v in changes.items() if k not in fields})

    return call


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_fit_learns_the_rule(run):
    result = run(
        epochs=30, patience=30, learning_rate=0.1, ddi_target=1.0, model_options={"dropout": 0.0}
    )
    assert result.metrics.jaccard > 0.9
    assert result.history[-1].losses["loss"] < 0.5 * result.history[0].losses["loss"]


def test_the_same_seed_gives_the_same_weights_to_the_bit(run):
    first = run()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert same(first.weights, run().weights)
    assert not same(first.weights, run(seed=4).weights)


def test_the_callers_random_states_and_threads_are_put_back(run):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    run(epochs=1, num_threads=threads + 1)
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert torch.get_num_threads() == threads


def test_patients_come_in_a_new_order_every_epoch(run, monkeypatch):
    seen = []

    def spy(arrays, patients):
        seen.append(patients.tolist())
        return collate(arrays, patients)

    monkeypatch.setattr("cafemed.stepping.collate", spy)
    run(epochs=2, batch_size=10)
    first, second = ([p for batch in part for p in batch] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == TRAIN.tolist()
    assert first != second
    assert first != TRAIN.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.5},
        {"ddi_weight": 0.5},
        {"ddi_target": 0.5},
        {"ddi_coefficient": 0.1},
        {"margin_weight": 0.9},
        {"objective": "sum"},
        {"threshold": 0.3},
        {"learning_rate": 0.03},
        {"batch_size": 7},
        {"model_options": {"dropout": 0.0}},  # so it is on while training
    ],
)
def test_every_setting_matters(run, change):
    """After one epoch, which is then the best: through the loss or the steps alone."""
    assert not same(run(epochs=1).weights, run(epochs=1, **change).weights)


def test_bfloat16_training_is_close_to_float32(run):
    """Other bits, weights and their moments in float32, about the same loss at the end."""
    plain, reduced = run(), run(precision="bfloat16")
    assert not same(plain.weights, reduced.weights)
    assert all(weight.dtype == torch.float32 for weight in reduced.weights.values())
    first, last = (result.history[-1].losses["loss"] for result in (plain, reduced))
    assert abs(first - last) < 0.01 * first


def test_the_metrics_are_at_the_threshold(run):
    low, high = (run(epochs=1, threshold=t, ddi_target=1.0) for t in (0.05, 0.95))
    assert low.metrics.num_medications > 5
    assert high.metrics.num_medications < 1


def test_the_result_is_the_best_epoch_and_its_weights(run, build_bag, small_inputs, small_arrays):
    """The weights given must score what the best epoch reported: they are a copy of it."""
    result = run(epochs=25, patience=25, learning_rate=0.5)  # restless on purpose
    jaccards = [report.metrics.jaccard for report in result.history]
    assert result.best_epoch == 1 + int(np.argmax(jaccards)) < len(jaccards)
    model = build_bag("bag", small_inputs, {}, 0)
    model.load_state_dict(result.weights)
    found = metrics.evaluate(
        evaluation.predict(model, small_arrays, VALIDATION),
        evaluation.targets(small_arrays, VALIDATION),
        evaluation.patient_offsets(small_arrays, VALIDATION),
        small_inputs.ddi,
    )
    assert found == result.metrics


def test_the_first_epoch_may_be_the_best(run):
    result = run(epochs=3, learning_rate=1e-12)
    assert [report.best for report in result.history] == [True, False, False]  # all are equal
    assert result.best_epoch == 1


def test_patience_ends_training(run):
    result = run(epochs=50, patience=4, learning_rate=1e-12)
    assert len(result.history) == 5


def test_a_batch_larger_than_the_split_is_one_step(run):
    assert run(epochs=1, batch_size=1000).best_epoch == 1


def test_every_epoch_is_reported_in_order(run):
    reports = []
    result = run(on_epoch=reports.append)
    assert tuple(reports) == result.history
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[0].best
    assert set(reports[0].losses) == {"loss", "bce", "margin", "ddi"}
    assert EpochReport.from_dict(reports[2].as_dict()) == reports[2]


def test_the_callback_may_stop_training(run):
    result = run(on_epoch=lambda report: report.epoch == 2)
    assert len(result.history) == 2


def test_the_reported_loss_is_the_mean_over_visits(run):
    """Without learning and dropout, it does not depend on how visits fall into batches."""
    still = {"epochs": 1, "learning_rate": 1e-12, "model_options": {"dropout": 0.0}}
    a, b = run(batch_size=3, **still), run(batch_size=28, **still)
    assert a.history[0].losses == pytest.approx(b.history[0].losses, rel=1e-5)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_fit_goes_on_to_the_same_weights(run, tmp_path, after):
    whole = run(learning_rate=0.2)

    def interrupt(report):
        if report.epoch == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(learning_rate=0.2, checkpoint_dir=tmp_path, on_epoch=interrupt)
    reports = []
    torch.rand(5)
    resumed = run(learning_rate=0.2, checkpoint_dir=tmp_path, on_epoch=reports.append)
    assert [report.epoch for report in reports] == list(range(after + 1, 7))
    assert same(whole.weights, resumed.weights)
    assert whole.best_epoch == resumed.best_epoch
    losses = [report.losses for report in whole.history]
    assert losses == [report.losses for report in resumed.history]


def test_interrupted_within_an_epoch_it_repeats_that_epoch(run, tmp_path, build_bag):
    whole = run()
    calls = 0

    def fragile(*arguments):
        model = build_bag(*arguments)

        def count(*_):
            nonlocal calls
            calls += 1
            if calls == 20:  # four training batches and one of validation an epoch: in epoch 4
                raise InterruptedError

        model.register_forward_pre_hook(count)
        return model

    with pytest.raises(InterruptedError):
        run(build=fragile, checkpoint_dir=tmp_path)
    assert same(whole.weights, run(checkpoint_dir=tmp_path).weights)


def test_a_finished_fit_is_not_repeated(run, tmp_path):
    first = run(checkpoint_dir=tmp_path)
    reports = []
    again = run(checkpoint_dir=tmp_path, on_epoch=reports.append)
    assert not reports
    assert again.best_epoch == first.best_epoch
    assert same(first.weights, again.weights)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.03},
        {"model_options": {"dropout": 0.1}},
        {"train_patients": TRAIN[:-1]},
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(run, tmp_path, change):
    run(epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(ArtifactError, match=r"of another run .* remove"):
        run(**{"epochs": 1, "checkpoint_dir": tmp_path, **change})


def test_a_checkpoint_of_other_inputs_is_refused(run, tmp_path, small_inputs):
    molecules = np.eye(small_inputs.sizes[2], 4, dtype=np.bool_)
    given = dataclasses.replace(small_inputs, molecules=molecules, num_laboratory_items=2)
    run(epochs=1, checkpoint_dir=tmp_path, inputs=given)
    run(epochs=1, checkpoint_dir=tmp_path, inputs=given)  # the same goes on
    others = (
        {"molecules": molecules[::-1].copy()},
        {"molecules": None},
        {"num_laboratory_items": 3},
    )
    for change in others:
        other = dataclasses.replace(given, **change)
        with pytest.raises(ArtifactError, match=r"of another run .* remove"):
            run(epochs=1, checkpoint_dir=tmp_path, inputs=other)


def test_a_checkpoint_of_another_version_of_the_model_is_refused(run, tmp_path, build_bag):
    run(epochs=1, checkpoint_dir=tmp_path)

    def changed(*arguments):
        model = build_bag(*arguments)
        model.head = torch.nn.Linear(8, 9, bias=False)
        return model

    with pytest.raises(ArtifactError, match="another version of the model"):
        run(build=changed, epochs=1, checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_stops_at_once(run, tmp_path, build_bag):
    calls = 0

    def breaking(*arguments):
        model = build_bag(*arguments)

        def spoil(_module, _inputs, output):
            nonlocal calls
            calls += 1
            return output * float("nan") if calls == 8 else output

        model.register_forward_hook(spoil)
        return model

    message = r"epoch 2, batch 3 of 4: .* got bce nan, margin nan, ddi nan; .* below 0\.02"
    with pytest.raises(TrainingError, match=message):
        run(build=breaking, checkpoint_dir=tmp_path)
    assert calls == 8  # no further batch
    # The checkpoint of the last good epoch is intact: without the fault, training goes on.
    assert same(run().weights, run(checkpoint_dir=tmp_path).weights)


def test_the_term_that_overflowed_is_named(run):
    with pytest.raises(TrainingError, match=r"epoch 1, batch 1 of 4: .* got ddi inf;"):
        run(ddi_weight=3e38, ddi_target=1e-9)


def test_weights_that_are_not_finite_after_an_epoch_are_not_kept(run, tmp_path, build_bag):
    def exploding(*arguments):
        model = build_bag(*arguments)
        model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
        return model

    with pytest.raises(TrainingError, match=r"after epoch 1|epoch 1, batch"):
        run(build=exploding, batch_size=100, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train_patients", "validation_patients"])
def test_an_empty_split_is_refused(run, split):
    name = "training" if split == "train_patients" else "validation"
    with pytest.raises(DataError, match=f"the {name} split has no patients"):
        run(**{split: np.zeros(0, np.int64)})


def test_device_names():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="expected one of auto, cpu, cuda, got 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds none"):
            choose_device("cuda")
