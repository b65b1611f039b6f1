"""jobs/deploy.py as a user runs it."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cafemed import paths, registry
from serve.answers import RecommendResponse
from serve.schema import RecommendRequest

JOB = paths.PROJECT_DIR / "jobs" / "deploy.py"


@pytest.fixture
def home() -> Iterator[Path]:
    """A short folder for the job's home and temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="cm", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def start(root: Path, home: Path, *arguments: str) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (home / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, str(JOB), f"paths.root={root}", "name=tiny", *arguments],
        env=own | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1"},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def refusal(root: Path, home: Path, *arguments: str) -> str:
    """Runs the job, which must refuse in one line, and gives that line."""
    job = start(root, home, "once=true", *arguments)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    [line] = errors.splitlines()
    assert line.startswith("error: ")
    assert list((home / "tmp").iterdir()) == []
    return line


def test_nothing_promoted_is_one_line(tmp_path: Path, home: Path) -> None:
    assert "no version is promoted to 'production'" in refusal(tmp_path, home)


def test_a_taken_port_is_one_line(root: Path, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        line = refusal(root, home, f"http.port={port}")
    assert f"http.port: cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.slow
def test_of_two_that_start_at_a_port_together_one_is_refused_in_one_line(
    root: Path, home: Path
) -> None:
    """Both find it free: neither listens for seconds."""
    (first_home := home / "a").mkdir()
    (second_home := home / "b").mkdir()
    arguments = [f"http.port={free_port()}", "http.proxy=default"]
    first = start(root, first_home, "once=true", *arguments)
    second = start(root, second_home, "once=true", *arguments)
    done = [(job.communicate(timeout=120), job.returncode) for job in (first, second)]
    assert sorted(code for _, code in done) == [0, 2]
    [errors] = [told for (_, told), code in done if code == 2]
    [line] = errors.splitlines()
    assert line.startswith("error: http.port: another endpoint has 127.0.0.1:")


def free_port() -> int:
    """One that nobody listens at, and the system gives to nobody on its own."""
    for port in random.SystemRandom().sample(range(20000, 30000), 20):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def test_an_edited_bundle_is_one_line(root: Path, home: Path, tmp_path: Path) -> None:
    """Although an earlier version works."""
    shutil.copytree(root / "registry", tmp_path / "registry")
    own = tmp_path / "registry" / "tiny"
    registry.promote(own, registry.publish(own, registry.resolve(own, "production"), {}))
    path = registry.resolve(own, "production") / "preprocessing.json"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert "preprocessing.json: expected SHA-256" in refusal(tmp_path, home, "http.port=0")


def test_settings_out_of_range_are_one_line(root: Path, home: Path) -> None:
    line = refusal(root, home, "serve.max_replicas=0", "http.port=-1", "serve.alias=9")
    assert "http.port: expected a value in" in line
    assert "serve.max_replicas: expected a value in" in line


def test_a_replica_larger_than_the_machine_is_one_line(root: Path, home: Path) -> None:
    line = refusal(root, home, "serve.num_cpus=10000", "http.port=0")
    assert "serve.num_cpus: a replica reserves 10000, but the largest node has" in line


def wait_for(job: subprocess.Popen[str], text: str) -> str:
    assert job.stdout is not None
    for line in job.stdout:
        if text in line:
            return line
    pytest.fail(f"ended without {text!r}: {job.stderr.read() if job.stderr else ''}")


def assert_all_gone(processes: list[psutil.Process], home: Path) -> None:
    assert len(processes) > 3
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert list((home / "tmp").iterdir()) == []
    assert {path.name for path in home.iterdir()} == {"tmp"}  # nothing in the home folder


@pytest.mark.slow
def test_once_answers_a_request_and_ends(root: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "registry", tmp_path / "registry")
    job = start(tmp_path, home, "once=true", "http.port=0")
    wait_for(job, "a local Ray")
    processes = psutil.Process(job.pid).children(recursive=True)
    _, errors = job.communicate(timeout=120)
    assert (job.returncode, errors) == (0, "")
    assert_all_gone(processes, home)
    report = json.loads((tmp_path / "experiments" / "tiny" / "deploy.json").read_text())
    request = RecommendRequest.model_validate(report["request"])
    answer = RecommendResponse.model_validate(report["answer"])
    assert len(request.patients[0].visits) == 4
    assert answer.recommendations[0].unknown_codes == []
    assert answer.model.version == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_serves_until_it_is_asked_to_stop_and_leaves_nothing(
    root: Path, home: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    shutil.copytree(root / "registry", tmp_path / "registry")
    job = start(tmp_path, home, "http.port=0")
    url = wait_for(job, "answers at").split()[3]
    wait_for(job, "serving until Ctrl-C")
    processes = psutil.Process(job.pid).children(recursive=True)
    assert httpx.get(f"{url}/healthz").status_code == 200
    job.send_signal(number)
    time.sleep(0.5)
    job.send_signal(signal.SIGINT)  # an impatient second one changes nothing
    job.communicate(timeout=60)
    assert job.returncode == status
    assert_all_gone(processes, home)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 2.0, 4.0])
def test_an_interrupt_while_starting_leaves_nothing(root: Path, home: Path, delay_s: float) -> None:
    job = start(root, home, "http.port=0")
    wait_for(job, "a local Ray")
    time.sleep(delay_s)
    processes = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode == 130
    assert_all_gone(processes, home)
