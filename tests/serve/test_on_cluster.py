"""The endpoint on a cluster under token authentication: `serve deploy` and the submitted job."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cafemed import paths
from cafemed.bundle import Bundle
from cafemed.client import Client, RefusedError
from serve import keys, launch
from serve.example import example_request

BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Head:
    """A cluster's head, and where its endpoint listens."""

    address: str
    env: dict[str, str]
    http_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=paths.PROJECT_DIR,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(root: Path) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="cm", dir="/tmp"))
    port, dashboard, agent, metrics, client, http_port = free_ports(6)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "HOME": str(folder),
        "CAFEMED_HOME": str(root),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=3"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'r'}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    command += [f"--ray-client-server-port={client}", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=paths.PROJECT_DIR,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_open(dashboard)
        yield Head(f"http://127.0.0.1:{dashboard}", env, http_port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"nothing listens on port {port}")


def test_serve_deploy_takes_config_yaml(head: Head, served: Bundle, tmp_path: Path) -> None:
    content = yaml.safe_load((paths.PROJECT_DIR / "serve" / "config.yaml").read_text())
    content["http_options"]["port"] = head.http_port
    content["applications"][0]["args"]["name"] = "tiny"
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump(content))
    head.run("serve", "deploy", "-a", head.address, str(own))
    deadline = time.monotonic() + 90
    status = 0
    while status != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            status = httpx.get(f"{head.url}/readyz").status_code
        except httpx.TransportError:
            continue
    answer = launch.ask(head.url, example_request(served))
    assert answer["model"] == {"name": "cafemed", "version": 1}


def test_a_submitted_job_deploys_and_returns(head: Head, served: Bundle) -> None:
    """After the test above: Serve keeps the port that it was started with."""
    job = ["python", "jobs/deploy.py", "name=tiny", f"http.port={head.http_port}"]
    submit = ["ray", "job", "submit", "--address", head.address, "--working-dir", "."]
    printed = head.run(*submit, "--", *job)
    assert f"answers at {head.url}" in printed
    assert "cafemed stays on the cluster" in printed
    assert "succeeded" in printed
    time.sleep(3)  # the job's processes are gone; the application is not
    answer = launch.ask(head.url, example_request(served))
    assert answer["model"] == {"name": "cafemed", "version": 1}


def test_beyond_the_loopback_nothing_is_deployed_without_keys(
    head: Head, root: Path, served: Bundle, tmp_path: Path
) -> None:
    """After the tests above: Serve is started anew, on every interface."""
    head.run("serve", "shutdown", "-a", head.address, "-y")
    content = yaml.safe_load((paths.PROJECT_DIR / "serve" / "config.yaml").read_text())
    content["http_options"] |= {"host": "0.0.0.0", "port": head.http_port}
    arguments = content["applications"][0]["args"]
    arguments["name"] = "tiny"
    own = tmp_path / "config.yaml"

    def deployed(state: str) -> dict[str, Any]:
        own.write_text(yaml.safe_dump(content))
        head.run("serve", "deploy", "-a", head.address, str(own))
        deadline = time.monotonic() + 90
        told: dict[str, Any] = {}
        while told.get("status") != state and time.monotonic() < deadline:
            time.sleep(0.5)
            printed = yaml.safe_load(head.run("serve", "status", "-a", head.address))
            told = printed["applications"].get("cafemed", {})
        assert told.get("status") == state, told
        return told

    told = deployed("DEPLOY_FAILED")
    assert "serve.access.auth: 'none' is only for the loopback" in told["message"]
    # A job is told the same, whatever it believes of where Serve listens.
    job = ["python", "jobs/deploy.py", "name=tiny", f"http.port={head.http_port}"]
    submit = ["ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", *job]
    refused = subprocess.run(
        submit,
        cwd=paths.PROJECT_DIR,
        env=head.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused.returncode != 0
    assert "error: serve.access.auth: 'none' is only for the loopback" in refused.stdout

    path = paths.keys_file(root, "tiny")
    secret = keys.create(path, "ward-3", 600)
    try:
        arguments["serve"]["access"] = {"auth": "keys"}
        deployed("RUNNING")
        with Client(head.url, secret) as client:
            answer = client.recommend(example_request(served)["patients"])
        assert answer["model"] == {"name": "cafemed", "version": 1}
        with Client(head.url, "other") as client, pytest.raises(RefusedError, match="status 401"):
            client.model()
    finally:
        path.unlink()
