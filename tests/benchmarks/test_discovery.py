"""What benchmarks/discovery.py measures with: data, distances, other packages and their limits."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.graphs import measures, planted, rivals, visits
from benchmarks.graphs.cases import SEARCHES, Case, cases
from causal import essential, scores


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """Makes `rivals.run` start a shell script; returns a path for its data."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setattr(rivals, "interpreter", lambda _: script)
    return tmp_path / "data.npz"


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own_and_can_be_run(quick: bool):
    found = cases(quick)
    assert len({case.name for case in found}) == len(found)
    assert {case.score for case in found} == set(scores.SCORES)
    assert {case.search for case in found} - set(SEARCHES) <= set(rivals.ENVIRONMENTS)
    keys = [(case.kind, case.columns) for case in found]
    assert len(set(keys)) == 1 + sum(a != b for a, b in itertools.pairwise(keys))


def test_names_are_those_of_the_table():
    assert Case("gauss", 200, "gaussian_bic", "best").name == "gauss p=200 gaussian_bic best"
    options = (("gamma", 1), ("min_support", 5))
    name = Case("binary", 500, "bdeu", "fast", options).name
    assert name == "binary p=500 bdeu gamma=1 min_support=5 fast"


@pytest.mark.parametrize("kind", ["gauss", "int", "binary", "independent"])
def test_data_are_the_same_for_a_seed_and_survive_the_file(kind: str, tmp_path: Path):
    data = planted.draw(kind, 12, 3)
    data.save(tmp_path / "data.npz")
    for again in (planted.draw(kind, 12, 3), planted.Planted.load(tmp_path / "data.npz")):
        assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))
    assert not np.array_equal(data.rows, planted.draw(kind, 12, 4).rows)
    assert essential.is_acyclic(data.dag)


def test_interventions_cut_a_column_from_its_parents():
    data = planted.draw("int", 12, 3)
    assert data.targets.sum(axis=1).tolist() == [1] * planted.INTERVENTIONS
    for e, (column,) in enumerate(data.target_lists()):
        rows = data.rows[data.environments == e]
        assert abs(rows[:, column].mean() - 2) < 0.2
        for parent in np.flatnonzero(data.dag[:, column]):
            assert abs(np.corrcoef(rows[:, parent], rows[:, column])[0, 1]) < 0.15


def test_distances_of_a_graph_that_misses_turns_and_invents():
    dag = np.zeros((5, 5), np.bool_)
    dag[0, 2] = dag[1, 2] = dag[3, 4] = True  # a collider, and a line
    data = planted.Planted(np.zeros((1, 5)), dag, np.zeros(1, np.int64), np.zeros((1, 5), np.bool_))
    found = np.zeros((5, 5), np.int8)
    found[2, 0] = 1  # turned; 1 → 2 is missing
    found[3, 4] = found[4, 3] = 1  # right
    found[0, 3] = 1  # invented
    measured = measures.distances(found, data)
    assert measured == {"edges": 3, "precision": 2 / 3, "recall": 2 / 3, "shd": 3}


def test_another_package_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rivals, "_PROJECT", tmp_path)
    with pytest.raises(rivals.FailedError, match="make bench-env") as raised:
        rivals.run("gies", tmp_path / "data.npz", 1)
    assert not isinstance(raised.value, rivals.TooLateError)


def test_a_failing_package_is_named_by_the_last_line_of_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = fake_python(tmp_path, monkeypatch, "echo Traceback >&2; echo 'Oh: no' >&2; exit 1")
    with pytest.raises(rivals.FailedError, match=r"^Oh: no$"):
        rivals.run("gies", data, 10)


def test_the_time_limit_ends_a_package_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = fake_python(tmp_path, monkeypatch, f"sleep 60 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(rivals.TooLateError, match="limit of 1 s"):
        rivals.run("gies", data, 1)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child is still running")


def test_invented_visits_hold_their_edges():
    cohort, edges = visits.draw(4_000, 200, 0)
    assert cohort.num_visits == 4_000
    rows = np.zeros((4_000, 200), np.bool_)
    lists = cohort.diagnoses
    rows[np.repeat(np.arange(4_000), lists.counts), lists.ids] = True
    assert rows.sum() == len(lists.ids)  # no code twice in a visit
    graph = np.zeros((200, 200), np.bool_)
    graph[edges[:, 0], edges[:, 1]] = True
    assert essential.is_acyclic(graph)
    often = [(a, b) for a, b in edges if rows[:, a].sum() >= 100]
    assert len(often) > 30
    with_cause = np.array([rows[rows[:, a], b].mean() for a, b in often])
    without = np.array([rows[~rows[:, a], b].mean() for a, b in often])
    assert (with_cause > without).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gies", "causal-learn", "xges"])
def test_other_packages_find_what_the_engine_finds(name: str, tmp_path: Path):
    if not rivals.interpreter(name).is_file():
        pytest.skip("no environment; make bench-env")
    path = tmp_path / "data.npz"
    data = planted.draw("gauss", 8, 1)
    data.save(path)
    answer = rivals.run(name, path, 120)
    assert name in answer.versions
    case = Case("gauss", 8, "gaussian_bic", name)
    theirs = measures.judge(case, path, answer.values)
    ours = measures.measure(case._replace(search="best"), path)
    for key in ("edges", "precision", "recall", "shd"):
        assert theirs[key] == ours[key]
    assert theirs["score"] == pytest.approx(ours["score"], abs=1e-6)


@pytest.mark.slow
def test_raw_effects_are_dowhys(tmp_path: Path):
    if not rivals.interpreter("dowhy").is_file():
        pytest.skip("no environment; make bench-env")
    found = measures.effects_like_dowhy(tmp_path / "data.npz", 1, 5, 120)
    assert found["largest_difference"] < 1e-10
