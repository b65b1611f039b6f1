"""What a terminal shows of a running sweep."""

import codecs
import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cafemed import sweep_display
from cafemed.conductor import Conductor
from cafemed.ledger import Header, Ledger


@pytest.fixture
def running(sweeps: Any, tmp_path: Path) -> Conductor:
    """Two trials ended after ten seconds, two are in their epochs and one in its first."""
    plan = sweeps.plan_of(scheduler="none")
    ledger = Ledger(tmp_path)
    ledger.open(Header("f", {}, plan.settings(), {}))
    now = [0.0]
    conductor = Conductor(plan, ledger, clock=lambda: now[0])
    for _ in range(5):
        start = conductor.next()
        assert start is not None
        conductor.started(start.number)
        if start.number == 4:
            continue
        history = sweeps.history_of(dict(start.parameters))
        conductor.stops(start.number, history[: start.number + 2])
        if start.number < 2:
            conductor.end(start.number, history)
    now[0] = 10.0
    return conductor


def shown(conductor: Conductor, before: int = 0) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=160).print(sweep_display.table(conductor, before))
    return out.getvalue().splitlines()


def test_the_table_has_the_trials_that_run(running: Conductor, sweeps: Any):
    lines = shown(running)
    best = max(trial.best_so_far[-1] for trial in running.ended)
    assert lines[0].startswith(f"2 of 12 trials ended, best Jaccard {best:.4f} (trial ")
    assert "about 50 s left" in lines[0]
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "3", "4"]
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]
    for cells, number in zip(table[:2], (2, 3), strict=True):
        found = sweeps.history_of(running.parameters_of(number))[number + 1]["metrics"]
        assert cells[2] == f"{number + 2}/{sweeps.EPOCHS}"
        assert cells[3:5] == [f"{found['jaccard']:.4f}", f"{found['ddi_rate']:.4f}"]
        assert cells[5] == sweep_display.duration(0.25 * (sweeps.EPOCHS - number - 2))
        assert cells[1].startswith("dropout=")
    assert table[2][1].startswith("dropout=")
    assert table[2][2:] == [f"0/{sweeps.EPOCHS}", "–", "–", "–"]


def test_a_trial_is_in_the_table_while_it_runs(running: Conductor, sweeps: Any, tmp_path: Path):
    drawn = running.next()
    assert drawn is not None
    assert running.running == [2, 3, 4]  # the other one waits for a place
    sweeps._save(running, 2, running.histories[2])
    again = Conductor(running.plan, Ledger(tmp_path))
    assert again.interrupted == [2, 3, 4, 5]
    assert [line for line in shown(again) if line.startswith("│")] == []
    start = again.next()
    assert start is not None
    again.started(start.number)
    (row,) = [line for line in shown(again) if line.startswith("│")]
    assert f"4/{sweeps.EPOCHS}" in row  # what it had before
    again.end(2, sweeps.history_of(start.parameters))
    assert [line for line in shown(again) if line.startswith("│")] == []


def test_time_left_is_of_this_run(running: Conductor):
    assert "left" not in sweep_display.headline(running, before=2)
    assert "about 100 s" not in sweep_display.headline(running, before=1)
    assert "about 2 min left" in sweep_display.headline(running, before=1)


class Terminal:
    """The screen's end of a pseudo-terminal, which is read as it is written to."""

    def __init__(self) -> None:
        self._screen, program = pty.openpty()
        fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
        self.stream = os.fdopen(program, "w", encoding="utf-8")
        self.text, self._seen = "", 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")().decode
        with contextlib.suppress(OSError):  # that the other end is closed
            while got := os.read(self._screen, 4096):
                self.text += decode(got)

    def wait_for(self, *wanted: str) -> str:
        """What came since the last call, as soon as all of this is in it."""
        until = time.monotonic() + 30.0
        while not all(text in self.text[self._seen :] for text in wanted):
            assert time.monotonic() < until, (wanted, self.text[self._seen :])
            time.sleep(0.02)
        found, self._seen = self.text[self._seen :], len(self.text)
        return found

    def close(self) -> str:
        """All that is left to read."""
        self.stream.close()
        self._reader.join(30.0)
        os.close(self._screen)
        return self.text[self._seen :]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    found = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    yield found
    if not found.stream.closed:
        found.close()


UP_AND_ERASE = "\x1b[1A\x1b[2K"
SHOW_CURSOR = "\x1b[?25h"


def test_a_terminal_follows_the_trials(
    running: Conductor,
    sweeps: Any,
    terminal: Terminal,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with sweep_display.following(running):
        terminal.wait_for("2 of 12 trials ended", f"0/{sweeps.EPOCHS}", f"5/{sweeps.EPOCHS}")
        running.stops(4, sweeps.history_of(running.parameters_of(4), 1))
        terminal.wait_for(f"1/{sweeps.EPOCHS}")
        running.end(4, sweeps.history_of(running.parameters_of(4)))
        terminal.wait_for("3 of 12 trials ended")
        print("a line of the job, whose output goes to a file")
    left = terminal.close()
    assert capsys.readouterr().out == "a line of the job, whose output goes to a file\n"
    assert "a line" not in terminal.text
    assert left.endswith(SHOW_CURSOR + "\r" + UP_AND_ERASE * len(shown(running)))


def test_a_line_of_the_job_is_above_the_table_in_a_terminal(
    running: Conductor, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with sweep_display.following(running):
        terminal.wait_for("2 of 12 trials ended")
        print("a line of the job")
        found = terminal.wait_for("a line of the job")
        # The table makes room for it, and is drawn again.
        assert found[: found.index("a line of the job")].endswith(UP_AND_ERASE)
        terminal.wait_for("2 of 12 trials ended")
    print("a line afterwards")
    assert terminal.close().endswith(UP_AND_ERASE + "a line afterwards\r\n")
    assert sys.stdout is terminal.stream


def test_without_a_terminal_nothing_is_shown(
    running: Conductor, capsys: pytest.CaptureFixture[str]
):
    with sweep_display.following(running):
        print("a line")
    assert capsys.readouterr() == ("a line\n", "")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.0, "59 s"), (90.0, "2 min"), (5400.0, "1.5 h")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str):
    assert sweep_display.duration(seconds) == said
