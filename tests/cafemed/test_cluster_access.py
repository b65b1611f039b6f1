"""Clusters that take a token, refuse it, or are none. A stand-in for a cluster's head answers."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cafemed import paths
from cafemed.cluster_access import require_answer
from cafemed.errors import ConfigError

TOKEN = "right" * 8
# A process of its own: Ray reads mode and token once in a process's life.
ASK = """
import sys
from cafemed.cluster_access import require_answer
from cafemed.errors import ConfigError
try:
    require_answer(sys.argv[1])
except ConfigError as err:
    sys.exit(str(err))
"""


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Answers as a cluster's head does: with its version, or that the token is wrong."""

    version = ray.__version__

    def CheckAlive(self, _request, context):  # noqa: N802
        given = dict(context.invocation_metadata()).get("authorization")
        if given != f"Bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)


@pytest.fixture
def head() -> Iterator[tuple[Head, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    served = Head()
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield served, f"127.0.0.1:{port}"
    server.stop(None).wait()


def ask(address: str, home: Path, **env: str) -> str:
    """What a process in this environment is told; empty if the cluster takes it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, address],
        env=kept | {"HOME": str(home), "PYTHONPATH": str(paths.PROJECT_DIR)} | env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == bool(done.stderr)
    return done.stderr.removesuffix("\n")


def test_the_clusters_token_is_taken(head: tuple[Head, str], tmp_path: Path):
    assert ask(head[1], tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) == ""


def test_a_token_file_in_the_home_is_taken_or_named(head: tuple[Head, str], tmp_path: Path):
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text(TOKEN)
    assert ask(head[1], tmp_path, RAY_AUTH_MODE="token") == ""
    file.write_text("wrong")
    said = ask(head[1], tmp_path, RAY_AUTH_MODE="token")
    assert f"the cluster refused the token of {file}; " in said


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "none was sent; export RAY_AUTH_MODE=token, with the cluster's token in "),
        ({"RAY_AUTH_TOKEN": TOKEN}, "none was sent; export RAY_AUTH_MODE=token, "),
        ({"RAY_AUTH_MODE": "token"}, "there is no token; write the cluster's into ~/.ray/auth_to"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"},
            "the cluster refused the token of RAY_AUTH_TOKEN; it has to be the one that its nodes",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
            "RAY_AUTH_TOKEN_PATH=/nowhere: no token can be read; write the cluster's into it",
        ),
    ],
    ids=["nothing", "mode", "token", "wrong", "unreadable"],
)
def test_what_is_missing_is_named_in_one_line(
    head: tuple[Head, str], tmp_path: Path, env: dict[str, str], expected: str
):
    said = ask(head[1], tmp_path, **env)
    assert said.startswith(f"RAY_ADDRESS={head[1]}: ")
    assert expected in said
    assert "\n" not in said
    assert "wrong" not in said  # a token is never shown
    assert TOKEN not in said


def test_another_version_of_ray_is_named(head: tuple[Head, str], tmp_path: Path):
    head[0].version = "2.9.0"
    said = ask(head[1], tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert f"the cluster runs Ray 2.9.0 and this process {ray.__version__}; " in said


def test_a_server_of_another_kind_is_told_apart():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="what listens there is not a cluster's head"):
            require_answer(f"127.0.0.1:{server.server_port}")
        server.shutdown()
