"""`jobs/train.py` on a small synthetic cohort, with a graph without edges."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import psutil
import pytest
from omegaconf import OmegaConf

import models
from cafemed import artifacts, cohort, config, graphs, paths
from cafemed.codes import node_name
from cafemed.event_files import read
from cafemed.training import FitConfig

SMALL = [
    "name=small",
    "data.generator.num_patients=60",
    "data.generator.num_visits=140",
    "data.generator.num_diagnoses=40",
    "data.generator.num_procedures=20",
    "data.generator.num_medications=15",
    "data.generator.diagnoses_per_visit=6",
    "data.generator.medications_per_visit=5",
    "data.generator.effect_draws=10",
]
TRAIN = ["name=small", "model.dimension=8", "train.epochs=3", "train.batch_size=16"]


def command(job, *arguments):
    return [sys.executable, str(paths.PROJECT_DIR / "jobs" / f"{job}.py"), *arguments]


def environment(root):
    return os.environ | {"CAFEMED_HOME": str(root), "OMP_NUM_THREADS": "1"}


def run(root, job, *arguments):
    return subprocess.run(
        command(job, *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=root,
        env=environment(root),
    )


def write_graph(experiment):
    """No edges, and effects of zero: training does not mind."""
    patients = cohort.load(experiment / "cohort")
    codes = tuple(
        node_name(kind, code)
        for kind in ("diagnosis", "procedure")
        for code in patients.vocabularies[kind]
    )
    medications = tuple(node_name("medication", c) for c in patients.vocabularies["medication"])
    effect = np.zeros((len(codes), len(medications)), np.float32)
    none = np.zeros(0, np.int32)
    floats = none.astype(np.float32)
    graph = graphs.CausalGraph(
        codes, none, none, none.astype(bool), floats, none.astype(np.int64), floats
    )
    sources = {"cohort": patients.fingerprint}
    with artifacts.new_folder(experiment / "graph", "graph", sources, {}) as (folder, _):
        graphs.write_graph(graph, folder / "graph.parquet")
        effects = graphs.EffectTable.known(codes, medications, effect, effect, "raw")
        graphs.write_effects(effects, folder / "effects.npz")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    prepared = run(folder, "prepare", *SMALL)
    assert prepared.returncode == 0, prepared.stderr
    write_graph(paths.experiment_dir(folder, "small"))
    return folder


@pytest.fixture(scope="module")
def experiment(root):
    return paths.experiment_dir(root, "small")


def test_the_yaml_spells_out_the_defaults():
    written = OmegaConf.to_container(OmegaConf.load(paths.CONF_DIR / "train" / "default.yaml"))
    assert written == dataclasses.asdict(FitConfig())


def test_graphdiffmeds_preset_is_what_its_paper_states():
    written = OmegaConf.to_container(OmegaConf.load(paths.CONF_DIR / "train" / "graphdiffmed.yaml"))
    assert set(written) == {field.name for field in dataclasses.fields(FitConfig)}
    assert config.from_mapping(FitConfig, written, "train") == FitConfig(
        epochs=20,
        batch_size=1,
        learning_rate=5e-4,
        weight_decay=2 * 0.005,  # the gradient of 0.005 times the squared weights
        objective="sum",
        ddi_target=0.06,
        ddi_coefficient=2.5,
        ddi_weight=0.0005,
        margin_weight=0.0,
    )


def test_a_run_writes_its_artifact_and_a_second_one_is_skipped(root, experiment):
    first = run(root, "train", *TRAIN)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0].split() == ["root", str(root)]
    assert sum(line.startswith("epoch") for line in first.stdout.splitlines()) == 3
    manifest = artifacts.verify(experiment / "fit", "fit")
    assert set(manifest.files) == {
        "config.json",
        "history.json",
        "metrics.json",
        "model.safetensors",
    }
    assert manifest.inputs.keys() == {"cohort", "graph"}
    assert len(json.loads((experiment / "fit" / "history.json").read_text())) == 3
    measured = json.loads((experiment / "fit" / "metrics.json").read_text())
    assert 0 < measured["test"]["metrics"]["prauc"] < 1
    assert measured["temperature"] != 1
    losses = [measured["validation"]["calibration"][at]["log_loss"] for at in ("before", "after")]
    assert losses[1] < losses[0]
    assert not list((experiment / "checkpoints").iterdir())
    assert event_steps(experiment) == [1, 2, 3]

    before = (experiment / "fit" / "manifest.json").stat().st_mtime_ns
    second = run(root, "train", *TRAIN)
    assert second.returncode == 0
    assert "unchanged, skipped" in second.stdout
    assert (experiment / "fit" / "manifest.json").stat().st_mtime_ns == before
    assert not list(root.glob("*.log"))


def event_steps(experiment):
    files = (experiment / "tensorboard" / "fit").iterdir()
    (path,) = [path for path in files if path.stat().st_size]
    found = [(event.step, value.tag) for event in read(path) for value in event.summary.value]
    assert [tag for _, tag in found].count("_hparams_/session_end_info") == 1
    return [step for step, tag in found if tag == "validation/jaccard"]


def test_bad_configuration_is_one_line_and_status_2(root):
    result = run(root, "train", *TRAIN, "train.epochs=0", "train.seed=x")
    assert result.returncode == 2
    assert result.stderr == (
        "error: train.epochs: expected a value in [1, inf], got 0; "
        "train.seed: expected int, got 'x'\n"
    )


def test_training_that_diverges_is_one_line_and_leaves_no_artifact(root, experiment):
    result = run(root, "train", *TRAIN, "train.learning_rate=1e30")
    assert result.returncode == 2
    assert "try a train.learning_rate below 1e+30" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not [path for path in experiment.iterdir() if path.name.startswith(".fit")]


def test_missing_stages_are_named(root):
    result = run(root, "train", "name=nothing")
    assert result.returncode == 2
    assert "nothing/cohort/manifest.json: expected the manifest of a cohort" in result.stderr


# Runs the job in its arguments, which kills itself when it cuts out a given training batch.
KILLED = """
import os, runpy, signal, sys
from cafemed import stepping
sys.argv.pop(0)
left, collate = int(sys.argv.pop(1)), stepping.collate
def fatal(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return collate(*arguments)
stepping.collate = fatal
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", models.NAMES)
@pytest.mark.parametrize(("epochs_done", "batches_done"), [(1, 3), (3, 11)])
def test_killed_within_an_epoch_and_run_again_it_ends_with_the_same_weights(
    root, experiment, model, epochs_done, batches_done
):
    arguments = [f"model={model}", *TRAIN, "train.epochs=6", "train.batch_size=2"]
    arguments += [f"train.seed={epochs_done}"]
    whole = run(root, "train", *arguments)
    assert whole.returncode == 0, whole.stderr
    expected = (experiment / "fit" / "model.safetensors").read_bytes()
    patients = int(re.search(r"(\d+) training", whole.stdout)[1])
    batches = -(-patients // 2)
    assert batches_done < batches - 1

    # A forced run is killed in the middle of an epoch; the run after it is not forced.
    fatal = epochs_done * batches + batches_done + 1
    script, *rest = command("train", *arguments, "force=true")[1:]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, script, str(fatal), *rest],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        env=environment(root) | {"PYTHONPATH": str(paths.PROJECT_DIR)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert sum(line.startswith("epoch") for line in killed.stdout.splitlines()) == epochs_done
    # What the whole run left would make the next one skip.
    shutil.rmtree(experiment / "fit")

    resumed = run(root, "train", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from the checkpoint" in resumed.stdout
    done = sum(line.startswith("epoch") for line in resumed.stdout.splitlines())
    assert done == 6 - epochs_done
    assert event_steps(experiment) == [1, 2, 3, 4, 5, 6]
    assert (experiment / "fit" / "model.safetensors").read_bytes() == expected


def tracked(root, query):
    with contextlib.closing(sqlite3.connect(root / "mlflow" / "mlflow.db")) as store:
        return store.execute(query).fetchall()


@pytest.mark.slow
def test_a_run_in_mlflow_goes_on_when_it_was_killed_and_is_there_once(root, experiment):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (the extra `tracking`)")
    arguments = [*TRAIN, "train.epochs=6", "train.batch_size=2", "train.seed=77", "tracking=mlflow"]
    script, *rest = command("train", *arguments)[1:]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, script, "100", *rest],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(root) | {"PYTHONPATH": str(paths.PROJECT_DIR)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(root, "train", *arguments)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "going on from the checkpoint" in resumed.stdout
    assert "tracking  a run in cafemed/small of sqlite:///" in resumed.stdout
    assert tracked(root, "select name, status from runs") == [("small", "FINISHED")]
    history = json.loads((experiment / "fit" / "history.json").read_text())
    query = "select step, value from metrics where key='{}' order by step"
    for key, wanted in (
        ("validation/jaccard", [(e["epoch"], e["metrics"]["jaccard"]) for e in history]),
        ("train/loss", [(e["epoch"], e["losses"]["loss"]) for e in history]),
    ):
        assert tracked(root, query.format(key)) == wanted
    measured = json.loads((experiment / "fit" / "metrics.json").read_text())
    found = tracked(root, query.format("served/test/prauc"))
    assert found == [(6, measured["test"]["metrics"]["prauc"])]
    params = dict(tracked(root, "select key, value from params"))
    assert params["train.seed"] == "77"
    assert params["model.name"] == "cafemed"
    manifest = artifacts.verify(experiment / "fit", "fit")
    assert params["fingerprint.cohort"] == manifest.inputs["cohort"]
    names = {path.name for path in (root / "mlflow" / "artifacts").rglob("*") if path.is_file()}
    assert names == {"config.json", "history.json", "manifest.json", "metrics.json"}

    again = run(root, "train", *arguments)
    assert "unchanged, skipped" in again.stdout
    assert "tracking" not in again.stdout
    redone = run(root, "train", *arguments, "force=true", "tensorboard=false")
    assert redone.returncode == 0, redone.stderr
    assert tracked(root, "select status from runs") == [("FINISHED",)] * 2
    with_uri = run(root, "train", *TRAIN, "tracking.uri=/x")
    assert with_uri.stderr == "error: tracking: uri and experiment: only with tracking=mlflow\n"


def test_another_model_is_trained_by_its_name(root, experiment):
    shutil.rmtree(experiment / "tensorboard", ignore_errors=True)
    arguments = ["model=causalmed", "tensorboard=false", *TRAIN]
    finished = run(root, "train", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "causalmed on" in finished.stdout
    artifacts.verify(experiment / "fit", "fit")
    written = json.loads((experiment / "fit" / "config.json").read_text())
    assert written["model"]["name"] == "causalmed"
    assert not (experiment / "tensorboard").exists()


WORKERS = [*TRAIN, "model.dropout=0", "device=cpu"]


def losses(experiment):
    written = json.loads((experiment / "fit" / "history.json").read_text())
    return [epoch["losses"] | epoch["metrics"] for epoch in written]


@pytest.mark.slow
def test_two_workers_give_the_losses_of_one_process(root, experiment):
    one = run(root, "train", *WORKERS)
    assert one.returncode == 0, one.stderr
    expected = losses(experiment)
    two = run(root, "train", *WORKERS, "num_workers=2")
    assert two.returncode == 0, two.stderr
    assert two.stderr == ""
    assert "cafemed by 2 workers" in two.stdout
    assert "a local Ray: 2 CPUs; 2 workers on cpu" in two.stdout
    assert not list((experiment / "checkpoints").iterdir())
    for got, wanted in zip(losses(experiment), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    again = run(root, "train", *WORKERS, "num_workers=2")
    assert "unchanged, skipped" in again.stdout


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_too(root, experiment):
    process = subprocess.Popen(
        command("train", *WORKERS, "num_workers=2", "train.epochs=5000", "train.patience=5000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(root),
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("RayTrainWorker" in " ".join(p.cmdline()) for p in started)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted; nothing half-written was left\n"
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left
    # The epochs so far are kept, and nothing else beside them.
    (folder,) = (experiment / "checkpoints").iterdir()
    assert {path.name[:6] for path in folder.iterdir()} == {"checkp", "state-"}


@pytest.mark.slow
def test_more_workers_than_the_machine_has_cpus_are_refused(root):
    result = run(root, "train", *WORKERS, "num_workers=1000", "train.epochs=4")
    assert result.returncode == 2
    assert "error: num_workers: there is no room for 1000 workers of 1 CPUs" in result.stderr


@pytest.mark.slow
def test_a_number_of_workers_that_is_none_is_refused(root):
    result = run(root, "train", *TRAIN, "num_workers=0")
    assert result.returncode == 2
    assert result.stderr == "error: num_workers: expected a value in [1, inf], got 0\n"
