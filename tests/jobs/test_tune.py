"""`jobs/tune.py` and `jobs/evaluate.py` on a small synthetic cohort, as a user runs them."""

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
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import models
from cafemed import (
    artifacts,
    bundle,
    bundle_files,
    checkpoints,
    cohort,
    findings,
    graphs,
    paths,
    registry,
    sweep,
)
from cafemed.codes import node_name
from cafemed.ledger import Ledger

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
TUNE = ["name=small", "search=smoke", "model.dimension=8", "train.epochs=2"]
FEW = [*TUNE, "search.num_samples=2"]


def environment(root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"CAFEMED_HOME": str(root), "OMP_NUM_THREADS": "1", "TMPDIR": str(root / "tmp")}


def start(
    root: Path, job: str, *arguments: str, through: Sequence[str] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *through, str(paths.PROJECT_DIR / "jobs" / f"{job}.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment(root),
    )


def run(root: Path, job: str, *arguments: str, through: Sequence[str] = ()) -> tuple[int, str, str]:
    process = start(root, job, *arguments, through=through)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    # A short path: Ray's sockets lie below the temporary folder.
    with tempfile.TemporaryDirectory(prefix="cm") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        status, _, err = run(folder, "prepare", *SMALL)
        assert status == 0, err
        write_graph(paths.experiment_dir(folder, "small"))
        yield folder


@pytest.fixture(scope="module")
def experiment(root: Path) -> Path:
    return paths.experiment_dir(root, "small")


def write_graph(experiment: Path) -> None:
    """No edges and no effects: a sweep does not mind."""
    patients = cohort.load(experiment / "cohort")
    kinds = ("diagnosis", "procedure")
    codes = tuple(node_name(kind, c) for kind in kinds for c in patients.vocabularies[kind])
    medications = tuple(node_name("medication", c) for c in patients.vocabularies["medication"])
    effect = np.zeros((len(codes), len(medications)), np.float32)
    none = np.zeros(0, np.int32)
    floats = none.astype(np.float32)
    graph = graphs.CausalGraph(codes, none, none, none > 0, floats, none.astype(np.int64), floats)
    sources = {"cohort": patients.fingerprint}
    with artifacts.new_folder(experiment / "graph", "graph", sources, {}) as (folder, _):
        graphs.write_graph(graph, folder / "graph.parquet")
        effects = graphs.EffectTable.known(codes, medications, effect, effect, "raw")
        graphs.write_effects(effects, folder / "effects.npz")


def test_a_sweep_is_published_evaluated_and_not_run_twice(root: Path, experiment: Path):
    status, out, err = run(root, "tune", *FEW)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["root", str(root)]
    assert sum(line.startswith("trial") for line in lines) == 2
    assert len(lines) == 11  # nothing of Ray's own
    manifest = artifacts.verify(experiment / "sweep", "sweep")
    assert {"sweep.parquet", "best.json", "bundle/manifest.json"} <= set(manifest.files)
    assert manifest.report["trials"] == 2
    assert pq.read_table(experiment / "sweep" / "sweep.parquet").num_rows == 2
    home = paths.registry_dir(root, "small")
    assert registry.resolve_version(home, "production") == 1
    assert registry.resolve_version(home, "candidate") == 1
    made_by = registry.versions(home)[0].record["produced_by"]
    assert made_by["sweep"] == manifest.fingerprint
    assert not (experiment / "trials").exists()
    events = (experiment / "tensorboard" / "sweep").glob("trial-*/events.out.tfevents.*")
    assert {path.parent.name for path in events} == {"trial-00000", "trial-00001"}

    status, out, _ = run(root, "tune", *FEW)
    assert status == 0
    assert "unchanged, skipped" in out
    assert len(registry.versions(home)) == 1
    check_the_reports_command(root, experiment)

    status, out, err = run(root, "evaluate", "name=small")
    assert (status, err) == (0, "")
    report = json.loads((experiment / "evaluation" / "report.json").read_text())
    ceiling = report["ceiling"]["at_half"]["prauc"]
    assert 0 < report["model"]["test"]["metrics"]["prauc"] < ceiling
    assert set(report["baselines"]) == {"most frequent", "last visit"}
    assert "last visit" in out
    served = bundle.load(registry.resolve(home, "production"))
    measured = report["model"]
    assert measured["temperature"] == served.preprocessing.temperature != 1
    assert measured["validation"]["metrics"] == served.metrics["validation"]
    assert measured["validation"]["calibration"] == served.metrics["validation_calibration"]
    check_card(root, experiment, home)
    tested = json.loads((experiment / "sweep" / "test.json").read_text())
    assert [found["metrics"] for found in tested.values()] == [measured["test"]["metrics"]]

    metrics = registry.resolve(home, "production") / "metrics.json"
    metrics.write_bytes(metrics.read_bytes().replace(b"0", b"9", 1))
    status, out, err = run(root, "evaluate", "name=small")
    assert status == 2
    assert "metrics.json: expected SHA-256" in err
    assert err.count("\n") == 1
    assert "unchanged" not in out
    assert_nothing_runs_in(root / "tmp")


def check_the_reports_command(root: Path, experiment: Path) -> list[str]:
    """It gives the chosen trial's epochs and model to the last digit; its arguments."""
    page = (experiment / "sweep" / "report.html").read_text()
    data = re.search(r'<script id="data" [^>]*>(.*?)</script>', page)
    assert data
    arguments: list[str] = json.loads(data[1])["command"]
    rows = pq.read_table(experiment / "sweep" / "sweep.parquet").to_pylist()
    (chosen,) = (row for row in rows if row["chosen"])
    check_trained_again(root, experiment, arguments, chosen["history"])
    epochs = json.loads((experiment / "fit" / "history.json").read_text())
    best = [epoch["metrics"] for epoch in epochs if epoch["best"]][-1]
    assert best == {name: chosen[name] for name in sweep.METRICS}
    weights = safetensors.torch.load_file(experiment / "fit" / "model.safetensors")
    published = bundle.load(experiment / "sweep" / "bundle").weights
    assert weights.keys() == published.keys()
    assert all(torch.equal(weights[name], published[name]) for name in weights)
    return arguments


def check_trained_again(
    root: Path, experiment: Path, arguments: list[str], history: list[dict[str, Any]]
) -> None:
    """Runs a report's command as a user pastes it: the fit has these epochs, to the last digit."""
    here = environment(root)
    done = subprocess.run(
        ["sh", "-c", " ".join(arguments)],
        cwd=paths.PROJECT_DIR,
        env=here | {"PATH": f"{Path(sys.executable).parent}:{here['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads((experiment / "fit" / "history.json").read_text())
    assert [
        {
            "epoch": epoch["epoch"],
            **{f"train_{name}": value for name, value in epoch["losses"].items()},
            **epoch["metrics"],
        }
        for epoch in content
    ] == [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]


def test_every_bad_entry_of_a_space_is_reported_at_once(root: Path):
    status, out, err = run(
        root,
        "tune",
        *TUNE,
        "search.space.model.dropout.high=2.0",
        "search.space.train.ddi_coefficient.type=real",
        "+search.space.train.momentum={type: float, low: 0, high: 1}",
    )
    assert status == 2
    assert err.startswith("error: search.space.model.dropout: expected a value in [0, 1), got 2.0")
    for part in ("search.space.train.ddi_coefficient.type", "search.space.train.momentum"):
        assert part in err
    assert err.count("\n") == 1
    assert "ray" not in out


def check_card(root: Path, experiment: Path, home: Path) -> None:
    """It is in the evaluation and in the registry, and comes back there if it was lost."""
    made = json.loads((experiment / "evaluation" / "model_card.json").read_text())
    assert registry.read_card(home, 1) == made
    assert made["model"]["version"] == 1
    assert made["training"]["train"]["epochs"] == 2
    assert made["training"]["calibration"] == {"temperature": "validation", "threshold": "fixed"}
    assert made["data"]["fingerprints"]["cohort"] == cohort.load(experiment / "cohort").fingerprint
    people = cohort.load(experiment / "cohort").patient_ids
    for path in (*(home / "cards").iterdir(), *(experiment / "evaluation").iterdir()):
        words = set(re.findall(r"[\w-]+", path.read_text()))
        assert not {name for name in people if len(name) > 4} & words
    (home / "cards" / "0001.json").unlink()
    status, out, err = run(root, "evaluate", "name=small")
    assert (status, err) == (0, "")
    assert "unchanged, skipped" in out
    assert registry.read_card(home, 1) == made


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("tune", ["name=none"], "cohort/manifest.json: expected the manifest of a cohort"),
        ("tune", ["name=none", "promote=maybe"], "promote: expected bool, got 'maybe'"),
        (
            "tune",
            ["name=none", "calibration.threshold=best"],
            "expected one of 'fixed', 'validation'",
        ),
        ("evaluate", ["name=none"], "no version is promoted to 'production' yet"),
        ("evaluate", ["name=small", "version=best"], "expected a version number or one of"),
    ],
)
def test_what_is_missing_is_one_line(root: Path, job: str, arguments: list[str], message: str):
    status, _, err = run(root, job, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_registry_that_cannot_be_used_is_refused_before_the_first_trial(
    root: Path, experiment: Path
):
    place = ["paths.registry=foo://x", "search.seed=7"]
    status, out, err = run(root, "tune", *FEW, *place)
    assert (status, err.count("\n")) == (2, 1), err
    assert "foo://x/small: no such kind of store" in err
    assert "trial" not in out
    assert not (experiment / "trials").exists()


def test_a_model_of_another_cohort_is_refused(root: Path, experiment: Path, tmp_path: Path):
    folder = tmp_path / "bundle"
    weights = tmp_path / "weights"
    weights.write_text("w")
    home = paths.registry_dir(root, "small")
    sources = {"cohort": "0" * 64, "weights": artifacts.sha256_of(weights)}
    with artifacts.new_folder(folder, bundle_files.STAGE, sources, {}) as (partial, _):
        for name in bundle_files.FILES:
            (partial / name).write_text("w")
    version = registry.publish(home, folder, {})
    status, _, err = run(root, "evaluate", "name=small", f"version={version}")
    assert status == 2
    assert "made from an input with fingerprint 000000000000" in err
    assert (experiment / "cohort").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("marker", "delay_s"), [("tune", 1.0), ("ray", 0.5), ("trial", 0.2)])
def test_an_interrupt_leaves_nothing_running_and_nothing_half_written(
    root: Path, experiment: Path, signal_number: int, marker: str, delay_s: float
):
    process = start(root, "tune", *TUNE, "search.num_samples=500", "search.seed=5", "force=true")
    before = (experiment / "sweep").exists()
    assert process.stdout
    for line in process.stdout:
        if line.startswith(marker):
            break
    time.sleep(delay_s)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *told, last = err.splitlines()
    assert last == "interrupted; nothing half-written was left"
    begun = (experiment / "trials" / "sweep.json").exists()
    command = f"python jobs/tune.py resume={experiment / 'trials'}"
    assert told == ([f"the sweep goes on with: {command}"] if begun else [])
    assert begun or marker == "tune"
    assert (experiment / "sweep").exists() == before
    assert not list(experiment.glob(".sweep*"))
    assert_nothing_runs_in(root / "tmp")
    shutil.rmtree(experiment / "trials", ignore_errors=True)


@pytest.mark.slow
def test_a_sweep_without_a_trial_within_the_limit_is_over_for_trackers_too(root: Path):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (the extra `tracking`)")
    shutil.copytree(paths.experiment_dir(root, "small"), paths.experiment_dir(root, "strict"))
    wanted = ["search.num_samples=1", "search.max_ddi_rate=0.0001", "tracking=mlflow"]
    for _ in range(2):  # run again, it says the same
        status, _, err = run(root, "tune", *TUNE, "name=strict", *wanted)
        assert (status, err.count("\n")) == (2, 1), err
        assert "no trial keeps a DDI rate of at most 0.0001" in err
        with contextlib.closing(sqlite3.connect(root / "mlflow" / "mlflow.db")) as store:
            found = store.execute("select status, count(*) from runs group by status").fetchall()
        assert found == [("FINISHED", 2)]
        sent = {path.name for path in (root / "mlflow" / "artifacts").rglob("*")}
        assert {"report.html", "best.json", "sweep.parquet"} <= sent


@pytest.mark.slow
def test_the_best_trial_is_trained_anew_and_that_model_is_what_is_evaluated(root: Path):
    source, folder = (paths.experiment_dir(root, name) for name in ("small", "again"))
    for stage in ("cohort", "graph"):
        shutil.copytree(source / stage, folder / stage)
    options = ["name=again", *FEW[1:]]
    status, _, err = run(root, "tune", *options)
    assert (status, err) == (0, "")
    status, out, err = run(root, "tune", *options, "retrain=true")
    assert (status, err) == (0, "")
    assert "unchanged, skipped" in out  # the sweep
    assert "version 0002 is candidate and production" in out
    made = artifacts.verify(folder / "retrained", "retrained")
    best = json.loads((folder / "sweep" / "best.json").read_text())
    assert (made.report["trial"], made.report["epochs"]) == (best["trial"], best["epoch"])
    assert "trained anew" in (folder / "sweep" / "report.html").read_text()
    status, _, err = run(root, "evaluate", "name=again")
    assert (status, err) == (0, "")
    card = json.loads((folder / "evaluation" / "model_card.json").read_text())
    assert card["training"]["retrained"] == made.report
    assert any("on the validation patients, too" in limit for limit in card["limits"])
    trial = bundle.load(folder / "sweep" / "bundle").metrics["validation"]["jaccard"]
    assert card["metrics"]["validation"]["values"]["jaccard"][0] == trial
    assert (folder / "sweep" / "test.json").exists()
    status, out, err = run(root, "tune", *options, "retrain=true")
    assert (status, err) == (0, "")
    assert out.count("unchanged, skipped") == 2
    status, out, _ = run(root, "tune", *options)
    assert "version 0001 is" not in out  # it was production; nobody asked for it again
    assert "trained anew" not in (folder / "sweep" / "report.html").read_text()


@pytest.mark.slow
def test_the_reports_command_trains_a_model_that_was_not_configured_again(root: Path):
    """With all its options, also those that no trial varied."""
    source, folder = (paths.experiment_dir(root, name) for name in ("small", "varied"))
    for stage in ("cohort", "graph"):
        shutil.copytree(source / stage, folder / stage)
    options = ["search=wide", "search.space.model.name.choices=[causalmed]", "train.epochs=3"]
    options += ["search.space.model.dimension.choices=[8,16]", "search.num_samples=2"]
    status, _, err = run(root, "tune", "name=varied", "model=cafemed", *options)
    assert (status, err) == (0, "")
    arguments = check_the_reports_command(root, folder)
    named = {argument.split("=")[0] for argument in arguments}
    own = {field.name for field in dataclasses.fields(models.options_class("causalmed"))}
    assert {f"model.{name}" for name in own} <= named
    assert "model=causalmed" in arguments


ONE_BY_ONE = [
    "search=smoke",
    "model.dimension=8",
    "train.epochs=30",
    "train.patience=30",
    "search.grace_period=15",  # long enough to be killed in
    "search.num_samples=5",
    "search.max_concurrent=1",
]


def scores(experiment: Path) -> list[dict[str, Any]]:
    """What a sweep found, without times, places and attempts."""
    rows = pq.read_table(experiment / "sweep" / "sweep.parquet").to_pylist()
    assert sum(row["chosen"] for row in rows) == 1
    left_out = ("started", "seconds", "host", "attempts")
    for row in rows:
        for epoch in row["history"]:
            del epoch["seconds"]
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


@pytest.fixture(scope="module")
def other(root: Path, experiment: Path) -> Path:
    """Another experiment on the same cohort, for sweeps that must not meet those of `small`."""
    folder = paths.experiment_dir(root, "other")
    for stage in ("cohort", "graph"):
        shutil.copytree(experiment / stage, folder / stage)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, other: Path) -> list[dict[str, Any]]:
    """The scores of a sweep that nothing interrupts."""
    status, _, err = run(root, "tune", "name=other", *ONE_BY_ONE)
    assert (status, err) == (0, "")
    found = scores(other)
    assert [row["trial"] for row in found] == list(range(5))
    assert {row["status"] for row in found} == {"finished", "stopped"}
    return found


