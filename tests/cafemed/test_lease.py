"""One process at a time has a storage: on one machine, on several, and when it is paused."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from cafemed import lease, owner
from cafemed.errors import ArtifactError
from cafemed.lease import Lease, TakenOverError
from cafemed.sweep_storage import Storage

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_S", 1.2)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes this process look as if it were on another machine, or as it is again."""
    real = owner.boot

    def move(away: bool) -> None:
        monkeypatch.setattr(owner, "boot", (lambda: "another boot") if away else real)

    return move


def store(folder: Path) -> Storage:
    """As an object store: no folder, so no kernel's lock."""
    made = Storage(folder)
    made.files, made.root = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "x"
    made.files.create_dir("x")
    return made


@pytest.fixture
def place(tmp_path: Path) -> Storage:
    return store(tmp_path)


@pytest.fixture
def first(place: Storage) -> Iterator[Lease]:
    """One that has the storage."""
    made = Lease(place)
    made.acquire()
    yield made
    made.release()


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("lease-*.json"))


@pytest.mark.parametrize("make", [Storage, store])
def test_a_second_one_is_told_who_has_it_since_when(make: Any, tmp_path: Path):
    place = tmp_path / "trials"
    with lease.held(make(place)):
        assert len(claims(place)) == 1
        with pytest.raises(ArtifactError) as caught, lease.held(make(place)):
            pass
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    wanted = rf"another process runs this sweep \(.+ on .+, process {os.getpid()}, since {since}\)"
    assert re.fullmatch(rf"{place}: {wanted}; let it end, or stop it first", str(caught.value))
    assert claims(place) == []
    with lease.held(make(place)):
        assert len(claims(place)) == 1


HOLD = """
import sys, time
from pathlib import Path
from pyarrow import fs
from cafemed import lease
from cafemed.sweep_storage import Storage
place = Storage(sys.argv[1])
if sys.argv[2] == "store":
    place.files, place.root = fs.SubTreeFileSystem(sys.argv[1], fs.LocalFileSystem()), "x"
with lease.held(place):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_a_killed_one_is_followed_at_once_on_its_machine(kind: str, tmp_path: Path):
    make = {"folder": Storage, "store": store}[kind]
    place = make(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
    with subprocess.Popen(command, stdout=-1, text=True, cwd=PROJECT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        taken = pytest.raises(ArtifactError, match=rf"process {other.pid}, since")
        with taken, lease.held(place):
            pass
        other.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline  # nobody has waited for it: its id is still taken
        started = time.monotonic()
        with lease.held(place):
            assert time.monotonic() - started < lease.EXPIRY_S / 2
            assert len(claims(tmp_path)) == 1


def test_another_machines_is_watched_and_followed_when_it_is_silent(
    tmp_path: Path, elsewhere: Any, capsys: pytest.CaptureFixture[str]
):
    """Machines whose locks are their own."""
    elsewhere(True)
    first = Lease(store(tmp_path))
    first.acquire()
    elsewhere(False)
    second, started = Lease(store(tmp_path)), time.monotonic()
    with pytest.raises(ArtifactError, match="another process runs this sweep"):
        second.acquire()
    assert time.monotonic() - started < lease.EXPIRY_S
    told = capsys.readouterr().out
    assert re.search(r"ran this sweep \(.*\) and was heard of 0 s ago; waiting for up to 1 s", told)
    assert len(claims(tmp_path)) == 1

    first._ended.set()  # as its machine goes away
    assert first._thread is not None
    first._thread.join()
    started = time.monotonic()
    second.acquire()
    assert lease.EXPIRY_S <= time.monotonic() - started < 2 * lease.EXPIRY_S + 1
    assert claims(tmp_path) == [second._name]
    # The machine comes back, and with it who thinks that it has it.
    with pytest.raises(TakenOverError, match="another process took this sweep over"):
        first.require()
    with pytest.raises(TakenOverError):
        first.require()
    first.release()
    second.require()
    assert claims(tmp_path) == [second._name]
    second.release()
    assert claims(tmp_path) == []


def test_a_clock_that_is_wrong_by_hours_ends_nobodys_claim(tmp_path: Path):
    """By its own clock, the one that has it renewed it yesterday."""
    place = store(tmp_path)
    first = owner.this_process() | {"boot": "b", "since": "", "beats": 7}
    place.write("lease-000004-aa.json", first | {"at": time.time() - 86400})

    def renew() -> None:
        place.write("lease-000004-aa.json", first | {"beats": 8, "at": time.time() - 86399})

    threading.Timer(lease.EXPIRY_S / 2, renew).start()
    with pytest.raises(ArtifactError, match="another process runs this sweep"):
        Lease(place).acquire()
    assert claims(tmp_path) == ["lease-000004-aa.json"]


def test_one_that_renews_after_all_keeps_it(tmp_path: Path):
    """Its claim was too old and a newcomer writes one: that one looks again."""
    place = store(tmp_path)
    old = owner.this_process() | {"boot": "b", "since": "", "beats": 7, "at": time.time() - 4000}
    place.write("lease-000004-aa.json", old)
    second = Lease(place)
    real = second._write

    beats = iter(range(8, 1000))

    def renew() -> None:
        place.write("lease-000004-aa.json", old | {"beats": next(beats), "at": time.time()})

    def write() -> None:
        real()
        renew()
        threading.Timer(0.5, renew).start()

    second._write = write  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match="another process runs this sweep"):
        second.acquire()
    assert claims(tmp_path) == ["lease-000004-aa.json"]


def test_the_lock_of_a_folder_tells_of_processes_in_other_containers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = Storage(tmp_path)
    place.write("lease-000004-aa.json", owner.this_process() | {"room": "r", "at": time.time()})
    with lease.held(place):
        assert claims(tmp_path)[0].startswith("lease-000005-")
    assert capsys.readouterr().out == ""


def test_one_that_was_suspended_looks_before_it_writes(tmp_path: Path, first: Lease):
    """Not after a minute of its own thread's, which did not run meanwhile either."""
    first._ended.set()
    assert first._thread is not None
    first._thread.join()
    beats, first._renewed = first._beats, lease._now()
    first.require()
    assert first._beats == beats  # it was renewed just now
    first._renewed -= lease.EXPIRY_S
    first.require()
    assert first._beats == beats + 1
    (tmp_path / "x" / first._name).unlink()  # whoever took it over has ended already
    first._renewed -= lease.EXPIRY_S
    with pytest.raises(TakenOverError):
        first.require()
    assert claims(tmp_path) == []


