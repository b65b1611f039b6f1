"""The registry: numbered versions of bundles, and the aliases that say which one is used.

It lies in a folder (cafemed/registry_folder.py), or in a bucket of an object store
(cafemed/registry_objects.py). Versions and moves of an alias are added and never changed; the
newest move counts. A model card is no part of its version: evaluated again, it is replaced.
"""

import dataclasses
import datetime
import getpass
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from cafemed import bundle_files, paths, untrusted
from cafemed.errors import ArtifactError
from cafemed.registry_folder import VERSION_DIGITS, FolderStore

#: Names that `promote` accepts: `candidate` is the newest that came out of a sweep, `production`
#: the one that is served.
ALIASES = ("candidate", "production")

#: A folder, or the URL of one in an object store: s3://bucket/registry/demo.
Location: TypeAlias = Path | str


class Store(Protocol):
    """Where a registry lies. Every method raises ArtifactError if it cannot be read or written."""

    def require_ready(self) -> None:
        """Tries what publishing will need, and leaves nothing behind."""

    def publish(self, bundle: Path, record: Mapping[str, Any]) -> int:
        """Adds a version, whole or not at all, under a number that nobody else gets."""

    def numbers(self) -> list[int]:
        """Of the versions, ascending."""

    def has(self, number: int) -> bool:
        """Says whether there is a version of this number."""

    def record(self, number: int) -> tuple[str, str]:
        """Where the record of a version is, and its text."""

    def bundle(self, number: int) -> Path:
        """The bundle of a version, in a folder of this machine."""

    def moves(self, alias: str) -> list[int]:
        """Numbers of an alias's moves, ascending."""

    def move(self, alias: str, number: int) -> tuple[str, str]:
        """Where a move is, and its text."""

    def add_move(self, alias: str, decide: Callable[[], Mapping[str, Any]]) -> None:
        """Adds the next move; decided anew whenever another process moved the alias meanwhile."""

    def write_card(self, number: int, card: str, text: str) -> str:
        """Writes or replaces a card, as JSON and for people, and says where."""

    def card(self, number: int) -> tuple[str, str] | None:
        """Where the card of a version is, and its JSON text; None if there is none."""


