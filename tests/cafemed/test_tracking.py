"""What trackers are told of a sweep, and what becomes of one that is away."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cafemed import config, mlflow_client, tracking
from cafemed.conductor import Conductor
from cafemed.errors import ConfigError, TrackingError, TrackingRefusedError
from cafemed.event_files import read
from cafemed.invocation import Invocation
from cafemed.ledger import Ledger
from cafemed.sweep_tracking import SweepTracking
from cafemed.tracking import Background, Progress, TrackingConfig

INPUTS = {"cohort": "c" * 64}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(tracking, "_TICK_S", 0.0)
    monkeypatch.setattr(tracking, "_RETRY_S", (0.01, 0.02))


def follow(sweeps: Any, root: Path, plan: Any, values: dict[str, Any], tick: Any = None) -> Any:
    """Plays a sweep, or goes on with it, while its trackers are told."""
    tracked = SweepTracking(values, Invocation(root, "x", False))
    ledger = Ledger(root / "experiments" / "x" / "trials")
    with tracked.following(plan, ledger, INPUTS) as tell:
        conductor = Conductor(plan, ledger, tell=tell)
        sweeps.play(conductor, tick or (lambda: None), slots=2)
    return conductor


def steps(folder: Path) -> list[int]:
    (path,) = [path for path in folder.iterdir() if path.stat().st_size]
    tags = [(e.step, v.tag) for e in read(path) for v in e.summary.value]
    return [step for step, tag in tags if tag == "validation/jaccard"]


@pytest.mark.parametrize("cut", [None, 3, 10, 21, 40])
def test_every_trial_has_its_epochs_once_whatever_is_interrupted(
    sweeps: Any, tmp_path: Path, cut: int | None
):
    plan, events = sweeps.plan_of(num_samples=6), 0

    def tick() -> None:
        nonlocal events
        events += 1
        if events == cut:
            raise sweeps.SweepCutError

    if cut is not None:
        with pytest.raises(sweeps.SweepCutError):
            follow(sweeps, tmp_path, plan, {}, tick)
    conductor = follow(sweeps, tmp_path, plan, {})
    folder = tmp_path / "experiments" / "x" / "tensorboard" / "sweep"
    assert len(conductor.ended) == 6
    for trial in conductor.ended:
        place = folder / f"trial-{trial.number:05d}"
        assert steps(place) == list(range(1, len(trial.history) + 1))
        (path,) = [path for path in place.iterdir() if path.stat().st_size]
        tags = [value.tag for event in read(path) for value in event.summary.value]
        assert tags.count("_hparams_/session_end_info") == 1


def test_a_sweep_that_goes_on_tells_of_the_trials_before_too(sweeps: Any, tmp_path: Path):
    plan = sweeps.plan_of(num_samples=2)
    follow(sweeps, tmp_path, plan, {"tensorboard": False})
    follow(sweeps, tmp_path, sweeps.plan_of(num_samples=3), {})
    folder = tmp_path / "experiments" / "x" / "tensorboard" / "sweep"
    assert {path.name[-1] for path in folder.iterdir()} == {"0", "1", "2"}
    assert steps(folder / "trial-00000")[:2] == [1, 2]


def test_what_is_told_does_not_change_afterwards(sweeps: Any, tmp_path: Path):
    told = list[tuple[Progress, int]]()
    plan, ledger = sweeps.plan_of(num_samples=2), Ledger(tmp_path / "trials")
    conductor = Conductor(plan, ledger, tell=lambda trial: told.append((trial, len(trial.history))))
    sweeps.play(conductor)
    assert max(epochs for _, epochs in told) > 2
    assert all(len(trial.history) == epochs for trial, epochs in told)


def test_a_new_sweep_takes_the_old_ones_place_and_can_be_without(sweeps: Any, tmp_path: Path):
    place = tmp_path / "experiments" / "x" / "tensorboard" / "sweep"
    follow(sweeps, tmp_path, sweeps.plan_of(num_samples=3), {})
    assert len(list(place.iterdir())) == 3
    Ledger(tmp_path / "experiments" / "x" / "trials").remove()
    for path in (tmp_path / "experiments" / "x" / "trials").glob("*.json"):
        path.unlink()
    follow(sweeps, tmp_path, sweeps.plan_of(num_samples=1), {})
    assert [path.name for path in place.iterdir()] == ["trial-00000"]
    for path in (tmp_path / "experiments" / "x" / "trials").glob("*.json"):
        path.unlink()
    follow(sweeps, tmp_path, sweeps.plan_of(num_samples=1), {"tensorboard": False})
    assert not place.exists()


def test_a_full_disk_costs_event_files_and_not_the_sweep(
    sweeps: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "experiments" / "x"
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("no folder")
    assert len(follow(sweeps, tmp_path, sweeps.plan_of(num_samples=3), {}).ended) == 3
    assert capsys.readouterr().out.count("tracking  no event files") == 1


class Server:
    """Takes what it is sent, unless it is away."""

    def __init__(self) -> None:
        self.away, self.calls, self.sent = False, 0, list[Progress]()
        self.refused = set[int]()

    def send(self, trial: Progress) -> None:
        self.calls += 1
        if self.away:
            raise TrackingError("http://x does not answer")
        if trial.number in self.refused:
            raise TrackingRefusedError("http://x refuses: deleted")
        self.sent.append(trial)

    def wait_for(self, done: Any) -> None:
        deadline = time.monotonic() + 5
        while not done() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert done()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def background(server: Server) -> Iterator[Background]:
    made = Background(server.send, "http://x")
    yield made
    assert made.close(5)


def progress(number: int, epochs: int) -> Progress:
    return Progress(number, {}, 0, [{}] * epochs)


def test_what_was_not_sent_is_sent_when_the_server_is_back(
    server: Server, background: Background, capsys: pytest.CaptureFixture[str]
):
    server.away = True
    for epochs in range(1, 50):
        for number in (0, 1):
            background.tell(progress(number, epochs))
    server.wait_for(lambda: server.calls >= 3)
    assert server.sent == []
    server.away = False
    server.wait_for(lambda: {t.number: len(t.history) for t in server.sent} == {0: 49, 1: 49})
    assert len(server.sent) == 2  # the newest progress of each, and not one an epoch
    background.tell(progress(0, 50))
    server.wait_for(lambda: len(server.sent) == 3)
    out = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1] for line in out] == [
        "http://x does not answer; what is missing is sent when it is back",
        "http://x is back",
    ]


def test_what_the_server_refuses_keeps_nothing_else_back(
    server: Server, background: Background, capsys: pytest.CaptureFixture[str]
):
    server.refused = {0}
    for number in (0, 1):
        background.tell(progress(number, 1))
    server.wait_for(lambda: [t.number for t in server.sent] == [1])
    calls = server.calls
    time.sleep(0.1)
    assert server.calls == calls
    assert "trial 0: http://x refuses: deleted" in capsys.readouterr().out


def test_nobody_waits_for_a_slow_server():
    held, sent = threading.Event(), list[int]()

    def send(trial: Progress) -> None:
        held.wait(5)
        sent.append(trial.number)

    background = Background(send, "http://x")
    began = time.monotonic()
    for epochs in range(1000):
        background.tell(progress(epochs % 2, epochs))
    assert time.monotonic() - began < 0.5
    threading.Timer(0.3, held.set).start()
    assert background.close(0.05)  # not before what is being sent is sent, and nothing after it
    assert sent == [0]


def test_the_end_sends_what_is_left(server: Server):
    background = Background(server.send, "http://x")
    background.tell(progress(0, 7))
    assert background.close(5)
    assert [len(trial.history) for trial in server.sent] == [7]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (None, "sqlite:////root/mlflow/mlflow.db"),
        ("/data/runs", "sqlite:////data/runs/mlflow.db"),
        ("file:///data/runs", "sqlite:////data/runs/mlflow.db"),
        ("sqlite:////data/x.db", "sqlite:////data/x.db"),
        ("http://host:5000/", "http://host:5000"),
        ("https://host/path", "https://host/path"),
    ],
)
def test_places_that_can_be_told(uri: str | None, expected: str):
    assert mlflow_client.resolve(uri, Path("/root")) == expected


@pytest.mark.parametrize("uri", ["runs", "host:5000", "ftp://host", "sqlite:///x.db", "http://"])
def test_other_places_are_refused(uri: str):
    with pytest.raises(ConfigError, match=r"tracking\.uri: expected a server's URL"):
        mlflow_client.resolve(uri, Path("/root"))


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        mlflow_client.resolve("https://me:geheim@host", Path("/root"))
    assert "geheim" not in str(caught.value)


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-env:1")
    assert tracking.require_uri(TrackingConfig("mlflow"), tmp_path) == "http://from-env:1"
    own = TrackingConfig("mlflow", "http://own:1")
    assert tracking.require_uri(own, tmp_path) == "http://own:1"


def test_a_server_without_mlflow_is_refused():
    with pytest.raises(ConfigError, match="tracking: uri and experiment: only with tracking=mlfl"):
        config.from_mapping(TrackingConfig, {"uri": "http://x"}, "tracking")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(Exception, match="pip install 'mlflow-skinny") as caught:
        SweepTracking({"name": "mlflow"}, Invocation(tmp_path, "x", False))
    assert "\n" not in str(caught.value)
