"""cdt's GIES: with a stand-in for Rscript everywhere, with R's pcalg where it is installed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cafemed.errors import ConfigError, DataError, MissingProgramError
from causal import fit_gies
from causal.cdt_engine import fit_cdt

#: Reads the folder out of the script that cdt writes, and plays R: answers with the chain
#: 1 → 2 → … of as many columns as data.csv has, and copies what it was given to `seen`.
FAKE = """#!{python}
import re, sys, shutil, time, pathlib
text = pathlib.Path(sys.argv[2]).read_text()
folder = pathlib.Path(re.search(r"file='(.*)/data.csv'", text).group(1))
seen = pathlib.Path({seen!r})
(seen / "runs").open("a").write("run\\n")
shutil.copy(folder / "data.csv", seen / "data.csv")
if (folder / "fixedgaps.csv").exists():
    shutil.copy(folder / "fixedgaps.csv", seen / "fixedgaps.csv")
(seen / "folder").write_text(str(folder))
{behaviour}
p = len((folder / "data.csv").read_text().splitlines()[0].split(","))
rows = [",".join("V%d" % (j + 1) for j in range(p))]
rows += [",".join("1" if j == i + 1 else "0" for j in range(p)) for i in range(p)]
(folder / "result.csv").write_text("\\n".join(rows) + "\\n")
"""
ROWS = np.random.default_rng(0).normal(size=(40, 4))


@pytest.fixture
def fake_r(tmp_path, monkeypatch):
    """Puts a program called Rscript on the path; gives the folder of what it saw."""

    def install(behaviour=""):
        seen = tmp_path / "seen"
        seen.mkdir()
        program = tmp_path / "bin" / "Rscript"
        program.parent.mkdir()
        program.write_text(FAKE.format(python=sys.executable, seen=str(seen), behaviour=behaviour))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return seen

    return install


def test_says_how_to_install_r_where_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match="install") as caught:
        fit_cdt(ROWS)
    assert "\n" not in str(caught.value)


def test_r_is_started_once_on_numbers_without_constant_columns(fake_r):
    seen = fake_r()
    rows = np.column_stack([ROWS[:, 0] > 0, np.full(40, 2.0), ROWS[:, 1], ROWS[:, 2]])
    found = fit_cdt(rows)
    assert (seen / "runs").read_text() == "run\n"
    assert np.loadtxt(seen / "data.csv", delimiter=",") == pytest.approx(rows[:, [0, 2, 3]])
    assert found.dropped == {1: "constant"}
    assert np.argwhere(found.adjacency).tolist() == [[0, 2], [2, 3]]
    assert np.isfinite(found.score)


def test_nothing_of_the_rows_is_left_behind(fake_r):
    seen = fake_r()
    fit_cdt(ROWS)
    assert not Path((seen / "folder").read_text()).exists()


def test_forbidden_pairs_become_gaps(fake_r):
    seen = fake_r()
    forbidden = np.zeros((4, 4), bool)
    forbidden[0, 3] = forbidden[3, 0] = True
    fit_cdt(ROWS, forbidden=forbidden)
    gaps = np.loadtxt(seen / "fixedgaps.csv", delimiter=",")
    assert (gaps == (forbidden | np.eye(4, dtype=bool))).all()
    with pytest.raises(ConfigError, match="both directions"):
        fit_cdt(ROWS, forbidden=np.eye(4, k=1))


def test_the_time_limit_ends_r_and_what_it_started(fake_r):
    seen = fake_r(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "(seen / 'pids').write_text('%d' % child.pid)\n"
        "time.sleep(300)"
    )
    for limit in (6, 60):  # on a busy machine R's stand-in may take longer to start its child
        begin = time.monotonic()
        with pytest.raises(DataError, match=f"did not end within {limit} s"):
            fit_cdt(ROWS, time_limit_s=float(limit))
        assert time.monotonic() - begin < limit + 24
        if (seen / "pids").exists():
            break
    pid = (seen / "pids").read_text()
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")
    assert not Path((seen / "folder").read_text()).exists()


def test_failures_of_r_are_one_line(fake_r):
    fake_r('sys.exit("Error in library(pcalg) : there is no package called pcalg")')
    with pytest.raises(MissingProgramError, match="pcalg"):
        fit_cdt(ROWS)


def test_no_columns_need_no_r(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fit_cdt(np.zeros((10, 0))).adjacency.shape == (0, 0)
    assert fit_cdt(np.ones((10, 2))).dropped == {0: "constant", 1: "constant"}


def r_has_pcalg():
    if shutil.which("Rscript") is None:
        return False
    return subprocess.run(["Rscript", "-e", "library(pcalg)"], capture_output=True).returncode == 0


@pytest.mark.skipif(not r_has_pcalg(), reason="Rscript with the package pcalg is not installed")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gives_our_engines_graph(seed):
    rng = np.random.default_rng(seed)
    weights = np.triu(rng.normal(size=(6, 6)) * (rng.random((6, 6)) < 0.5), 1)
    rows = rng.normal(size=(300, 6)) @ np.linalg.inv(np.eye(6) - weights)
    ours, cdts = fit_gies(rows, search="textbook"), fit_cdt(rows)
    assert (ours.adjacency == cdts.adjacency).all()
    assert ours.score == pytest.approx(cdts.score, abs=1e-6)
