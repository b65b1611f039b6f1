import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from sklearn.metrics import log_loss as sklearn_log_loss

from cafemed import calibration, evaluation, metrics
from cafemed.calibration import CalibrationConfig, Decision, Predictions


def case(seed=0, patients=40, medications=11, temperature=1.0):
    """Logits that are right at this temperature."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, patients))])
    logits = rng.normal(-0.5, 3, (offsets[-1], medications)).astype(np.float32)
    targets = rng.random(logits.shape) < 1 / (1 + np.exp(-logits / temperature))
    return Predictions(logits, targets, offsets)


def plain_error(probabilities, targets, num_bins=15):
    """Σ n_b / n |acc(b) - conf(b)|, one pair at a time."""
    inside = [[] for _ in range(num_bins)]
    for p, y in zip(probabilities.ravel().tolist(), targets.ravel().tolist(), strict=True):
        bin_of = next(b for b in range(num_bins) if p * num_bins < b + 1 or b == num_bins - 1)
        inside[bin_of].append((p, y))
    total = sum(map(len, inside))
    return sum(
        len(pairs) / total * abs(np.mean([y for _, y in pairs]) - np.mean([p for p, _ in pairs]))
        for pairs in inside
        if pairs
    )


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_targets_is_found(true):
    made = case(patients=3000, temperature=true)
    assert calibration.fit_temperature(made.logits, made.targets) == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_is_scipys_minimum_of_sklearns_log_loss(seed):
    made = case(seed, temperature=0.5 + seed)

    def loss(log_t):
        p = 1 / (1 + np.exp(-made.logits.astype(np.float64) / np.exp(log_t)))
        return sklearn_log_loss(made.targets.ravel(), np.clip(p, 1e-15, 1 - 1e-15).ravel())

    expected = optimize.minimize_scalar(loss, bounds=(-3, 3), options={"xatol": 1e-8})
    found = calibration.fit_temperature(made.logits, made.targets)
    assert found == pytest.approx(np.exp(expected.x), rel=1e-5)
    assert calibration.log_loss(made.logits, made.targets, found) == pytest.approx(expected.fun)
    assert found == calibration.fit_temperature(made.logits, made.targets)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30, width=32), st.booleans()), min_size=1, max_size=30),
    st.floats(0.1, 10),
)
def test_no_other_temperature_has_less_log_loss(pairs, other):
    logits = np.array([[x for x, _ in pairs]], np.float32)
    targets = np.array([[y for _, y in pairs]])
    found = calibration.fit_temperature(logits, targets)
    assert 0.1 <= found <= 10
    least = calibration.log_loss(logits, targets, found)
    assert least <= calibration.log_loss(logits, targets, other) + 1e-9


def test_where_no_temperature_is_best_the_nearest_end_is_taken():
    logits = np.array([[2.0, -1.0, 3.0]], np.float32)
    assert calibration.fit_temperature(logits, logits > 0) == 0.1  # never wrong
    assert calibration.fit_temperature(logits, logits < 0) == 10  # always wrong
    assert calibration.fit_temperature(np.zeros((1, 3)), logits > 0) == 1  # nothing to scale


def test_log_loss_does_not_overflow():
    logits, targets = np.array([[800.0, -900.0]]), np.array([[False, False]])
    assert calibration.log_loss(logits, targets) == 400
    assert calibration.log_loss(logits, ~targets, 2.0) == 225


@pytest.mark.parametrize("seed", range(4))
def test_the_calibration_error_is_the_plain_sum_over_bins(seed):
    made = case(seed, temperature=2.5)
    for temperature in (1.0, 2.5):
        p = made.probabilities(temperature)
        found = calibration.expected_error(p, made.targets)
        assert found == pytest.approx(plain_error(p, made.targets), abs=1e-12)


def test_a_bin_begins_at_its_lower_edge_and_the_last_one_holds_one():
    p = np.array([0.0, 1 / 15, 0.2, 14 / 15, 1.0])
    assert calibration.bins(p).tolist() == [0, 1, 3, 14, 14]


def test_temperature_mends_a_model_that_is_too_sure():
    made = case(patients=500, temperature=3.0)
    found = calibration.measure(made, calibration.fit_temperature(made.logits, made.targets))
    assert found["after"]["ece"] < 0.3 * found["before"]["ece"]
    assert found["after"]["log_loss"] < found["before"]["log_loss"]


def test_reliability_is_a_loop_over_pairs():
    made = case(2, patients=12, temperature=2.0)
    found = calibration.Reliability.of(made, 2.0)
    p = made.probabilities(2.0)
    for b in range(15):
        inside = (p >= found.edges[b]) & ((p < found.edges[b + 1]) | (b == 14))
        assert found.pairs[b] == inside.sum()
        for i, (start, end) in enumerate(itertools.pairwise(made.patient_offsets)):
            assert found.present[i, b] == inside[start:end].any()
        if inside.any():
            assert found.probability[b] == pytest.approx(p[inside].mean())
            assert found.share[b] == pytest.approx(made.targets[inside].mean())
        else:
            assert np.isnan([found.probability[b], found.share[b]]).all()
    gap = np.nansum(found.pairs * np.abs(found.probability - found.share)) / p.size
    assert gap == pytest.approx(calibration.expected_error(p, made.targets))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40), st.floats(0.01, 100))
def test_at_a_half_no_temperature_changes_a_set(logits, temperature):
    values = np.array([logits], np.float32)
    # A logit nearer to 0 than float32 can tell from it gives exactly 0.5 at any temperature.
    values[np.abs(values) < 1e-3] = 0
    before, after = evaluation.sigmoid(values), evaluation.sigmoid(values, temperature)
    np.testing.assert_array_equal(before >= 0.5, after >= 0.5)


def test_the_threshold_is_tuned_after_the_temperature():
    made = case(3, patients=300, temperature=4.0)
    both = CalibrationConfig(temperature="validation", threshold="validation")
    found = calibration.choose(made, both, 0.5)
    assert found.temperature == pytest.approx(4, rel=0.1)
    jaccard = {
        t: metrics.evaluate(
            made.probabilities(found.temperature),
            made.targets,
            made.patient_offsets,
            np.zeros((11, 11), np.bool_),
            t,
        ).jaccard
        for t in metrics.THRESHOLDS
    }
    assert jaccard[found.threshold] == max(jaccard.values())
    untempered = CalibrationConfig(temperature="fixed", threshold="validation")
    assert calibration.choose(made, untempered, 0.5).threshold != found.threshold


def test_what_is_fixed_stays():
    made = case(temperature=2.0)
    fixed = CalibrationConfig(temperature="fixed", threshold="fixed")
    assert calibration.choose(made, fixed, 0.4) == Decision(1.0, 0.4)
    default = calibration.choose(made, CalibrationConfig(), 0.4)
    assert default.threshold == 0.4
    assert default.temperature == calibration.fit_temperature(made.logits, made.targets)
