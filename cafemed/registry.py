"""The registry: numbered versions of bundles, and the aliases that say which one is used.

    registry/NAME/
      versions/0001/bundle/…       a bundle folder, never changed once it is there
      versions/0001/record.json    who and what produced it, and when
      aliases/production/000001/move.json    one folder a move of the alias; the highest counts
      cards/0001.json, cards/0001.md         the model card, once the version is evaluated

It works on any local or shared folder and needs no lock: a version and a move are prepared in a
hidden folder and renamed to the next free number. The rename fails if somebody else took that
number, and then the next one is tried. So two processes that publish or promote at the same time
both succeed, in some order, and whoever reads sees the state before or after, never between. A card
is no part of its version, which never changes: evaluated again, its two files are replaced, each
atomically.
"""

import dataclasses
import datetime
import errno
import getpass
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cafemed import artifacts, bundle_files
from cafemed.errors import ArtifactError

#: Names that `promote` accepts: `candidate` is the newest that came out of a sweep, `production`
#: the one that is served.
ALIASES = ("candidate", "production")

_VERSION_DIGITS = 4
_MOVE_DIGITS = 6
_HIDDEN = ".new."
_STALE_S = 24 * 3600.0
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@dataclasses.dataclass(frozen=True)
class Version:
    """One published version.

    Attributes:
        number: 1, 2, …
        folder: its bundle.
        record: who (`user`, `host`), when (`published`, UTC) and what produced it (`produced_by`).
    """

    number: int
    folder: Path
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Move:
    """One move of an alias.

    Attributes:
        version: where the alias points from then on.
        action: "promote" or "rollback".
        record: who and when, as in Version.
    """

    version: int
    action: str
    record: Mapping[str, Any]


def publish(registry: Path, bundle_folder: Path, produced_by: Mapping[str, Any]) -> int:
    """Copies a bundle into the registry as a new version and gives its number.

    Args:
        registry: the registry folder; made if it is not there.
        bundle_folder: a bundle that `bundle.write` made.
        produced_by: what made it, for instance the sweep's fingerprint, the trial and its
            parameters; JSON values.

    Raises:
        ArtifactError: if the folder is not a whole bundle.
    """
    bundle_files.verify(bundle_folder)

    def fill(folder: Path) -> None:
        shutil.copytree(bundle_folder, folder / "bundle")
        bundle_files.verify(folder / "bundle")  # what was copied is what was checked
        record = {**_signature("published"), "produced_by": dict(produced_by)}
        _write_synced(folder / "record.json", record)

    return _add(registry / "versions", _VERSION_DIGITS, fill)


def promote(registry: Path, version: int, alias: str = "production") -> None:
    """Points an alias at a version.

    Raises:
        ArtifactError: if there is no such version or alias.
    """
    folder = _alias_dir(registry, alias)
    _version_dir(registry, version)
    _add(folder, _MOVE_DIGITS, lambda partial: _write_move(partial, version, "promote"))


def rollback(registry: Path, alias: str = "production") -> int:
    """Points an alias at the version it had before, and gives that version.

    Twice in a row goes back two versions.

    Raises:
        ArtifactError: if there is no version to go back to.
    """
    folder = _alias_dir(registry, alias)
    target = 0

    def fill(partial: Path) -> None:
        nonlocal target  # decided anew whenever another process moved the alias meanwhile
        stack = _stack(history(registry, alias))
        if len(stack) < 2:
            now = f"only version {stack[0]:04d} was promoted" if stack else "nothing is promoted"
            raise ArtifactError(f"{registry}: {alias}: no earlier version to go back to; {now}")
        target = stack[-2]
        _write_move(partial, target, "rollback")

    _add(folder, _MOVE_DIGITS, fill)
    return target


def resolve(registry: Path, name: str | int) -> Path:
    """Gives the bundle folder of an alias ("production") or of a version ("3", "0003", 3).

    Raises:
        ArtifactError: if the registry, alias or version does not exist.
    """
    return _version_dir(registry, resolve_version(registry, name)) / "bundle"


def resolve_version(registry: Path, name: str | int) -> int:
    """Gives the number of the version that an alias or a version's name stands for.

    Raises:
        ArtifactError: as resolve.
    """
    if isinstance(name, int) or re.fullmatch(r"[0-9]{1,9}", str(name)):
        number = int(name)
        _version_dir(registry, number)
        return number
    moves = history(registry, name)
    if not moves:
        raise ArtifactError(
            f"{registry}: no version is promoted to {name!r} yet; published versions: "
            f"{_listed(registry)}"
        )
    return moves[-1].version


