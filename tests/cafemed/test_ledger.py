"""The ledger gives back what was written, whole or not at all, on disks and object stores."""

import dataclasses
import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from cafemed import artifacts
from cafemed.errors import ArtifactError
from cafemed.ledger import Entry, Header, Ledger

HEADER = Header("abc", {"cohort": "c0"}, {"search": {"num_samples": 3}}, {"name": "n"})


@pytest.fixture(params=["folder", "url", "store"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """On a folder, on its URL, and as on an object store: files appear when they are closed."""
    if request.param == "folder":
        return Ledger(tmp_path / "trials")
    if request.param == "url":
        return Ledger(f"file://{tmp_path}/trials")
    made = Ledger(tmp_path / "trials")
    made._place.files = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    made._place.root = "trials"
    made._place.files.create_dir("trials")
    return made


def ended(sweeps: Any, number: int) -> Entry:
    parameters = {"model.dropout": 0.25, "model.name": "x", "train.learning_rate": 1e-3}
    record = dataclasses.replace(
        sweeps.record_of(number, parameters),
        started=datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
        attempts=2,
    )
    return Entry(number, parameters, number, "finished", 2, record, 12.5)


def test_what_is_written_is_read_again(ledger: Ledger, sweeps: Any):
    assert not ledger.exists()
    assert ledger.entries() == []
    ledger.open(HEADER)
    assert ledger.exists()
    assert ledger.header() == HEADER
    running = Entry(3, {"model.dropout": 0.5}, 7, "running", 1, None, 3.0)
    ledger.write(running)
    ledger.write(ended(sweeps, 1))
    assert ledger.entries() == [ended(sweeps, 1), running]
    ledger.write(ended(sweeps, 3))
    assert ledger.entries() == [ended(sweeps, 1), ended(sweeps, 3)]


def test_what_an_earlier_version_wrote_is_read(sweeps: Any, tmp_path: Path):
    """It noted less of a trial."""
    ledger = Ledger(tmp_path / "trials")
    ledger.open(HEADER)
    ledger.write(ended(sweeps, 1))
    file = tmp_path / "trials" / "00001.json"
    content = json.loads(file.read_text())
    del content["started"], content["host"]
    del content["record"]["memory_gb"], content["record"]["num_workers"]
    file.write_text(json.dumps(content))
    assert ledger.entries() == [ended(sweeps, 1)]


def test_it_removes_what_is_its_own(ledger: Ledger, sweeps: Any, tmp_path: Path):
    ledger.open(HEADER)
    ledger.write(ended(sweeps, 1))
    folder = tmp_path / "trials"
    (folder / "run-001" / "trial-00001").mkdir(parents=True)
    (folder / "run-001" / "trial-00001" / "x").write_text("x")
    (folder / "notes.txt").write_text("of somebody else")
    assert ledger.next_run() == "run-002"
    ledger.remove()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not ledger.exists()


def test_the_newest_whole_checkpoint_is_found_in_the_newest_run(ledger: Ledger, tmp_path: Path):
    assert ledger.checkpoint(1) is None
    for run, epochs in (("run-001", (1, 2)), ("run-002", (3,)), ("run-010", ())):
        for epoch in epochs:
            place = tmp_path / "trials" / run / "trial-00001" / f"checkpoint_{epoch:06d}"
            save(place, epoch)
    path, found = ledger.checkpoint(1)  # type: ignore[misc]
    assert found.epoch == 3
    assert path == f"{ledger.storage}/run-002/trial-00001/checkpoint_000003"
    with ledger.local(path) as folder:
        assert (folder / "checkpoint.json").is_file()
    # Cut off while it was copied: the one before counts.
    (tmp_path / "trials/run-002/trial-00001/checkpoint_000003/checkpoint.json").unlink()
    path, found = ledger.checkpoint(1)  # type: ignore[misc]
    assert found.epoch == 2


def test_a_trials_checkpoints_are_discarded_and_nothing_else(ledger: Ledger, tmp_path: Path):
    ledger.discard(1)  # has none
    for run in ("run-001", "run-002"):
        for number in (1, 11):
            save(tmp_path / "trials" / run / f"trial-{number:05d}" / "checkpoint_000001", 1)
    (tmp_path / "trials/run-002/trial-00001/error.txt").write_text("of Ray Tune")
    ledger.discard(1)
    assert ledger.checkpoint(1) is None
    assert ledger.checkpoint(11) is not None
    left = [p.relative_to(tmp_path) for p in (tmp_path / "trials").glob("*/trial-00001/*")]
    assert [str(path) for path in left] == ["trials/run-002/trial-00001/error.txt"]


def save(place: Path, epoch: int) -> None:
    import torch

    from cafemed import checkpoints
    from cafemed.randomness import RandomStates

    weights = {"w": torch.zeros(1)}
    states = RandomStates({}, {})
    checkpoints.save(place, checkpoints.Checkpoint("", epoch, 1, weights, weights, {}, states, []))


def test_a_write_that_fails_leaves_what_was_there(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger = Ledger(tmp_path)
    ledger.write(Entry(1, {}, 0, "running", 1, None, 1.0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            ledger.write(ended(sweeps, 1))
    assert ledger.entries()[0].state == "running"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001.json"]


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    ledger = Ledger(tmp_path)
    (tmp_path / "00001.json").write_text(text)
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"00001\.json: not a trial of a sweep's history"):
        ledger.entries()
    with pytest.raises(ArtifactError, match=r"sweep\.json: not a sweep's history"):
        ledger.header()


def test_another_format_and_no_sweep_at_all_are_said(tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a sweep that is not over, found no file"):
        Ledger(tmp_path).header()
    (tmp_path / "sweep.json").write_text('{"format_version": 2}')
    with pytest.raises(ArtifactError, match="format_version 2, this program reads 1"):
        Ledger(tmp_path).header()


@pytest.mark.parametrize("name", ["sweep.json", "tracking.json", "00003.json"])
def test_half_a_file_of_a_killed_process_goes_with_the_sweep(tmp_path: Path, name: str):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom cafemed import artifacts\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "artifacts.write_text(Path(sys.argv[1]), '{}')\n"
    )
    ledger = Ledger(tmp_path / "trials")
    with ledger.locked():
        ledger.open(HEADER)
        killed = [sys.executable, "-c", code, str(tmp_path / "trials" / name)]
        assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
        assert list((tmp_path / "trials").glob(f".{name}.*"))
        assert ledger.entries() == []
        ledger.remove()
    assert not (tmp_path / "trials").exists()


def test_one_process_at_a_time_and_none_after_it_is_killed(tmp_path: Path):
    code = (
        "import sys\nfrom cafemed.ledger import Ledger\n"
        "with Ledger(sys.argv[1]).locked():\n    print('has it', flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "trials")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        ledger = Ledger(tmp_path / "trials")
        with pytest.raises(ArtifactError, match="another process runs this sweep"):  # noqa: SIM117
            with ledger.locked():
                pass
        other.kill()
        other.wait()
        with ledger.locked():
            ledger.open(HEADER)
    assert ledger.exists()
    with ledger.locked():
        ledger.remove()
        (tmp_path / "trials" / ".lease-000001-00.json.half").touch()
    assert not (tmp_path / "trials").exists()  # an empty folder does not stay
