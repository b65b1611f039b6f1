"""A registry in a folder: local, or shared by several machines.

    versions/0001/bundle/…       a bundle folder, never changed once it is there
    versions/0001/record.json    who and what produced it, and when
    aliases/production/000001/move.json    one folder a move of the alias; the highest counts
    cards/0001.json, cards/0001.md         the model card, once the version is evaluated

No lock is needed: a version and a move are prepared in a hidden folder and renamed to the next free
number. The rename fails if somebody else took that number, and then the next one is tried. So two
processes that publish or promote at the same time both succeed, in some order, and whoever reads
sees the state before or after, never between; so does whoever comes after a killed one.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cafemed import artifacts, bundle_files, untrusted
from cafemed.errors import ArtifactError

VERSION_DIGITS = 4
MOVE_DIGITS = 6

_HIDDEN = ".new."
_STALE_S = 24 * 3600.0
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


class FolderStore:
    """See cafemed.registry.Store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._versions = folder / "versions"

    def require_ready(self) -> None:
        """See Store."""
        try:
            places = (self._versions, *self._versions.parents)
            with tempfile.TemporaryFile(dir=next(place for place in places if place.exists())):
                pass
        except OSError as err:
            raise ArtifactError(f"{self._folder}: cannot write: {err.strerror}") from err

    def publish(self, bundle: Path, record: Mapping[str, Any]) -> int:
        """See Store."""

        def fill(folder: Path) -> None:
            shutil.copytree(bundle, folder / "bundle")
            bundle_files.verify(folder / "bundle")  # what was copied is what was checked
            _write_synced(folder / "record.json", record)

        return _add(self._versions, VERSION_DIGITS, fill)

    def numbers(self) -> list[int]:
        """See Store."""
        return _numbers(self._versions)

    def has(self, number: int) -> bool:
        """See Store."""
        return self._version(number).is_dir()

    def record(self, number: int) -> tuple[str, str]:
        """See Store."""
        return _read(self._version(number) / "record.json")

    def bundle(self, number: int) -> Path:
        """See Store."""
        return self._version(number) / "bundle"

    def moves(self, alias: str) -> list[int]:
        """See Store."""
        return _numbers(self._folder / "aliases" / alias)

    def move(self, alias: str, number: int) -> tuple[str, str]:
        """See Store."""
        return _read(self._folder / "aliases" / alias / f"{number:0{MOVE_DIGITS}d}" / "move.json")

    def add_move(self, alias: str, decide: Callable[[], Mapping[str, Any]]) -> None:
        """See Store."""

        def fill(folder: Path) -> None:
            _write_synced(folder / "move.json", decide())

        _add(self._folder / "aliases" / alias, MOVE_DIGITS, fill)

    def write_card(self, number: int, card: str, text: str) -> str:
        """See Store."""
        path = self._card(number)
        path.parent.mkdir(exist_ok=True)
        for file, content in {path.with_suffix(".md"): text, path: card}.items():
            artifacts.write_text(file, content)
            file.chmod(0o644)  # as the version's files: whoever may serve it may read its card
        return str(path)

    def card(self, number: int) -> tuple[str, str] | None:
        """See Store."""
        return _read(self._card(number)) if self._card(number).exists() else None

    def _version(self, number: int) -> Path:
        return self._versions / f"{number:0{VERSION_DIGITS}d}"

    def _card(self, number: int) -> Path:
        return self._folder / "cards" / f"{number:0{VERSION_DIGITS}d}.json"


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


def _numbers(parent: Path) -> list[int]:
    if not parent.is_dir():
        return []
    return sorted(int(path.name) for path in parent.iterdir() if path.name.isdigit())


def _read(path: Path) -> tuple[str, str]:
    try:
        untrusted.require_size(path, untrusted.MAX_RECORD_BYTES)
        return str(path), path.read_text()
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: not a record of the registry ({type(err).__name__})") from err


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