def history(registry: Path, alias: str) -> list[Move]:
    """Every move of an alias, oldest first; the last one counts.

    Raises:
        ArtifactError: for an unknown alias or an unreadable move.
    """
    folder = _alias_dir(registry, alias)
    moves = []
    for number in _numbers(folder):
        content = _read(folder / f"{number:0{_MOVE_DIGITS}d}" / "move.json", "version", "action")
        moves.append(Move(content.pop("version"), content.pop("action"), content))
    return moves


def versions(registry: Path) -> list[Version]:
    """Every published version, oldest first."""
    return [version(registry, number) for number in _numbers(registry / "versions")]


def version(registry: Path, number: int) -> Version:
    """One published version.

    Raises:
        ArtifactError: if there is none of this number, or its record cannot be read.
    """
    folder = _version_dir(registry, number)
    return Version(number, folder / "bundle", _read(folder / "record.json", "produced_by"))


def write_card(registry: Path, number: int, card: Mapping[str, Any], text: str) -> Path:
    """Writes the model card of a version, or replaces it, and gives its JSON file.

    Args:
        registry: the registry folder.
        number: of the version.
        card: JSON values.
        text: the card for people, Markdown.

    Raises:
        ArtifactError: if there is no such version.
    """
    _version_dir(registry, number)
    folder = registry / "cards"
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:0{_VERSION_DIGITS}d}.json"
    contents = {path.with_suffix(".md"): text, path: json.dumps(card, indent=1) + "\n"}
    for file, content in contents.items():
        artifacts.write_text(file, content)
        file.chmod(0o644)  # as the version's files: whoever may serve it may read its card
    return path


def read_card(registry: Path, number: int) -> dict[str, Any] | None:
    """The model card of a version; None if it was never evaluated.

    Raises:
        ArtifactError: if there is no such version, or its card cannot be read.
    """
    _version_dir(registry, number)
    path = registry / "cards" / f"{number:0{_VERSION_DIGITS}d}.json"
    return _read(path, "format_version", "model") if path.exists() else None


def _add(parent: Path, digits: int, fill: Callable[[Path], None]) -> int:
    """Adds the next numbered folder to `parent`, whole or not at all, and gives its number.

    `fill` writes the content; it is called again when another process took the number meanwhile.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent)
    while True:
        number = max(_numbers(parent), default=0) + 1  # before `fill` reads what it decides on
        partial = Path(tempfile.mkdtemp(dir=parent, prefix=_HIDDEN))
        try:
            fill(partial)
            partial.chmod(0o755)
            # A folder is never renamed onto one that holds files: this is the exclusive create.
            partial.rename(parent / f"{number:0{digits}d}")
        except OSError as err:
            shutil.rmtree(partial, ignore_errors=True)
            if err.errno not in _TAKEN:
                raise ArtifactError(f"{parent}: cannot write: {err.strerror}") from err
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        else:
            artifacts.sync(parent)
            return number


def _write_move(folder: Path, version: int, action: str) -> None:
    content = {"version": version, "action": action, **_signature("moved")}
    _write_synced(folder / "move.json", content)


def _stack(moves: list[Move]) -> list[int]:
    """Versions to go back through, the current one last: a promotion pushes, a rollback pops."""
    stack: list[int] = []
    for move in moves:
        if move.action == "rollback":
            stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack


def _version_dir(registry: Path, version: int) -> Path:
    folder = registry / "versions" / f"{version:0{_VERSION_DIGITS}d}"
    if not folder.is_dir():
        raise ArtifactError(
            f"{registry}: no version {version:0{_VERSION_DIGITS}d}; there is {_listed(registry)}"
        )
    return folder


def _alias_dir(registry: Path, alias: str) -> Path:
    if alias not in ALIASES:
        raise ArtifactError(
            f"{registry}: expected a version number or one of {', '.join(ALIASES)}, got {alias!r}"
        )
    return registry / "aliases" / alias


def _listed(registry: Path) -> str:
    numbers = [f"{n:0{_VERSION_DIGITS}d}" for n in _numbers(registry / "versions")]
    return ", ".join(numbers) or "none (publish one with jobs/tune.py)"


def _numbers(parent: Path) -> list[int]:
    if not parent.is_dir():
        return []
    return sorted(int(path.name) for path in parent.iterdir() if path.name.isdigit())


def _read(path: Path, *keys: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in keys if key not in content]
    except (OSError, ValueError, TypeError) as err:
        raise ArtifactError(f"{path}: not a record of the registry ({type(err).__name__})") from err
    if missing:
        raise ArtifactError(f"{path}: expected the key {missing[0]!r}")
    return content


def _signature(what: str) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        user = str(os.getuid())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {what: now, "user": user, "host": socket.gethostname()}


def _write_synced(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _remove_stale(parent: Path) -> None:
    """Removes what a publisher that died left; by age, as it may have been on another machine."""
    for path in parent.glob(f"{_HIDDEN}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # its owner finished
