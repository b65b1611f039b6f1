"""Node classes against networkx on each visit alone; files there and back, and broken ones."""

import dataclasses
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from scipy import sparse

from cafemed import graphs
from cafemed.codes import CodeLists
from cafemed.errors import ArtifactError
from cafemed.graphs import CausalGraph, EffectTable


def random_graph(p: int, seed: int, density: float = 0.3) -> CausalGraph:
    """Edges of a random order, a third of them undirected."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(p)
    edges = [(i, j) for i in range(p) for j in range(i + 1, p) if rng.random() < density]
    edges = [(int(order[i]), int(order[j])) for i, j in edges]
    directed = rng.random(len(edges)) < 0.67
    ends = [e if d else (min(e), max(e)) for e, d in zip(edges, directed.tolist(), strict=True)]
    return CausalGraph(
        nodes=tuple(f"diagnosis/icd9:{i:03}" for i in range(p)),
        source=np.array([a for a, _ in ends], np.int32),
        target=np.array([b for _, b in ends], np.int32),
        directed=directed,
        stability=rng.random(len(ends)).astype(np.float32),
        support=rng.integers(5, 100, len(ends)),
        strength=rng.random(len(ends)).astype(np.float32),
    )


def random_lists(visits: int, size: int, seed: int) -> CodeLists:
    rng = np.random.default_rng(seed)
    return CodeLists.of(
        [rng.permutation(size)[: rng.integers(0, size)].tolist() for _ in range(visits)]
    )


def classes_of_one_visit(graph: CausalGraph, codes: list[str]) -> list[int]:
    full = nx.DiGraph()
    full.add_nodes_from(codes)
    for a, b, directed in zip(graph.source, graph.target, graph.directed, strict=True):
        if directed:
            full.add_edge(graph.nodes[a], graph.nodes[b])
    inside = full.subgraph(codes)
    table = {(False, True): 0, (False, False): 1, (True, True): 2, (True, False): 3}
    return [table[inside.in_degree(c) > 0, inside.out_degree(c) > 0] for c in codes]


@pytest.mark.parametrize("seed", range(6))
def test_node_classes_are_those_of_each_visits_own_subgraph(seed: int) -> None:
    graph = random_graph(12, seed)
    # A vocabulary in another order than the graph's nodes, with a code that the graph lacks.
    rng = np.random.default_rng(seed)
    vocabulary = [*rng.permutation(graph.nodes).tolist(), "diagnosis/icd9:new"]
    lists = random_lists(60, len(vocabulary), seed)
    found = graphs.node_classes(lists, graph.directed_adjacency(vocabulary))
    expected = [
        c
        for v in range(len(lists))
        for c in classes_of_one_visit(graph, [vocabulary[i] for i in lists[v]])
    ]
    assert found.dtype == np.int8
    assert found.tolist() == expected
    assert len(set(expected)) == 4


def test_an_undirected_edge_makes_no_class() -> None:
    graph = CausalGraph(
        nodes=("a", "b"),
        source=np.array([0], np.int32),
        target=np.array([1], np.int32),
        directed=np.array([False]),
        stability=np.ones(1, np.float32),
        support=np.ones(1, np.int64),
        strength=np.ones(1, np.float32),
    )
    adjacency = graph.directed_adjacency(["a", "b"])
    classes = graphs.node_classes(CodeLists.of([[0, 1], [1]]), adjacency)
    assert classes.tolist() == [graphs.ORPHAN] * 3


def test_a_visit_sees_only_its_own_codes() -> None:
    chain = sparse.csr_array(np.eye(3, k=1, dtype=np.float32))  # 0 → 1 → 2
    lists = CodeLists.of([[0, 1, 2], [2, 0], [], [1, 0], [2, 1]])
    assert graphs.node_classes(lists, chain).tolist() == [
        *(graphs.CAUSE, graphs.MIDDLE, graphs.EFFECT),
        *(graphs.ORPHAN, graphs.ORPHAN),
        *(graphs.EFFECT, graphs.CAUSE),
        *(graphs.EFFECT, graphs.CAUSE),
    ]


@pytest.mark.parametrize("lists", [[], [[]], [[], [], []]])
def test_visits_without_codes_have_no_classes(lists: list[list[int]]) -> None:
    adjacency = random_graph(4, 0).directed_adjacency([f"diagnosis/icd9:{i:03}" for i in range(4)])
    assert graphs.node_classes(CodeLists.of(lists), adjacency).shape == (0,)


def test_empty_vocabulary_and_empty_graph() -> None:
    nothing = random_graph(0, 0)
    assert graphs.node_classes(CodeLists.of([[], []]), nothing.directed_adjacency([])).shape == (0,)
    adjacency = nothing.directed_adjacency(["diagnosis/x"])
    assert graphs.node_classes(CodeLists.of([[0], []]), adjacency).tolist() == [graphs.ORPHAN]


def test_without_sinks_leaves_the_other_nodes_and_their_edges() -> None:
    nodes = ("diagnosis/a", "medication/m", "medication/n", "previous_medication/m", "procedure/p")
    edges = [(0, 1), (0, 4), (3, 0), (3, 2), (4, 1)]
    graph = CausalGraph(
        nodes=nodes,
        source=np.array([a for a, _ in edges], np.int32),
        target=np.array([b for _, b in edges], np.int32),
        directed=np.array([True, False, True, True, True]),
        stability=np.arange(5, dtype=np.float32),
        support=np.arange(5) + 10,
        strength=np.arange(5, dtype=np.float32) + 20,
    )
    inner = graph.without_sinks()
    assert inner.nodes == ("diagnosis/a", "previous_medication/m", "procedure/p")
    named = [
        (inner.nodes[a], inner.nodes[b], *rest)
        for a, b, *rest in zip(
            *(inner.source.tolist(), inner.target.tolist(), inner.directed.tolist()),
            *(inner.stability.tolist(), inner.support.tolist(), inner.strength.tolist()),
            strict=True,
        )
    ]
    assert named == [
        ("diagnosis/a", "procedure/p", False, 1, 11, 21),
        ("previous_medication/m", "diagnosis/a", True, 2, 12, 22),
    ]
    # Classes are the same whether or not the graph has its sinks.
    lists = random_lists(40, 3, 0)
    adjacencies = [g.directed_adjacency(list(inner.nodes)).toarray() for g in (graph, inner)]
    np.testing.assert_array_equal(*adjacencies)
    for each in (graph, inner):
        classes = graphs.node_classes(lists, each.directed_adjacency(list(inner.nodes)))
        assert set(classes.tolist()) > {graphs.CAUSE}


def test_a_graph_file_of_before_there_were_strengths_is_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "graph.parquet"
    graphs.write_graph(random_graph(9, 3), path)
    pq.write_table(pq.read_table(path).drop_columns(["strength"]), path)
    assert np.isnan(graphs.read_graph(path).strength).all()


@pytest.mark.parametrize("p", [0, 1, 9])
def test_graph_file_there_and_back(tmp_path: Path, p: int) -> None:
    graph = random_graph(p, 3)
    graphs.write_graph(graph, tmp_path / "graph.parquet")
    found = graphs.read_graph(tmp_path / "graph.parquet")
    assert found.nodes == graph.nodes
    for name in ("source", "target", "directed", "stability", "support", "strength"):
        a, b = getattr(found, name), getattr(graph, name)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


EFFECT_ARRAYS = (
    "effect",
    "standard_error",
    "minimum",
    "maximum",
    "support",
    "supported",
    "visits",
)


def table(rows: int = 5, columns: int = 3) -> EffectTable:
    rng = np.random.default_rng(1)
    error = rng.random((rows, columns)).astype(np.float32)
    error[0] = np.nan
    effect = rng.normal(size=(rows, columns)).astype(np.float32)
    return EffectTable(
        codes=tuple(f"diagnosis/icd9:{i}é" for i in range(rows)),
        medications=tuple(f"medication/atc:{i}" for i in range(columns)),
        effect=effect,
        standard_error=error,
        estimator="adjusted",
        minimum=effect - 1,
        maximum=effect + 1,
        support=rng.integers(0, 9, (rows, columns)).astype(np.int32),
        supported=rng.random((rows, columns)) < 0.5,
        visits=rng.random(rows).astype(np.float32),
    )


def test_effects_file_there_and_back(tmp_path: Path) -> None:
    effects = table()
    graphs.write_effects(effects, tmp_path / "effects.npz")
    found = graphs.read_effects(tmp_path / "effects.npz")
    assert (found.codes, found.medications) == (effects.codes, effects.medications)
    assert found.estimator == "adjusted"
    for name in EFFECT_ARRAYS:
        a, b = getattr(found, name), getattr(effects, name)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_rows_are_taken_by_the_kind_of_their_node() -> None:
    names = ("diagnosis/x:1", "diagnosis/x:2", "procedure/x:1", "previous_medication/x:1")
    effects = dataclasses.replace(table(rows=5), codes=(*names, "previous_medication/x:2"))
    codes, before = (
        effects.of_kinds("diagnosis", "procedure"),
        effects.of_kinds("previous_medication"),
    )
    assert (codes.codes, before.codes) == (effects.codes[:3], effects.codes[3:])
    for part in (codes, before):
        assert (part.medications, part.estimator) == (effects.medications, effects.estimator)
    for name, values in vars(effects).items():
        if isinstance(values, np.ndarray):
            both = np.concatenate([getattr(codes, name), getattr(before, name)])
            np.testing.assert_array_equal(both, values)
    assert codes.of_kinds("previous_medication").effect.shape == (0, 3)


def test_an_effects_file_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "effects.npz"
    graphs.write_effects(table(), path)
    with np.load(path) as content:
        kept = {name: content[name] for name in content if name not in ("minimum", "support")}
    np.savez(path, **kept)
    with pytest.raises(ArtifactError, match="without minimum, support; write it again") as caught:
        graphs.read_effects(path)
    assert "\n" not in str(caught.value)


def test_intervals() -> None:
    effects = table()
    low, high = effects.interval()
    np.testing.assert_allclose(high - effects.effect, 1.959964 * effects.standard_error, rtol=1e-4)
    np.testing.assert_allclose(effects.effect - low, 1.959964 * effects.standard_error, rtol=1e-4)
    low, high = effects.interval(0.5)
    np.testing.assert_allclose(high - low, 2 * 0.67449 * effects.standard_error, rtol=1e-4)
    assert np.isnan(low[0]).all()


def test_effects_that_are_known_are_supported_and_have_no_range() -> None:
    effects = table()
    known = EffectTable.known(
        effects.codes, effects.medications, effects.effect, effects.standard_error, "true"
    )
    np.testing.assert_array_equal(known.minimum, effects.effect)
    np.testing.assert_array_equal(known.maximum, effects.effect)
    assert known.supported.all()


@pytest.mark.parametrize("size", [0, 10, 200, -20])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, size: int) -> None:
    graph_file, effects_file = tmp_path / "graph.parquet", tmp_path / "effects.npz"
    graphs.write_graph(random_graph(9, 3), graph_file)
    graphs.write_effects(table(), effects_file)
    for path, read in ((graph_file, graphs.read_graph), (effects_file, graphs.read_effects)):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ArtifactError, match=path.name) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_every_damaged_byte_of_an_effects_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "effects.npz"
    graphs.write_effects(table(), path)
    whole = path.read_bytes()
    shape, refused = table().effect.shape, 0
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            read = graphs.read_effects(path)
        except ArtifactError:
            refused += 1
        else:
            for name in EFFECT_ARRAYS:
                assert getattr(read, name).shape == (shape[:1] if name == "visits" else shape)
    assert refused > 0


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "effects.npz", other=np.ones(2))
    with pytest.raises(ArtifactError, match=r"effects\.npz"):
        graphs.read_effects(tmp_path / "effects.npz")
    effects = table()
    for name in EFFECT_ARRAYS:
        wrong = dataclasses.replace(effects, **{name: getattr(effects, name)[:4]})
        graphs.write_effects(wrong, tmp_path / "shape.npz")
        with pytest.raises(ArtifactError, match=rf"expected {name} of shape \(5,"):
            graphs.read_effects(tmp_path / "shape.npz")
    for missing in ("none.npz", "none.parquet"):
        read = graphs.read_effects if missing.endswith("npz") else graphs.read_graph
        with pytest.raises(ArtifactError, match=missing):
            read(tmp_path / missing)


def test_a_graph_with_an_edge_to_an_unknown_node_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "graph.parquet"
    graphs.write_graph(random_graph(9, 3), path)
    content = pq.read_table(path).replace_schema_metadata({"nodes": '["a", "b"]'})
    pq.write_table(content, path)
    with pytest.raises(ArtifactError, match=r"graph\.parquet: not a causal graph"):
        graphs.read_graph(path)
