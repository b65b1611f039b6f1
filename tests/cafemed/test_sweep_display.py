"""What a terminal shows of a running sweep."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cafemed import sweep_display
from cafemed.conductor import Conductor
from cafemed.ledger import Header, Ledger


@pytest.fixture
def running(sweeps: Any, tmp_path: Path) -> Conductor:
    """Two trials ended after ten seconds, and two are in their epochs."""
    plan = sweeps.plan_of(scheduler="none")
    ledger = Ledger(tmp_path)
    ledger.open(Header("f", {}, plan.settings(), {}))
    now = [0.0]
    conductor = Conductor(plan, ledger, clock=lambda: now[0])
    for _ in range(4):
        start = conductor.next()
        assert start is not None
        conductor.started(start.number)
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
    assert [row.split("│")[1].strip() for row in rows] == ["2", "3"]
    for row, number in zip(rows, (2, 3), strict=True):
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        found = sweeps.history_of(running.parameters_of(number))[number + 1]["metrics"]
        assert cells[2] == f"{number + 2}/{sweeps.EPOCHS}"
        assert cells[3:5] == [f"{found['jaccard']:.4f}", f"{found['ddi_rate']:.4f}"]
        assert cells[5] == sweep_display.duration(0.25 * (sweeps.EPOCHS - number - 2))
        assert cells[1].startswith("dropout=")


def test_time_left_is_of_this_run(running: Conductor):
    assert "left" not in sweep_display.headline(running, before=2)
    assert "about 100 s" not in sweep_display.headline(running, before=1)
    assert "about 2 min left" in sweep_display.headline(running, before=1)


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
