"""A registry in an object store, through fsspec: `s3://bucket/registry`, `gs://…`.

    versions/0001-6b1f…/claim          somebody is about to publish under this number
    versions/0001-6b1f…/bundle/…       the bundle's files, its manifest after the others
    versions/0001-6b1f…/record.json    written last: without it there is no such version
    aliases/production/000001.json     one object a move of the alias; the highest counts
    cards/0001.json, cards/0001.md     the model card, once the version is evaluated

Keys of a version are unique, so publishing needs nothing of the store but that a listing shows what
was written before: whoever claims a number and then sees another claim on it gives it up. (Of two
that claim the same number at least the later one sees the other.) A killed publisher leaves a
number unused.

Moving an alias is another matter: two that move it must come one after the other, so its object is
created only if it is not there (S3: `If-None-Match`, Google Cloud Storage: generation match, Azure:
`If-None-Match`). A store that lacks this, or ignores it, is found out and refused. A move carries
a token, by which whoever made it knows it again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from cafemed import artifacts, bundle_files, paths, untrusted
from cafemed.errors import ArtifactError, UserError
from cafemed.registry_folder import MOVE_DIGITS, VERSION_DIGITS

#: Protocols whose fsspec implementation creates an object exclusively on the server (`memory` is
#: one process alone). Others only look before they write, which two can do at once.
_EXCLUSIVE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")
#: Protocol → the package that speaks it, where it is one of ours to name.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}

_VERSION = re.compile(r"(\d+)-[0-9a-f]+/(.+)")
_RECORD = "record.json"
#: An unreachable store is to be told within a minute, not after botocore's ten.
_S3_OPTIONS = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3}}
}


class ObjectStore:
    """See cafemed.registry.Store."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        options = _S3_OPTIONS if self._protocol in ("s3", "s3a") else {}
        try:
            self._files, root = fsspec.core.url_to_fs(
                self._url, use_listings_cache=False, **options
            )
        except ImportError as err:
            package = _PACKAGES.get(self._protocol, "the package of this store")
            raise ArtifactError(
                f"{self._url}: needs {package}, which is not installed (pip install {package})"
            ) from err
        except ValueError as err:
            raise ArtifactError(f"{self._url}: no such kind of store: {_told(err)}") from err
        self._root = str(root).rstrip("/")

    def require_ready(self) -> None:
        """See Store."""
        self.numbers()
        self._require_exclusive()

    def publish(self, bundle: Path, record: Mapping[str, Any]) -> int:
        """See Store."""
        with self._speaking():
            number, folder = self._claim()
            names = sorted(path.name for path in bundle.iterdir())
            names.sort(key=lambda name: name == artifacts.MANIFEST)
            for name in names:
                self._files.put_file(str(bundle / name), self._path(f"{folder}/bundle/{name}"))
            manifest = artifacts.sha256_of(bundle / artifacts.MANIFEST)
            self._write(f"{folder}/{_RECORD}", json.dumps({**record, "manifest": manifest}))
        return number

    def numbers(self) -> list[int]:
        """See Store."""
        return sorted(self._published())

    def has(self, number: int) -> bool:
        """See Store."""
        return number in self._published()

    def record(self, number: int) -> tuple[str, str]:
        """See Store."""
        return self._read(f"{self._published()[number]}/{_RECORD}")

    def bundle(self, number: int) -> Path:
        """See Store.

        The copy lies in `paths.cache_dir()` and is used again while it is what the record says.
        """
        folder = self._published()[number]
        place, text = self._read(f"{folder}/{_RECORD}")
        try:
            wanted = str(json.loads(text)["manifest"])
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            raise ArtifactError(f"{place}: not a record of a version") from err
        name = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        target = paths.cache_dir() / "registry" / name / Path(folder).name
        if not _is_copy(target, wanted):
            self._download(f"{folder}/bundle", target, wanted)
        return target

    def moves(self, alias: str) -> list[int]:
        """See Store."""
        names = [name.removesuffix(".json") for name in self._names(f"aliases/{alias}")]
        return sorted(int(name) for name in names if name.isdigit())

    def move(self, alias: str, number: int) -> tuple[str, str]:
        """See Store."""
        return self._read(f"aliases/{alias}/{number:0{MOVE_DIGITS}d}.json")

    def add_move(self, alias: str, decide: Callable[[], Mapping[str, Any]]) -> None:
        """See Store."""
        self._require_exclusive()
        while True:
            number = max(self.moves(alias), default=0) + 1  # before what is decided on is read
            name = f"aliases/{alias}/{number:0{MOVE_DIGITS}d}.json"
            content = json.dumps({**decide(), "token": secrets.token_hex(8)})
            with self._speaking(), contextlib.suppress(FileExistsError):
                self._create(name, content)
                return
            # Where the answer was lost, the store's client asks again and meets its own object.
            if self._read(name)[1] == content:
                return

    def write_card(self, number: int, card: str, text: str) -> str:
        """See Store."""
        name = f"cards/{number:0{VERSION_DIGITS}d}"
        with self._speaking():
            self._write(f"{name}.md", text)
            self._write(f"{name}.json", card)
        return f"{self._url}/{name}.json"

    def card(self, number: int) -> tuple[str, str] | None:
        """See Store."""
        name = f"{number:0{VERSION_DIGITS}d}.json"
        return self._read(f"cards/{name}") if name in self._names("cards") else None

    def _claim(self) -> tuple[int, str]:
        """Takes a number that nobody else has or gets, and gives the folder for it."""
        while True:
            number = max(self._claims(), default=0) + 1
            folder = f"versions/{number:0{VERSION_DIGITS}d}-{secrets.token_hex(8)}"
            self._write(f"{folder}/claim", "")
            if self._claims()[number] == {folder}:
                return number, folder
            self._files.rm_file(self._path(f"{folder}/claim"))
            time.sleep(random.uniform(0, 0.5))  # so that not all come back at once

    def _claims(self) -> dict[int, set[str]]:
        """Number → the folders that claim it, published or not."""
        found: dict[int, set[str]] = {}
        for name in self._names("versions"):
            if match := _VERSION.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(f"versions/{name.split('/')[0]}")
        return found

    def _published(self) -> dict[int, str]:
        """Number → folder of the versions that are whole."""
        matches = [_VERSION.fullmatch(name) for name in self._names("versions")]
        return {
            int(match[1]): f"versions/{match.string.split('/')[0]}"
            for match in matches
            if match and match[2] == _RECORD
        }

    def _require_exclusive(self) -> None:
        refusal = (
            f"{self._url}: an alias is not moved here: two that move it at once could not be told "
            "apart, because this store has no exclusive create"
        )
        if self._protocol not in _EXCLUSIVE:
            raise ArtifactError(f"{refusal} (known to have it: {', '.join(_EXCLUSIVE)})")
        name = f"aliases/.probe-{secrets.token_hex(8)}"
        with self._speaking():
            with contextlib.suppress(FileExistsError):  # its own, where the answer was lost
                self._create(name, "")
            try:
                self._create(name, "")
            except FileExistsError:
                return
            finally:
                self._files.rm_file(self._path(name))
        raise ArtifactError(f"{refusal} (it wrote over an object that was there)")

    def _download(self, folder: str, target: Path, wanted: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new."))
        try:
            for name in self._names(folder):
                if name not in (*bundle_files.FILES, artifacts.MANIFEST):
                    raise ArtifactError(f"{self._url}/{folder}/{name}: not a file of a bundle")
                with self._speaking():
                    self._files.get_file(self._path(f"{folder}/{name}"), str(partial / name))
            bundle_files.verify(partial)
            if not _is_copy(partial, wanted):
                raise ArtifactError(
                    f"{self._url}/{folder}: its manifest is not the one that was published"
                )
            partial.chmod(0o755)
            _put(partial, target, wanted)
        except ArtifactError as err:
            told = str(err).replace(str(partial), f"{self._url}/{folder}")
            raise ArtifactError(told) from err
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _names(self, folder: str) -> list[str]:
        """Names of all objects below a folder, with the path from there."""
        place = self._path(folder)
        with self._speaking():
            self._files.invalidate_cache()
            try:
                found = self._files.find(place)
            except FileNotFoundError:
                return []
        start = place.lstrip("/") + "/"
        return sorted(str(path).lstrip("/").removeprefix(start) for path in found)

    def _read(self, name: str) -> tuple[str, str]:
        place, most = f"{self._url}/{name}", untrusted.MAX_RECORD_BYTES
        with self._speaking():
            text = self._files.cat_file(self._path(name), start=0, end=most + 1)
            if len(text) > most:
                raise ArtifactError(f"{place}: expected at most {most >> 20} MiB")
            return place, text.decode()

    def _write(self, name: str, text: str) -> None:
        self._files.pipe_file(self._path(name), text.encode())

    def _create(self, name: str, text: str) -> None:
        """Writes an object that is not there; FileExistsError if it is."""
        self._files.pipe_file(self._path(name), text.encode(), mode="create")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turns what the store's package raises, of whatever class, into one line."""
        try:
            yield
        except (UserError, FileExistsError):
            raise
        except Exception as err:
            raise ArtifactError(f"{self._url}: {_told(err)}") from err


def _is_copy(folder: Path, manifest: str) -> bool:
    """Says whether a folder is a whole bundle with the manifest of this SHA-256."""
    try:
        bundle_files.verify(folder)
    except ArtifactError:
        return False
    return artifacts.sha256_of(folder / artifacts.MANIFEST) == manifest


def _put(partial: Path, target: Path, manifest: str) -> None:
    """Renames a checked copy to its place, unless another process put one there meanwhile.

    That one may be in use already: only what is no such copy is removed.
    """
    with _locked(target.parent):
        if _is_copy(target, manifest):
            return
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".old."))
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside / "damaged")
        partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others out, of those that ask so too; on a file system without locks nobody."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _told(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0]}" if lines else type(err).__name__
