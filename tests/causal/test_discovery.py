"""Discovery of planted graphs, the same on every cluster; what the job says and refuses."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from distributed import Client

from cafemed import artifacts, cohort, graphs, paths
from cafemed.cohort import Cohort
from cafemed.errors import DataError
from causal import cluster, columns, discovery, learning
from causal.blocks import BlocksConfig
from causal.discovery import CausalConfig
from causal.tasks import Batch, Problem, Task
from causal.workers import Workers

MakeCohort = Callable[..., Cohort]

#: Blocks so small that the small cohort falls into several, whose edges have to be merged.
SMALL = BlocksConfig(max_size=2, max_boundary=1)


def edges(graph: graphs.CausalGraph) -> set[tuple[str, str, bool]]:
    return {
        (graph.nodes[a], graph.nodes[b], bool(d))
        for a, b, d in zip(graph.source, graph.target, graph.directed, strict=True)
    }


def skeleton(graph: graphs.CausalGraph) -> set[frozenset[str]]:
    return {frozenset((a, b)) for a, b, _ in edges(graph)}


def test_planted_dependences_are_found_and_nothing_else(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=1500, seed=1)
    d = [f"diagnosis/{code}" for code in people.vocabularies["diagnosis"]]
    p = [f"procedure/{code}" for code in people.vocabularies["procedure"]]
    m = [f"previous_medication/{code}" for code in people.vocabularies["medication"]]
    found = discovery.discover(people, CausalConfig(), in_process).graph
    planted = [(d[0], d[1]), (d[1], p[0]), (d[2], p[1]), (m[2], d[2])]
    # Drug 1 is given for procedure 0 and drug 0 for its ancestor, so the two go together.
    expected = {frozenset(pair) for pair in [*planted, (m[0], m[1])]}
    assert skeleton(found) == expected
    assert (m[2], d[2], True) in edges(found)  # time orders these two
    assert {(d[1], d[0], False), (d[1], p[0], False)} <= edges(found)  # nothing orders this chain
    assert found.nodes == tuple(sorted([*d, *p, *m]))
    assert np.isnan(found.stability).all()
    dense = columns.of_cohort(people).present.toarray().astype(bool)
    for a, b, support in zip(found.source, found.target, found.support, strict=True):
        assert support == (dense[:, a] & dense[:, b]).sum()


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_the_result_is_an_essential_graph_that_keeps_to_time(
    make_cohort: MakeCohort, in_process: Client, inputs: str
) -> None:
    people = make_cohort(num_patients=800, sizes=(25, 15, 10), seed=2, inputs=inputs)
    config = CausalConfig(score="gaussian_bic", min_support=1, blocks=SMALL)
    found = discovery.discover(people, config, in_process)
    tier = dict(zip(columns.of_cohort(people).names, columns.of_cohort(people).tiers, strict=True))
    directed = nx.DiGraph([(a, b) for a, b, arrow in edges(found.graph) if arrow])
    assert nx.is_directed_acyclic_graph(directed)
    assert all(tier[a] <= tier[b] for a, b in directed.edges)
    lines = nx.Graph([(a, b) for a, b, arrow in edges(found.graph) if not arrow])
    assert nx.is_chordal(lines) if lines else True
    assert all(tier[a] == tier[b] for a, b in lines.edges)
    assert found.report["blocks"] > 3
    assert found.report["edges"] > 10


def test_the_merged_graph_scores_at_least_as_the_union(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    for seed in range(3):
        people = make_cohort(num_patients=600, sizes=(25, 15, 10), seed=seed)
        config = CausalConfig(score="gaussian_bic", min_support=1, blocks=SMALL)
        scores = discovery.discover(people, config, in_process).report["scores"]
        assert scores["merged"]["score"] >= scores["union"]["score"] - 1e-9
        assert abs(scores["merged"]["score"] - scores["direct"]["score"]) < 100
        assert set(scores) == {"union", "merged", "direct"}


def test_the_merging_search_starts_at_the_union_and_may_join_blocks(
    make_cohort: MakeCohort, in_process: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out: dict[str, list[tuple[Task, Any]]] = {}

    class Watched(Workers):
        def run(self, tasks: Any, what: str, function: Any) -> list[Any]:
            results = super().run(tasks, what, function)
            handed_out[what] = []
            for task, found in zip(tasks, results, strict=True):
                if isinstance(task, Batch):
                    handed_out[what] += zip(task.tasks, found, strict=True)
                else:
                    handed_out[what].append((task, found))
            return results

    def allowed_in_merge() -> set[tuple[int, int]]:
        pairs = set()
        for task, _ in handed_out["merge"]:
            assert task.first is not None
            assert task.second is not None
            pairs |= set(zip(task.first.tolist(), task.second.tolist(), strict=True))
        return pairs

    monkeypatch.setattr(discovery, "Workers", Watched)
    people = make_cohort(num_patients=600, sizes=(25, 15, 10), seed=0)
    config = CausalConfig(score="gaussian_bic", min_support=1, blocks=SMALL)
    report = discovery.discover(people, config, in_process).report
    cols = columns.of_cohort(people)
    screened = learning.screen(cols, columns.count(cols), config).pairs
    every = set(zip(screened.first.tolist(), screened.second.tolist(), strict=True))
    assert len(every) == report["screened_pairs"]
    learned = {
        (int(found.columns[i]), int(found.columns[j]))
        for _, found in handed_out["blocks"]
        for i, j in zip(*np.nonzero(found.dag), strict=True)
    }
    assert len(handed_out["blocks"]) == report["blocks"]
    start = {
        pair
        for task, _ in handed_out["merge"]
        if task.start is not None
        for pair in zip(task.start.source.tolist(), task.start.target.tolist(), strict=True)
    }
    assert len(start) == report["scores"]["union"]["edges"] > 10
    assert start <= learned
    assert nx.is_directed_acyclic_graph(nx.DiGraph(sorted(start)))
    assert {(min(e), max(e)) for e in start} <= allowed_in_merge() <= every
    # Some edge joins a member to a code of its boundary.
    config = dataclasses.replace(config, blocks=BlocksConfig(max_size=2, max_boundary=0))
    alone = discovery.discover(people, config, in_process).report["scores"]["union"]
    assert report["scores"]["union"]["edges"] > alone["edges"]
    # Without boundaries, a pair that no block learned lies between blocks.
    together = {
        (a, b)
        for task, _ in handed_out["blocks"]
        for a in task.columns.tolist()
        for b in task.columns.tolist()
    }
    assert every - together
    assert every - together <= allowed_in_merge()


def test_one_block_gives_the_direct_runs_graph(make_cohort: MakeCohort, in_process: Client) -> None:
    people = make_cohort(num_patients=600, seed=4)
    config = CausalConfig(blocks=BlocksConfig(max_size=100, resolution=1e-6))
    scores = discovery.discover(people, config, in_process).report["scores"]
    assert scores["merged"]["score"] == pytest.approx(scores["direct"]["score"], abs=1e-9)


def test_other_patients_and_vocabulary_order_change_nothing(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=600, seed=5)
    config = CausalConfig(compare_direct=False)
    expected = discovery.discover(people, config, in_process).graph
    reverse = {
        "diagnoses": ("diagnosis", people.diagnoses),
        "procedures": ("procedure", people.procedures),
    }
    turned: dict[str, Any] = {}
    vocabularies = dict(people.vocabularies)
    for name, (kind, lists) in reverse.items():
        size = len(vocabularies[kind])
        vocabularies[kind] = vocabularies[kind][::-1]
        turned[name] = dataclasses.replace(lists, ids=(size - 1 - lists.ids).astype(np.int32))
    held_out = np.repeat(people.split != 0, np.diff(people.patient_offsets))
    lists = turned["diagnoses"]
    noise = lists.ids.copy()
    of_code = np.repeat(held_out, lists.counts)
    noise[of_code] = 0
    turned["diagnoses"] = dataclasses.replace(lists, ids=noise)
    other = dataclasses.replace(people, vocabularies=vocabularies, **turned)
    found = discovery.discover(other, config, in_process).graph
    assert found.nodes == expected.nodes
    assert edges(found) == edges(expected)


def test_independent_codes_have_an_empty_graph(make_cohort: MakeCohort, in_process: Client) -> None:
    people = make_cohort(num_patients=600, seed=6)
    rng = np.random.default_rng(0)
    shuffled = {
        name: getattr(people, name).take(rng.permutation(people.num_visits))
        for name in ("diagnoses", "procedures", "medications")
    }
    for name, lists in shuffled.items():
        independent = rng.random((people.num_visits, 9)) < 0.1
        size = {"diagnoses": 9, "procedures": 6, "medications": 5}[name]
        shuffled[name] = type(lists).of(
            [np.flatnonzero(row[:size]).tolist() for row in independent]
        )
    found = discovery.discover(dataclasses.replace(people, **shuffled), CausalConfig(), in_process)
    assert found.graph.num_edges == 0
    assert found.report["blocks"] == 0


def test_no_training_visits_are_refused(make_cohort: MakeCohort, in_process: Client) -> None:
    people = dataclasses.replace(make_cohort(), split=np.full(120, 1, np.int8))
    with pytest.raises(DataError, match="no visit of a training patient"):
        discovery.discover(people, CausalConfig(), in_process)


def test_the_same_to_the_bit_on_every_cluster(make_cohort: MakeCohort, in_process: Client) -> None:
    people = make_cohort(num_patients=500, sizes=(25, 15, 10), seed=7)
    config = CausalConfig(score="gaussian_bic", min_support=1, blocks=SMALL)

    def result(client: Client) -> tuple[bytes, ...]:
        found = discovery.discover(people, config, client)
        scores = {k: (v["score"], v["edges"]) for k, v in found.report["scores"].items()}
        graph = found.graph
        arrays = (graph.source, graph.target, graph.directed, graph.support)
        return (*(a.tobytes() for a in arrays), repr(scores).encode())

    expected = result(in_process)
    for workers in (1, 2):
        with cluster.connect("local", workers) as client:
            assert result(client) == expected


@pytest.mark.slow
def test_the_same_to_the_bit_on_ray(
    make_cohort: MakeCohort, in_process: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    people = make_cohort(num_patients=500, sizes=(25, 15, 10), seed=7)
    config = CausalConfig(score="gaussian_bic", min_support=1, blocks=SMALL, bootstraps=3)
    expected = discovery.discover(people, config, in_process)
    with cluster.connect("ray", 2) as client:
        found = discovery.discover(people, config, client)
    assert edges(found.graph) == edges(expected.graph)
    assert found.graph.stability.tobytes() == expected.graph.stability.tobytes()
    assert np.isfinite(found.graph.stability).all()
    for name, entry in expected.report["scores"].items():
        assert found.report["scores"][name]["score"] == entry["score"]


def test_blocks_by_cdt_are_merged_by_the_native_search(
    make_cohort: MakeCohort, in_process: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causal import cdt_engine, fit_gies

    seen = []

    def stand_in(data: np.ndarray, *, forbidden: np.ndarray, **_: Any) -> Any:
        seen.append(np.abs(data.mean(axis=0)).max())
        assert (forbidden == forbidden.T).all()
        return fit_gies(data, search="textbook", forbidden=forbidden)

    monkeypatch.setattr(cdt_engine, "fit_cdt", stand_in)
    people = make_cohort(num_patients=800, seed=1)
    by_cdt = discovery.discover(people, CausalConfig(engine="cdt"), in_process)
    native = discovery.discover(people, CausalConfig(), in_process)
    assert skeleton(by_cdt.graph) == skeleton(native.graph)
    tier = dict(zip(columns.of_cohort(people).names, columns.of_cohort(people).tiers, strict=True))
    assert all(tier[a] <= tier[b] for a, b, arrow in edges(by_cdt.graph) if arrow)
    assert len(seen) == by_cdt.report["blocks"]
    assert max(seen) < 1e-9  # centred within first and later visits, hence in all


@pytest.mark.skipif(shutil.which("Rscript") is not None, reason="R is installed here")
def test_cdt_without_r_says_what_to_install(make_cohort: MakeCohort, tmp_path: Path) -> None:
    save(make_cohort(num_patients=300, seed=1), tmp_path)
    result = run_job(tmp_path, "causal.engine=cdt")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "causal.engine=cdt needs R with the package pcalg" in result.stderr


def small_problem(tmp_path: Path) -> tuple[Problem, list[Task], Callable[[Problem, Task], int]]:
    cols = columns.Columns(
        ("a",),
        columns.sparse.csr_array(np.ones((2, 1), np.int64)),
        np.zeros(1, np.int64),
        np.zeros(2, np.int8),
    )
    jobs = [Task(np.array([i])) for i in range(6)]
    folder = str(tmp_path)

    def work(_: Problem, task: Task) -> int:
        number = int(task.columns[0])
        mark = Path(folder) / str(number)
        runs = len(mark.read_text()) if mark.exists() else 0
        mark.write_text("x" * (runs + 1))
        if number == 3 and (runs == 0 or "always" in folder):
            time.sleep(1)  # what the other worker finished meanwhile has been collected
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return number

    problem = Problem(columns.count(cols), cols.tiers, 1.0, "fast")
    return problem, jobs, work


@pytest.mark.slow
def test_a_killed_worker_costs_only_its_own_block(tmp_path: Path) -> None:
    problem, jobs, work = small_problem(tmp_path)
    with cluster.connect("local", 2) as client:
        assert Workers(client, problem).run(jobs, "blocks", work) == list(range(6))
    runs = {int(path.name): len(path.read_text()) for path in tmp_path.iterdir()}
    assert runs[3] == 2
    # Dask had handed one more task to the dead worker, at most; it had not begun.
    assert all(runs[i] == 1 for i in (0, 1, 2, 4, 5))


@pytest.mark.slow
def test_a_block_that_always_kills_its_worker_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "always"
    folder.mkdir()
    problem, jobs, work = small_problem(folder)
    with (
        cluster.connect("local", 1) as client,
        pytest.raises(DataError, match="worker") as caught,
    ):
        Workers(client, problem).run(jobs, "blocks", work)
    assert "\n" not in str(caught.value)


def run_job(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = paths.PROJECT_DIR / "jobs" / "discover.py"
    return subprocess.run(
        [sys.executable, str(job), f"paths.root={root}", "causal.workers=1", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache_folder())},
    )


def cache_folder() -> Path:
    from causal import compiled

    return compiled.cache_dir()


def save(people: Cohort, root: Path) -> Path:
    folder = root / "experiments" / "default" / "cohort"
    with artifacts.new_folder(folder, "cohort", {}, {"inputs": people.inputs}, private=True) as (
        partial,
        _,
    ):
        cohort.write(people, partial)
    return folder


def test_the_job_writes_both_files_then_skips(make_cohort: MakeCohort, tmp_path: Path) -> None:
    folder = save(make_cohort(num_patients=400, seed=8), tmp_path)
    first = run_job(tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    target = folder.parent / "graph"
    manifest = artifacts.verify(target, "graph")
    assert manifest.inputs == {"cohort": cohort.load(folder).fingerprint}
    assert set(manifest.files) >= {"graph.parquet", "effects.npz"}
    assert "cluster" not in manifest.config
    graph = graphs.read_graph(target / "graph.parquet")
    assert graph.without_sinks().num_edges == manifest.report["edges"]
    effects = graphs.read_effects(target / "effects.npz")
    assert effects.effect.shape == (20, 5)
    assert effects.codes[15] == "previous_medication/atc:M0"
    assert effects.estimator == CausalConfig().effects.estimator
    assert first.stdout.splitlines()[0] == f"root      {tmp_path}"
    for word in ("training visits", "union", "merged", "direct", "of 75 pairs", "of 25 pairs"):
        assert word in first.stdout
    again = run_job(tmp_path, "causal.workers=2", "causal.cluster=local")
    assert again.returncode == 0
    assert "unchanged, skipped" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["causal.penalty=-1", "causal.min_support=0"], ["causal.penalty", "causal.min_support"]),
        (["causal.search=slow"], ["causal.search", "'slow'"]),
        (["causal.blocks.max_size=1.5"], ["causal.blocks.max_size", "1.5"]),
        (["causal.cluster=tcp://127.0.0.1:9"], ["causal.cluster", "127.0.0.1:9"]),
    ],
)
def test_the_job_refuses_in_one_line(
    make_cohort: MakeCohort, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    save(make_cohort(num_patients=20), tmp_path)
    result = run_job(tmp_path, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(text in result.stderr for text in expected)
    assert not (tmp_path / "experiments" / "default" / "graph").exists()


def living_group(group: int) -> list[str]:
    """Command lines of the group's processes, those that only wait to be reaped left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of_group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.5, 3.0, 4.5])
