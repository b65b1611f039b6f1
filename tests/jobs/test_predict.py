"""The predict job as a user runs it."""

import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafemed import paths, registry

JOB = paths.PROJECT_DIR / "jobs" / "predict.py"
BUNDLE = paths.PROJECT_DIR / "tests" / "cafemed" / "old_bundles" / "without-laboratory"
CODE = {"system": "icd9", "code": "3"}


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), f"paths.root={root}", "name=tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    home = tmp_path / "root" / "registry" / "tiny"
    registry.promote(home, registry.publish(home, BUNDLE, {}))
    rows = [{"patient": i, "visits": [{"diagnoses": [CODE]}] * (1 + i % 3)} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=15)
    return tmp_path / "root"


@pytest.mark.slow
def test_a_file_is_answered_once_and_anew_with_force(root: Path, tmp_path: Path):
    files = [f"predict.input={tmp_path}/in.parquet", f"predict.output={tmp_path}/new/out.parquet"]
    told = run(root, *files, "predict.workers=0")
    assert told.returncode == 0, told.stderr
    assert "version 0001 (production)" in told.stdout
    assert "40 patients in " in told.stdout
    output = tmp_path / "new" / "out.parquet"
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert stat.S_IMODE(output.parent.stat().st_mode) == 0o700
    first = pq.read_table(output)
    assert first["patient"].to_pylist() == list(range(40))

    again = run(root, *files, "predict.workers=0")
    assert again.returncode == 2
    assert "force=true replaces it" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1

    on_ray = run(root, *files, "predict.workers=2", "force=true")
    assert on_ray.returncode == 0, on_ray.stderr
    assert pq.read_table(output).equals(first)


@pytest.mark.slow
def test_a_bad_row_is_one_line_on_ray_too(root: Path, tmp_path: Path):
    """As a job, in a process that ends: what Ray Data leaves running then joins no other Ray."""
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    output.write_bytes(b"as it was")
    rows = pq.read_table(source).to_pylist()
    rows[33]["visits"] = []
    pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=15)
    told = run(root, f"predict.input={source}", f"predict.output={output}", "force=true")
    assert told.returncode == 2, told.stderr
    lines = told.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert lines[-1].endswith("row 34: column visits: expected at least one visit")
    # Ray's core may tell of how Ray Data starts its actors; of the error there is nothing more.
    assert all("core_worker.cc" in line for line in lines[:-1])
    assert output.read_bytes() == b"as it was"
