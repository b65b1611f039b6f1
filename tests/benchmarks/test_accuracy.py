"""What benchmarks/accuracy.py and batch_size.py compute: intervals, choices, runs that are kept."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import accuracy, batch_size
from benchmarks.recommenders import scores, workers
from benchmarks.recommenders.runs import Bench, Run, Task
from benchmarks.recommenders.scores import Sets
from benchmarks.recommenders.variants import CEILING, REFERENCE, Learner, Variant, quick, variants
from cafemed import artifacts, cohort, graphs, metrics, paths, training
from cafemed.codes import node_name

SMALL = ["num_patients=60", "num_visits=140", "num_diagnoses=40", "num_procedures=20"]
SMALL += ["num_medications=15", "diagnoses_per_visit=6", "medications_per_visit=5"]
TRAINED = Learner("cafemed", (("model.dimension", 8), ("train.epochs", 2), ("train.patience", 1)))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A synthetic cohort with a graph that has no edges."""
    root = tmp_path_factory.mktemp("root")
    generator = [f"data.generator.{option}" for option in (*SMALL, "effect_draws=10")]
    prepare = [sys.executable, str(paths.PROJECT_DIR / "jobs" / "prepare.py"), *generator]
    subprocess.run([*prepare, f"paths.root={root}"], check=True, capture_output=True, timeout=120)
    folder = paths.experiment_dir(root, "default")
    people = cohort.load(folder / "cohort")
    kinds = ("diagnosis", "procedure")
    codes = tuple(node_name(k, code) for k in kinds for code in people.vocabularies[k])
    medications = tuple(node_name("medication", c) for c in people.vocabularies["medication"])
    ints, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    graph = graphs.CausalGraph(
        codes, ints, ints, ints.astype(bool), floats, ints.astype(np.int64), floats
    )
    effect = np.full((len(codes), len(medications)), 0.1, np.float32)
    table = graphs.EffectTable.known(codes, medications, effect, effect, "raw")
    sources = {"cohort": people.fingerprint}
    with artifacts.new_folder(folder / "graph", "graph", sources, {}) as (target, _):
        graphs.write_graph(graph, target / "graph.parquet")
        graphs.write_effects(table, target / "effects.npz")
    return folder


@pytest.fixture
def bench(experiment, tmp_path):
    return Bench(tmp_path / "work", experiment)


