"""The history of a sweep that is not over: what a sweep goes on from after whatever ended it.

A folder, or a URL of an object store, that every node sees:

    sweep.json                           settings, inputs, and how the job was called
    00003.json                           trial 3: number, parameters, seed, state, epochs, error, …
    tracking.json                        where the sweep is tracked, if it is
    lease-000001-….json                  which process runs the sweep (cafemed/lease.py)
    run-001/trial-00003/checkpoint_…     its checkpoint: the trial saves it there; to a URL Ray Tune
                                         carries it

Each JSON file is replaced whole by the process that runs the sweep, and holds nothing that is
unpickled. Losing that process, a trial's, a node or the disk's last free byte at any point leaves
every trial that ended, and of the others the last whole checkpoint; a machine's power may take that
of a trial that runs with it. Of the trials that ended, those that are beaten keep none.
"""

import contextlib
import dataclasses
import datetime
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pyarrow import fs

from cafemed import artifacts, checkpoints, lease
from cafemed.errors import ArtifactError
from cafemed.sweep import TrialRecord
from cafemed.sweep_storage import Storage

FILE = "sweep.json"
TRACKING = "tracking.json"
FORMAT_VERSION = 1
#: What a sweep has in its folder, besides lock and lease; of a write that was killed, half a file.
_OURS = re.compile(r"(sweep|tracking|\d+)\.json|\.(sweep|tracking|\d+)\.json\.\w+|run-\d+")

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
        started: when it was started the last time, in seconds since 1970; None until its first
            epoch.
        host: where; "" until then.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    state: State
    attempts: int
    record: TrialRecord | None
    clock: float
    started: float | None = None
    host: str = ""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a sweep is, as `sweep.json` has it.

    Attributes:
        fingerprint: of inputs and the settings that a sweep keeps.
        inputs: name → fingerprint.
        settings: see SweepPlan.settings.
        job: how the job was called: "root", "registry", "name", "promote", "retrain", "measure",
            "tracking", "forced".
    """

    fingerprint: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    job: Mapping[str, Any]


class Ledger:
    """Reads and writes the files of a sweep's history.

    What changes them raises TakenOverError once another process runs the sweep that was `locked`.

    Args:
        storage: absolute folder, or URL (`s3://bucket/folder`, `gs://…`, `file:///…`).
    """

    def __init__(self, storage: str | Path) -> None:
        self._place = Storage(storage)
        self._leases: tuple[lease.Lease, ...] = ()

    @property
    def storage(self) -> str:
        """The folder or URL."""
        return self._place.name

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one of this machine's file system."""
        return self._place.folder

    def is_at(self, other: "Ledger") -> bool:
        """Says whether another one is the same place."""
        return self._place.is_at(other._place)

    def exists(self) -> bool:
        """Says whether there is a sweep that is not over."""
        return self._place.has(FILE)

    @contextlib.contextmanager
    def locked(self, beside: "Ledger | None" = None) -> Iterator[None]:
        """Makes sure that one process runs the sweep; see cafemed/lease.py.

        Args:
            beside: a locked one, without which this one may not be written either.

        Raises:
            ArtifactError: if another process runs it, or if it is somewhere that cannot be written.
        """
        with lease.held(self._place) as held:
            self._leases = (held, *(() if beside is None else beside._leases))
            try:
                yield
            finally:
                self._leases = ()

    @property
    def lost(self) -> lease.TakenOverError | None:
        """Why another process runs the sweep that this one had locked; None if it does not."""
        return next((held.lost for held in self._leases if held.lost is not None), None)

    def require_ours(self) -> None:
        """Makes sure that nobody took the sweep over since it was locked.

        Raises:
            TakenOverError: if somebody did.
            OSError: if that cannot be found out.
        """
        for held in self._leases:
            held.require()

    def open(self, header: Header) -> None:
        """Writes `sweep.json`: begins a sweep, or notes how it goes on."""
        self.require_ours()
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(header)}
        self._place.write(FILE, content)

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
            content = self._place.read(FILE)
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
        self.require_ours()
        content = dataclasses.asdict(entry) | {"record": _plain(entry.record)}
        self._place.write(f"{entry.number:05d}.json", content)

    def entries(self) -> list[Entry]:
        """All trials, by number.

        Raises:
            ArtifactError: if a file is damaged.
        """
        return [self._entry(name) for name in sorted(self._place.names()) if name[:1].isdigit()]

    def keep_tracking(self, content: Mapping[str, Any]) -> None:
        """Notes where the sweep is tracked; see cafemed/mlflow_sweep.py."""
        self.require_ours()
        self._place.write(TRACKING, content)

    def tracking(self) -> dict[str, Any] | None:
        """Where the sweep is tracked; None if it is not.

        Raises:
            ArtifactError: if the file is damaged.
        """
        if TRACKING not in self._place.names():
            return None
        try:
            return self._place.read(TRACKING)
        except (ValueError, TypeError) as err:
            raise ArtifactError(
                f"{self.storage}/{TRACKING}: not the runs of a sweep ({type(err).__name__}); "
                "remove it to track the sweep anew"
            ) from err

    def next_run(self) -> str:
        """The name of a new folder for Ray Tune's files; every run of the job has its own."""
        runs = [int(name[4:]) for name in self._place.names() if name.startswith("run-")]
        return f"run-{max(runs, default=0) + 1:03d}"

    def checkpoint(self, number: int) -> tuple[str, checkpoints.Checkpoint] | None:
        """A trial's newest whole checkpoint and where it is; None if it has none.

        A checkpoint that was cut off while it was written, or damaged since, is passed over.
        """
        for path in map(self._place.url, self._checkpoints(number)):
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
            fs.copy_files(self._place.path(source), name, source_filesystem=self._place.files)
            yield Path(name)

    def remove(self) -> None:
        """Removes the sweep, its checkpoints too; `sweep.json` first, so never half a sweep."""
        self.require_ours()
        ours = filter(_OURS.fullmatch, self._place.names())
        for name in sorted(ours, key=lambda name: name != FILE):
            self._place.remove(name)

    def secure(self, number: int) -> None:
        """Waits until a trial's newest checkpoint is on the disk: trials do not, to lose no time.

        Raises:
            OSError: if the disk is full, among others.
        """
        if self.folder is not None:
            for name in self._checkpoints(number)[:1]:
                for path in (self.folder / name).iterdir():
                    artifacts.sync(path)

    def discard(self, number: int) -> None:
        """Removes a trial's checkpoints; what cannot be removed stays until the sweep is over."""
        self.require_ours()
        for name in self._checkpoints(number):
            with contextlib.suppress(OSError):
                self._place.remove(name)

    def _checkpoints(self, number: int) -> list[str]:
        """Folders of a trial's checkpoints below the storage, the newest first."""
        runs = sorted((n for n in self._place.names() if n.startswith("run-")), reverse=True)
        found = []
        for run in runs:
            folder = f"{run}/trial-{number:05d}"
            names = [n for n in self._place.names(folder) if n.startswith("checkpoint_")]
            found += [f"{folder}/{name}" for name in sorted(names, reverse=True)]
        return found

    def _entry(self, name: str) -> Entry:
        try:
            content = self._place.read(name)
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


def _plain(record: TrialRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    started = None if record.started is None else record.started.isoformat()
    return dataclasses.asdict(record) | {"started": started, "checkpoint": None}
