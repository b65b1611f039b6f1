"""Runs in MLflow: in SQLite with its client alone, and on a real server over HTTP.

The server is asked by its REST API (https://mlflow.org/docs/latest/rest-api.html), not through the
client that wrote. It comes from an environment of its own: `make bench-env`.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import models
from cafemed import artifacts, fits, paths, sweep, sweep_run, tracking, training
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError, TrackingError, TrainingError
from cafemed.fit_tracking import FitTracking
from cafemed.invocation import Invocation
from cafemed.lease import TakenOverError
from cafemed.ledger import Entry, Header, Ledger
from cafemed.mlflow_client import Client
from cafemed.sweep_tracking import SweepTracking, runs_in, send_evaluation
from cafemed.training import FitConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mlflow") is None,
        reason="mlflow-skinny is not installed (the extra `tracking`)",
    ),
    # Of what MLflow's client is made of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

INPUTS = {"cohort": "c" * 64, "graph": "d" * 64}
SERVER = paths.PROJECT_DIR / ".bench" / "mlflow" / "bin" / "mlflow"
START_S = 60


@pytest.fixture(autouse=True)
def _quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(tracking, "_RETRY_S", (0.1, 0.2))


class Server:
    """A real MLflow server, in a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"sqlite:///{self.folder / 'server.db'}"
        command = [SERVER, "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", self.folder / "files"]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=kept | {"MLFLOW_DISABLE_TELEMETRY": "true"},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ask(self, path: str, body: dict[str, Any] | None = None, /, **query: Any) -> Any:
        url = f"{self.url}/api/2.0/{path}"
        answer = httpx.get(url, params=query) if body is None else httpx.post(url, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def runs(self, experiment: str) -> list[dict[str, Any]]:
        found = self.ask("mlflow/experiments/get-by-name", experiment_name=experiment)
        ids = [found["experiment"]["experiment_id"]]
        body = {"experiment_ids": ids, "max_results": 1000}
        return list(self.ask("mlflow/runs/search", body).get("runs", []))

    def history(self, run: dict[str, Any], key: str) -> list[tuple[int, float]]:
        query = {"run_id": run["info"]["run_id"], "metric_key": key, "max_results": 1000}
        found = self.ask("mlflow/metrics/get-history", **query).get("metrics", [])
        return [(int(m.get("step", 0)), m["value"]) for m in found]

    def files(self, run: dict[str, Any], folder: str = "") -> set[str]:
        query = {"run_id": run["info"]["run_id"]} | ({"path": folder} if folder else {})
        return {f["path"] for f in self.ask("mlflow/artifacts/list", **query).get("files", [])}


def entries(run: dict[str, Any], kind: str) -> dict[str, Any]:
    return {entry["key"]: entry["value"] for entry in run["data"].get(kind, [])}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not SERVER.exists():
        pytest.skip("no MLflow server here: make bench-env")
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


class Sweeper:
    """Runs one experiment's sweep without Ray, as the job does it."""

    def __init__(self, root: Path, name: str, sweeps: Any, uri: str) -> None:
        self.root, self.name, self.sweeps = root, name, sweeps
        self.values = {"name": "mlflow", "uri": uri, "tensorboard": False}
        self.folder = root / "experiments" / name
        self.ledger = Ledger(self.folder / "trials")

    def tracked(self) -> SweepTracking:
        return SweepTracking(self.values, Invocation(self.root, self.name, False))

    def run(self, plan: Any, tick: Callable[[], None] = lambda: None) -> Conductor:
        tracked = self.tracked()
        tracked.require_ready(self.ledger)
        with tracked.ending():
            return self._run(plan, tick, tracked)

    def _run(self, plan: Any, tick: Callable[[], None], tracked: SweepTracking) -> Conductor:
        with tracked.following(plan, self.ledger, INPUTS) as tell:
            conductor = Conductor(plan, self.ledger, tell=tell)
            self.sweeps.play(conductor, tick, slots=2)
        result = conductor.result()
        stage = (self.folder / "sweep", sweep.STAGE, INPUTS, plan.settings())
        with artifacts.new_folder(*stage) as (partial, report):
            sweep.write(result, partial, "b" * 64)
            tracked.keep(self.ledger, partial)
            report |= sweep.summary(result, 1.0)
        (self.folder / "sweep" / "report.html").write_text("<p>report</p>")
        self.ledger.remove()
        tracked.finish(self.folder / "sweep", 7)
        return conductor


def check(server: Server, experiment: str, conductor: Conductor) -> dict[str, Any]:
    """Compares everything that the server has of a sweep with the sweep; gives the parent."""
    found = server.runs(experiment)
    by_trial = {entries(run, "tags")["cafemed.trial"]: run for run in found}
    assert len(by_trial) == len(found) == len(conductor.ended) + 1
    parent = by_trial.pop("parent")
    assert parent["info"]["status"] == "FINISHED"
    for trial in conductor.ended:
        run = by_trial[str(trial.number)]
        tags, params = entries(run, "tags"), entries(run, "params")
        assert tags["mlflow.parentRunId"] == parent["info"]["run_id"]
        assert run["info"]["run_name"] == f"trial-{trial.number:05d}"
        expected = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[trial.status]
        assert (run["info"]["status"], tags["status"]) == (expected, trial.status)
        assert params["seed"] == str(trial.seed)
        assert (params["num_workers"], params["cpus"]) == ("1", "1.0")
        for name, value in trial.parameters.items():
            assert params[name] == str(value)
        for key in ("jaccard", "ddi_rate"):
            wanted = [(e["epoch"], e["metrics"][key]) for e in trial.history]
            assert sorted(server.history(run, f"validation/{key}")) == wanted
        wanted = [(e["epoch"], e["losses"]["loss"]) for e in trial.history]
        assert sorted(server.history(run, "train/loss")) == wanted
        best = trial.best_epoch
        if best is not None:
            ends = [(best["epoch"], best["metrics"]["jaccard"])]
            assert server.history(run, "best/jaccard") == ends
    return dict(parent)


def test_a_sweep_on_a_server(
    server: Server, sweeps: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    one = Sweeper(tmp_path, "whole", sweeps, server.url)
    plan = sweeps.plan_of(num_samples=8)
    conductor = one.run(plan)
    assert {t.status for t in conductor.ended} == {"finished", "stopped"}
    parent = check(server, "cafemed/whole", conductor)
    tags, params = entries(parent, "tags"), entries(parent, "params")
    assert params["fingerprint.cohort"] == INPUTS["cohort"]
    assert params["search.sampler"] == "tpe_multivariate"
    assert params["train.epochs"] == str(sweeps.EPOCHS)
    assert tags["search.num_samples"] == "8"
    assert tags["registry.version"] == "7"
    assert tags["cafemed.best_trial"] == str(conductor.result().best.number)
    assert {"report.html", "sweep.parquet", "best.json"} <= server.files(parent)
    path = f"{parent['info']['experiment_id']}/{parent['info']['run_id']}/artifacts/best.json"
    content = httpx.get(f"{server.url}/api/2.0/mlflow-artifacts/artifacts/{path}").content
    assert content == (one.folder / "sweep" / "best.json").read_bytes()
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["tracking"]

    one.tracked().finish(one.folder / "sweep", 7)  # run again, there is nothing to send
    assert capfd.readouterr() == ("", "")
    for trial in conductor.ended:  # asked for more, it goes on from what is in its folder
        again = Entry(trial.number, trial.parameters, trial.seed, trial.status, 1, trial, clock=1.0)
        one.ledger.write(again)
    more = one.run(sweeps.plan_of(num_samples=10))
    assert len(more.ended) == 10
    check(server, "cafemed/whole", more)


def test_an_evaluation_goes_to_the_sweeps_run(server: Server, sweeps: Any, tmp_path: Path):
    one = Sweeper(tmp_path, "evaluated", sweeps, server.url)
    conductor = one.run(sweeps.plan_of(num_samples=2))
    target = one.folder / "evaluation"
    with artifacts.new_folder(target, "evaluation", INPUTS, {}) as (partial, report):
        (partial / "model_card.md").write_text("card")
        report["model"] = {"test": {"metrics": {"jaccard": 0.25}}}
    send_evaluation(one.folder / "sweep", target, "e" * 64)  # of another model
    assert not any(server.files(run, "evaluation") for run in server.runs("cafemed/evaluated"))
    for _ in range(2):
        send_evaluation(one.folder / "sweep", target, "b" * 64)
    parent = check(server, "cafemed/evaluated", conductor)
    assert server.history(parent, "test/jaccard") == [(0, 0.25)]
    assert "evaluation/model_card.md" in server.files(parent, "evaluation")


@pytest.mark.parametrize("cut", [2, 9, 17, 31])
def test_a_sweep_that_goes_on_is_the_same_runs(
    server: Server, sweeps: Any, tmp_path: Path, cut: int
):
    one = Sweeper(tmp_path, f"cut{cut}", sweeps, server.url)
    plan, events = sweeps.plan_of(num_samples=5), 0

    def tick() -> None:
        nonlocal events
        events += 1
        time.sleep(0.02)
        if events == cut:
            raise sweeps.SweepCutError

    with pytest.raises(sweeps.SweepCutError):
        one.run(plan, tick)
    before = server.runs(f"cafemed/cut{cut}")
    parent = [r for r in before if entries(r, "tags")["cafemed.trial"] == "parent"]
    assert [run["info"]["status"] for run in parent] == ["KILLED"]
    if cut == 17:  # as if the job had died before it noted which runs there are
        noted = one.ledger.tracking()
        assert noted is not None
        one.ledger.keep_tracking({**noted, "parent": None, "trials": {}})
    after = check(server, f"cafemed/cut{cut}", one.run(plan))
    assert after["info"]["run_id"] == parent[0]["info"]["run_id"]


def test_answers_that_are_lost_repeat_nothing(
    server: Server, sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losing = True

    def losing_every_other(done: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count()

        def call(*arguments: Any, **more: Any) -> Any:
            result = done(*arguments, **more)
            if losing and next(calls) % 2 == 0:
                raise TrackingError("the answer was lost")
            return result

        return call

    for name in ("create", "log", "end"):
        monkeypatch.setattr(Client, name, losing_every_other(getattr(Client, name)))
    monkeypatch.setattr(tracking, "_RETRY_S", (0.0, 0.0))
    one = Sweeper(tmp_path, "lost", sweeps, server.url)
    conductor = one.run(sweeps.plan_of(num_samples=3), lambda: time.sleep(0.05))
    for _ in range(10):
        one.tracked().finish(one.folder / "sweep", 7)
    losing = False
    one.tracked().finish(one.folder / "sweep", 7)
    check(server, "cafemed/lost", conductor)


def test_a_server_that_goes_away_costs_nothing(
    sweeps: Any, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, events = Sweeper(tmp_path, "away", sweeps, server.url), 0

    def tick() -> None:
        nonlocal events
        events += 1
        time.sleep(0.05)
        if events == 12:
            server.kill()
        if events == 40:
            server.start()

    try:
        conductor = one.run(sweeps.plan_of(num_samples=6), tick)
        assert events > 40
        check(server, "cafemed/away", conductor)
    finally:
        if not server_runs(server):
            server.start()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tracking")]
    assert len(lines) <= 3
    assert "does not answer" in lines[0]
    assert lines[-1].startswith("tracking  run ")


def test_a_server_that_stays_away_gets_the_rest_when_the_job_runs_again(
    sweeps: Any, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one, events = Sweeper(tmp_path, "later", sweeps, server.url), 0

    def tick() -> None:
        nonlocal events
        events += 1
        if events == 10:
            server.kill()

    try:
        conductor = one.run(sweeps.plan_of(num_samples=4), tick)
        out = capsys.readouterr().out
        assert "run the same command again to send what is missing" in out
        with pytest.raises(
            TrackingError, match=r"does not answer .*; start it, or"
        ):  # a new one is not begun
            Sweeper(tmp_path, "new", sweeps, server.url).run(sweeps.plan_of(num_samples=1))
    finally:
        server.start()
    one.tracked().finish(one.folder / "sweep", 7)
    check(server, "cafemed/later", conductor)


def server_runs(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_folder_takes_it_with_the_client_alone(
    sweeps: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    place = tmp_path / "runs"
    one = Sweeper(tmp_path, "local", sweeps, str(place))
    plan, events = sweeps.plan_of(num_samples=4), 0

    def tick() -> None:
        nonlocal events
        events += 1
        if events == 15:
            raise sweeps.SweepCutError

    with pytest.raises(sweeps.SweepCutError):
        one.run(plan, tick)
    conductor = one.run(plan)
    out, err = capfd.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1
    runs = runs_in(one.folder / "sweep")
    assert runs is not None
    with sqlite3.connect(place / "mlflow.db") as store:
        for trial in conductor.ended:
            run = runs.trials[str(trial.number)]
            query = "select step, value from metrics where run_uuid=? and key=? order by step"
            found = store.execute(query, (run, "validation/jaccard")).fetchall()
            assert found == [(e["epoch"], e["metrics"]["jaccard"]) for e in trial.history]
    store.close()
    files = {path.name for path in (place / "artifacts").rglob("*") if path.is_file()}
    assert {"report.html", "sweep.parquet", "best.json"} <= files
    best = json.loads(next((place / "artifacts").rglob("best.json")).read_text())
    assert best["trial"] == conductor.result().best.number
    assert not (Path.cwd() / "mlruns").exists()


def test_where_the_storage_is_is_not_told(sweeps: Any, tmp_path: Path):
    one = Sweeper(tmp_path, "x", sweeps, str(tmp_path / "runs"))
    one.run(sweeps.plan_of(num_samples=1, storage="/somewhere"))
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as store:
        told = store.execute("select key, value from tags union select key, value from params")
        found = dict(told.fetchall())
    assert found["search.num_samples"] == "1"
    assert "search.storage" not in found
    assert "/somewhere" not in found.values()


def statuses(place: Path) -> list[str]:
    """Of the runs in a folder, the parents' first."""
    with contextlib.closing(sqlite3.connect(place / "mlflow.db")) as store:
        query = "select status from runs order by name like 'trial-%'"
        return [status for (status,) in store.execute(query)]


@pytest.mark.parametrize(
    ("ended_by", "status"),
    [(ArtifactError, "FAILED"), (KeyboardInterrupt, "KILLED"), (TakenOverError, "RUNNING")],
)
def test_what_ends_the_job_after_the_trials_ends_the_run(
    sweeps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ended_by: type[BaseException],
    status: str,
):
    one, plan = (
        Sweeper(tmp_path, "x", sweeps, str(tmp_path / "runs")),
        sweeps.plan_of(num_samples=2),
    )

    def cut(*_: Any) -> None:
        raise ended_by

    with monkeypatch.context() as broken:
        broken.setattr(sweep, "write", cut)
        with pytest.raises(ended_by):
            one.run(plan)
    assert statuses(tmp_path / "runs")[0] == status
    one.run(plan)
    assert statuses(tmp_path / "runs")[0] == "FINISHED"


def test_a_sweep_whose_trials_all_failed_is_failed(
    sweeps: Any, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep_run.experiment, "load_inputs", lambda _: given)
    one, plan = (
        Sweeper(tmp_path, "x", sweeps, str(tmp_path / "runs")),
        sweeps.plan_of(num_samples=2),
    )

    def search(*arguments: Any) -> tuple[sweep.SweepResult, float]:
        rate = {"train.learning_rate": 0.1}
        records = tuple(sweeps.record_of(i, rate, "failed", 0) for i in range(2))
        for record in records:
            arguments[-1](tracking.Progress.of(record))
        return sweep.SweepResult(records), 1.0

    monkeypatch.setattr(sweep_run, "_search", search)
    one.ledger.open(Header("f", INPUTS, plan.settings(), {}))
    tracked = one.tracked()
    with pytest.raises(TrainingError, match="all 2 trials failed"), tracked.ending():
        sweep_run.run(one.folder, plan, one.ledger, INPUTS, models.build, tracked)
    assert statuses(tmp_path / "runs") == ["FAILED"] * 3
    assert not one.ledger.exists()


FIT = FitConfig(epochs=5, patience=5, batch_size=8, seed=3)


def settings_of(config: FitConfig) -> dict[str, Any]:
    model = {"name": "bag", "options": {"dropout": 0.25}}
    return {"model": model, "train": dataclasses.asdict(config), "calibration": {}}


class Fitter:
    """Trains a small model, as jobs/train.py does it; at the end of an epoch something may be."""

    def __init__(self, root: Path, build: Any, given: Any, uri: str) -> None:
        self.told = Invocation(root, "fitted", False)
        self.build, (self.inputs, self.arrays), self.uri = build, given, uri
        self.told.experiment.mkdir(parents=True, exist_ok=True)

    def tracked(self) -> FitTracking:
        values = {"name": "mlflow", "uri": self.uri, "tensorboard": False}
        wanted = artifacts.fingerprint(fits.STAGE, INPUTS, settings_of(FIT))
        return FitTracking(values, self.told, settings_of(FIT), INPUTS, wanted)

    def run(self, meanwhile: Callable[[int], None] = lambda _: None) -> fits.FitResult:
        folder, tracked = self.told.experiment, self.tracked()
        checkpoint = folder / "checkpoint"
        tracked.require_ready(checkpoint)
        with tracked.following(checkpoint) as tell:

            def after_epoch(report: Any) -> None:
                tell(report)
                meanwhile(report.epoch)

            result = training.fit(
                *(self.build, "bag", {"dropout": 0.25}, self.inputs, self.arrays),
                *(np.arange(30), np.arange(30, 40), FIT),
                on_epoch=after_epoch,
                checkpoint_dir=checkpoint,
            )
            measured = {"test": {"metrics": {"jaccard": 0.25, "prauc": math.nan}}}
            fits.write(folder / "fit", INPUTS, settings_of(FIT), result, measured)
        tracked.finish(folder / "fit")
        return result


@pytest.fixture
def fitter(
    server: Server, tmp_path: Path, build_bag: Any, small_inputs: Any, small_arrays: Any
) -> Fitter:
    return Fitter(tmp_path, build_bag, (small_inputs, small_arrays), server.url)


def check_fit(server: Server, result: Any, status: str = "FINISHED") -> dict[str, Any]:
    """Compares what the server has with the run; gives its newest run."""
    run = server.runs("cafemed/fitted")[0]
    assert run["info"]["status"] == status
    params = entries(run, "params")
    assert params["fingerprint.cohort"] == INPUTS["cohort"]
    assert (params["model.dropout"], params["train.seed"]) == ("0.25", "3")
    for key in ("jaccard", "ddi_rate"):
        wanted = [(e.epoch, getattr(e.metrics, key)) for e in result.history]
        assert sorted(server.history(run, f"validation/{key}")) == wanted
    assert [value for _, value in server.history(run, "best/jaccard")] == [
        max(e.metrics.jaccard for e in result.history)
    ]
    assert server.history(run, "served/test/jaccard") == [(5, 0.25)]
    assert server.history(run, "served/test/prauc") == []
    files = {"config.json", "history.json", "manifest.json", "metrics.json"}
    assert server.files(run) == files
    assert entries(run, "tags")["best_epoch"] == str(result.best_epoch)
    return run


@pytest.mark.parametrize(
    ("ended_by", "status"), [(TrainingError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_single_run_that_goes_on_is_the_same_run(
    server: Server, fitter: Fitter, ended_by: type[BaseException], status: str
):
    before = len(server.runs("cafemed/fitted")) if ended_by is KeyboardInterrupt else 0

    def cut(epoch: int) -> None:
        if epoch == 2:
            raise ended_by

    with pytest.raises(ended_by):
        fitter.run(cut)
    cut_off, *_ = server.runs("cafemed/fitted")
    assert cut_off["info"]["status"] == status
    assert [step for step, _ in server.history(cut_off, "train/loss")] == [1, 2]
    run = check_fit(server, fitter.run())
    assert run["info"]["run_id"] == cut_off["info"]["run_id"]
    assert len(server.runs("cafemed/fitted")) == before + 1
    assert (
        not fitter.tracked()
        ._run(anew=False)
        .finish(  # type: ignore[union-attr]
            fitter.told.experiment / "fit"
        )
    )


def test_a_single_run_does_not_need_the_server_all_the_time(
    server: Server, fitter: Fitter, capsys: pytest.CaptureFixture[str]
):
    def lose(epoch: int) -> None:
        if epoch == 2:
            server.kill()

    try:
        result = fitter.run(lose)
        assert "run the same command again to send what is missing" in capsys.readouterr().out
        with pytest.raises(TrackingError, match=r"does not answer .*; start it, or"):
            fitter.tracked().require_ready(fitter.told.experiment / "other")
    finally:
        server.start()
    fitter.tracked().finish(fitter.told.experiment / "fit")
    check_fit(server, result)