@dataclasses.dataclass(frozen=True)
class Version:
    """One published version.

    Attributes:
        number: 1, 2, …
        folder: its bundle; of a registry in an object store the copy on this machine.
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


def location(text: str) -> Location:
    """The folder or URL that a text names."""
    return paths.place(text)


def store(registry: Location) -> Store:
    """Opens a registry, which need not exist yet.

    Raises:
        ArtifactError: for a URL of a store that is unknown, or whose package is not installed.
    """
    place = paths.place(registry) if isinstance(registry, str) else registry
    if isinstance(place, Path):
        return FolderStore(place)
    # Here, because most registries are folders, and this takes a while to import.
    from cafemed.registry_objects import ObjectStore

    return ObjectStore(place)


def require_ready(registry: Location) -> None:
    """Makes sure that a version could be published now and an alias moved to it.

    Raises:
        ArtifactError: if the registry cannot be read or written, or cannot move an alias.
    """
    store(registry).require_ready()


def publish(registry: Location, bundle_folder: Path, produced_by: Mapping[str, Any]) -> int:
    """Copies a bundle into the registry as a new version and gives its number.

    Args:
        registry: folder or URL; made if it is not there.
        bundle_folder: a bundle that `bundle.write` made.
        produced_by: what made it, for instance the sweep's fingerprint, the trial and its
            parameters; JSON values.

    Raises:
        ArtifactError: if the folder is not a whole bundle, or the registry cannot be written.
    """
    bundle_files.verify(bundle_folder)
    record = {**_signature("published"), "produced_by": dict(produced_by)}
    return store(registry).publish(bundle_folder, record)


def promote(registry: Location, version: int, alias: str = "production") -> None:
    """Points an alias at a version.

    Raises:
        ArtifactError: if there is no such version or alias, or an object store cannot make sure
            that nobody moves the alias at the same time.
    """
    _require_alias(registry, alias)
    kept = _require_version(registry, version)
    kept.add_move(alias, lambda: _move(version, "promote"))


def rollback(registry: Location, alias: str = "production") -> int:
    """Points an alias at the version it had before, and gives that version.

    Twice in a row goes back two versions.

    Raises:
        ArtifactError: if there is no version to go back to, and as promote.
    """
    _require_alias(registry, alias)
    target = 0

    def decide() -> dict[str, Any]:
        nonlocal target
        stack = _stack(history(registry, alias))
        if len(stack) < 2:
            now = f"only version {stack[0]:04d} was promoted" if stack else "nothing is promoted"
            raise ArtifactError(f"{registry}: {alias}: no earlier version to go back to; {now}")
        target = stack[-2]
        return _move(target, "rollback")

    store(registry).add_move(alias, decide)
    return target


def resolve(registry: Location, name: str | int) -> Path:
    """Gives the bundle folder of an alias ("production") or of a version ("3", "0003", 3).

    A version in an object store is copied to this machine, unless it is there (paths.cache_dir).

    Raises:
        ArtifactError: if the registry, alias or version does not exist.
    """
    return store(registry).bundle(resolve_version(registry, name))


def resolve_version(registry: Location, name: str | int) -> int:
    """Gives the number of the version that an alias or a version's name stands for.

    Raises:
        ArtifactError: as resolve.
    """
    if isinstance(name, int) or re.fullmatch(r"[0-9]{1,9}", str(name)):
        number = int(name)
        _require_version(registry, number)
        return number
    _require_alias(registry, name)
    kept = store(registry)
    moves = kept.moves(name)
    if not moves:
        raise ArtifactError(
            f"{registry}: no version is promoted to {name!r} yet; published versions: "
            f"{_listed(kept)}"
        )
    return _read_move(kept, name, moves[-1]).version


def history(registry: Location, alias: str) -> list[Move]:
    """Every move of an alias, oldest first; the last one counts.

    Raises:
        ArtifactError: for an unknown alias or an unreadable move.
    """
    _require_alias(registry, alias)
    kept = store(registry)
    return [_read_move(kept, alias, number) for number in kept.moves(alias)]


def earlier(registry: Location, alias: str) -> list[int]:
    """The versions that rollbacks would go to, the next one first; none that was rolled back.

    Raises:
        ArtifactError: as history.
    """
    stack = _stack(history(registry, alias))
    return list(dict.fromkeys(number for number in stack[-2::-1] if number != stack[-1]))


def versions(registry: Location) -> list[Version]:
    """Every published version, oldest first."""
    return [version(registry, number) for number in store(registry).numbers()]


def version(registry: Location, number: int) -> Version:
    """One published version.

    Raises:
        ArtifactError: if there is none of this number, or its record cannot be read.
    """
    kept = _require_version(registry, number)
    return Version(number, kept.bundle(number), _checked(kept.record(number), "produced_by"))


def records(registry: Location) -> dict[int, Mapping[str, Any]]:
    """Who and what produced each version, and when; the bundles are not looked at.

    Raises:
        ArtifactError: if a record cannot be read.
    """
    kept = store(registry)
    return {number: _checked(kept.record(number), "produced_by") for number in kept.numbers()}


def write_card(registry: Location, number: int, card: Mapping[str, Any], text: str) -> str:
    """Writes the model card of a version, or replaces it, and says where its JSON is.

    Args:
        registry: folder or URL.
        number: of the version.
        card: JSON values.
        text: the card for people, Markdown.

    Raises:
        ArtifactError: if there is no such version.
    """
    kept = _require_version(registry, number)
    return kept.write_card(number, json.dumps(card, indent=1) + "\n", text)


def read_card(registry: Location, number: int) -> dict[str, Any] | None:
    """The model card of a version; None if it was never evaluated.

    Raises:
        ArtifactError: if there is no such version, or its card cannot be read.
    """
    found = _require_version(registry, number).card(number)
    return None if found is None else _checked(found, "format_version", "model")


def _move(version: int, action: str) -> dict[str, Any]:
    return {"version": version, "action": action, **_signature("moved")}


def _read_move(kept: Store, alias: str, number: int) -> Move:
    found = kept.move(alias, number)
    content = _checked(found, "version", "action")
    content.pop("token", None)  # the store's own
    move = Move(content.pop("version"), content.pop("action"), content)
    if type(move.version) is not int or move.action not in ("promote", "rollback"):
        raise ArtifactError(f"{found[0]}: not a move of an alias")
    return move


def _stack(moves: list[Move]) -> list[int]:
    """Versions to go back through, the current one last: a promotion pushes, a rollback pops."""
    stack: list[int] = []
    for move in moves:
        if move.action == "rollback":
            stack = stack[:-1]
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack


def _require_version(registry: Location, number: int) -> Store:
    kept = store(registry)
    if not kept.has(number):
        raise ArtifactError(
            f"{registry}: no version {number:0{VERSION_DIGITS}d}; there is {_listed(kept)}"
        )
    return kept


def _require_alias(registry: Location, alias: str) -> None:
    if alias not in ALIASES:
        raise ArtifactError(
            f"{registry}: expected a version number or one of {', '.join(ALIASES)}, got {alias!r}"
        )


def _listed(kept: Store) -> str:
    numbers = [f"{n:0{VERSION_DIGITS}d}" for n in kept.numbers()]
    return ", ".join(numbers) or "none (publish one with jobs/tune.py)"


def _checked(found: tuple[str, str], *keys: str) -> dict[str, Any]:
    """Decodes a text of the registry, given with its place, that must have these keys."""
    place, text = found
    try:
        content: dict[str, Any] = json.loads(text)
        missing = [key for key in keys if key not in content]
        if not isinstance(content, dict):
            raise TypeError("not a mapping")
        untrusted.require_encodable(place, text)
    except (ValueError, TypeError, RecursionError) as err:
        raise ArtifactError(
            f"{place}: not a record of the registry ({type(err).__name__})"
        ) from err
    if missing:
        raise ArtifactError(f"{place}: expected the key {missing[0]!r}")
    return content


def _signature(what: str) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        user = str(os.getuid())
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {what: now, "user": user, "host": socket.gethostname()}
