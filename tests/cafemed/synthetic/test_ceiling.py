"""Bayes-optimal probabilities against enumeration, and the ceiling's measures."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss

from cafemed import drugs, metrics, protocols
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError, ConfigError
from cafemed.protocols import CohortConfig
from cafemed.sources import mimic3
from cafemed.synthetic import Population, SyntheticConfig, ceiling, truth
from cafemed.synthetic.tables import start_shares

DIAGNOSES = [[0, 2], [1], [0, 1, 2], [2]]
PROCEDURES = [[1], [0], [0, 1], [1]]
MEDICATIONS = [[0, 3], [1], [1, 2], [0]]
OFFSETS = np.array([0, 2, 4])


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    return write_truth(tiny, tmp_path_factory.mktemp("truth"))


def write_truth(model, target):
    lists = (CodeLists.of(codes) for codes in (DIAGNOSES, PROCEDURES, MEDICATIONS))
    config = SyntheticConfig(effect_draws=10)
    truth.write(Population(config, 0, model, OFFSETS, *lists), start_shares(), target)
    return target


def cohort_of(
    model, keep_diagnoses=(0, 1, 2), keep_procedures=(0, 1), keep=(0, 1, 2, 3), **changes
):
    """The four visits as a cohort that knows only these codes."""

    def lists(codes, kept):
        return CodeLists.of([[kept.index(c) for c in visit if c in kept] for visit in codes])

    medications = lists(MEDICATIONS, keep)
    cohort = Cohort(
        patient_offsets=OFFSETS,
        patient_ids=("1", "2"),
        visit_ids=("4", "3", "2", "1"),
        admitted=np.array(
            ["2100-01-01", "2101-01-01", "2100-01-01", "2100-02-01"], "datetime64[s]"
        ),
        diagnoses=lists(DIAGNOSES, keep_diagnoses),
        procedures=lists(PROCEDURES, keep_procedures),
        medications=medications,
        targets=medications,
        vocabularies={
            "diagnosis": tuple(model.diagnoses[i] for i in keep_diagnoses),
            "procedure": tuple(model.procedures[i] for i in keep_procedures),
            "medication": tuple(model.medications[i] for i in keep),
        },
        ddi=model.ddi[np.ix_(keep, keep)],
        split=np.zeros(2, np.int8),
        sex=np.zeros(2, np.int8),
        age=np.zeros(4, np.float32),
    )
    return dataclasses.replace(cohort, **changes)


def seen(visit):
    codes = np.zeros(5, int)
    codes[DIAGNOSES[visit]] = 1
    codes[np.array(PROCEDURES[visit]) + 3] = 1
    return tuple(codes.tolist())


def before(visit):
    medications = np.zeros(4, int)
    if visit % 2:
        medications[MEDICATIONS[visit - 1]] = 1
    return tuple(medications.tolist())


def test_exact_where_all_codes_are_seen(tiny, tiny_folder, enumeration):
    visits = np.array([3, 0, 1])
    found, error = ceiling.bayes_probabilities(tiny_folder, cohort_of(tiny), visits)
    for row, visit in enumerate(visits):
        distribution = enumeration.medication_distribution(tiny, seen(visit), before(visit))
        np.testing.assert_allclose(found[row], enumeration.marginals(distribution), atol=1e-6)
    assert found.dtype == error.dtype == np.float32
    assert not error.any()


@pytest.mark.parametrize("hidden", [{2}, {0}, {0, 4}])
def test_codes_outside_the_vocabulary_are_averaged_over(tiny, tiny_folder, enumeration, hidden):
    kept = [i for i in range(5) if i not in hidden]
    cohort = cohort_of(
        tiny,
        tuple(i for i in kept if i < 3),
        tuple(i - 3 for i in kept if i >= 3),
        keep=(0, 1, 2, 3),
    )
    found, error = ceiling.bayes_probabilities(
        tiny_folder, cohort, np.arange(4), num_draws=20_000, seed=1
    )
    expected = np.zeros((4, 4))
    for visit in range(4):
        total = 0.0
        for codes, probability in enumeration.code_distribution(tiny).items():
            if all(codes[i] == seen(visit)[i] for i in kept):
                given = enumeration.medication_distribution(tiny, codes, before(visit))
                expected[visit] += probability * enumeration.marginals(given)
                total += probability
        expected[visit] /= total
    assert 1e-4 < error.max() < 0.005
    np.testing.assert_allclose(found, expected, atol=5 * error.max())


@pytest.mark.parametrize("name", ["tiny", "persistent"])
def test_history_alone_averages_over_the_visit(name, request, enumeration, tmp_path):
    model = request.getfixturevalue(name)
    cohort = cohort_of(model, inputs="history")
    found, error = ceiling.bayes_probabilities(
        write_truth(model, tmp_path), cohort, np.arange(4), num_draws=20_000
    )
    for visit in range(4):
        past = seen(visit - 1) if visit % 2 else (0, 0, 0, 0, 0)
        expected = np.zeros(4)
        for codes, probability in enumeration.code_distribution(model, past).items():
            given = enumeration.medication_distribution(model, codes, before(visit))
            expected += probability * enumeration.marginals(given)
        np.testing.assert_allclose(found[visit], expected, atol=5 * error.max())
    assert 1e-4 < error.max() < 0.005


def test_stated_error_is_the_spread_over_seeds(tiny, tiny_folder):
    cohort = cohort_of(tiny, (0, 1), keep=(3, 1))
    runs = [
        ceiling.bayes_probabilities(tiny_folder, cohort, np.arange(4), num_draws=100, seed=seed)
        for seed in range(200)
    ]
    spread = np.std([p for p, _ in runs], axis=0)
    stated = np.mean([e for _, e in runs], axis=0)
    assert stated.shape == (4, 2)
    np.testing.assert_allclose(stated, spread, rtol=0.25, atol=2e-4)


def test_cohorts_of_another_kind_are_refused(tiny, tiny_folder):
    visits = np.arange(4)
    backwards = cohort_of(tiny)
    backwards = dataclasses.replace(backwards, admitted=backwards.admitted[::-1])
    with pytest.raises(ConfigError, match="time order"):
        ceiling.bayes_probabilities(tiny_folder, backwards, visits)
    names = {**cohort_of(tiny).vocabularies, "procedure": ("icd9:01", "icd9:77")}
    with pytest.raises(ArtifactError, match="icd9:77"):
        ceiling.bayes_probabilities(tiny_folder, cohort_of(tiny, vocabularies=names), visits)
    fewer = cohort_of(tiny, targets=CodeLists.of([[0], [], [], []]))
    with pytest.raises(ConfigError, match="target_window_h"):
        ceiling.bayes_probabilities(tiny_folder, fewer, visits)
    with pytest.raises(ConfigError, match="target_window_h"):
        ceiling.bayes_probabilities(tiny_folder, cohort_of(tiny), visits, target_window_h=24)


@pytest.mark.parametrize("window", [None, 12.0, 24.0, 40.0])
def test_probabilities_are_calibrated_on_a_population(folder, window):
    cohort, _ = protocols.clean(
        mimic3.read(folder),
        drugs.read(drugs.locate(folder / "drugs")),
        CohortConfig(target_window_h=window),
    )
    targets = cohort.targets.multi_hot(cohort.sizes[2])
    found, _ = ceiling.bayes_probabilities(
        folder / "truth", cohort, np.arange(cohort.num_visits), target_window_h=window
    )
    for low in np.arange(0, 1, 0.1):
        inside = (found >= low) & (found < low + 0.1)
        if (size := inside.sum()) > 500:
            error = np.sqrt(found[inside].mean() * (1 - found[inside].mean()) / size)
            assert targets[inside].mean() == pytest.approx(found[inside].mean(), abs=4.5 * error)
    # No monotone change of the optimal probabilities has a smaller loss.
    best = ceiling.log_loss(found, targets)
    odds = np.log(found / (1 - found))
    for changed in (odds * 1.1, odds * 0.9, odds + 0.1, odds - 0.1):
        assert ceiling.log_loss(1 / (1 + np.exp(-changed)), targets) > best


def test_summary_measures_and_carries_the_error():
    rng = np.random.default_rng(0)
    p = rng.random((40, 12)) ** 3
    targets = rng.random((40, 12)) < p
    offsets = np.arange(0, 41, 2)
    ddi = np.triu(rng.random((12, 12)) < 0.2, 1)
    ddi |= ddi.T
    exact = ceiling.summary(p, np.zeros_like(p), targets, offsets, ddi)
    expected = sklearn_log_loss(targets.ravel(), p.ravel())
    assert exact.log_loss == pytest.approx(expected, rel=1e-6)
    assert exact.at_half == metrics.evaluate(p, targets, offsets, ddi)
    threshold, jaccard = metrics.best_threshold(p, targets, offsets)
    assert (exact.threshold, exact.at_best.jaccard) == (threshold, pytest.approx(jaccard))
    assert exact.true_num_medications == pytest.approx(targets.sum(axis=1).mean())
    assert exact.log_loss_error == exact.at_half_error.jaccard == 0
    shaken = ceiling.summary(p, np.full_like(p, 0.02), targets, offsets, ddi)
    assert (
        dataclasses.replace(
            shaken,
            log_loss_error=0.0,
            at_half_error=exact.at_half_error,
            at_best_error=exact.at_best_error,
        )
        == exact
    )
    assert 0 < shaken.at_half_error.prauc < 0.05
    assert 0 < shaken.log_loss_error < 0.05
    assert set(shaken.as_dict()["at_best"]) == {*metrics.Metrics.__dataclass_fields__}
