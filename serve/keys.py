"""API keys: a file of their hashes, and the replica's view of it.

A key is 256 random bits, so that its plain SHA-256 cannot be turned back or guessed; only that is
kept. The file is JSON, readable by its owner alone, written beside and renamed; replicas read it
again when it changes, so that a key is revoked without a restart.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from cafemed import artifacts
from cafemed.config import Range, from_mapping
from cafemed.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

#: What every key begins with, so that one that was published by mistake can be searched for.
PREFIX = "cafemed_"
#: How often a replica looks whether the file has changed, in seconds.
REREAD_S = 1.0

_FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 1 << 20


class KeysError(UserError):
    """The file of keys is missing or unreadable, or does not have what was asked for."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as it is kept.

    Attributes:
        name: who uses it; in logs and metrics.
        sha256: of the key, hex.
        per_minute: requests a minute that a replica answers; as many may come at once.
        created: UTC, ISO 8601.
    """

    name: str
    sha256: str
    per_minute: Annotated[int, Range(1, 1_000_000)]
    created: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "name: expected 1 to 64 letters, digits, '_', '-' and '.', beginning with a "
                f"letter or digit, got {self.name!r}"
            )
        if not _SHA256.fullmatch(self.sha256):
            raise ConfigError("sha256: expected 64 hexadecimal digits")


def read(path: Path) -> tuple[Key, ...]:
    """Reads a file of keys.

    Raises:
        KeysError: if it is missing or not such a file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        content = json.loads(raw) if len(raw) <= _MAX_FILE_BYTES else None
    except FileNotFoundError as err:
        raise KeysError(f"{path}: no API keys; make one: python jobs/keys.py create=NAME") from err
    except (OSError, ValueError, RecursionError) as err:
        raise KeysError(f"{path}: not a file of API keys ({type(err).__name__})") from err
    if not isinstance(content, Mapping) or content.get("format_version") != _FORMAT_VERSION:
        raise KeysError(f"{path}: expected a file of API keys of format_version {_FORMAT_VERSION}")
    entries = content.get("keys")
    if not isinstance(entries, list):
        raise KeysError(f"{path}: keys: expected a list")
    try:
        keys = tuple(from_mapping(Key, one, f"keys[{i}]") for i, one in enumerate(entries))
    except ConfigError as err:
        raise KeysError(f"{path}: {err}") from err
    if len({key.name for key in keys}) < len(keys):
        raise KeysError(f"{path}: expected each name once")
    return keys


def create(path: Path, name: str, per_minute: int) -> str:
    """Adds a key to the file, made if it is not there, and gives the key; it is kept nowhere.

    Raises:
        KeysError: if there is a key of that name, or the file cannot be read.
        ConfigError: if the name or rate is none.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"name": name, "sha256": _sha256(secret.encode()), "per_minute": per_minute}
    key = from_mapping(Key, {**entry, "created": created}, "")
    with _locked(path):
        keys = read(path) if path.exists() else ()
        if any(one.name == name for one in keys):
            raise KeysError(f"{path}: there is a key {name!r}; revoke it first, or take another")
        _write(path, (*keys, key))
    return secret


def revoke(path: Path, name: str) -> None:
    """Removes a key from the file; replicas refuse it when they look next, every REREAD_S.

    Raises:
        KeysError: if there is none of that name.
    """
    with _locked(path):
        keys = read(path)
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise KeysError(f"{path}: no key {name!r}; there is {names}")
        _write(path, kept)


class Keys:
    """The keys of a file as a replica holds them, and how fast each is being used.

    Used from one event loop, but for `refresh`, which runs in a thread of its own: see `follow`.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file.

        Args:
            path: of the file.
            clock: gives seconds, for how often each key is used.

        Raises:
            KeysError: as `read`.
        """
        self._path = path
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._signature = _signature(path)
        self._keys = read(path)
        self._reported = ""

    def follow(self) -> None:
        """Refreshes the keys every REREAD_S from now on, for as long as they are held.

        In a thread that nobody waits for: the file may be on a shared folder that hangs. The keys
        then stay as they were until it answers.
        """
        held = weakref.ref(self)
        threading.Thread(target=_follow, args=(held,), name="api-keys", daemon=True).start()

    def refresh(self) -> None:
        """Reads the file again if it has changed.

        Without a file there is no key. One that cannot be read changes nothing: that is reported,
        once, and it is read again until it can be.
        """
        try:
            signature = _signature(self._path)
            if signature == self._signature:
                return
            self._keys = read(self._path) if signature else ()
            self._signature = signature  # not before: what could not be read is tried again
        except Exception as err:  # noqa: BLE001 - the thread that follows the file has to go on
            reason = str(err) if isinstance(err, KeysError) else type(err).__name__
            if reason != self._reported:
                logger.error("the API keys stay as they were: %s", reason)
            self._reported = reason
            return
        self._reported = ""
        names = ", ".join(key.name for key in self._keys)
        logger.warning("API keys now: %s", names or "none")

    def find(self, presented: bytes) -> Key | None:
        """The key that was presented; takes as long whichever it is, and if it is none."""
        digest = _sha256(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def wait_s(self, key: Key) -> float:
        """Counts a request of a key; 0 if it may be answered, else the seconds until one may."""
        bucket = self._buckets.get(key.sha256)
        if bucket is None or bucket.per_minute != key.per_minute:
            held = {one.sha256 for one in self._keys}
            self._buckets = {sha: one for sha, one in self._buckets.items() if sha in held}
            bucket = self._buckets[key.sha256] = _Bucket(key.per_minute, self._clock())
        return bucket.take(self._clock())


class _Bucket:
    """A token bucket: holds a minute's requests, and fills as fast as they may come."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._tokens = float(per_minute)
        self._filled = now

    def take(self, now: float) -> float:
        """Takes a token and gives 0, or gives the seconds until there is one."""
        rate = self.per_minute / 60
        self._tokens = min(self.per_minute, self._tokens + rate * (now - self._filled))
        self._filled = now
        if self._tokens < 1:
            return math.nextafter((1 - self._tokens) / rate, math.inf)
        self._tokens -= 1
        return 0.0


def _follow(held: weakref.ref[Keys]) -> None:
    while (keys := held()) is not None:
        keys.refresh()
        del keys  # held here, they would be followed for ever
        time.sleep(REREAD_S)


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Tells one state of the file from another; None without a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    content: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "keys": [dataclasses.asdict(key) for key in keys],
    }
    artifacts.write_text(path, json.dumps(content, indent=1) + "\n")  # mode 0600


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps two writers apart: each reads what the other wrote."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
