"""Found against true: every figure by its definition, in loops; files and R that are missing."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cafemed import graphs
from cafemed.errors import ArtifactError, ConfigError
from cafemed.graphs import CausalGraph, EffectTable
from causal import evaluation
from causal.evaluation import Truth

CODES = [f"diagnosis/x:{i}" for i in range(6)] + [f"procedure/x:{i}" for i in range(4)]
BEFORE = [f"previous_medication/x:{i}" for i in range(3)]
SINKS = [f"medication/x:{i}" for i in range(3)]


def graph_of(
    arrows: set[tuple[str, str]],
    lines: set[tuple[str, str]] = frozenset(),  # type: ignore[assignment]
    nodes: list[str] | None = None,
    strength: float = 1.0,
) -> CausalGraph:
    names = tuple(sorted(nodes or [*CODES, *BEFORE, *SINKS]))
    every = [*sorted(arrows), *sorted(lines)]
    return CausalGraph(
        nodes=names,
        source=np.array([names.index(a) for a, _ in every], np.int32),
        target=np.array([names.index(b) for _, b in every], np.int32),
        directed=np.array([True] * len(arrows) + [False] * len(lines), np.bool_),
        stability=np.full(len(every), np.nan, np.float32),
        support=np.full(len(every), 9),
        strength=np.full(len(every), strength, np.float32),
    )


def random_true(seed: int) -> set[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(CODES).tolist()
    return {pair for pair in itertools.combinations(order, 2) if rng.random() < 0.25} | {
        (a, b) for a in [*CODES, *BEFORE] for b in SINKS if rng.random() < 0.3
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_figure_is_what_its_definition_says(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    true = random_true(seed)
    kept = {edge for edge in sorted(true) if rng.random() < 0.7}
    turned = {e for e in sorted(kept) if e[1] in CODES and rng.random() < 0.3}
    lines = {e for e in sorted(kept - turned) if e[1] in CODES and rng.random() < 0.4}
    invented = {
        (a, b)
        for a, b in itertools.permutations(CODES, 2)
        if rng.random() < 0.05 and not {(a, b), (b, a)} & true
    }
    arrows = {(b, a) for a, b in turned} | (kept - turned - lines) | invented
    found = graph_of(arrows, {tuple(sorted(e)) for e in lines})  # type: ignore[misc]
    for part, (sources, targets) in zip(
        evaluation.compare_graphs(found, graph_of(true)),
        [(CODES, CODES), ([*CODES, *BEFORE], SINKS)],
        strict=True,
    ):
        inside = {e for e in true if e[0] in sources and e[1] in targets}
        here = {frozenset(e) for e in arrows | lines if {*e} <= {*sources, *targets}}
        here = {e for e in here if any(a in sources and b in targets for a, b in _both(e))}
        real = {frozenset(e) for e in inside}
        assert (part.true_edges, part.found_edges) == (len(real), len(here))
        assert part.hits == len(here & real)
        directed = [e for e in arrows if frozenset(e) in here & real]
        assert part.directed == len(directed)
        assert part.right == sum(e in inside for e in directed)
        assert part.precision == pytest.approx(len(here & real) / len(here))
        assert part.recall == pytest.approx(len(here & real) / len(real))


def _both(pair: frozenset[str]) -> list[tuple[str, str]]:
    a, b = sorted(pair)
    return [(a, b), (b, a)]


def test_the_true_essential_graph_scores_full_marks() -> None:
    a, b, c, d = CODES[:4]
    m, now = BEFORE[0], SINKS[0]
    # a → b ← c is a collider and stays; c - d has no direction; m and the sink are fixed by time.
    true = graph_of({(a, b), (c, b), (c, d), (m, d), (a, now), (m, now)})
    found = graph_of({(a, b), (c, b), (m, d), (c, d), (a, now), (m, now)})
    for part in evaluation.compare_graphs(found, true):
        assert (part.precision, part.recall, part.directions_right) == (1, 1, 1)
        assert part.aupr == pytest.approx(1)
    # Without m the line is open, and so it has to be found; an arrow there is a mistake.
    true = graph_of({(a, b), (c, b), (d, CODES[5])})
    line = graph_of({(a, b), (c, b)}, {(d, CODES[5])})
    arrow = graph_of({(a, b), (c, b), (d, CODES[5])})
    assert evaluation.compare_graphs(line, true)[0].shd == 0
    assert evaluation.compare_graphs(arrow, true)[0].shd == 1
    # Time gives an arrow its direction, and this one the next.
    true = graph_of({(m, d), (d, CODES[5])})
    assert evaluation.compare_graphs(true, true)[0].shd == 0
    assert evaluation.compare_graphs(graph_of({(m, d)}, {(d, CODES[5])}), true)[0].shd == 1
    true = graph_of({(a, b), (c, b), (d, CODES[5])})
    # A turned arrow, a missing edge and one too many: one mistake each.
    wrong = graph_of({(b, a), (c, b), (CODES[4], c)}, set())
    assert evaluation.compare_graphs(wrong, true)[0].shd == 3


def test_the_area_under_the_curve_ranks_edges_by_stability_then_by_strength() -> None:
    pairs = [(CODES[0], CODES[1]), (CODES[2], CODES[1]), (CODES[4], CODES[5])]
    true = graph_of({pairs[0], pairs[1]})
    found = graph_of(set(pairs))
    by_strength = [5.0, 4.0, 1.0]  # the false one last
    by_stability = [0.5, 0.4, 0.9]  # the false one first
    areas = []
    for strength, stability in (
        (by_strength, [np.nan] * 3),
        (by_stability, [np.nan] * 3),
        (by_strength, by_stability),
    ):
        ranked = dataclasses.replace(
            found,
            strength=np.array(strength, np.float32),
            stability=np.array(stability, np.float32),
        )
        areas.append(evaluation.compare_graphs(ranked, true)[0].aupr)
    assert areas[0] == pytest.approx(1)
    assert areas[1] < 0.9  # type: ignore[operator]
    assert areas[2] == areas[1]


def test_codes_that_one_graph_lacks_and_pairs_of_previous_medications_do_not_count() -> None:
    true = graph_of({(CODES[0], CODES[1]), (CODES[2], CODES[3]), (BEFORE[0], SINKS[0])})
    fewer = [name for name in [*CODES, *BEFORE, *SINKS] if name != CODES[3]]
    found = graph_of(
        {(CODES[0], CODES[1]), (BEFORE[0], BEFORE[1]), ("diagnosis/x:new", CODES[0])},
        nodes=[*fewer, "diagnosis/x:new"],
    )
    codes, sinks = evaluation.compare_graphs(found, true)
    assert (codes.true_edges, codes.found_edges, codes.hits) == (1, 1, 1)
    assert (sinks.true_edges, sinks.found_edges, sinks.hits) == (1, 0, 0)
    assert np.isnan(sinks.precision)
    only = evaluation.compare_graphs(found.without_sinks(), true)
    assert [part.part for part in only] == ["diagnoses and procedures"]


def test_a_truth_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    cycle = graph_of({(CODES[0], CODES[1]), (CODES[1], CODES[2]), (CODES[2], CODES[0])})
    with pytest.raises(ArtifactError, match=r"causal\.truth: expected an acyclic graph"):
        evaluation.compare_graphs(graph_of(set()), cycle)
    with pytest.raises(ArtifactError, match=r"causal\.truth: a graph over other codes"):
        evaluation.compare_graphs(graph_of(set()), graph_of(set(), nodes=["diagnosis/other:1"]))
    for missing in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(ConfigError, match=r"causal\.truth: expected a graph\.parquet") as told:
            evaluation.read_truth(str(missing))
        assert "\n" not in str(told.value)
    (tmp_path / "graph.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="not a causal graph"):
        evaluation.read_truth(str(tmp_path))


def effects_of(rows: list[str], columns: list[str], seed: int) -> EffectTable:
    rng = np.random.default_rng(seed)
    shape = (len(rows), len(columns))
    effect = rng.normal(size=shape).astype(np.float32)
    error = np.where(rng.random(shape) < 0.2, np.nan, 0.5).astype(np.float32)
    table = EffectTable.known(tuple(rows), tuple(columns), effect, error, "adjusted")
    return dataclasses.replace(table, supported=rng.random(shape) < 0.7)


def test_effects_are_compared_pair_by_pair() -> None:
    found, true = effects_of(CODES, SINKS, 1), effects_of(CODES[::-1][:7], SINKS[:2], 2)
    errors, sizes, held = [], [], []
    for i, code in enumerate(found.codes):
        for j, medication in enumerate(found.medications):
            if code not in true.codes or medication not in true.medications:
                continue
            if not found.supported[i, j] or np.isnan(found.standard_error[i, j]):
                continue
            truth = true.effect[true.codes.index(code), true.medications.index(medication)]
            errors.append(float(found.effect[i, j]) - float(truth))
            sizes.append(float(truth))
            held.append(abs(errors[-1]) <= 1.959964 * 0.5)
    compared = evaluation.compare_effects(found, true)
    assert compared.pairs == len(errors) > 3
    assert compared.rmse == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert compared.rmse_of_none == pytest.approx(np.sqrt(np.mean(np.square(sizes))))
    assert compared.coverage == pytest.approx(np.mean(held))
    assert 0 < compared.coverage < 1
    # A truth says nothing of previous medications: nothing changes with rows of them.
    more = effects_of([f"previous_medication/x:{i}" for i in range(3)], SINKS, 3)
    arrays = ("effect", "standard_error", "minimum", "maximum", "support", "supported", "visits")
    joined = {a: np.concatenate([getattr(found, a), getattr(more, a)]) for a in arrays}
    longer = dataclasses.replace(found, codes=(*found.codes, *more.codes), **joined)
    assert evaluation.compare_effects(longer, true) == compared
    assert evaluation.compare_effects(found, effects_of(["diagnosis/y:1"], SINKS, 0)).pairs == 0


def test_a_folder_with_both_files_is_read_and_told_of(tmp_path: Path) -> None:
    true, effects = graph_of(random_true(1)), effects_of(CODES, SINKS, 2)
    graphs.write_graph(true, tmp_path / "graph.parquet")
    alone = evaluation.lines(true, effects, evaluation.read_truth(str(tmp_path)))
    graphs.write_effects(effects, tmp_path / "effects.npz")
    both = evaluation.lines(true, effects, evaluation.read_truth(str(tmp_path / "graph.parquet")))
    assert both[:-1] == alone
    assert "root mean square error 0.0000" in both[-1]
    assert "precision 1.00, recall 1.00" in both[0]
    assert all("\n" not in line for line in both)


#: Reads the script that cdt writes, and plays R's package SID: answers with the number of entries
#: in which the two graphs differ, and twice that.
FAKE = """#!{python}
import re, sys, pathlib
text = pathlib.Path(sys.argv[2]).read_text()
rows = [
    [[float(x) for x in line.split(",")] for line in pathlib.Path(name).read_text().splitlines()]
    for name in re.findall(r'read.csv\\(file="(.*?)"', text)
]
different = sum(a != b for x, y in zip(*rows) for a, b in zip(x, y))
low, high = re.findall(r"write.table\\(.*?, '(.*?)'", text)
pathlib.Path(low).write_text(str(different))
pathlib.Path(high).write_text(str(2 * different))
"""


def test_the_intervention_distance_is_asked_of_r(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "Rscript"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    true = graph_of({(CODES[0], CODES[1]), (CODES[1], CODES[2])})
    found = graph_of({(CODES[0], CODES[1]), (CODES[2], CODES[1])})
    part = evaluation.compare_graphs(found, true)[0]
    assert (part.sid, part.no_sid) == ((2.0, 4.0), "")
    assert "SID 2 to 4" in evaluation.lines(found, effects_of([], [], 0), Truth(true, None))[1]
    # Two empty graphs need no R to be equal.
    assert evaluation.compare_graphs(graph_of(set()), graph_of(set()))[0].sid == (0.0, 0.0)


def test_where_r_is_missing_or_too_slow_the_distance_is_left_out_and_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = graph_of(random_true(0))
    monkeypatch.setenv("PATH", str(tmp_path))
    part = evaluation.compare_graphs(true, true)[0]
    assert part.sid is None
    assert part.no_sid == "needs R with the package SID (CRAN)"
    told = evaluation.lines(true, effects_of([], [], 0), Truth(true, None))[1]
    assert told.endswith("SID left out: needs R with the package SID (CRAN)")
    many = [f"diagnosis/x:{i:03}" for i in range(160)]
    chain = graph_of(set(itertools.pairwise(many)), nodes=many)
    part = evaluation.compare_graphs(chain, chain)[0]
    assert part.sid is None
    assert "160 nodes" in part.no_sid
    assert part.shd is not None


def test_nothing_of_cdt_is_imported_before_a_comparison() -> None:
    script = (
        "import sys; from causal import evaluation; "
        "print(any(m.split('.')[0] in ('cdt', 'torch', 'sklearn') for m in sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr
