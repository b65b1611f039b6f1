import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cafemed import artifacts, console, errors


def test_a_job_prints_its_root_first(capsys):
    with console.job(Path("/some/root")):
        console.say("stage", "text")
    assert capsys.readouterr().out == "root      /some/root\nstage     text\n"


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError,
        errors.DataError,
        errors.ArtifactError,
        errors.MissingProgramError,
    ],
)
def test_a_users_error_is_one_line_and_status_2(error, capsys):
    with pytest.raises(SystemExit) as stop, console.job(Path("/r")):
        raise error("a.csv: column b missing")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.csv: column b missing\n"


def test_ctrl_c_is_status_130(capsys):
    with pytest.raises(SystemExit) as stop, console.job(Path("/r")):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_or_a_forbidden_folder_is_one_line_and_status_2(number, capsys):
    with pytest.raises(SystemExit) as stop, console.job(Path("/r")):
        raise OSError(number, os.strerror(number), "/r/cohort")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: /r/cohort: {os.strerror(number)}\n"


def test_other_faults_of_the_machine_keep_their_traceback():
    with pytest.raises(OSError, match="Bad address"), console.job(Path("/r")):
        raise OSError(errno.EFAULT, "Bad address")


def test_a_reader_that_left_ends_the_job_without_a_traceback():
    program = (
        "from pathlib import Path; from cafemed import console\n"
        "with console.job(Path('/r')):\n"
        "    for i in range(10**6): console.say('line', str(i))\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert job.stdout is not None
    job.stdout.readline()
    job.stdout.close()
    _, errors_printed = job.communicate(timeout=30)
    assert (job.returncode, errors_printed) == (141, b"")


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), console.job(Path("/r")):
        raise ZeroDivisionError


def test_a_stage_that_is_done_is_skipped_aloud_unless_forced(tmp_path, capsys):
    folder = tmp_path / "graph"
    wanted = artifacts.fingerprint("graph", {}, {})
    assert not console.is_done(folder, "graph", wanted, force=False)
    with artifacts.new_folder(folder, "graph", {}, {}):
        pass
    assert not console.is_done(folder, "graph", wanted, force=True)
    assert capsys.readouterr().out == ""
    assert console.is_done(folder, "graph", wanted, force=False)
    assert "unchanged, skipped" in capsys.readouterr().out


def test_progress_gives_every_item_and_is_silent_without_a_terminal(capsys):
    assert list(console.progress([3, 1, 2], "counting")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_waiting_is_silent_without_a_terminal(capsys):
    with console.waiting("starting"):
        pass
    assert capsys.readouterr() == ("", "")
