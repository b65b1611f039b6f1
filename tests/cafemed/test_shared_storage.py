"""What a node says of a storage, and clusters whose nodes share one or do not."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from cafemed import shared_storage
from cafemed.errors import ConfigError

# What a sweep does first, in a driver of its own: Ray reads the token once in a process's life.
REQUIRE = """
import os, sys
from cafemed import cluster, shared_storage
from cafemed.errors import ConfigError
os.environ["RAY_ADDRESS"] = sys.argv[1]
try:
    with cluster.ray_cluster(1):
        shared_storage.require_shared(sys.argv[2], "search.storage")
except ConfigError as err:
    sys.exit(str(err))
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "_PATIENCE_S", 0.2)


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "here", "Alive": True}])
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)


def marker(folder: Path) -> str:
    (folder / ".shared-0").write_text(".shared-0")
    return ".shared-0"


def test_a_node_that_sees_the_marker_has_nothing_to_say_and_leaves_nothing(tmp_path: Path):
    name = marker(tmp_path)
    assert shared_storage.look(str(tmp_path), name) is None
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_node_that_sees_another_folder_says_so(tmp_path: Path):
    # An older marker of the same name is not the driver's.
    (tmp_path / ".shared-0").write_text("something else")
    for name in (".shared-0", ".shared-1"):
        said = shared_storage.look(str(tmp_path), name)
        assert said == "does not see what was written there"


def test_a_node_that_may_not_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_place: str, _name: str) -> None:
        raise PermissionError("Permission denied\nand more")

    name = marker(tmp_path)
    monkeypatch.setattr(shared_storage, "_write", refuse)
    assert shared_storage.look(str(tmp_path), name) == "Permission denied"


@pytest.mark.usefixtures("one_node")
def test_one_node_needs_no_shared_folder_and_nothing_is_made(tmp_path: Path):
    shared_storage.require_shared(tmp_path / "not" / "there", "search.storage")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_node")
def test_a_url_is_written_and_read_even_by_one_node(tmp_path: Path):
    shared_storage.require_shared(f"file://{tmp_path}", "search.storage")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"^search\.storage: cannot write to file:///no/where: "):
        shared_storage.require_shared("file:///no/where", "search.storage")
    with pytest.raises(ConfigError, match=r"^search\.storage: cannot write to ftp://x: "):
        shared_storage.require_shared("ftp://x", "search.storage")
    # Every opening of this one is another, empty file system.
    with pytest.raises(ConfigError, match=r"mock://x does not keep what is written there: "):
        shared_storage.require_shared("mock://x", "search.storage")


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as writing, reading and removing one object takes."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def reply(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        done = "uploadId" in self.path
        tag = "CompleteMultipartUploadResult" if done else "InitiateMultipartUploadResult"
        self.reply(200, f"<{tag}><UploadId>1</UploadId><ETag>0</ETag></{tag}>".encode())

    def do_PUT(self) -> None:
        if "Content-Length" not in self.headers:
            # In chunks, which hold chunks of S3's own: length, content, an empty one, a checksum.
            sent = b""
            while length := int(self.rfile.readline(), 16):
                sent += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            self.objects[self.path.split("?")[0]] = sent.split(b"\r\n")[1]
        # Otherwise the empty object that pyarrow leaves for a folder whose last file it removed.
        self.reply(200)

    def do_GET(self) -> None:
        body = self.objects.get(self.path.split("?")[0])
        self.reply(404) if body is None else self.reply(200, body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.objects.pop(self.path.split("?")[0])
        self.reply(204)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.usefixtures("one_node")
def test_a_bucket_is_written_read_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    seen: list[str] = []
    monkeypatch.setattr(Bucket, "log_request", lambda self, *_: seen.append(self.command))
    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=eu"
        url = f"s3://bucket/trials?{options}"
        shared_storage.require_shared(url, "search.storage")
        assert Bucket.objects == {}
        assert {"PUT", "GET", "DELETE"} <= set(seen)
        monkeypatch.setattr(Bucket, "do_POST", lambda self: self.reply(403))
        with pytest.raises(ConfigError, match=r"^search\.storage: cannot write to s3://bucket/tri"):
            shared_storage.require_shared(url, "search.storage")
        server.shutdown()


def test_a_trial_on_a_node_without_the_sweep_names_the_key(tmp_path: Path):
    (tmp_path / "sweep.json").touch()
    shared_storage.require_seen(tmp_path / "sweep.json", "search.storage")
    with pytest.raises(ConfigError, match=r"^search\.storage: /no is not shared .* sweep\.json is"):
        shared_storage.require_seen(Path("/no/sweep.json"), "search.storage")


@pytest.fixture(scope="module")
def two_nodes(ray_nodes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster whose second node has a disk of its own where the head has a folder `private`."""
    private = tmp_path_factory.mktemp("private")
    mount = f'mount -t tmpfs none {private} && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("this user may not mount in a namespace of his own")
    with ray_nodes.head(cpus=1) as nodes:
        nodes.add(cpus=1, gpus=2, through=inside)
        nodes.wait()
        yield nodes, private


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_folder_that_is_private_to_a_node_is_refused(two_nodes: Any):
    nodes, private = two_nodes
    started = time.monotonic()
    done = nodes.python(REQUIRE, nodes.address, str(private / "experiments" / "trials"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"search.storage: {private}/experiments/trials is not shared by the ")
    assert "cluster's 2 nodes (" in line
    assert "does not see what was written there); choose a folder that all nodes mount" in line
    assert not list(private.iterdir())
    assert time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_folder_that_all_nodes_see_is_taken_and_left_as_it_was(two_nodes: Any):
    nodes, _ = two_nodes
    shared = nodes.folder / "shared"
    shared.mkdir()
    done = nodes.python(REQUIRE, nodes.address, str(shared / "experiments" / "trials"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(shared.iterdir())
    done = nodes.python(REQUIRE, nodes.address, f"file://{shared}")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(shared.iterdir())
