"""Jobs submitted to a real local cluster under token authentication."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "data=synthetic_demo",
    "data.generator.num_patients=150",
    "data.generator.num_visits=350",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass(frozen=True)
class Head:
    address: str
    env: dict[str, str]
    home: Path

    def submit(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [BIN / "ray", "job", "submit", "--address", self.address, *arguments]
        return subprocess.run(
            command,
            cwd=PROJECT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="cm", dir="/tmp") as folder:
        temp = Path(folder)
        port, dashboard, agent, metrics, client = free_ports(5)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
            "CAFEMED_HOME": str(temp / "home"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "default",
        }
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={temp / 'r'}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
        with (temp / "log").open("w") as log:
            # Started in the project's folder, as docs/cluster.md says.
            process = subprocess.Popen(
                command, cwd=PROJECT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for_port(dashboard, process, temp / "log")
            yield Head(f"http://127.0.0.1:{dashboard}", env, temp / "home")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"no dashboard on port {port}: {log.read_text()}")


def assert_succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout


def test_python_entry_point_from_an_uploaded_working_directory(head: Head):
    result = head.submit(
        "--working-dir", ".", "--", "python", "jobs/prepare.py", "name=first", *SMALL
    )
    assert_succeeded(result)
    assert str(head.home) in result.stdout  # the job prints its root
    assert (head.home / "experiments/first/cohort/manifest.json").is_file()


def test_executable_entry_point_from_an_uploaded_working_directory(head: Head):
    arguments = ["--working-dir", ".", "--", "jobs/prepare.py", "name=second", *SMALL]
    assert_succeeded(head.submit(*arguments))
    again = head.submit(*arguments)
    assert_succeeded(again)
    assert "unchanged, skipped" in again.stdout


def test_sweep_runs_on_the_cluster_in_all_three_forms(head: Head):
    assert_succeeded(
        head.submit("--working-dir", ".", "--", "python", "jobs/prepare.py", "name=s", *SMALL)
    )
    discover = ["python", "jobs/discover.py", "name=s"]
    assert_succeeded(head.submit("--working-dir", ".", "--", *discover))
    sweep = ["name=s", "search=smoke", "search.num_samples=2", "train.epochs=2", "force=true"]
    forms = (
        ["--working-dir", ".", "--", "python", "jobs/tune.py", *sweep],
        ["--working-dir", ".", "--", "jobs/tune.py", *sweep],
        # Literally this, on a head that was started in the project's folder.
        ["jobs/tune.py", *sweep],
    )
    for form in forms:
        assert_succeeded(head.submit(*form))
    assert (head.home / "experiments/s/sweep/sweep.parquet").is_file()


def test_users_error_in_a_submitted_job_is_one_line_and_fails_the_job(head: Head):
    result = head.submit(
        "--working-dir", ".", "--", "python", "jobs/discover.py", "name=never_prepared"
    )
    assert result.returncode != 0
    assert "error:" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["missing", "wrong"])
def test_a_client_without_the_right_token_is_refused(head: Head, token: str):
    without = dict(head.env)
    del without["RAY_AUTH_TOKEN"]
    mode = "token" if token else "disabled"
    stranger = Head(head.address, without, head.home)
    extra = {"RAY_AUTH_MODE": mode, "HOME": str(head.home)}
    if token:
        extra["RAY_AUTH_TOKEN"] = token
    result = stranger.submit("--working-dir", ".", "--", "python", "jobs/prepare.py", **extra)
    assert result.returncode != 0
    assert "token" in (result.stdout + result.stderr).lower()
