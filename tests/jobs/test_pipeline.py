"""The whole pipeline as a user runs it: to its end, interrupted, and with a stage that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cafemed import paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"CAFEMED_HOME": str(home), "PYTHONWARNINGS": "default", "PYTHONUNBUFFERED": "1"}


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, paths.PROJECT_DIR / "jobs/pipeline.py", *arguments],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_running(home: Path) -> list[str]:
    """Command lines of live processes whose environment names this home folder."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            named = f"CAFEMED_HOME={home}".encode() in (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if named and command:
            found.append(command)
    return found


def wait_until_nothing_runs(home: Path, seconds: float = 60) -> list[str]:
    deadline = time.monotonic() + seconds
    while (running := left_running(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return running


def test_demo_ends_with_an_answer_and_leaves_nothing_running(tmp_path: Path):
    process = start(tmp_path, "--config-name", "demo")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]
    for line in ("data ", "graph ", "sweep ", "best trial ", "test ", "request "):
        assert f"\n{line}" in output
    assert "(best possible)" in output
    assert wait_until_nothing_runs(tmp_path) == []
    experiment = tmp_path / "experiments/demo_synthetic"
    answer = json.loads((experiment / "deploy.json").read_text())["answer"]
    assert answer["recommendations"][0]["medications"]
    # Nothing was written outside the root, and patients' folders are private.
    assert {p.name for p in tmp_path.iterdir()} <= {"experiments", "registry", "cache"}
    assert (experiment / "cohort").stat().st_mode & 0o077 == 0

    again, _ = start(tmp_path, "--config-name", "demo").communicate(timeout=300)
    assert again.count("unchanged, skipped") >= 4, again


@pytest.mark.parametrize("stage", ["discover", "tune", "deploy"])
def test_interrupted_demo_leaves_nothing_running(stage: str, tmp_path: Path):
    process = start(tmp_path, "--config-name", "demo")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(stage) and " stage " in line:
            break
    time.sleep(6)  # into the stage: its workers are up
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, rest[-4000:]
    assert "Traceback" not in rest
    assert wait_until_nothing_runs(tmp_path) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_failing_stage_stops_the_pipeline_with_its_message(tmp_path: Path):
    process = start(tmp_path, "data=mimic3", f"data.root={tmp_path}", f"data.drugs={tmp_path}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: stage prepare failed" in output
    assert "Traceback" not in output
    assert "discover" not in output
