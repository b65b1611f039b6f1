"""The history of a sweep that is not over: what a sweep goes on from after whatever ended it.

A folder, or a URL of an object store, that every node sees:

    sweep.json                           settings, inputs, and how the job was called
    00003.json                           trial 3: number, parameters, seed, state, epochs, error, …
    tracking.json                        where the sweep is tracked, if it is
    run-001/trial-00003/checkpoint_…     its checkpoint, which Ray Tune puts there

Each JSON file is replaced whole by the process that runs the sweep, and holds nothing that is
unpickled. Losing that process, a trial's, a node or the disk's last free byte at any point leaves
every trial that ended, and of the others the last whole checkpoint. Of the trials that ended, those
that are beaten keep none.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pyarrow import fs

from cafemed import artifacts, checkpoints
from cafemed.errors import ArtifactError
from cafemed.sweep import TrialRecord

FILE = "sweep.json"
LOCK = ".lock"
TRACKING = "tracking.json"
FORMAT_VERSION = 1
#: What a sweep has in its folder, besides the lock.
_OURS = re.compile(r"sweep\.json|tracking\.json|\d+\.json|run-\d+")

State: TypeAlias = Literal["running", "finished", "stopped", "failed"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A trial as the ledger has it.

    Attributes:
        number, parameters, seed: see TrialRecord.
        state: "running" from when its parameters are drawn until it ends.
        attempts: how often it was started.
        record: what came of it; None while it is running.
        clock: seconds that the sweep had run for, in all, when this was written.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    state: State
    attempts: int
    record: TrialRecord | None
    clock: float


@dataclasses.dataclass(frozen=True)
class Header:
    """What a sweep is, as `sweep.json` has it.

    Attributes:
        fingerprint: of inputs and the settings that a sweep keeps.
        inputs: name → fingerprint.
        settings: see SweepPlan.settings.
        job: how the job was called: "root", "registry", "name", "promote", "retrain",
            "tracking", "forced".
    """

    fingerprint: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    job: Mapping[str, Any]


class Ledger:
    """Reads and writes the files of a sweep's history.

    Args:
        storage: absolute folder, or URL (`s3://bucket/folder`, `gs://…`, `file:///…`).
    """

    def __init__(self, storage: str | Path) -> None:
        self.storage = str(storage)
        if "://" in self.storage:
            self._files, self._root = fs.FileSystem.from_uri(self.storage)
        else:
            self._files, self._root = fs.LocalFileSystem(), self.storage
        if self.folder is not None:
            self.storage = self._root

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one of this machine's file system."""
        return Path(self._root) if isinstance(self._files, fs.LocalFileSystem) else None

    def is_at(self, other: "Ledger") -> bool:
        """Says whether another one is the same place."""
        if self.folder is not None and other.folder is not None:
            return self.folder.resolve() == other.folder.resolve()
        return self.storage.rstrip("/") == other.storage.rstrip("/")

    def exists(self) -> bool:
        """Says whether there is a sweep that is not over."""
        return bool(self._files.get_file_info(self._path(FILE)).type == fs.FileType.File)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes sure that one process runs the sweep; the lock goes with the process that has it.

        Raises:
            ArtifactError: if another process has it. (Object stores have no locks.)
        """
        if self.folder is None:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(handle)
            raise ArtifactError(
                f"{self.storage}: another process runs this sweep; let it end, or stop it first"
            ) from err
        try:
            yield
        finally:
            if self._names() == [LOCK]:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(handle)

    def open(self, header: Header) -> None:
        """Writes `sweep.json`: begins a sweep, or notes how it goes on."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(header)}
        self._write(FILE, content)

    def header(self) -> Header:
        """Reads `sweep.json`.

        Raises:
            ArtifactError: if it is missing, damaged or of another format.
        """
        path = f"{self.storage}/{FILE}"
        if not self.exists():
            raise ArtifactError(
                f"{path}: expected a sweep that is not over, found no file; a "
                "finished one lies in the experiment's folder `sweep`"
            )
        try:
            content = self._read(FILE)
            version = content.pop("format_version")
            if version != FORMAT_VERSION:
                raise ArtifactError(
                    f"{path}: format_version {version}, this program reads {FORMAT_VERSION}; "
                    "start anew with force=true"
                )
            return Header(**content)
        except (ValueError, TypeError, KeyError) as err:
            raise ArtifactError(
                f"{path}: not a sweep's history ({type(err).__name__}); start anew with force=true"
            ) from err

    def write(self, entry: Entry) -> None:
        """Notes a trial: when it is drawn, and when it ends."""
        content = dataclasses.asdict(entry) | {"record": _plain(entry.record)}
        self._write(f"{entry.number:05d}.json", content)

    def entries(self) -> list[Entry]:
        """All trials, by number.

        Raises:
            ArtifactError: if a file is damaged.
        """
        return [self._entry(name) for name in sorted(self._names()) if name[:1].isdigit()]

    def keep_tracking(self, content: Mapping[str, Any]) -> None:
        """Notes where the sweep is tracked; see cafemed/mlflow_sweep.py."""
        self._write(TRACKING, content)

    def tracking(self) -> dict[str, Any] | None:
        """Where the sweep is tracked; None if it is not.

        Raises:
            ArtifactError: if the file is damaged.
        """
        if TRACKING not in self._names():
            return None
        try:
            return self._read(TRACKING)
        except (ValueError, TypeError) as err:
            raise ArtifactError(
                f"{self.storage}/{TRACKING}: not the runs of a sweep ({type(err).__name__}); "
                "remove it to track the sweep anew"
            ) from err

    def next_run(self) -> str:
        """The name of a new folder for Ray Tune's files; every run of the job has its own."""
        runs = [int(name[4:]) for name in self._names() if name.startswith("run-")]
        return f"run-{max(runs, default=0) + 1:03d}"

    def checkpoint(self, number: int) -> tuple[str, checkpoints.Checkpoint] | None:
        """A trial's newest whole checkpoint and where it is; None if it has none.

        A checkpoint that was cut off while it was written, or damaged since, is passed over.
        """
        for path in map(self._url, self._checkpoints(number)):
            with self.local(path) as folder:
                try:
                    found = checkpoints.load(folder, None)
                except ArtifactError:
                    continue
            if found is not None:
                return path, found
        return None

    @contextlib.contextmanager
    def local(self, path: str) -> Iterator[Path]:
        """A checkpoint's folder on this machine: where it lies, or a copy while the block runs."""
        if self.folder is not None:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as name:
            source = path.split("?")[0].removeprefix(f"{self.storage.split('?')[0]}/")
            fs.copy_files(self._path(source), name, source_filesystem=self._files)
            yield Path(name)

    def remove(self) -> None:
        """Removes the sweep, its checkpoints too; `sweep.json` first, so never half a sweep."""
        for name in sorted(filter(_OURS.fullmatch, self._names()), key=lambda name: name != FILE):
            info = self._files.get_file_info(self._path(name))
            if info.type == fs.FileType.Directory:
                self._files.delete_dir(info.path)
            else:
                self._files.delete_file(info.path)

    def discard(self, number: int) -> None:
        """Removes a trial's checkpoints; what cannot be removed stays until the sweep is over."""
        for name in self._checkpoints(number):
            with contextlib.suppress(OSError):
                self._files.delete_dir(self._path(name))

    def _checkpoints(self, number: int) -> list[str]:
        """Folders of a trial's checkpoints below the storage, the newest first."""
        runs = sorted((n for n in self._names() if n.startswith("run-")), reverse=True)
        found = []
        for run in runs:
            folder = f"{run}/trial-{number:05d}"
            names = [n for n in self._names(folder) if n.startswith("checkpoint_")]
            found += [f"{folder}/{name}" for name in sorted(names, reverse=True)]
        return found

    def _entry(self, name: str) -> Entry:
        try:
            content = self._read(name)
            record = content["record"]
            if record is not None:
                started = record["started"]
                record |= {
                    "history": tuple(record["history"]),
                    "started": started and datetime.datetime.fromisoformat(started),
                    "checkpoint": None,
                }
                content["record"] = TrialRecord(**record)
            return Entry(**content)
        except (ValueError, TypeError, KeyError) as err:
            raise ArtifactError(
                f"{self.storage}/{name}: not a trial of a sweep's history ({type(err).__name__}); "
                "remove it to run the trial again"
            ) from err

    def _url(self, name: str) -> str:
        """How a place below the storage is written; a URL's options stay behind it."""
        base, mark, options = self.storage.partition("?")
        return f"{base}/{name}{mark}{options}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names(self, folder: str = "") -> list[str]:
        place = self._path(folder).rstrip("/")
        selector = fs.FileSelector(place, allow_not_found=True)
        return [info.base_name for info in self._files.get_file_info(selector)]

    def _read(self, name: str) -> dict[str, Any]:
        with self._files.open_input_stream(self._path(name)) as file:
            return dict(json.loads(file.read()))

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        """The one function that writes; a reader sees the file before or after, never half of it.

        Raises:
            OSError: if the disk is full, among others.
        """
        text = json.dumps(content) + "\n"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(self.folder / name, text)
            return
        with self._files.open_output_stream(self._path(name)) as file:  # there once it is closed
            file.write(text.encode())


def _plain(record: TrialRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    started = None if record.started is None else record.started.isoformat()
    return dataclasses.asdict(record) | {"started": started, "checkpoint": None}