@pytest.mark.slow
def test_a_trial_that_was_stopped_early_is_trained_again_as_far(
    root: Path, other: Path, whole: list[dict[str, Any]]
):
    found = findings.read(other / "sweep")
    stopped = next(row for row in whole if row["status"] == "stopped")
    names = {name for name in stopped if name.startswith(("model.", "train."))}
    parameters = {name: stopped[name] for name in names if stopped[name] is not None}
    best = {"trial": stopped["trial"], "seed": stopped["seed"], "parameters": parameters}
    command = dataclasses.replace(found, best={**found.best, **best}).command()
    assert stopped["epochs"] < 30
    check_trained_again(root, other, command, stopped["history"])


def wait_for_a_checkpoint(trials: Path, number: int) -> None:
    """Returns in the middle of a trial: when its first epochs are saved, of many."""
    deadline = time.monotonic() + 240
    while not list(trials.glob(f"run-*/trial-{number:05d}/checkpoint_*/checkpoint.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_a_killed_sweep_goes_on_to_the_same_scores(
    root: Path, other: Path, whole: list[dict[str, Any]], victim: str
):
    process = start(root, "tune", "name=other", "force=true", *ONE_BY_ONE)
    wait_for_a_checkpoint(other / "trials", number=2)
    if victim == "driver":
        process.kill()
    else:
        for pid, command in processes_with(str(root / "tmp")):
            if "raylet/raylet " in command:
                os.kill(pid, signal.SIGKILL)
    with process:
        process.communicate(timeout=120)
    assert process.returncode != 0
    assert (other / "trials" / "sweep.json").is_file()
    status, out, err = run(root, "tune", "name=other", *ONE_BY_ONE)
    assert (status, err) == (0, "")
    told = re.search(r"goes on: (\d) of 5 trials ended(, 1 was interrupted and goes on)?\n", out)
    assert told, out
    before = int(told[1])
    assert 2 <= before <= 4
    assert sum(line.startswith("trial ") for line in out.splitlines()) == 5 - before
    assert scores(other) == whole
    attempts = pq.read_table(other / "sweep" / "sweep.parquet")["attempts"].to_pylist()
    again = [number for number, count in enumerate(attempts) if count > 1]
    # One that was drawn and not started yet was started once; between two trials there is none.
    assert again in ([before] if told[2] else [], [])
    assert not (other / "trials").exists()
    shutil.rmtree(root / "tmp")
    (root / "tmp").mkdir()


def trials_told(out: str) -> list[int]:
    """Numbers of the trials that a job said ended."""
    return [int(number) for number in re.findall(r"^trial +trial (\d+)", out, re.MULTILINE)]


@pytest.mark.slow
def test_a_killed_sweep_of_two_trials_at_a_time_runs_each_trial_once(
    root: Path, other: Path, whole: list[dict[str, Any]]
):
    # Without a scheduler the scores of so few trials do not depend on which of them ends first.
    options = ["name=other", *ONE_BY_ONE, "search.max_concurrent=2", "search.scheduler=none"]
    options += ["train.epochs=60", "train.patience=60"]  # longer than a worker takes to start
    trials = other / "trials"
    ledger = Ledger(trials)

    def saved(number: int) -> list[dict[str, Any]]:
        """A trial's epochs; not with the tensors, which its worker may be replacing just now."""
        file = next(trials.glob(f"*/*-{number:05d}/*/{checkpoints.FILE}"), None)
        return json.loads(file.read_text())["history"] if file else []

    def is_amid() -> bool:
        """Whether a trial ended, and two others have epochs behind them, but not nearly all."""
        entries = ledger.entries() if ledger.exists() else []
        epochs = [len(saved(entry.number)) for entry in entries if entry.record is None]
        return len(entries) > 2 and len(epochs) == 2 and all(1 <= n < 40 for n in epochs)

    with start(root, "tune", *options, "force=true") as process:
        deadline = time.monotonic() + 240
        while not is_amid():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.communicate(timeout=120)
    before = ledger.entries()
    cut = {e.number: saved(e.number) for e in before if e.record is None}
    assert (len(before) > 2, len(cut), all(cut.values())) == (True, 2, True)

    status, out, err = run(root, "tune", *options)
    assert (status, err) == (0, "")
    assert f"goes on: {len(before) - 2} of 5 trials ended, 2 were interrupted and go on" in out
    assert sorted(trials_told(out)) == sorted({*cut, *range(len(before), 5)})
    rows = pq.read_table(other / "sweep" / "sweep.parquet").to_pylist()
    assert [row["trial"] for row in rows] == list(range(5))
    assert [row["attempts"] for row in rows] == [2 if n in cut else 1 for n in range(5)]
    for entry, row in zip(before, rows, strict=False):
        if entry.record is None:
            # Epochs take their own time: these are those of before, and not others like them.
            times = [epoch["seconds"] for epoch in cut[entry.number]]
            assert [epoch["seconds"] for epoch in row["history"][: len(times)]] == times
        else:
            assert row["seconds"] == entry.record.seconds
    for row, alone in zip(scores(other), whole, strict=True):
        assert (row["status"], len(row["history"])) == ("finished", 60)
        assert row["history"][: len(alone["history"])] == alone["history"]
    assert not trials.exists()
    shutil.rmtree(root / "tmp")
    (root / "tmp").mkdir()


#: Runs a job that finds the disk full in the middle of sweep.parquet.
FULL = """
import errno, os, runpy, sys
import pyarrow.parquet

def write(table, path, **more):
    write_table(table, path, **more)
    if path.name == "sweep.parquet":
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: No space left on device")

write_table, pyarrow.parquet.write_table = pyarrow.parquet.write_table, write
_, *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_costs_no_trial(
    root: Path, other: Path, whole: list[dict[str, Any]]
):
    folder = paths.experiment_dir(root, "full")
    for stage in ("cohort", "graph"):
        shutil.copytree(other / stage, folder / stage)
    options, trials = ["name=full", *ONE_BY_ONE], folder / "trials"
    status, out, err = run(root, "tune", *options, through=["-c", FULL])
    assert (status, trials_told(out)) == (2, [0, 1, 2, 3, 4])
    assert err.splitlines() == [
        f"the sweep goes on with: python jobs/tune.py resume={trials}",
        f"error: {root}: Error writing bytes to file. Detail: No space left on device",
    ]
    assert not [path for path in folder.iterdir() if "sweep" in path.name]
    before = Ledger(trials).entries()

    status, out, err = run(root, "tune", *options)
    assert (status, err, trials_told(out)) == (0, "", [])
    assert "goes on: 5 of 5 trials ended\n" in out
    assert scores(folder) == whole
    rows = pq.read_table(folder / "sweep" / "sweep.parquet").to_pylist()
    kept = [entry.record.seconds for entry in before if entry.record is not None]
    assert [row["seconds"] for row in rows] == kept
    assert not trials.exists()
    assert_nothing_runs_in(root / "tmp")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_of_two_workers_a_trial_goes_on_to_the_same_scores(root: Path, other: Path):
    """One trial has room at a time: what a killed one left must not keep the place."""
    beside = paths.experiment_dir(root, "beside")
    for stage in ("cohort", "graph"):
        shutil.copytree(other / stage, beside / stage)
    options = ["search=smoke", "model.dimension=8", "train.epochs=10", "train.patience=10"]
    options += ["search.num_samples=2", "search.num_workers=2", "search.scheduler=none"]
    options += ["search.max_concurrent=1", "search.cpus=0.5"]
    with start(root, "tune", "name=beside", *options) as whole:
        with start(root, "tune", "name=other", "force=true", *options) as process:
            wait_for_a_checkpoint(other / "trials", number=1)
            process.kill()
            process.communicate(timeout=120)
        status, out, err = run(root, "tune", "name=other", *options)
        assert (status, err) == (0, "")
        _, err = whole.communicate(timeout=240)
        assert (whole.returncode, err) == (0, "")
    assert "goes on: 1 of 2 trials ended, 1 was interrupted and goes on" in out
    found = scores(other)
    assert [row["trial"] for row in found] == [0, 1]
    assert [row["cpus"] for row in found] == [1.0, 1.0]
    attempts = pq.read_table(other / "sweep" / "sweep.parquet")["attempts"].to_pylist()
    assert attempts == [1, 2]
    assert not (other / "trials").exists()
    assert scores(beside) == found
    assert "num_workers=2" in check_the_reports_command(root, beside)
    assert_nothing_runs_in(root / "tmp", ended=False)
    shutil.rmtree(root / "tmp")
    (root / "tmp").mkdir()


@pytest.mark.slow
def test_a_sweep_in_a_bucket_is_run_by_one_process_and_goes_on_when_that_is_killed(
    root: Path, other: Path, whole: list[dict[str, Any]], bucket: str
):
    options = ["name=other", *ONE_BY_ONE, f"search.storage={bucket}/sweeps"]
    process = start(root, "tune", "force=true", *options)
    assert process.stdout
    next(line for line in process.stdout if line.startswith("trial "))
    status, out, err = run(root, "tune", *options)
    assert (status, err.count("\n")) == (2, 1), err
    assert re.search(rf"runs this sweep \(.* process {process.pid}, since .*\); let it end", err)
    assert "trial" not in out
    process.kill()
    with process:
        process.communicate(timeout=120)
    status, out, err = run(root, "tune", *options)
    assert (status, err) == (0, "")
    assert "goes on: " in out
    assert "waiting" not in out  # it was this machine's
    assert scores(other) == whole
    files, folder = pyarrow.fs.FileSystem.from_uri(f"{bucket}/sweeps/other")
    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    assert files.get_file_info(selector) == []
    shutil.rmtree(root / "tmp")
    (root / "tmp").mkdir()


@pytest.mark.slow
def test_a_sweep_that_another_machine_took_over_stops(root: Path, other: Path):
    """As after a suspension: the other one's claim is there when this one looks again."""
    process = start(root, "tune", "name=other", "force=true", *ONE_BY_ONE, "search.num_samples=900")
    assert process.stdout
    next(line for line in process.stdout if line.startswith("trial "))
    claim = {"user": "her", "host": "there", "pid": 7, "since": "2026-01-02T03:04:05+00:00"}
    (other / "trials" / "lease-000009-00aa.json").write_text(json.dumps(claim))
    out, err = process.communicate(timeout=120)
    whose = r"\(her on there, process 7, since 2026-01-02 03:04:05 UTC\)"
    assert re.fullmatch(rf"error: {other}/trials: another process took .* {whose}, .*\n", err), err
    assert process.returncode == 2
    assert "registry" not in out
    assert [path.name for path in (other / "trials").glob("lease-*")] == ["lease-000009-00aa.json"]
    assert_nothing_runs_in(root / "tmp")
    shutil.rmtree(other / "trials")


@pytest.mark.slow
def test_resume_names_the_folder_and_may_ask_for_more(
    root: Path, other: Path, whole: list[dict[str, Any]]
):
    process = start(root, "tune", "name=other", "force=true", *ONE_BY_ONE)
    assert process.stdout
    next(line for line in process.stdout if line.startswith("trial "))
    process.terminate()
    _, err = process.communicate(timeout=60)
    command = err.splitlines()[0].removeprefix("the sweep goes on with: python jobs/tune.py ")
    assert command == f"resume={other / 'trials'}"
    status, _, err = run(root, "tune", "name=other", *ONE_BY_ONE, "search.seed=1")
    assert status == 2
    assert "holds an unfinished sweep with other settings (search.seed is 0, now 1)" in err
    status, out, err = run(root, "tune", command, "search.num_samples=6")
    assert (status, err) == (0, "")
    found = scores(other)
    assert len(found) == 6
    for row in (*found, *whole):
        del row["chosen"], row["pareto"]
    assert found[:5] == whole
    # Finished, the same command as at first has all it asks for; more goes on from there.
    status, out, _ = run(root, "tune", "name=other", *ONE_BY_ONE)
    assert status == 0
    assert "unchanged, skipped" in out
    status, out, _ = run(root, "tune", "name=other", *ONE_BY_ONE, "search.num_samples=7")
    assert status == 0
    assert "goes on: 6 of 7 trials ended" in out
    assert bundle.load(other / "sweep" / "bundle").metrics["validation"]["jaccard"] == max(
        row["jaccard"] for row in scores(other)
    )


def assert_nothing_runs_in(temp: Path, ended: bool = True) -> None:
    """No process of a Ray that had this temporary folder, and unless one was killed no folder."""
    deadline = time.monotonic() + 20
    while (running := commands_with(str(temp))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running == []
    assert not ended or list(temp.glob("cafemed-*")) == []


def commands_with(text: str) -> list[str]:
    return [command for _, command in processes_with(text)]


def processes_with(text: str) -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if text in command:
            found.append((int(path.parent.name), command))
    return found


def test_one_command_searches_another_models_space_and_measures_the_winner_once(
    root: Path, experiment: Path
):
    """With a threshold of its own."""
    options = ["calibration.threshold=validation", "measure=true"]
    options += ["model=causalmed", "search.num_samples=1", "train.epochs=2", "force=true"]
    status, out, err = run(root, "tune", "name=small", *options)
    assert (status, err) == (0, "")
    assert "1 trials over model.effect_levels," in out
    served = bundle.load(registry.resolve(paths.registry_dir(root, "small"), "production"))
    assert served.model_name == "causalmed"
    assert bundle.restore_model(served, models.build)
    assert served.preprocessing.threshold != 0.5
    measured = json.loads((experiment / "evaluation" / "report.json").read_text())["model"]
    assert measured["threshold"] == measured["best_threshold"] == served.preprocessing.threshold
    assert measured["validation"]["metrics"] == served.metrics["validation"]
    (tested,) = json.loads((experiment / "sweep" / "test.json").read_text()).values()
    assert tested["metrics"] == measured["test"]["metrics"]
    assert tested["intervals"] == measured["test"]["intervals"]
    page = (experiment / "sweep" / "report.html").read_text()
    assert f'"tested":{{"0":{{"patients":{tested["patients"]},' in page
    assert "last visit" in out
    status, out, err = run(root, "evaluate", "name=small")
    assert (status, err) == (0, "")
    assert "unchanged, skipped" in out
