"""Who runs a sweep: a claim in its storage, renewed by its owner, that keeps all others out.

    .lock                        locked by the owner's kernel; of folders alone
    lease-000003-5f1c….json      the claim: user, host, process, since when; written anew every 10 s

The kernel's lock is enough on one machine, and goes with the process. Machines that share a folder
may not share locks, and object stores have none. So whoever wants a sweep looks for claims first.
One whose owner is provably dead (its process is gone, on this machine) does not count. Any other
is watched: it is renewed, and its owner alive; or it is not for a minute, and counts no more. Then
the newcomer writes a claim of its own with a higher number and looks again: if there is another
new one, or an old one was renewed after all, it takes its own back and begins again. Of two that
do this at the same time at least the later one sees the other. This needs nothing of a store but
that a listing shows what was written before, and no two clocks that agree.

An owner that could not renew its claim for long, such as one that was suspended, looks for claims
with a higher number before it writes anything, and stops if there is one.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cafemed import console, owner
from cafemed.errors import ArtifactError
from cafemed.sweep_storage import Storage

LOCK = ".lock"
#: Seconds between two renewals of a claim, and without one after which it counts no more.
BEAT_S = 10.0
EXPIRY_S = 60.0
#: Seconds between two looks at a claim that is watched.
_LOOK_S = 1.0
#: Seconds that a kernel may take to end a process that was killed, and its locks.
_KILLED_S = 5.0
_CLAIM = re.compile(r"lease-(\d+)-[0-9a-f]+\.json")
_HALF = ".lease-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_Claims = dict[str, dict[str, Any]]


class TakenOverError(ArtifactError):
    """Another process runs the sweep that this one ran."""


@contextlib.contextmanager
def held(storage: Storage) -> Iterator["Lease"]:
    """Makes sure that one process uses a storage while the block runs.

    Raises:
        ArtifactError: if another process has it, naming who; or if it cannot be written to.
    """
    with _kernel_lock(storage) as locked:
        lease = Lease(storage, locked)
        try:
            try:
                lease.acquire()
            except OSError as err:
                raise ArtifactError(f"{storage.name}: {_first_line(err)}") from err
            yield lease
        finally:
            lease.release()


class Lease:
    """A claim on a storage.

    Args:
        storage: where.
        locked: whether this process has the kernel's lock there, so no other of this machine does.
    """

    def __init__(self, storage: Storage, locked: bool = False) -> None:
        self._storage, self._locked = storage, locked
        self._id, self._owner = secrets.token_hex(8), owner.this_process()
        self._name = ""
        self._beats = 0
        self._renewed = _now()
        self._since = datetime.datetime.now(datetime.UTC)
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        #: Why it is lost; None while it is not, as far as this process knows.
        self.lost: TakenOverError | None = None

    def acquire(self) -> None:
        """Waits until nobody else can have the storage, and takes it.

        Raises:
            ArtifactError: if somebody has it.
            OSError: if the storage cannot be read or written.
        """
        while True:
            found = self._watched(_claims(self._storage))
            number = max(map(_number, found), default=0) + 1
            self._name = f"lease-{number:06d}-{self._id}.json"
            self._write()
            others = {name: c for name, c in _claims(self._storage).items() if name != self._name}
            if all(found.get(name) == claim for name, claim in others.items()):
                break
            self._storage.remove(self._name)
            time.sleep(random.uniform(0, min(BEAT_S, 1.0)))  # so that not all come back at once
        for name in found:
            self._storage.remove(name)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Takes the claim back."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(EXPIRY_S)
        if self._name:
            with contextlib.suppress(OSError):
                self._storage.remove(self._name)

    def require(self) -> None:
        """Makes sure, before something is written, that nobody took the storage over.

        Raises:
            TakenOverError: if somebody did.
            OSError: if the claim is too old to say, and cannot be renewed.
        """
        if self.lost is None and _now() - self._renewed > EXPIRY_S / 2:
            self.renew()
        if self.lost is not None:
            raise self.lost

    def renew(self) -> None:
        """Writes the claim anew, and looks before and after whether it still counts.

        Raises:
            OSError: if the storage cannot be read or written.
        """
        with self._writing:
            started = _now()
            self._look()
            if self.lost is None:
                self._write()
                self._look()
            self._renewed = started

    def _beat(self) -> None:
        while self.lost is None and not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next time, or whoever writes is told
                self.renew()

    def _look(self) -> None:
        found = _claims(self._storage)
        higher = [name for name in found if _number(name) > _number(self._name)]
        # Some disks' listings may miss a file while others come and go beside it.
        if not higher and (self._name in found or self._storage.has(self._name)):
            return
        who = _who(found[max(higher)] if higher else {})
        self.lost = TakenOverError(
            f"{self._storage.name}: another process took this sweep over{who}, as this one had not "
            f"been heard of for {EXPIRY_S:.0f} s, or removed its files; this one stops"
        )
        with contextlib.suppress(OSError):
            self._storage.remove(self._name)

    def _watched(self, found: _Claims) -> _Claims:
        """Gives the claims that do not count any more, after whatever time that takes to say.

        Raises:
            ArtifactError: if one does.
        """
        self._require_dead(found)
        told, until = False, _now() + EXPIRY_S
        while any(self._may_count(claim) for claim in found.values()):
            if not told:
                _say_waiting(self._storage, found[max(found)])
                told = True
            if _now() > until:
                break
            time.sleep(min(_LOOK_S, BEAT_S))
            now = _claims(self._storage)
            renewed = [c for name, c in now.items() if name in found and c != found[name]]
            if renewed:
                raise _taken(self._storage, renewed[0])
            if set(now) - set(found):  # somebody else waited, too
                self._require_dead(now)
                until = _now() + EXPIRY_S
            found = now
        return found

    def _require_dead(self, found: _Claims) -> None:
        for claim in found.values():
            if self._is_alive(claim):
                raise _taken(self._storage, claim)

    def _is_alive(self, claim: Mapping[str, Any]) -> bool:
        """Whether a claim's owner certainly runs, on this machine."""
        return not self._locked and owner.lives(claim) is True

    def _may_count(self, claim: Mapping[str, Any]) -> bool:
        """Whether a claim's owner may be running somewhere; its clock does not count."""
        if owner.lives(claim) is False:
            return False
        return not (self._locked and claim.get("boot") == owner.boot())

    def _write(self) -> None:
        self._beats += 1
        content = self._owner | {
            "since": self._since.isoformat(timespec="seconds"),
            "beats": self._beats,
            "at": time.time(),
        }
        self._storage.write(self._name, content)


