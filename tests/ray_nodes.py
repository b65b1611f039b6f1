"""Ray clusters of several nodes on this machine, each node started as on a machine of its own.

Every node is one `ray start --block` process, started and ended here by its own id, with its own
ports and a temporary folder that goes with the cluster. Their GPUs are numbers, not devices.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cafemed import paths

BIN = Path(sys.executable).parent
_START_S = 90
_WAIT = """
import sys, time, ray
address, count, seconds = sys.argv[1:]
ray.init(address, logging_level=50)
until = time.monotonic() + float(seconds)
while (alive := sum(node["Alive"] for node in ray.nodes())) != int(count):
    if time.monotonic() > until:
        sys.exit(f"{alive} nodes instead of {count}")
    time.sleep(0.2)
"""


@dataclass
class Nodes:
    """A cluster: `address` for drivers, `dashboard` for jobs, `env` with its token."""

    folder: Path
    address: str
    dashboard: str
    env: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """The root of inputs and outputs of the jobs that run here."""
        return self.folder / "home"

    def add(self, cpus: int, gpus: int = 0, through: Sequence[str] = ()) -> None:
        """Starts one more node; `through` is put before its command."""
        agent, metrics = free_ports(2)
        command = [*through, str(BIN / "ray"), "start", "--block", f"--address={self.address}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        # In the head's, a node would delete jobs' working directories that are its neighbour's too.
        command += [f"--temp-dir={self.folder / f'n{len(self.processes)}'}"]
        self._start(command, cpus, gpus)

    def wait(self) -> None:
        """Waits until the head knows every node that was started."""
        done = self.python(_WAIT, self.address, str(len(self.processes)), str(_START_S))
        assert done.returncode == 0, done.stdout + done.stderr + self.log()

    def _start(self, command: list[str], cpus: int, gpus: int) -> None:
        command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        with (self.folder / "log").open("a") as log:
            # Started in the project's folder, as docs/cluster.md says.
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=paths.PROJECT_DIR,
                    env=self.env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def python(self, code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a process that has the cluster's token."""
        return self.run([sys.executable, "-c", code, *arguments], **env)

    def run(self, command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command with the cluster's token, in the project's folder."""
        return subprocess.run(
            command,
            cwd=paths.PROJECT_DIR,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def log(self) -> str:
        """What the nodes printed."""
        return (self.folder / "log").read_text()[-3000:]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def head(cpus: int, gpus: int = 0, more: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """Starts a head with a token of its own; ends it and all nodes added since.

    `more` is of the environment of every node.
    """
    with tempfile.TemporaryDirectory(prefix="cm", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, agent, metrics, client = free_ports(5)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": name,
            "HOME": name,
            "CAFEMED_HOME": str(folder / "home"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "default",
            "OMP_NUM_THREADS": "1",
        }
        env |= more or {}
        nodes = Nodes(folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env)
        command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'r'}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}"]
        try:
            nodes._start(command, cpus, gpus)
            _wait_for_port(dashboard, nodes)
            yield nodes
        finally:
            # The head last: the others complain about a head that is gone.
            for process in reversed(nodes.processes):
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=90)


def _wait_for_port(port: int, nodes: Nodes) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        assert nodes.processes[0].poll() is None, nodes.log()
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no dashboard on port {port}: {nodes.log()}")
