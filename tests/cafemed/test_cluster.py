import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cafemed import cluster, paths
from cafemed.errors import ConfigError


def connect(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with cluster.ray_cluster(1):
        pass


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no Ray cluster answers"):
            connect(monkeypatch, address)


def test_the_address_of_the_job_server_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="expected HOST:PORT of a cluster"):
        connect(monkeypatch, "http://127.0.0.1:8265")


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray as a head without CPUs, a worker, and one that is gone show it."""
    resources = [({}, True), ({"CPU": 4.0}, True), ({"CPU": 64.0, "GPU": 8.0}, False)]
    nodes = [{"Resources": given, "Alive": alive} for given, alive in resources]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("two_nodes")
def test_a_local_ray_refuses_what_it_can_never_hold():
    cluster.require_resources("a trial", {"CPU": ("search.cpus", 4.0), "GPU": ("search.gpus", 0)})
    for kind, most in (("CPU", 4), ("GPU", 0)):
        message = (
            rf"^key: a trial reserves 4\.5, but the largest node has {most} {kind}; reserve less"
        )
        with pytest.raises(ConfigError, match=message):
            cluster.require_resources("a trial", {kind: ("key", 4.5)})


@pytest.mark.usefixtures("two_nodes")
def test_a_cluster_may_grow_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    cluster.require_resources("a trial", {"CPU": ("search.cpus", 1.0), "GPU": ("search.gpus", 1.0)})
    [line] = capsys.readouterr().out.splitlines()
    assert "search.gpus: a trial reserves 1, but the largest node has 0 GPU now; waiting" in line


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Where a socket's path is not too long."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def started_with(folder: Path) -> list[psutil.Process]:
    """Processes that have this folder as their temporary one, or a file in it open.

    Where a process wrote its title over the start of its environment, psutil sees none.
    """
    found = []
    for process in psutil.process_iter(["cmdline"]):
        own = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):
            told = f"TMPDIR={folder}\0".encode() in (own / "environ").read_bytes()
            open_files = [str(link.readlink()) for link in (own / "fd").iterdir()]
            if told or any(name.startswith(f"{folder}/") for name in open_files):
                found.append(process)
    return found


def seen(part: str, folder: Path) -> bool:
    """Whether one of these processes, or a log of theirs, is called so."""
    if list(folder.glob(f"cafemed-*/session_2*/logs/{part}*")):
        return True
    return any(part in " ".join(p.info["cmdline"] or ()) for p in started_with(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_wait_for_the_start_and_those_that_were_ignored_are(number: signal.Signals):
    before, reached = signal.getsignal(number), []

    def start(times: int) -> None:
        with cluster._interrupts_deferred():
            for _ in range(times):
                signal.raise_signal(number)
            reached.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            start(times)
    assert reached == [1]
    assert signal.getsignal(number) == before
    signal.signal(number, signal.SIG_IGN)
    try:
        start(2)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


_START = """
import time
from cafemed import cluster
try:
    with cluster.ray_cluster(1):
        time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("part", "seconds"),
    [
        ("gcs_server", 0),
        ("raylet/raylet", 0),
        ("dashboard/agent.py", 0),
        ("dashboard/agent.py", 1),
        ("ray::DashboardAgent", 0),
        ("python-core-driver", 0),  # its log: the connection is being made
    ],
)
def test_an_interrupt_while_ray_starts_leaves_nothing(
    part: str, seconds: float, number: signal.Signals, short_folder: Path
):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", _START],
        cwd=paths.PROJECT_DIR,
        env=kept | {"TMPDIR": str(short_folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not seen(part, short_folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert started_with(short_folder) == []
    assert list(short_folder.iterdir()) == []
