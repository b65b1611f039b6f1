"""A registry in an object store: in memory here, in a real S3 server where there is one (slow)."""

import collections
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cafemed import bundle_files, registry, registry_objects
from cafemed.errors import ArtifactError
from serve.following import FollowingModel

MADE = Path(__file__).parent / "old_bundles" / "without-pace"
_COUNT = itertools.count()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAFEMED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "registry"


@pytest.fixture
def url() -> str:
    return f"memory://models{next(_COUNT)}/demo"


def objects(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    return sorted(path.removeprefix(f"{root}/") for path in files.find(root))


def test_versions_aliases_and_cards_as_in_a_folder(url: str):
    assert [registry.publish(url, MADE, {"trial": i}) for i in (4, 5)] == [1, 2]
    trials = [record["produced_by"]["trial"] for record in registry.records(url).values()]
    assert trials == [4, 5]
    registry.promote(url, 1)
    registry.promote(url, 2)
    registry.promote(url, 1, "candidate")
    assert registry.resolve_version(url, "production") == 2
    assert registry.rollback(url) == 1
    assert [registry.resolve_version(url, a) for a in registry.ALIASES] == [1, 1]
    assert [m.action for m in registry.history(url, "production")] == [
        "promote",
        "promote",
        "rollback",
    ]
    assert registry.read_card(url, 1) is None
    for text in ("first", "second"):  # evaluated again, it is replaced
        place = registry.write_card(url, 1, {"format_version": 1, "model": text}, "# Card")
        assert place == f"{url}/cards/0001.json"
        assert registry.read_card(url, 1) == {"format_version": 1, "model": text}
    assert registry.read_card(url, 2) is None


def test_resolve_gives_a_copy_that_is_made_once_and_mended(url: str, cache: Path):
    registry.publish(url, MADE, {})
    folder = registry.resolve(url, 1)
    assert folder.is_relative_to(cache)
    assert bundle_files.verify(folder) == bundle_files.verify(MADE)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert registry.resolve(url, "0001") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    (folder / "effects.npz").write_bytes(b"damaged")
    assert bundle_files.verify(registry.resolve(url, 1)) == bundle_files.verify(MADE)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_copy_that_a_faster_process_made_is_left_to_it(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may be reading it. One that is damaged meanwhile is replaced all the same."""
    registry.publish(url, MADE, {})
    real = registry_objects.ObjectStore._download
    found: list[tuple[Path, int]] = []

    def download(self: registry_objects.ObjectStore, *given: Any) -> None:
        if not found:
            found.append((Path(), 0))
            folder = registry.resolve(url, 1)
            found[0] = folder, folder.stat().st_ino
        real(self, *given)

    monkeypatch.setattr(registry_objects.ObjectStore, "_download", download)
    assert registry.resolve(url, 1) == found[0][0]
    assert found[0][0].stat().st_ino == found[0][1]
    monkeypatch.undo()
    monkeypatch.setenv("CAFEMED_CACHE", str(cache.parent))
    (found[0][0] / "effects.npz").unlink()
    assert bundle_files.verify(registry.resolve(url, 1)) == bundle_files.verify(MADE)
    assert [path.name for path in found[0][0].parent.iterdir()] == [found[0][0].name]


def test_a_half_published_version_is_not_there(url: str):
    registry.publish(url, MADE, {})
    files, root = fsspec.core.url_to_fs(url)
    whole = [name for name in objects(url) if name.startswith("versions/")]
    # What a publisher leaves that is killed after any of its objects: the record is the last.
    for number, cut in enumerate(range(1, len(whole)), 2):
        folder = f"{root}/versions/{number:04d}-{cut:016x}"
        names = sorted(name.split("/", 2)[2] for name in whole)
        names.sort(key=lambda name: (name != "claim", name == "record.json"))
        for name in names[:cut]:
            files.pipe_file(f"{folder}/{name}", b"half")
    assert list(registry.records(url)) == [1]
    with pytest.raises(ArtifactError, match=r"no version 0002; there is 0001$"):
        registry.promote(url, 2)
    assert registry.publish(url, MADE, {}) == len(whole) + 1  # numbers claimed once stay unused


def test_the_manifest_is_written_after_the_files_and_the_record_last(url: str):
    registry.publish(url, MADE, {})
    times = {}
    files, root = fsspec.core.url_to_fs(url)
    for name in objects(url):
        times[name.split("/")[-1]] = files.info(f"{root}/{name}")["created"]
    assert sorted(times, key=times.__getitem__)[-2:] == ["manifest.json", "record.json"]
    assert min(times, key=times.__getitem__) == "claim"


def test_who_claims_a_number_that_is_claimed_gives_it_up(url: str, monkeypatch: pytest.MonkeyPatch):
    """Two that look at the same moment: the other's claim appears just after ours is written."""
    files, root = fsspec.core.url_to_fs(url)
    real = registry_objects.ObjectStore._write
    waited = []

    def write(self: registry_objects.ObjectStore, name: str, text: str) -> None:
        if name.endswith("/claim") and not waited:
            files.pipe_file(f"{root}/versions/0001-00000000000000aa/claim", b"")
            waited.append(name)
        real(self, name, text)

    monkeypatch.setattr(registry_objects.ObjectStore, "_write", write)
    monkeypatch.setattr(time, "sleep", waited.append)
    assert registry.publish(url, MADE, {}) == 2
    assert len(waited) == 2
    assert not any(name in waited[0] for name in objects(url) if name.startswith("versions/0001"))


def test_a_move_that_somebody_else_made_meanwhile_is_not_written_over(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    for _ in range(3):
        registry.publish(url, MADE, {})
    registry.promote(url, 1)
    registry.promote(url, 2)
    real = registry_objects.ObjectStore._create
    raced = []

    def create(self: registry_objects.ObjectStore, name: str, text: str) -> None:
        if name.endswith("000003.json") and not raced:
            raced.append(name)
            registry.promote(url, 3)  # takes the number first
        real(self, name, text)

    monkeypatch.setattr(registry_objects.ObjectStore, "_create", create)
    assert registry.rollback(url) == 2  # from 3, which was decided on anew
    moves = [(m.action, m.version) for m in registry.history(url, "production")]
    assert moves[2:] == [("promote", 3), ("rollback", 2)]


def test_a_move_is_made_once_where_the_answer_was_lost(url: str, monkeypatch: pytest.MonkeyPatch):
    """The client then asks again, and the store says that the object is there."""
    for _ in range(3):
        registry.promote(url, registry.publish(url, MADE, {}))
    real = registry_objects.ObjectStore._create
    lost: set[str] = set()

    def create(self: registry_objects.ObjectStore, name: str, text: str) -> None:
        real(self, name, text)
        if name not in lost:
            lost.add(name)
            raise FileExistsError(name)

    monkeypatch.setattr(registry_objects.ObjectStore, "_create", create)
    assert registry.rollback(url) == 2
    assert len(lost) == 2  # the probe and the move
    moves = [(m.action, m.version) for m in registry.history(url, "production")]
    assert moves[3:] == [("rollback", 2)]


def test_an_alias_is_not_moved_where_the_store_cannot_create_exclusively(
    url: str, monkeypatch: pytest.MonkeyPatch
):
    registry.publish(url, MADE, {})
    # A server that knows no condition and writes over what is there.
    memory = type(fsspec.filesystem("memory"))
    real = memory.pipe_file
    monkeypatch.setattr(memory, "pipe_file", lambda *given, **_condition: real(*given))
    with pytest.raises(ArtifactError, match=r"no exclusive create \(it wrote over") as caught:
        registry.promote(url, 1)
    assert "\n" not in str(caught.value)
    assert not [name for name in objects(url) if name.startswith("aliases")]
    # Most of fsspec's stores only look before they write, which two can do at once.
    monkeypatch.setattr(registry_objects, "_EXCLUSIVE", ("s3", "gs"))
    with pytest.raises(ArtifactError, match=r"no exclusive create \(known to have it: s3, gs\)"):
        registry.promote(url, 1)


def test_a_store_is_tried_before_it_is_needed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    registry.require_ready(url)
    assert objects(url) == []
    registry.require_ready(tmp_path / "there" / "demo")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file/demo: cannot write: "):
        registry.require_ready(tmp_path / "file" / "demo")
    with pytest.raises(ArtifactError, match="foo://x/demo: no such kind of store"):
        registry.require_ready("foo://x/demo")
    monkeypatch.setattr(registry_objects, "_EXCLUSIVE", ("s3", "gs"))
    with pytest.raises(ArtifactError, match="no exclusive create"):
        registry.require_ready(url)


def test_a_file_url_is_the_folder(tmp_path: Path):
    assert registry.publish(f"file://{tmp_path}/demo", MADE, {}) == 1
    assert registry.resolve(tmp_path / "demo", 1) == tmp_path / "demo/versions/0001/bundle"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f, folder: f.pipe_file(f"{folder}/bundle/effects.npz", b"x"),
            "effects.npz",
        ),
        (lambda f, folder: f.rm_file(f"{folder}/bundle/effects.npz"), "effects.npz"),
        (
            lambda f, folder: f.pipe_file(f"{folder}/bundle/a.pkl", b"x"),
            "a.pkl: not a file",
        ),
        (lambda f, folder: f.pipe_file(f"{folder}/record.json", b"[1]"), "not a record"),
        (
            lambda f, folder: f.pipe_file(f"{folder}/record.json", b"[" * 100_000),
            "not a record",
        ),
        (
            lambda f, folder: f.pipe_file(f"{folder}/record.json", b" " * (16 << 20) + b"{}"),
            "expected at most 16 MiB",
        ),
        (
            lambda f, folder: f.pipe_file(
                f"{folder}/record.json", b'{"manifest": "0", "produced_by": {}}'
            ),
            "its manifest is not the one that was published",
        ),
    ],
)
def test_a_damaged_version_is_refused_with_its_url(url: str, cache: Path, damage, message: str):
    registry.publish(url, MADE, {})
    files, root = fsspec.core.url_to_fs(url)
    folder = next(path.rpartition("/")[0] for path in files.find(root) if "record" in path)
    damage(files, folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        registry.resolve(url, 1)
    assert str(caught.value).startswith(f"{url}/versions/0001-")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*/*"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://models/demo", "no such kind of store"),
        ("memory://nothing/demo", "no version is promoted"),
    ],
)
def test_what_is_not_there_is_one_line(url: str, message: str):
    with pytest.raises(ArtifactError, match=message) as caught:
        registry.resolve(url, "production")
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ArtifactError, match="gs://b/demo: needs gcsfs, which is not installed"):
        registry.resolve("gs://b/demo", "production")


def test_a_replica_follows_a_registry_in_a_store(url: str):
    for _ in range(2):
        registry.publish(url, MADE, {})
    registry.promote(url, 1)
    model = FollowingModel(url, "production")
    assert not model.refresh()
    registry.promote(url, 2)
    assert model.refresh()
    assert model.recommender.name.version == 2
    registry.rollback(url)
    assert model.refresh()
    assert model.recommender.name.version == 1


PROJECT = Path(__file__).resolve().parents[2]

# Publishes and promotes until it is killed, or so many times.
WORK = """
import sys
from pathlib import Path
from cafemed import registry
home, made, name, times = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for i in range(times):
    version = registry.publish(home, made, {"by": name, "i": i})
    registry.promote(home, version)
    if i % 3 == 2:
        registry.rollback(home)
"""


def start(url: str, name: str, times: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORK, url, str(MADE), name, str(times)]
    return subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def bucket(bucket: str) -> str:
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    return bucket


@pytest.mark.slow
def test_processes_that_share_a_bucket_lose_nothing(bucket: str):
    url = f"{bucket}/together/demo"
    workers = [start(url, f"w{i}", 5) for i in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    records = registry.records(url)
    assert len(records) == 20
    assert len({(r["produced_by"]["by"], r["produced_by"]["i"]) for r in records.values()}) == 20
    moves = registry.history(url, "production")
    assert collections.Counter(move.action for move in moves) == {"promote": 20, "rollback": 4}
    assert {move.version for move in moves if move.action == "promote"} == set(records)
    assert bundle_files.verify(registry.resolve(url, "production")) == bundle_files.verify(MADE)


@pytest.mark.slow
def test_killed_publishers_leave_a_bucket_whole(bucket: str):
    url = f"{bucket}/killed/demo"
    for round_ in range(3):
        workers = [start(url, f"r{round_}w{i}", 1000) for i in range(3)]
        time.sleep(3 + 0.37 * round_)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait(30)
    records = registry.records(url)
    assert records
    for number in records:
        assert bundle_files.verify(registry.resolve(url, number)) == bundle_files.verify(MADE)
    assert {move.version for move in registry.history(url, "production")} <= set(records)
    version = registry.publish(url, MADE, {})
    assert version > max(records)
    registry.promote(url, version)
    assert registry.resolve_version(url, "production") == version


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_an_unreachable_store_is_one_line_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="s3://elsewhere/demo: EndpointConnectionError") as told:
        registry.resolve("s3://elsewhere/demo", "production")
    assert "\n" not in str(told.value)
    assert time.monotonic() - started < 60
