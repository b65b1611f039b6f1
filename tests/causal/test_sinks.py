"""Causes of this visit's medications against regressions on the rows; the rest stays as it was."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from distributed import Client
from numpy.typing import NDArray

from cafemed import batches
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import cluster, columns, discovery, sinks, stability
from causal.discovery import CausalConfig, Discovery
from causal.scores import Rule

MakeCohort = Callable[..., Cohort]


def parents(graph: CausalGraph) -> dict[str, dict[str, tuple[float, int]]]:
    """Child → parent → (strength, support), of directed edges."""
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for i in np.flatnonzero(graph.directed):
        child, parent = graph.nodes[graph.target[i]], graph.nodes[graph.source[i]]
        found.setdefault(child, {})[parent] = (float(graph.strength[i]), int(graph.support[i]))
    return found


def with_sinks(
    cohort: Cohort,
    graph: CausalGraph,
    penalty: float,
    client: Client,
    score: str = "gaussian_bic",
    **config: Any,
) -> CausalGraph:
    """The graph with sinks whose edges cost so much."""
    bic = 0.5 * np.log(len(columns.training_visits(cohort)))
    if score == "gaussian_bic":
        rule = {"penalty": penalty / bic}
    else:
        rule = {"gamma": (penalty - bic) / np.log(len(graph.nodes))}
    chosen = CausalConfig(score=score, **rule, **config)  # type: ignore[arg-type]
    return sinks.add_to(Discovery(graph, {}), cohort, chosen, client).graph


Table = dict[str, NDArray[np.float64]]


def rows_of(cohort: Cohort) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    """Name → 0/1 column over the training visits, by plain loops; which visits are first ones."""
    visits = [
        v
        for p in range(cohort.num_patients)
        if cohort.split[p] == 0
        for v in range(cohort.patient_offsets[p], cohort.patient_offsets[p + 1])
    ]
    starts = set(cohort.patient_offsets[:-1].tolist())
    if cohort.inputs == "history":
        visits = [v for v in visits if v not in starts]
    back = 1 if cohort.inputs == "history" else 0
    sources = [
        ("diagnosis", "diagnosis", cohort.diagnoses, back),
        ("procedure", "procedure", cohort.procedures, back),
        ("previous_medication", "medication", cohort.medications, 1),
        ("medication", "medication", cohort.targets, 0),
    ]
    table = {}
    for kind, of, lists, shift in sources:
        for i, code in enumerate(cohort.vocabularies[of]):
            table[f"{kind}/{code}"] = np.array(
                [i in lists[v - shift] and not (shift and v in starts) for v in visits], np.float64
            )
    return table, np.array([v in starts for v in visits])


Table = dict[str, NDArray[np.float64]]


def gain(table: Table, first: NDArray[np.bool_], child: str, causes: list[str]) -> float:
    """Log-likelihood that a regression on the causes gains, each stratum with its own mean."""
    centred = {}
    for name in [child, *causes]:
        centred[name] = table[name].copy()
        for stratum in (first, ~first):
            if stratum.any():
                centred[name][stratum] -= centred[name][stratum].mean()
    y = centred[child]
    if not causes:
        return 0.0
    x = np.column_stack([centred[name] for name in causes])
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(-0.5 * len(y) * np.log((rest @ rest) / (y @ y)))


# With a score on counts sinks have the extended BIC (`sinks.rule_of`), which cannot be as cheap.
@pytest.mark.parametrize(("score", "penalty"), [("gaussian_bic", 1.0), ("bdeu", 4.0)])
@pytest.mark.parametrize("inputs", ["current", "history"])
def test_each_sink_has_the_causes_that_the_score_prefers(
    make_cohort: MakeCohort, in_process: Client, inputs: str, score: str, penalty: float
) -> None:
    people = make_cohort(num_patients=900, sizes=(12, 8, 7), seed=3, inputs=inputs)
    found = discovery.discover(people, CausalConfig(), in_process)
    graph = with_sinks(people, found.graph, penalty, in_process, score, min_support=5)
    table, first = rows_of(people)
    known = [name for name in table if not name.startswith("medication/")]
    chosen = parents(graph)
    number = 0
    for sink in (name for name in table if name.startswith("medication/")):
        own = chosen.get(sink, {})
        support = {name: int(table[name] @ table[sink]) for name in known}
        allowed = [
            name
            for name in known
            if support[name] >= 5 and gain(table, first, sink, [name]) > penalty
        ]
        assert set(own) <= set(allowed)
        best = gain(table, first, sink, list(own)) - penalty * len(own)
        for name in allowed:  # no cause more and none less would score higher
            other = sorted(set(own) ^ {name})
            assert gain(table, first, sink, other) - penalty * len(other) <= best + 1e-6
        for name, (strength, shared) in own.items():
            without = [other for other in own if other != name]
            adds = gain(table, first, sink, list(own)) - gain(table, first, sink, without)
            assert strength == pytest.approx(adds - penalty, rel=1e-4)
            assert shared == support[name]
            number += 1
    assert number > {"gaussian_bic": 12, "bdeu": 0}[score]


def test_planted_causes_of_medications_are_found(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=1500, seed=1)
    found = discovery.discover(people, CausalConfig(), in_process)
    graph = sinks.add_to(found, people, CausalConfig(search="best"), in_process).graph
    d, p, m = (people.vocabularies[kind] for kind in ("diagnosis", "procedure", "medication"))
    own = {child: set(of) for child, of in parents(graph).items() if child.startswith("medication")}
    assert own[f"medication/{m[0]}"] == {f"diagnosis/{d[0]}"}
    assert own[f"medication/{m[1]}"] == {f"procedure/{p[0]}"}
    assert f"previous_medication/{m[3]}" in own[f"medication/{m[3]}"]
    assert sum(map(len, own.values())) <= 5


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_sinks_change_nothing_of_the_rest(
    make_cohort: MakeCohort, in_process: Client, inputs: str
) -> None:
    people = make_cohort(num_patients=600, sizes=(25, 15, 10), seed=7, inputs=inputs)
    config = CausalConfig(score="gaussian_bic", min_support=1)
    before = discovery.discover(people, config, in_process).graph
    graph = with_sinks(people, before, 2.0, in_process, min_support=1)
    assert graph.num_edges > before.num_edges + 3
    after = graph.without_sinks()
    assert after.nodes == before.nodes
    for name in ("source", "target", "directed", "stability", "support", "strength"):
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes(), name
    names = np.array(graph.nodes)
    from_sink = np.char.startswith(names[graph.source], "medication/")
    to_sink = np.char.startswith(names[graph.target], "medication/")
    assert not from_sink.any()
    assert graph.directed[to_sink].all()
    assert {n for n in names if n.startswith("medication/")} == {
        f"medication/{code}" for code in people.vocabularies["medication"]
    }
    order = list(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
    assert order == sorted(order)
    # What a model is given is the same to the bit.
    given = [batches.cohort_arrays(people, each) for each in (before, graph)]
    assert len(np.unique(given[0].classes)) >= 3
    np.testing.assert_array_equal(given[0].classes, given[1].classes)


def test_visits_of_other_patients_and_the_vocabularys_order_change_nothing(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=400, seed=5)
    nothing = columns.of_cohort(people).names
    none = np.zeros(0, np.int64)
    empty = CausalGraph(
        nothing,
        *(none.astype(np.int32), none.astype(np.int32), none > 0, none.astype(np.float32)),
        none,
        none.astype(np.float32),
    )
    expected = parents(with_sinks(people, empty, 1.5, in_process))
    size = len(people.vocabularies["medication"])
    lists = {}
    for name in ("medications", "targets"):
        old = getattr(people, name)
        turned = (size - 1 - old.ids).astype(np.int32)
        held_out = np.repeat(people.split != 0, np.diff(people.patient_offsets))
        turned[np.repeat(held_out, old.counts)] = 0
        lists[name] = type(old)(turned, old.offsets)
    vocabularies = {
        **people.vocabularies,
        "medication": people.vocabularies["medication"][::-1],
    }
    other = dataclasses.replace(people, vocabularies=vocabularies, **lists)
    assert parents(with_sinks(other, empty, 1.5, in_process)) == expected
    assert sum(map(len, expected.values())) >= 5


def test_strengths_of_edges_are_what_the_score_loses_without_them(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=900, sizes=(12, 8, 7), seed=2)
    config = CausalConfig(score="gaussian_bic", penalty=2.0, compare_direct=False)
    found = discovery.discover(people, config, in_process)
    graph, penalty = found.graph, found.report["edge_penalty"]
    table, first = rows_of(people)
    lines: dict[str, set[str]] = {}
    for i in np.flatnonzero(~graph.directed):
        a, b = graph.nodes[graph.source[i]], graph.nodes[graph.target[i]]
        lines.setdefault(a, set()).add(b)
        lines.setdefault(b, set()).add(a)
    checked = 0
    for child, own in parents(graph).items():
        if child in lines:  # its parents depend on the member that was found
            continue
        for name, (strength, _) in own.items():
            without = [other for other in own if other != name]
            adds = gain(table, first, child, list(own)) - gain(table, first, child, without)
            assert strength == pytest.approx(adds - penalty, rel=1e-4)
            checked += 1
    alone = parents(graph)
    for i in np.flatnonzero(~graph.directed):
        a, b = graph.nodes[graph.source[i]], graph.nodes[graph.target[i]]
        if lines[a] == {b} and lines[b] == {a} and not alone.get(a) and not alone.get(b):
            adds = gain(table, first, a, [b])
            assert graph.strength[i] == pytest.approx(adds - penalty, rel=1e-4)
            checked += 1
    assert checked >= 3
    assert (graph.strength > 0).all()


def test_a_cohort_whose_medications_nothing_explains_has_sinks_without_edges(
    make_cohort: MakeCohort,
) -> None:
    people = make_cohort(num_patients=60, seed=0)
    inputs, given = columns.of_cohort(people), columns.sinks_of(people)
    rule = Rule("extended_bic", 1.0, 1e6, len(inputs.names))
    found = sinks.learn(inputs, columns.count(inputs), given, rule, 1, "fast")
    assert len(found.source) == len(found.sink) == len(found.strength) == len(found.support) == 0


def test_stability_is_the_share_of_bootstraps_with_the_edge_on_any_cluster(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=300, seed=4)
    config = CausalConfig(
        score="extended_bic", gamma=0, penalty=0.3, bootstraps=12, min_support=2, seed=3
    )
    inputs, given = columns.of_cohort(people), columns.sinks_of(people)
    before = discovery.discover(people, dataclasses.replace(config, bootstraps=0), in_process)
    found = Discovery(before.graph, {})
    graph = sinks.add_to(found, people, config, in_process).graph
    of_visit = people.patient_of_visit()[columns.training_visits(people)]
    times: dict[tuple[str, str], int] = {}
    for number in range(12):
        rows = stability.drawn_visits(of_visit, 3, number)
        drawn = inputs.visits(rows)
        rule = Rule("extended_bic", 0.3, 0.0, len(inputs.names))
        edges = sinks.learn(drawn, columns.count(drawn), given.visits(rows), rule, 2, "fast")
        for a, b in zip(edges.source.tolist(), edges.sink.tolist(), strict=True):
            pair = inputs.names[a], given.names[b]
            times[pair] = times.get(pair, 0) + 1
    to_sink = [graph.nodes[b].startswith("medication/") for b in graph.target]
    assert np.isnan(graph.stability[~np.array(to_sink)]).all()  # as they came
    shown = {
        (graph.nodes[graph.source[i]], graph.nodes[graph.target[i]]): float(graph.stability[i])
        for i in np.flatnonzero(to_sink)
    }
    for pair, share in shown.items():
        assert share == pytest.approx(times.get(pair, 0) / 12)
    assert max(shown.values()) == 1
    assert len(set(shown.values())) > 5
    with cluster.connect("local", 2) as client:
        again = sinks.add_to(found, people, config, client).graph
    assert again.stability.tobytes() == graph.stability.tobytes()
