"""The registry: versions, aliases, and processes that change them at the same time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafemed import artifacts, bundle_files, registry, registry_folder
from cafemed.errors import ArtifactError


def make_bundle(folder: Path, content: str = "weights") -> Path:
    """A folder that is a bundle seen from outside, which is all that the registry looks at."""
    scratch = folder.parent / "weights"
    scratch.write_text(content)
    sources = {"weights": artifacts.sha256_of(scratch)}
    with artifacts.new_folder(folder, bundle_files.STAGE, sources, {}) as (partial, _):
        for name in bundle_files.FILES:
            (partial / name).write_text(content)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "registry" / "demo"


def test_versions_are_numbered_and_remember_what_made_them(home: Path, made: Path):
    assert [registry.publish(home, made, {"trial": i}) for i in (4, 5)] == [1, 2]
    first, second = registry.versions(home)
    assert (first.number, second.number) == (1, 2)
    assert second.record["produced_by"] == {"trial": 5}
    assert {"published", "user", "host"} <= set(second.record)
    assert second.folder == home / "versions" / "0002" / "bundle"
    assert bundle_files.verify(second.folder) == bundle_files.verify(made)


@pytest.mark.parametrize("name", ["production", "2", "0002", 2])
def test_resolve_takes_an_alias_or_a_version(home: Path, made: Path, name: str | int):
    for _ in range(3):
        registry.publish(home, made, {})
    registry.promote(home, 2)
    assert registry.resolve(home, name) == home / "versions" / "0002" / "bundle"


def test_aliases_move_apart_from_each_other(home: Path, made: Path):
    for _ in range(2):
        registry.publish(home, made, {})
    registry.promote(home, 1, "production")
    registry.promote(home, 2, "candidate")
    assert registry.resolve_version(home, "production") == 1
    assert registry.resolve_version(home, "candidate") == 2


def test_rollback_goes_back_through_the_promotions(home: Path, made: Path):
    for _ in range(4):
        registry.publish(home, made, {})
    for version in (1, 3, 3, 2):  # the repeated promotion changes nothing to go back to
        registry.promote(home, version)
    assert [registry.rollback(home), registry.rollback(home)] == [3, 1]
    assert registry.resolve_version(home, "production") == 1
    with pytest.raises(ArtifactError, match="no earlier version to go back to; only version 0001"):
        registry.rollback(home)
    registry.promote(home, 4)
    assert registry.rollback(home) == 1
    moves = [(move.action, move.version) for move in registry.history(home, "production")]
    assert moves[-2:] == [("promote", 4), ("rollback", 1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda home: registry.resolve(home, "production"), "no version is promoted"),
        (lambda home: registry.resolve(home, 7), "no version 0007; there is 0001"),
        (lambda home: registry.resolve(home, "../0001"), "expected a version number or one of"),
        (lambda home: registry.resolve(home, 3.5), "expected a version number or one of"),
        (lambda home: registry.resolve(home, None), "expected a version number or one of"),
        (lambda home: registry.promote(home, 7), "no version 0007"),
        (lambda home: registry.promote(home, 1, "best"), "candidate, production, got 'best'"),
        (lambda home: registry.rollback(home), "nothing is promoted"),
        (lambda home: registry.resolve(home.parent / "other", 1), "none .publish one with"),
    ],
)
def test_what_is_not_there_is_one_line(home: Path, made: Path, call, message: str):
    registry.publish(home, made, {})
    with pytest.raises(ArtifactError, match=message) as caught:
        call(home)
    assert "\n" not in str(caught.value)


def test_a_changed_bundle_is_not_published(home: Path, made: Path):
    (made / "model.safetensors").write_text("other")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        registry.publish(home, made, {})
    assert registry.versions(home) == []


def test_a_failed_copy_leaves_nothing(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry_folder, "_write_synced", full_disk)
    with pytest.raises(ArtifactError, match="No space left on device"):
        registry.publish(home, made, {})
    assert list((home / "versions").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "[" * 100_000,
        '{"version": 1, "action": "promote"}' + " " * (16 << 20),
        '{"version": ["1"], "action": "promote"}',
        '{"version": 1, "action": "remove"}',
    ],
    ids=["list", "deep", "large", "version", "action"],
)
def test_an_unreadable_record_is_named(home: Path, made: Path, content: str):
    registry.publish(home, made, {})
    registry.promote(home, 1)
    move = home / "aliases" / "production" / "000001" / "move.json"
    move.write_text(content)
    with pytest.raises(ArtifactError, match=r"move\.json"):
        registry.resolve(home, "production")


# Each process publishes and promotes ten times, as fast as it can.
WORK = """
import sys
import time
from pathlib import Path
from cafemed import registry
home, made, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for i in range(10):
    version = registry.publish(home, made, {"by": name, "i": i})
    registry.promote(home, version)
    registry.resolve(home, "production")
    if i % 3 == 2:
        registry.rollback(home)
"""


def test_processes_at_the_same_time_lose_nothing(home: Path, made: Path):
    command = [sys.executable, "-c", WORK, str(home), str(made)]
    workers = [subprocess.Popen([*command, f"w{i}"], stderr=subprocess.PIPE) for i in range(4)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    published = registry.versions(home)
    assert [v.number for v in published] == list(range(1, 41))
    made_by = {(v.record["produced_by"]["by"], v.record["produced_by"]["i"]) for v in published}
    assert len(made_by) == 40  # nobody's version was replaced by another's
    moves = registry.history(home, "production")
    assert [move.action for move in moves].count("promote") == 40
    assert [move.action for move in moves].count("rollback") == 12
    promoted = sorted(move.version for move in moves if move.action == "promote")
    assert promoted == list(range(1, 41))
    assert registry.resolve_version(home, "production") == moves[-1].version
    names = [path.name for path in (home / "aliases" / "production").iterdir()]
    assert sorted(names) == [f"{i:06d}" for i in range(1, 53)]  # no gap, nothing left over
    for version in published:
        bundle_files.verify(version.folder)


# As WORK, but for ever, and says what it has finished.
ENDLESS = """
import sys
import time
from pathlib import Path
from cafemed import registry
home, made = Path(sys.argv[1]), Path(sys.argv[2])
while True:
    version = registry.publish(home, made, {})
    registry.promote(home, version)
    print(version, flush=True)
    registry.rollback(home)
"""


@pytest.mark.slow
def test_killed_processes_leave_a_registry_whole(home: Path, made: Path, tmp_path: Path):
    for _ in range(2):
        registry.promote(home, registry.publish(home, made, {}))
    finished: set[int] = set()
    for round_ in range(6):
        command = [sys.executable, "-c", ENDLESS, str(home), str(made)]
        with (tmp_path / "said").open("w+") as said:
            workers = [subprocess.Popen(command, stdout=said) for _ in range(4)]
            time.sleep(1.5 + 0.137 * round_)
            for worker in workers:
                worker.kill()
                worker.wait(30)
            said.seek(0)
            finished |= {int(line) for line in said.read().split()}
        published = registry.versions(home)
        assert [v.number for v in published] == list(range(1, len(published) + 1))
        for version in published[-20:]:
            bundle_files.verify(version.folder)
        moves = registry.history(home, "production")
        promoted = [move.version for move in moves if move.action == "promote"]
        assert finished <= set(promoted) <= {v.number for v in published}
        assert len(promoted) == len(set(promoted))
        assert registry.resolve(home, "production").is_dir()
    assert len(finished) > 20
    version = registry.publish(home, made, {})
    registry.promote(home, version)
    assert registry.resolve_version(home, "production") == version
