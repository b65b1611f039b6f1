"""API keys: what is kept, what is found, how often each may ask."""

import hashlib
import json
import logging
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cafemed.errors import ConfigError
from serve import keys
from serve.keys import Keys, KeysError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access" / "tiny.json"


def test_only_a_hash_is_kept_and_only_its_owner_reads_it(path: Path) -> None:
    secret = keys.create(path, "ward-3", 600)
    other = keys.create(path, "research", 60)
    assert secret != other
    assert len(secret) >= len(keys.PREFIX) + 43  # 256 bits in base64
    content = path.read_text()
    assert secret not in content
    assert hashlib.sha256(secret.encode()).hexdigest() in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [(k.name, k.per_minute) for k in keys.read(path)] == [("ward-3", 600), ("research", 60)]


@pytest.mark.parametrize("name", ["", "a b", "../x", "ward\n3", "é", "x" * 65, "-x"])
def test_a_name_that_is_none_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected 1 to 64 letters"):
        keys.create(path, name, 600)
    assert not path.exists()


def test_names_are_made_once_and_revoked_once(path: Path) -> None:
    with pytest.raises(KeysError, match=r"no API keys; make one: python jobs/keys\.py create=NAME"):
        keys.revoke(path, "ward-3")
    keys.create(path, "ward-3", 600)
    with pytest.raises(KeysError, match="there is a key 'ward-3'"):
        keys.create(path, "ward-3", 600)
    with pytest.raises(KeysError, match="no key 'ward'; there is ward-3"):
        keys.revoke(path, "ward")
    keys.revoke(path, "ward-3")
    assert keys.read(path) == ()


def test_writers_at_the_same_time_all_count(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: keys.create(path, f"key{i}", 1), range(24)))
    assert {key.name for key in keys.read(path)} == {f"key{i}" for i in range(24)}


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        content = json.loads(raw)
        change(content)
        return json.dumps(content).encode()

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda raw: raw[:-20], "not a file of API keys"),
        (lambda raw: b"\xff" + raw, "not a file of API keys"),
        (lambda _: b"[" * 100_000, "not a file of API keys"),
        (lambda _: b" " * (2 << 20), "expected a file of API keys of format_version 1"),
        (edited(lambda c: c.update(format_version=2)), "format_version 1"),
        (edited(lambda c: c.update(keys={})), "keys: expected a list"),
        (edited(lambda c: c["keys"][0].update(per_minute=0)), r"keys\[0\]\.per_minute: expected"),
        (edited(lambda c: c["keys"][0].update(sha256="0")), "sha256: expected 64 hexadecimal"),
        (edited(lambda c: c["keys"].append(c["keys"][0])), "expected each name once"),
    ],
)
def test_a_file_that_is_none_is_one_line(
    path: Path, edit: Callable[[bytes], bytes], said: str
) -> None:
    keys.create(path, "ward-3", 600)
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(KeysError, match=said) as caught:
        Keys(path)
    assert "\n" not in str(caught.value)


def test_a_key_is_found_and_nothing_else_is(path: Path) -> None:
    secrets = {name: keys.create(path, name, 600) for name in ("a", "b", "c")}
    held = Keys(path)
    for name, secret in secrets.items():
        found = held.find(secret.encode())
        assert found is not None
        assert found.name == name
    stored = keys.read(path)[0].sha256  # who reads the file cannot use what it holds
    for wrong in (b"", b"a", secrets["a"].encode()[:-1], stored.encode(), b"\xff" * 40):
        assert held.find(wrong) is None


def test_every_key_is_compared_whichever_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [keys.create(path, name, 600) for name in ("a", "b", "c")]
    held = Keys(path)
    compared: list[str] = []
    digest = keys.hmac.compare_digest

    def count(a: str, b: str) -> bool:
        compared.append(a)
        return digest(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", count)
    for secret in (*secrets, "none"):
        compared.clear()
        held.find(secret.encode())
        assert len(compared) == 3


def test_a_replica_follows_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = keys.create(path, "first", 600)
    held = Keys(path)
    second = keys.create(path, "second", 600)
    assert held.find(second.encode()) is None
    held.refresh()
    assert held.find(second.encode()) is not None
    keys.revoke(path, "first")
    held.refresh()
    assert held.find(first.encode()) is None
    assert "API keys now: second" in caplog.text
    assert second not in caplog.text


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_keys_are_followed_whatever_goes_wrong_and_as_long_as_they_are_held(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "REREAD_S", 0.005)
    before = set(threading.enumerate())
    secret = keys.create(path, "first", 600).encode()
    held = [Keys(path)]
    held[0].follow()
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda *_, **__: 1 / 0)  # what nobody thought of
        wait_until(lambda: "the API keys stay as they were: ZeroDivisionError" in caplog.text)
    assert held[0].find(secret) is not None
    path.unlink()
    wait_until(lambda: held[0].find(secret) is None)
    held.clear()
    wait_until(lambda: not thread.is_alive())


def test_a_broken_file_changes_nothing_and_a_removed_one_revokes_all(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = keys.create(path, "first", 600).encode()
    held = Keys(path)
    whole = path.read_bytes()
    path.write_bytes(b"{")
    with caplog.at_level(logging.ERROR):
        held.refresh()
        held.refresh()
    assert len(caplog.records) == 1
    assert held.find(secret) is not None
    path.unlink()
    held.refresh()
    assert held.find(secret) is None
    path.write_bytes(whole)
    held.refresh()
    assert held.find(secret) is not None


def test_a_key_that_was_revoked_while_the_file_could_not_be_read_is_refused_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = keys.create(path, "first", 600).encode()
    held = Keys(path)
    keys.revoke(path, "first")
    with monkeypatch.context() as patch:
        # A shared folder that hiccups: the file is there, and its bytes cannot be had.
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(116, "stale")))
        held.refresh()
    assert held.find(secret) is not None
    held.refresh()
    assert held.find(secret) is None


def test_a_key_may_ask_so_often_in_any_minute(path: Path) -> None:
    """Against a plain count: what is let through from any moment on stays under burst + rate."""
    clock = Clock()
    keys.create(path, "a", 60)
    keys.create(path, "b", 60)
    held = Keys(path, clock)
    a, b = keys.read(path)
    passed: list[float] = []
    for _ in range(3000):
        clock.now += 0.1
        if held.wait_s(a) == 0:
            passed.append(clock.now)
    first_minute = sum(t < 160 for t in passed)
    assert 110 <= first_minute <= 120  # the bucket, and what came into it
    assert sum(160 <= t < 220 for t in passed) in (59, 60, 61)
    assert held.wait_s(b) == 0  # has its own


def test_the_wait_told_is_just_long_enough(path: Path) -> None:
    clock = Clock()
    keys.create(path, "a", 7)
    held = Keys(path, clock)
    [a] = keys.read(path)
    while (wait_s := held.wait_s(a)) == 0:
        pass
    assert wait_s == pytest.approx(60 / 7)
    clock.now += wait_s * 0.99
    assert held.wait_s(a) > 0
    clock.now += wait_s * 0.02
    assert held.wait_s(a) == 0
    assert held.wait_s(a) > 0