def drawn_sets(seed=0, patients=23, size=9):
    """Targets of patients with one to four visits, some without any, and predictions for them."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, patients))])
    targets = rng.random((offsets[-1], size)) < 0.3
    ddi = np.triu(rng.random((size, size)) < 0.3, 1)
    noise = [rng.random(targets.shape) for _ in range(4)]
    return Sets(targets, offsets, ddi | ddi.T), [0.6 * targets + 0.6 * x for x in noise]


def drawn_patients(sets, probabilities, patients):
    """The metrics of these patients, each as often as named, from their visits written out."""
    rows = [np.arange(sets.patient_offsets[p], sets.patient_offsets[p + 1]) for p in patients]
    offsets = np.concatenate([[0], np.cumsum([len(of_patient) for of_patient in rows])])
    chosen = np.concatenate(rows)
    found = metrics.evaluate(probabilities[chosen], sets.targets[chosen], offsets, sets.ddi, 0.5)
    return np.array(dataclasses.astuple(found))


def test_terms_add_up_to_the_metrics():
    sets, (probabilities, *_) = drawn_sets()
    terms = sets.terms(probabilities, 0.5)
    everyone = drawn_patients(sets, probabilities, range(len(terms)))
    np.testing.assert_allclose(metrics.from_sums(terms.sum(axis=0)), everyone, rtol=1e-12)
    nothing = metrics.from_sums(sets.terms(np.zeros_like(probabilities), 0.5).sum(axis=0))
    assert nothing[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]


def test_a_round_is_the_mean_over_drawn_seeds_on_drawn_patients():
    sets, predictions = drawn_sets()
    size, rounds = len(sets.patient_offsets) - 1, 40
    of_seeds = [sets.terms(p, 0.5) for p in predictions[:3]]
    found = scores.sample(of_seeds, number=2, rounds=rounds, seed=5)
    patients = np.random.default_rng(5).integers(size, size=(rounds, size))
    seeds = np.random.default_rng((5, 2)).integers(3, size=(rounds, 3))
    for i in range(rounds):
        plain = [drawn_patients(sets, predictions[s], patients[i]) for s in seeds[i]]
        np.testing.assert_allclose(found.rounds[i], np.mean(plain, axis=0), rtol=1e-10)
    everyone = [drawn_patients(sets, p, range(size)) for p in predictions[:3]]
    np.testing.assert_allclose(found.value, np.mean(everyone, axis=0), rtol=1e-12)
    low, high = found.interval()
    np.testing.assert_allclose(high, np.percentile(found.rounds, 97.5, axis=0))
    assert (low <= found.value).all()


def test_p_values_count_the_rarer_sign_of_paired_differences():
    sets, predictions = drawn_sets()
    one, other = (
        scores.sample([sets.terms(p, 0.5)], number, rounds=199)
        for number, p in enumerate(predictions[:2])
    )
    patients = np.random.default_rng(0).integers(23, size=(199, 23))
    differences = [
        drawn_patients(sets, predictions[0], p) - drawn_patients(sets, predictions[1], p)
        for p in patients
    ]
    above = sum(d[0] >= -1e-12 for d in differences)
    below = sum(d[0] <= 1e-12 for d in differences)
    assert one.p_values(other)[0] == pytest.approx(min(2 * (1 + min(above, below)) / 200, 1))
    assert one.p_values(one).tolist() == [1.0] * 5
    perfect = scores.sample([sets.terms(sets.targets.astype(float), 0.5)], 7, rounds=199)
    assert perfect.p_values(one)[0] == pytest.approx(2 / 200)
    share = one.share_of(perfect)
    assert share[1] < share[0] < share[2] < 1


def test_every_variant_has_a_name_and_options_that_exist():
    found = variants()
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names)
    assert {CEILING, REFERENCE} <= set(names)
    for variant in (*found, *quick(found)):
        for learner in variant.candidates():
            settings = learner.settings()
            assert all(settings[key] == value for key, value in learner.changes)
    published = next(v for v in found if v.name == "cafemed published w/o both").learner
    assert published.section("model") == {
        "direct": "none",
        "use_cwg": False,
        "use_charm": False,
    }


def test_a_finished_run_is_found_again_and_not_trained_again(bench, monkeypatch):
    assert "validation Jaccard" in bench.do(Task("one", TRAINED, 0))
    run = bench.load(TRAINED, 0)
    targets, _ = bench.sets("test")
    assert run.test.shape == targets.shape
    assert run.record["epochs"] == 2
    assert len(run.record["history"]) == 2
    assert not list(bench.work.glob("checkpoints/*"))
    assert run.record["cpu_s"] > 0

    def refuse(*_arguments, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", refuse)
    assert "kept" in bench.do(Task("another name", TRAINED, 0))
    assert "kept" in Bench(bench.work, bench.folder).do(Task("one", TRAINED, 0))
    for other in (
        Task("one", TRAINED, 1),
        Task("one", TRAINED.changed((("model.dropout", 0.3),)), 0),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            bench.do(other)


def test_an_interrupted_run_goes_on_and_says_no_time(bench, monkeypatch):
    learner = TRAINED.changed((("train.patience", 3),))
    done = []

    def fit(*arguments, on_epoch, **options):
        def interrupt(report):
            on_epoch(report)
            done.append(report.epoch)
            if len(done) == 1:
                raise KeyboardInterrupt

        return original(*arguments, on_epoch=interrupt, **options)

    original = training.fit
    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        bench.do(Task("one", learner, 0))
    assert bench.find(learner, 0) is None
    bench.do(Task("one", learner, 0))
    assert done == [1, 2]
    record = bench.load(learner, 0).record
    assert record["epochs"] == 2
    assert record["cpu_s"] is None


def test_runs_of_a_version_with_fewer_options_are_those_that_do_the_same(bench):
    published = TRAINED.changed((("model.direct", "none"),))
    bench.do(Task("one", published, 0))
    path = next(bench.work.glob("runs/*/run.json"))
    record = json.loads(path.read_text())
    for option in ("model.direct", "train.objective"):
        del record["settings"][option]
    path.write_text(json.dumps(record))
    assert bench.find(published, 0) == path.parent
    assert bench.find(TRAINED, 0) is None
    assert bench.find(published.changed((("train.objective", "sum"),)), 0) is None
    assert bench.find(published.changed((("model.direct_pace", 3.0),)), 0) == path.parent
    path.write_text(json.dumps(record | {"data": "of another cohort"}))
    assert bench.find(published, 0) is None
    del record["settings"]["model.dropout"]
    path.write_text(json.dumps(record))
    assert bench.find(published, 0) is None


def test_predictions_of_plain_learners_are_kept_too(bench):
    targets, _ = bench.sets("validation")
    for kind in (CEILING, "most_frequent", "last_visit", "logistic_regression", "noisy_or"):
        changes = (("train.epochs", 2),) if kind == "noisy_or" else ()
        bench.do(Task(kind, Learner(kind, changes), 0))
        run = bench.load(Learner(kind, changes), 0)
        assert run.validation.shape == targets.shape
        assert 0 <= run.validation.min() <= run.validation.max() <= 1


def test_unknown_learners_are_refused(bench):
    with pytest.raises(ValueError, match="nonsense"):
        bench.do(Task("nonsense", Learner("nonsense"), 0))


def test_the_candidate_with_the_best_validation_score_is_chosen(bench, monkeypatch):
    targets, _ = bench.sets("validation")
    wrong = np.zeros(targets.shape, np.float32)
    # All at 0.3 and above: nothing at 0.5, everything right at the threshold 0.3.
    low = np.where(targets, 0.3, 0.1).astype(np.float32)
    half = np.where(targets & (np.arange(targets.shape[1]) % 2 == 0), 0.9, 0.1).astype(np.float32)
    kept = {0.1: wrong, 1.0: half, 2.0: low}

    def load(_bench, learner, _seed):
        found = kept.get(dict(learner.changes)["learner.strength"])
        return None if found is None else Run(found, found, {})

    monkeypatch.setattr(Bench, "load", load)
    search = tuple((("learner.strength", strength),) for strength in kept)
    variant = Variant("l1", Learner("logistic_regression"), search)
    chosen = [dict(accuracy.choose(bench, variant, t).changes) for t in (False, True)]
    assert chosen == [{"learner.strength": 1.0}, {"learner.strength": 2.0}]
    missing = dataclasses.replace(variant, search=(*search, (("learner.strength", 9.0),)))
    assert accuracy.choose(bench, missing, False) is None


def test_tables_and_rows(bench, capsys, monkeypatch):
    monkeypatch.setattr(scores.intervals, "ROUNDS", 50)
    wanted = [
        Variant(CEILING, Learner(CEILING), seeded=False),
        Variant("most frequent", Learner("most_frequent"), seeded=False),
        Variant(REFERENCE, TRAINED),
        Variant("absent", TRAINED.changed((("model.dropout", 0.1),))),
    ]
    for variant in wanted[:3]:
        for seed in (0, 1) if variant.seeded else (0,):
            bench.do(Task(variant.name, variant.learner, seed))
    rows = accuracy.report(bench, wanted, seeds=2, seed=0)
    of = {(row["case"], row["metric"]): row["value"] for row in rows}
    assert of["ceiling", "jaccard_share_of_ceiling"] == 1
    assert of["ceiling", "jaccard"] >= of["most frequent", "jaccard"]
    assert of["cafemed", "seeds"] == 2
    assert of["cafemed", "epochs_ran_out"] == 2 - sum(
        bench.load(TRAINED, seed).record["best_epoch"] == 1 for seed in (0, 1)
    )
    assert ("cafemed", "jaccard_p_value") not in of
    targets, offsets = bench.sets("test")
    runs_of = [bench.load(TRAINED, seed).test for seed in (0, 1)]
    ddi = bench.given.inputs.ddi
    plain = [metrics.evaluate(run, targets, offsets, ddi).prauc for run in runs_of]
    assert of["cafemed", "prauc"] == pytest.approx(np.mean(plain))
    assert "absent: no runs" in capsys.readouterr().out


def test_batch_sizes_are_compared_by_the_way_to_a_score():
    def history(scores_of_epochs, seconds):
        return [{"metrics": {"jaccard": x}, "cpu_s": seconds} for x in scores_of_epochs]

    found = batch_size.figures(
        [history([0.1, 0.5, 0.6, 0.55], 2.0), history([0.3, 0.597, 0.58], 4.0)], 0.596
    )
    assert found["best_jaccard"] == pytest.approx(0.5985)
    assert found["epochs_to_own_best"] == 2.5
    assert found["cpu_s_to_own_best"] == 7
    assert found["epochs_to_near_best"] == 2.5
    assert found["cpu_s_to_near_best"] == 7
    assert "cpu_s_to_near_best" not in batch_size.figures([history([0.1, 0.2], 1.0)], 0.3)
    sizes = [dict(v.learner.changes)["train.batch_size"] for v in batch_size.variants(quick=False)]
    assert sizes == [128, 32, 4, 1]


@pytest.mark.slow
def test_workers_share_the_tasks_and_one_that_fails_is_told(experiment, tmp_path):
    learners = [TRAINED.changed((("train.learning_rate", r),)) for r in (0.001, 0.002, 0.003)]
    tasks = [Task("one", learner, 0) for learner in learners]
    workers.do_all(tmp_path, experiment, tasks, 2)
    bench = Bench(tmp_path, experiment)
    assert all(bench.find(learner, 0) for learner in learners)
    nonsense = [Task("nonsense", Learner("nonsense"), 0)]
    with pytest.raises(RuntimeError, match="1 of 1 processes failed"):
        workers.do_all(tmp_path, experiment, nonsense, 2)