def test_ctrl_c_ends_in_one_line_and_leaves_nothing(
    make_cohort: MakeCohort, tmp_path: Path, after_s: float
) -> None:
    folder = save(make_cohort(num_patients=6000, sizes=(900, 500, 60), seed=9), tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    job = subprocess.Popen(
        [
            sys.executable,
            str(paths.PROJECT_DIR / "jobs" / "discover.py"),
            f"paths.root={tmp_path}",
            "causal.workers=2",
            "causal.score=gaussian_bic",
            "causal.search=best",
            "causal.min_support=1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "NUMBA_CACHE_DIR": str(cache_folder()),
            "TMPDIR": str(temporary),
        },
    )
    assert job.stdout is not None
    assert job.stdout.readline().startswith("root")
    time.sleep(after_s)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to every process of the job
    _, messages = job.communicate(timeout=60)
    assert job.returncode == 130
    assert messages.splitlines() == ["interrupted; nothing half-written was left"]
    assert list(temporary.iterdir()) == []
    assert [path.name for path in folder.parent.iterdir()] == ["cohort"]
    deadline = time.monotonic() + 10  # Python's own resource tracker ends after the job
    while living_group(job.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living_group(job.pid) == []


def test_a_cohort_that_is_missing_or_edited_is_refused(
    make_cohort: MakeCohort, tmp_path: Path
) -> None:
    missing = run_job(tmp_path)
    assert missing.returncode == 2
    assert "cohort/manifest.json" in missing.stderr
    folder = save(make_cohort(num_patients=20), tmp_path)
    with (folder / "visits.parquet").open("ab") as file:
        file.write(b"x")
    edited = run_job(tmp_path)
    assert edited.returncode == 2
    assert "visits.parquet" in edited.stderr
    assert "Traceback" not in edited.stderr
