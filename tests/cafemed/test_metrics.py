import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

from cafemed import metrics


def _case(seed=0, patients=7, medications=13, ties=False):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, patients)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    shape = (offsets[-1], medications)
    probabilities = rng.random(shape).astype(np.float32)
    if ties:
        probabilities = np.round(probabilities, 1)
    targets = rng.random(shape) < 0.3
    ddi = np.triu(rng.random((medications, medications)) < 0.2, 1)
    return probabilities, targets, offsets, ddi | ddi.T


def _plain(probabilities, targets, offsets, ddi, threshold):
    """The published evaluation, one visit at a time, with sets."""
    per_patient, pairs, interacting, medications, visits = [], 0, 0, 0, 0
    for start, end in itertools.pairwise(offsets):
        rows = []
        for v in range(start, end):
            predicted = {m for m, p in enumerate(probabilities[v]) if p >= threshold}
            target = {m for m, y in enumerate(targets[v]) if y}
            union, common = len(predicted | target), len(predicted & target)
            precision = common / len(predicted) if predicted else 0
            recall = common / len(target) if target else 0
            f1 = 2 * precision * recall / (precision + recall) if common else 0
            ap = average_precision_score(targets[v], probabilities[v]) if target else 0
            rows.append((common / union if union else 0, f1, ap))
            chosen = sorted(predicted)
            for a in range(len(chosen)):
                for b in range(a + 1, len(chosen)):
                    pairs += 1
                    interacting += bool(ddi[chosen[a], chosen[b]])
            medications += len(predicted)
            visits += 1
        per_patient.append(np.mean(rows, axis=0))
    jaccard, f1, prauc = np.mean(per_patient, axis=0)
    return jaccard, f1, prauc, interacting / pairs if pairs else 0, medications / visits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.97])
def test_metrics_equal_the_published_loops(seed, ties, threshold):
    probabilities, targets, offsets, ddi = _case(seed, ties=ties)
    got = metrics.evaluate(probabilities, targets, offsets, ddi, threshold)
    expected = _plain(probabilities, targets, offsets, ddi, np.float32(threshold))
    np.testing.assert_allclose(list(got.as_dict().values()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_visit_scores_equal_scikit_learn(ties):
    probabilities, targets, _, ddi = _case(1, patients=60, ties=ties)
    keep = targets.any(axis=1)
    probabilities, targets = probabilities[keep], targets[keep]
    scores = metrics.score_visits(probabilities, targets, ddi)
    predicted = probabilities >= 0.5
    for v in range(len(targets)):
        assert scores.prauc[v] == pytest.approx(
            average_precision_score(targets[v], probabilities[v]), abs=1e-12
        )
        assert scores.jaccard[v] == pytest.approx(jaccard_score(targets[v], predicted[v]))
        assert scores.f1[v] == pytest.approx(f1_score(targets[v], predicted[v], zero_division=0))


def test_average_precision_with_all_equal_probabilities_is_the_base_rate():
    targets = np.array([[True, False, False, True]])
    assert metrics.average_precision(np.full((1, 4), 0.7), targets) == pytest.approx([0.5])


def test_what_is_undefined_counts_as_zero():
    nothing = np.zeros((1, 4), np.bool_)
    scores = metrics.score_visits(np.full((1, 4), 0.1), nothing, np.zeros((4, 4), np.bool_))
    assert (scores.jaccard[0], scores.f1[0], scores.prauc[0]) == (0, 0, 0)
    got = metrics.aggregate(scores, np.array([0, 1]))
    assert (got.ddi_rate, got.num_medications) == (0, 0)
    with pytest.warns(UserWarning, match="No positive class"):
        assert average_precision_score(nothing[0], np.full(4, 0.1)) == 0  # ours is the same


def test_a_patients_visits_are_averaged_before_patients():
    # One patient with three perfect visits, one with a single visit that is all wrong.
    targets = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.bool_)
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]])
    got = metrics.evaluate(probabilities, targets, np.array([0, 3, 4]), np.zeros((2, 2), np.bool_))
    assert got.jaccard == pytest.approx(0.5)


