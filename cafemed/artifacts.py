"""Artifact folders: written whole or not at all, with a manifest that says what they came from.

Every stage of an experiment is one folder. Its `manifest.json` holds the stage's name, a
fingerprint of its inputs and configuration, and the SHA-256 and size of every file, so that a
stage can be skipped when nothing changed and refused when a file was edited or truncated.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cafemed.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
#: Stages whose format has changed; those before it can still be read (bundle_formats.py).
FORMAT_VERSIONS = {"bundle": 2}
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 20

#: Stage → what mends it, for messages.
_REMEDIES = {
    "tables": "run jobs/prepare.py",
    "cohort": "run jobs/prepare.py",
    "graph": "run jobs/discover.py",
    "fit": "run jobs/train.py",
    "sweep": "run jobs/tune.py",
    "retrained": "run jobs/tune.py with retrain=true",
    "evaluation": "run jobs/evaluate.py",
    "bundle": "promote another version (docs/tuning.md)",
}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact folder says of itself.

    Attributes:
        stage: "tables", "cohort", "graph", "fit", "sweep", "retrained",
            "evaluation" or "bundle".
        fingerprint: SHA-256 (hex) of stage, format version, inputs and config; the same inputs
            and config give the same fingerprint on any machine.
        inputs: name of each input → its fingerprint or SHA-256.
        config: the plain configuration that made the artifact.
        files: file name → {"sha256", "bytes"}.
        report: what the stage counted or measured; JSON values, nothing at patient level.
        format_version: of the stage's files, when it was written.
    """

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    report: dict[str, Any]
    format_version: int = FORMAT_VERSION


def format_version(stage: str) -> int:
    """The version of a stage's files that this program writes."""
    return FORMAT_VERSIONS.get(stage, FORMAT_VERSION)


def fingerprint(
    stage: str, inputs: Mapping[str, str], config: Mapping[str, Any], version: int | None = None
) -> str:
    """Gives the SHA-256 (hex) that identifies what a stage makes of these inputs and config.

    Args:
        stage: see Manifest.
        inputs: see Manifest.
        config: see Manifest.
        version: of the format; None: the one that this program writes.
    """
    content = {
        "stage": stage,
        "format_version": format_version(stage) if version is None else version,
        "inputs": dict(inputs),
        "config": dict(config),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(
    target: Path,
    stage: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    private: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Writes an artifact folder beside `target` and renames it into place when the block ends.

    Yields the folder to write into and a dict to fill with the stage's report. When the block
    raises, or the process dies, `target` is as it was before; a dead process's leftovers are
    hidden folders that the next write of the same target removes.

    Args:
        target: the folder to make; replaced if it exists.
        stage: see Manifest.
        inputs: see Manifest.
        config: see Manifest.
        private: files about patients: files get mode 0600, folders 0700.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    _remove_leftovers(target)
    partial = Path(
        tempfile.mkdtemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=f".{os.getpid()}.partial"
        )
    )
    try:
        report: dict[str, Any] = {}
        yield partial, report
        _seal(partial, stage, inputs, config, report, private)
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: written beside, flushed to disk, renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_manifest(folder: Path, stage: str) -> Manifest:
    """Reads the manifest of an artifact folder.

    Raises:
        ArtifactError: if the folder or manifest is missing or unreadable, is of another stage, or
            has a format version that this program does not know.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{path}: expected the manifest of a {stage}, found no file; {_remedy(stage)}"
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{path}: larger than {_MAX_MANIFEST_BYTES >> 20} MiB; {_remedy(stage)}"
        )
    try:
        content = json.loads(path.read_text())
        # First, because a newer manifest may have keys that this program does not know.
        _require_known_format(path, stage, content["format_version"])
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise ArtifactError(
            f"{path}: not a manifest ({type(err).__name__}); {_remedy(stage)}"
        ) from err
    if manifest.stage != stage:
        raise ArtifactError(f"{path}: expected stage {stage!r}, got {manifest.stage!r}")
    return manifest


def verify(folder: Path, stage: str) -> Manifest:
    """Reads the manifest and compares every file's size and SHA-256 with it.

    Raises:
        ArtifactError: as read_manifest, and for a file that is missing, truncated or edited.
    """
    manifest = read_manifest(folder, stage)
    remedy = _remedy(stage)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: listed in {MANIFEST} but missing; {remedy}")
        if path.stat().st_size != expected["bytes"]:
            raise ArtifactError(
                f"{path}: expected {expected['bytes']} bytes, found {path.stat().st_size}; "
                f"the file was truncated or edited; {remedy}"
            )
        found = sha256_of(path)
        if found != expected["sha256"]:
            raise ArtifactError(
                f"{path}: expected SHA-256 {expected['sha256'][:12]}…, found {found[:12]}…; "
                f"the file was edited; {remedy}"
            )
    return manifest


def is_current(folder: Path, stage: str, wanted: str) -> bool:
    """Says whether `folder` holds a whole artifact of this stage with this fingerprint."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return verify(folder, stage).fingerprint == wanted
    except ArtifactError:
        return False


def require_match(what: str, expected: str, found: str) -> None:
    """Refuses artifacts that do not belong together, printing both fingerprints.

    Raises:
        ArtifactError: if the two differ.
    """
    if expected != found:
        raise ArtifactError(
            f"{what}: made from an input with fingerprint {found[:12]}…, but the one given has "
            f"{expected[:12]}…; run the earlier stages again"
        )


def _require_known_format(path: Path, stage: str, found: object) -> None:
    newest = format_version(stage)
    if type(found) is int and 1 <= found <= newest:
        return
    known = str(newest) if newest == 1 else f"1 to {newest}"
    if type(found) is int and found > newest:
        advice = f"a newer program wrote it: use that one, or {_remedy(stage)}"
    else:
        advice = _remedy(stage)
    raise ArtifactError(
        f"{path}: format_version {str(found)[:20]}, this program reads {known}; {advice}"
    )


def _remedy(stage: str) -> str:
    return _REMEDIES.get(stage, "make it anew")


def _seal(
    folder: Path,
    stage: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    private: bool,
) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = {
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
        }
    manifest = Manifest(
        stage=stage,
        fingerprint=fingerprint(stage, inputs, config),
        inputs=dict(inputs),
        config=dict(config),
        files=files,
        report=dict(report),
        format_version=format_version(stage),
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=1, default=_plain) + "\n"
    (folder / MANIFEST).write_text(text)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o700 if private else 0o755)
        else:
            path.chmod(0o600 if private else 0o644)
            sync(path)
    folder.chmod(0o700 if private else 0o755)
    sync(folder)


def _replace(partial: Path, target: Path) -> None:
    # rename() cannot replace a folder that holds files, so the old one steps aside first.
    aside = partial.with_suffix(".old")
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Removes what a process that died left beside `target`: .name.RANDOM.PID.partial and .old."""
    for leftover in target.parent.glob(f".{target.name}.*"):
        parts = leftover.name.split(".")
        if parts[-1] in ("partial", "old") and parts[-2].isdigit() and not _alive(int(parts[-2])):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
