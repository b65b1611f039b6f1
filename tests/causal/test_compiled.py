"""The cache of machine code: outside the source folder, found again from a copy of the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cafemed import paths
from causal import compiled

CODE = """
import numpy as np
from causal import essential, pdag
essential.dag_to_essential(np.triu(np.ones((4, 4)), 1))
print(sum(pdag.settle_all.stats.cache_hits.values()))
"""


def test_the_folder_is_under_the_root_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("CAFEMED_HOME", str(tmp_path))
    assert compiled.cache_dir() == tmp_path / "cache" / "numba"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    assert compiled.cache_dir() == tmp_path / "named"


def run_from(folder: Path, root: Path) -> int:
    environment = dict(os.environ, CAFEMED_HOME=str(root), PYTHONPATH=str(folder))
    environment.pop("NUMBA_CACHE_DIR", None)
    output = subprocess.run(
        [sys.executable, "-P", "-c", CODE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    ).stdout
    return int(output)


def test_a_copy_of_the_project_finds_the_code_that_another_compiled(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    hits = []
    for name in ("first", "second"):
        for package in ("cafemed", "causal"):
            shutil.copytree(paths.PROJECT_DIR / package, tmp_path / name / package)
        hits.append(run_from(tmp_path / name, root))
        assert not list((tmp_path / name).rglob("*.nbc"))
    assert hits == [0, 1]
    kernel = tmp_path / "second" / "causal" / "gaussian.py"
    kernel.write_text(kernel.read_text() + "\n# changed\n")
    assert run_from(tmp_path / "second", root) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_cannot_be_written_only_costs_time(tmp_path):
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    assert run_from(paths.PROJECT_DIR, root) == 0