def test_ddi_rate_pools_pairs_over_visits():
    ddi = np.zeros((4, 4), np.bool_)
    ddi[0, 1] = ddi[1, 0] = True
    probabilities = np.array([[0.9, 0.9, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]])
    got = metrics.evaluate(probabilities, probabilities > 0, np.array([0, 2]), ddi)
    assert got.ddi_rate == pytest.approx(2 / 7)  # not the mean of 1/1 and 1/6
    assert got.num_medications == pytest.approx(3)


def test_a_probability_at_the_threshold_is_predicted():
    got = metrics.score_visits(
        np.array([[0.5, 0.4]]), np.array([[True, False]]), np.zeros((2, 2), np.bool_)
    )
    assert got.jaccard[0] == 1


def test_bootstrap_equals_recomputing_every_round():
    probabilities, targets, offsets, ddi = _case(3, patients=20)
    scores = metrics.score_visits(probabilities, targets, ddi)
    got = metrics.bootstrap(scores, offsets, rounds=6, share=0.8, seed=5)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(6):
        chosen = rng.choice(20, 16, replace=True)
        rows = np.concatenate([np.arange(offsets[p], offsets[p + 1]) for p in chosen])
        lengths = [offsets[p + 1] - offsets[p] for p in chosen]
        again = np.concatenate([[0], np.cumsum(lengths)])
        drawn.append(_plain(probabilities[rows], targets[rows], again, ddi, 0.5))
    np.testing.assert_allclose(list(got.mean.as_dict().values()), np.mean(drawn, axis=0))
    np.testing.assert_allclose(list(got.sd.as_dict().values()), np.std(drawn, axis=0))
    assert got == metrics.bootstrap(scores, offsets, rounds=6, share=0.8, seed=5)
    assert got.sd.ddi_rate > 0


def test_intervals_equal_recomputing_every_round():
    probabilities, targets, offsets, ddi = _case(6, patients=9)
    scores = metrics.score_visits(probabilities, targets, ddi)
    got = metrics.intervals(scores, offsets, rounds=25, level=0.9, seed=2)
    rng = np.random.default_rng(2)
    drawn = []
    for chosen in rng.integers(9, size=(25, 9)):
        rows = np.concatenate([np.arange(offsets[p], offsets[p + 1]) for p in chosen])
        lengths = [offsets[p + 1] - offsets[p] for p in chosen]
        again = np.concatenate([[0], np.cumsum(lengths)])
        drawn.append(_plain(probabilities[rows], targets[rows], again, ddi, 0.5))
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0)
    np.testing.assert_allclose(list(got.low.as_dict().values()), low)
    np.testing.assert_allclose(list(got.high.as_dict().values()), high)
    assert got.as_dict()["prauc"] == [got.low.prauc, got.high.prauc]


def test_metrics_from_sums_are_those_of_aggregate():
    probabilities, targets, offsets, ddi = _case(7)
    scores = metrics.score_visits(probabilities, targets, ddi)
    found = metrics.from_sums(metrics.terms(scores, offsets).sum(axis=0))
    expected = list(metrics.aggregate(scores, offsets).as_dict().values())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_best_threshold_is_the_best_of_a_plain_search():
    probabilities, targets, offsets, ddi = _case(4, patients=30)
    tried = {
        t: metrics.evaluate(probabilities, targets, offsets, ddi, t).jaccard
        for t in metrics.THRESHOLDS
    }
    threshold, jaccard = metrics.best_threshold(probabilities, targets, offsets)
    assert jaccard == pytest.approx(max(tried.values()))
    assert threshold == min(t for t, value in tried.items() if value == max(tried.values()))


def test_of_equal_thresholds_the_lowest_is_best():
    probabilities, targets = np.array([[0.9, 0.1]]), np.array([[True, False]])
    found = metrics.best_threshold(probabilities, targets, np.array([0, 1]), (0.05, 0.2, 0.6))
    assert found == (0.2, 1.0)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 5], [0, 2, 4]])
def test_offsets_that_do_not_cover_the_visits_are_refused(offsets):
    scores = metrics.score_visits(np.ones((5, 2)), np.ones((5, 2), bool), np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="patient_offsets"):
        metrics.aggregate(scores, np.array(offsets))


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        metrics.score_visits(np.ones((5, 2)), np.ones((5, 3), bool), np.zeros((2, 2), bool))