def test_a_listing_that_misses_a_file_loses_nothing(
    tmp_path: Path, place: Storage, first: Lease, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(place, "names", lambda: [])
        first.renew()
        first.require()
    assert claims(tmp_path) == [first._name]


def test_a_later_claim_counts_while_the_old_one_is_still_there(
    tmp_path: Path, place: Storage, first: Lease
):
    place.write("lease-000009-aa.json", owner.this_process() | {"user": "her", "since": ""})
    first.renew()
    with pytest.raises(TakenOverError, match=r"took this sweep over \(her on "):
        first.require()
    assert claims(tmp_path) == ["lease-000009-aa.json"]


def test_a_storage_that_fails_for_a_while_loses_nothing(
    place: Storage, first: Lease, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(place, "write", full)
        time.sleep(lease.EXPIRY_S)
        with pytest.raises(OSError, match="No space left"):
            first.require()
    first.require()
    first.release()
    with monkeypatch.context() as patch:
        patch.setattr(place, "write", full)
        with pytest.raises(ArtifactError, match="No space left on device"), lease.held(place):
            pass


def test_a_folder_whose_disk_has_no_locks_has_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", none)
    with lease.held(Storage(tmp_path)):
        taken = pytest.raises(ArtifactError, match=f"process {os.getpid()}, since")
        with taken, lease.held(Storage(tmp_path)):
            pass


def test_a_damaged_claim_is_watched_as_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = store(tmp_path)
    (tmp_path / "x" / "lease-000001-aa.json").write_text("{")
    with lease.held(place):
        assert claims(tmp_path)[0].startswith("lease-000002-")
    assert "another process ran this sweep and has a damaged claim; waiting" in (
        capsys.readouterr().out
    )


def test_a_lock_that_the_kernel_takes_back_in_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a process that was killed just now, or of one that runs, whose claim says so."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    place, real, left = Storage(tmp_path), lease.fcntl.flock, [1, 2]

    def flock(handle: int, how: int) -> None:
        if left:
            left.pop()
            raise BlockingIOError
        real(handle, how)

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    dead = owner.this_process() | {"pid": gone.pid, "since": "", "at": time.time()}
    place.write("lease-000001-aa.json", dead)
    with lease.held(place):
        assert left == []
    left.append(1)
    place.write("lease-000001-aa.json", dead | {"pid": os.getpid()})
    with pytest.raises(ArtifactError, match="another process runs this sweep"), lease.held(place):
        pass


def test_a_lock_on_a_folder_that_was_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Who ends removes an empty folder; a newcomer may have opened its lock just before."""
    place = tmp_path / "trials"
    real, removed = lease.fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not removed:
            removed.append((place / ".lock").unlink())
        real(handle, how)

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    with lease.held(Storage(place)):
        assert (place / ".lock").exists()
        with pytest.raises(ArtifactError), lease.held(Storage(place)):
            pass


def test_an_empty_folder_that_is_removed_takes_no_newcomers_claim_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of another machine, whose locks are its own."""
    place = Storage(tmp_path / "trials")
    real = place.names

    def names() -> list[str]:
        found = real()
        if found == [".lock"]:
            place.write("lease-000002-aa.json", {})
        return found

    with lease.held(place):
        monkeypatch.setattr(place, "names", names)
    assert claims(tmp_path) == ["lease-000002-aa.json"]
    (tmp_path / "trials" / "lease-000002-aa.json").unlink()
    with lease.held(Storage(tmp_path / "trials")):
        (tmp_path / "trials" / ".lease-000001-00.json.half").touch()
    assert not (tmp_path / "trials").exists()


# Takes the lease as often as it gets it and adds one to a number, read before and written after.
# One in four is killed while it has it; the others watch each other's claims as other machines do.
COUNT = """
import os, random, signal, sys, time
from pathlib import Path
from pyarrow import fs
from cafemed import lease, owner
from cafemed.errors import ArtifactError
from cafemed.sweep_storage import Storage
lease.BEAT_S, lease.EXPIRY_S, os.fsync = 0.05, 1.0, lambda _: None
folder, name, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
owner.boot = lambda: name
place = Storage(folder)
place.files, place.root = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "x"
print("up", flush=True)
sys.stdin.readline()
done, deadline = 0, time.monotonic() + 60
while done < times and time.monotonic() < deadline:
    try:
        with lease.held(place):
            inside = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            count = int((folder / "count").read_text())
            time.sleep(random.uniform(0, 0.1))
            (folder / "count").write_text(str(count + 1))
            (folder / "inside").unlink()
            if name == "0" and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
    except ArtifactError:
        time.sleep(random.uniform(0, 0.2))
print(done, flush=True)
"""


@pytest.mark.slow
def test_of_many_that_want_it_one_has_it_at_a_time(tmp_path: Path):
    store(tmp_path)
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(i), "5"], stdin=-1, stdout=-1, text=True, cwd=PROJECT)
        for i in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    told = [worker.communicate(timeout=120)[0].splitlines()[-1:] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    assert told[1:] == [["5"]] * 3
    assert (tmp_path / "count").read_text() == str(3 + 15)
    assert len(claims(tmp_path)) <= 1  # of the killed one, if it was the last


def test_two_newcomers_do_not_both_get_it(tmp_path: Path, elsewhere: Any):
    """Both look, then both write: each sees the other's claim, and one of them comes later."""
    elsewhere(True)
    gate = threading.Barrier(2)
    found: list[Any] = []
    entered = threading.Semaphore(1)

    def want() -> None:
        mine = Lease(store(tmp_path))
        real, first = mine._write, [True]

        def write() -> None:
            if first:
                first.clear()
                gate.wait(10)
            real()

        mine._write = write  # type: ignore[method-assign]
        try:
            mine.acquire()
        except ArtifactError as err:
            found.append(err)
            return
        found.append(entered.acquire(blocking=False))
        time.sleep(3 * lease.BEAT_S)
        entered.release()
        mine.release()

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert True in found
    assert False not in found
