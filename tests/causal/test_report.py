"""What the job leaves behind for people: the page, the plain table, the comparison with a truth."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cafemed import artifacts, cohort, graphs, paths
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import compiled

MakeCohort = Callable[..., Cohort]


def run_job(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = paths.PROJECT_DIR / "jobs" / "discover.py"
    return subprocess.run(
        [sys.executable, str(job), f"paths.root={root}", "causal.workers=1", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "NUMBA_CACHE_DIR": str(compiled.cache_dir())},
    )


def save(people: Cohort, root: Path) -> Path:
    folder = root / "experiments" / "default"
    with artifacts.new_folder(folder / "cohort", "cohort", {}, {}, private=True) as (partial, _):
        cohort.write(people, partial)
    return folder


@pytest.fixture
def truth(make_cohort: MakeCohort, tmp_path: Path) -> Path:
    """The planted edges of the random cohort."""
    people = make_cohort()
    d, p, m = (people.vocabularies[kind] for kind in ("diagnosis", "procedure", "medication"))
    edges = [
        (f"diagnosis/{d[0]}", f"diagnosis/{d[1]}"),
        (f"diagnosis/{d[1]}", f"procedure/{p[0]}"),
        (f"diagnosis/{d[2]}", f"procedure/{p[1]}"),
        (f"previous_medication/{m[2]}", f"diagnosis/{d[2]}"),
        (f"diagnosis/{d[0]}", f"medication/{m[0]}"),
        (f"procedure/{p[0]}", f"medication/{m[1]}"),
        (f"previous_medication/{m[3]}", f"medication/{m[3]}"),
    ]
    nodes = tuple(sorted({name for edge in edges for name in edge}))
    size = len(edges)
    graph = CausalGraph(
        nodes=nodes,
        source=np.array([nodes.index(a) for a, _ in edges], np.int32),
        target=np.array([nodes.index(b) for _, b in edges], np.int32),
        directed=np.ones(size, np.bool_),
        stability=np.full(size, np.nan, np.float32),
        support=np.zeros(size, np.int64),
        strength=np.full(size, np.nan, np.float32),
    )
    folder = tmp_path / "truth"
    folder.mkdir()
    graphs.write_graph(graph, folder / "graph.parquet")
    return folder


def test_the_job_leaves_a_page_and_a_plain_table_and_tells_how_near_the_truth_is(
    make_cohort: MakeCohort, tmp_path: Path, truth: Path
) -> None:
    experiment = save(make_cohort(num_patients=1500, seed=1), tmp_path)
    first = run_job(tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert "truth" not in first.stdout
    manifest = artifacts.verify(experiment / "graph", "graph")
    assert "graph.html" in manifest.files
    assert "truth" not in manifest.config
    table = pd.read_parquet(experiment / "graph" / "graph.parquet")
    assert list(table.columns) == [
        *("source", "target", "directed", "stability", "support", "strength"),
    ]
    to_sink = table["target"].str.startswith("medication/")
    assert to_sink.sum() == manifest.report["sink_edges"] > 2
    assert len(table) - to_sink.sum() == manifest.report["edges"]
    assert f"{to_sink.sum()} more edges lead to this visit's medications" in first.stdout
    assert (table["strength"] > 0).all()
    page = (experiment / "graph" / "graph.html").read_text()
    assert all(f'"{name}"' in page for name in {*table["source"], *table["target"]})

    again = run_job(tmp_path, f"causal.truth={truth}")
    assert (again.returncode, again.stderr) == (0, "")
    assert "unchanged, skipped" in again.stdout
    lines = again.stdout.splitlines()
    codes = next(line for line in lines if "truth, diagnoses and procedures" in line)
    assert "3 edges, 3 true; precision 1.00, recall 1.00" in codes
    given = next(line for line in lines if "truth, this visit's medications" in line)
    assert "recall 1.00, 1.00 of 3 directions right" in given
    assert sum("SHD" in line for line in lines) == 2

    without = run_job(tmp_path, "causal.sinks=false", f"causal.truth={truth}/graph.parquet")
    assert without.returncode == 0, without.stderr
    assert "unchanged" not in without.stdout
    assert "this visit's medications" not in without.stdout
    alone = pd.read_parquet(experiment / "graph" / "graph.parquet")
    pd.testing.assert_frame_equal(alone, table[~to_sink].reset_index(drop=True))


def test_a_truth_that_is_none_is_refused_before_anything_is_learned(
    make_cohort: MakeCohort, tmp_path: Path, truth: Path
) -> None:
    experiment = save(make_cohort(num_patients=20), tmp_path)
    (truth / "graph.parquet").write_bytes(b"no table")
    for given, expected in (
        (truth, "not a causal graph"),
        (tmp_path / "nowhere", "causal.truth: expected a graph.parquet or its folder"),
    ):
        refused = run_job(tmp_path, f"causal.truth={given}")
        assert refused.returncode == 2
        assert expected in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert not (experiment / "graph").exists()
