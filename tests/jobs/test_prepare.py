"""`jobs/prepare.py` as a user runs it."""

import os
import subprocess
import sys

import pytest

from cafemed import cohort, paths


@pytest.fixture
def run(tmp_path):
    """Runs the job with a root of its own."""

    def run_job(*arguments):
        return subprocess.run(
            [sys.executable, paths.PROJECT_DIR / "jobs" / "prepare.py", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"CAFEMED_HOME": str(tmp_path / "root"), "OMP_NUM_THREADS": "1"},
        )

    return run_job


@pytest.fixture
def arguments(tmp_path, hospitals):
    """What names a drawn hospital on the command line."""
    tables = hospitals.draw(2, num_patients=40).write(tmp_path / "tables", packed=True)
    drugs = hospitals.write_drugs(tmp_path / "drugs")
    return ["data=mimic3", f"data.root={tables}", f"data.drugs={drugs}"]


def test_it_prints_its_root_first_and_a_table_last(run, arguments, tmp_path):
    result = run(*arguments, "name=one")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    folder = tmp_path / "root" / "experiments" / "one" / "cohort"
    assert lines[0] == f"root      {tmp_path / 'root'}"
    assert lines[-1] == f"done      {folder}"
    patients = cohort.load(folder).num_patients
    assert any(line.startswith(f"patients       {patients} (") for line in lines)
    assert result.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"root", "tables", "drugs"}

    again = run(*arguments, "name=one")
    assert "unchanged, skipped" in again.stdout
    assert again.stdout.splitlines()[3:] == lines[4:]


def test_a_bad_table_is_one_line_and_status_2_and_writes_nothing(run, arguments, tmp_path):
    (tmp_path / "tables" / "DIAGNOSES_ICD.csv.gz").write_bytes(b"")
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "DIAGNOSES_ICD.csv.gz" in result.stderr
    assert not (tmp_path / "root").exists()


def test_values_out_of_range_are_reported_together(run, arguments):
    result = run(*arguments, "data.cohort.min_visits=0", "data.cohort.inputs=all")
    assert result.returncode == 2
    assert "data.cohort.min_visits: expected a value in [1, inf], got 0" in result.stderr
    assert "data.cohort.inputs: expected one of 'current', 'history', got 'all'" in result.stderr
    assert result.stderr.count("\n") == 1