@contextlib.contextmanager
def _kernel_lock(storage: Storage) -> Iterator[bool]:
    """Locks a folder; gives whether there is a lock: object stores and some disks have none."""
    folder = storage.folder
    if folder is None:
        yield False
        return
    handle, locked = _lock(folder, storage)
    try:
        yield locked
    finally:
        _remove_empty(folder, storage.names())
        os.close(handle)


def _remove_empty(folder: Path, names: Collection[str]) -> None:
    """Removes a folder with nothing of a sweep's in it, but not what comes to it meanwhile."""
    # Of a write that was killed, half of a claim may be left.
    if [name for name in names if not name.startswith(_HALF)] != [LOCK]:
        return
    with contextlib.suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _lock(folder: Path, storage: Storage) -> tuple[int, bool]:
    until = _now() + _KILLED_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if (folder / LOCK).stat().st_ino == os.fstat(handle).st_ino:
                    return handle, True
            # Who had it removed the folder with it.
        except BlockingIOError as err:
            claims = _claims(storage)
            claim = claims[max(claims)] if claims else {}
            if _now() > until or owner.lives(claim) is not False:
                os.close(handle)
                raise _taken(storage, claim) from err
            time.sleep(0.1)
        except OSError as err:
            if err.errno in _NO_LOCKS:
                return handle, False
            os.close(handle)
            raise
        os.close(handle)


def _claims(storage: Storage) -> _Claims:
    found: _Claims = {}
    for name in filter(_CLAIM.fullmatch, storage.names()):
        with contextlib.suppress(FileNotFoundError):  # removed since
            try:
                found[name] = storage.read(name)
            except (ValueError, TypeError):
                found[name] = {}  # whoever wrote it may write it again
    return found


def _taken(storage: Storage, claim: Mapping[str, Any]) -> ArtifactError:
    return ArtifactError(
        f"{storage.name}: another process runs this sweep{_who(claim)}; let it end, or stop it "
        "first"
    )


def _say_waiting(storage: Storage, claim: Mapping[str, Any]) -> None:
    heard = f"was heard of {max(_age(claim), 0.0):.0f} s ago" if claim else "has a damaged claim"
    console.say(
        "tune",
        f"another process ran this sweep{_who(claim)} and {heard}; waiting for up to "
        f"{EXPIRY_S:.0f} s to see whether it still does: {storage.name}",
    )


def _who(claim: Mapping[str, Any]) -> str:
    """Whose process it is, where, and since when it runs the sweep, as far as its claim says so."""
    if not claim:
        return ""
    since = str(claim.get("since")).replace("T", " ").replace("+00:00", " UTC")
    return (
        f" ({claim.get('user')} on {claim.get('host')}, process {claim.get('pid')}, since {since})"
    )


def _age(claim: Mapping[str, Any]) -> float:
    """Seconds since a claim was renewed, by the clocks of two machines."""
    at = claim.get("at")
    return time.time() - at if isinstance(at, float) else 0.0


def _number(name: str) -> int:
    found = _CLAIM.fullmatch(name)
    assert found is not None
    return int(found[1])


def _now() -> float:
    """Seconds, also of the time that the machine was suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0] if lines else type(err).__name__
