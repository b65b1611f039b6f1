"""The engine on data of our own: facts, invariances, options, degenerate columns, bad input."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cafemed.errors import ConfigError, DataError
from causal import essential, fit_gies, gies, statistics


def gaussian(seed, p, n=400, degree=2.0, targets=((),)):
    """Rows of a random linear Gaussian DAG; its adjacency; the rows' environments."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(p)
    dag = np.zeros((p, p), bool)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < degree / (p - 1), 1)
    weights = dag * rng.uniform(0.5, 1.5, (p, p)) * rng.choice([-1, 1], (p, p))
    environments = np.arange(n) % len(targets)
    rows = np.zeros((n, p))
    for j in order:
        rows[:, j] = rows @ weights[:, j] + rng.normal(size=n)
        for e, nodes in enumerate(targets):
            if j in nodes:
                rows[environments == e, j] = rng.normal(2, 1, (environments == e).sum())
    return rows, dag, environments


def noisy_or(seed, p, n=2000):
    """0/1 rows of a random noisy-or DAG with prevalences from 1 % to 40 %."""
    rng = np.random.default_rng(seed)
    dag = np.triu(rng.random((p, p)) < 2.0 / (p - 1), 1)
    strength, leak = rng.uniform(0.3, 0.8, (p, p)), rng.uniform(0.01, 0.4, p)
    rows = np.zeros((n, p), np.int8)
    for j in range(p):
        off = (1 - leak[j]) * np.where(dag[:, j], 1 - strength[:, j] * rows, 1).prod(axis=1)
        rows[:, j] = rng.random(n) > off
    return rows, dag


def edges(adjacency):
    """The graph as text: "0>1 2-3"."""
    pairs = []
    for i, j in np.argwhere(adjacency):
        if not adjacency[j, i]:
            pairs.append(f"{i}>{j}")
        elif i < j:
            pairs.append(f"{i}-{j}")
    return " ".join(pairs)


#: The textbook search's graphs, as it first gave them; pcalg's are in test_gies_golden.
FACTS = {
    "gauss_1": "0>3 0-4 0-6 0>7 1>3 2>3 2-5 2>7 4>3 4>7 6>3 6>7 7>3",
    "gauss_2": "0>1 2-6 3-6 5>1 6>1 6-7",
    "gauss_3": "1-5 1-7 2>0 2-6 3>0 3-5 4-6 7>0",
    "gauss_4": "0>3 0>7 1>7 2>3 4>3 5-6 7>3",
    "gauss_5": "1>0 1>3 2>1 2>3 2>6 3>6 4>0 5>6 7>1 7>6",
    "binary_1": "2>0 2>5 3>2 4>3 4>7 6>7 7>3",
    "binary_2": "0>6 0>7 1>3 2>0 2>3 3>0 3>4 3>5 3>6 5>7",
    "binary_3": "0-1 0>4 0>7 2>4 3>4 3>7 4>7 6>7 7>5",
    "interventional_1": "0>3 0>4 0>6 0>7 1>3 2>0 2>3 2>7 4>3 4>7 5>2 6>3 6>7 7>3",
    "interventional_2": "0>1 5>1 6>1 6>2 6>3 6>7",
    "interventional_3": "1>5 1-7 2>0 3>0 4>3 5>3 6>2 6>4 7>0",
    "interventional_4": "0>7 1>7 2>3 4>3 5-6 7>3",
}


def fact_case(name):
    kind, seed = name.split("_")
    if kind == "gauss":
        return gaussian(int(seed), 8)[0], None, None
    if kind == "binary":
        return noisy_or(int(seed), 8)[0], None, None
    targets = [[], [0], [2], [5, 6]]
    rows, _, environments = gaussian(int(seed), 8, targets=targets)
    return rows, environments, targets


@pytest.mark.parametrize("name", FACTS)
def test_known_graphs(name):
    rows, environments, targets = fact_case(name)
    found = fit_gies(rows, environments=environments, targets=targets, search="textbook")
    assert edges(found.adjacency) == FACTS[name]


@pytest.mark.parametrize("search", ["fast", "textbook"])
def test_more_blocked_moves_than_there_is_room_for(search):
    """Moves set aside outgrow a small table of paths; it grows, and nothing else changes."""
    import math

    from causal import climb, pdag, scores
    from causal import search as kernels

    p = 60
    rows = gaussian(8, p, n=4000, degree=9.0)[0]
    score = scores.gaussian_score(statistics.from_dense(rows), 0.5, "pooled")
    allowed = ~np.eye(p, dtype=bool)
    climber = climb.Climber(score, allowed, allowed & False, np.zeros(p, np.int32), math.inf)
    order = kernels.FAST if search == "fast" else kernels.TEXTBOOK
    expected = climber._climb(np.zeros((p, p), np.int8), order)[0]
    state = kernels.make_state(pdag.empty_graph(np.zeros(p, np.int32)))
    small = {"path": np.empty((4 * p, 6), np.int64), "head": np.full(8, -1, np.int32)}
    state = state._replace(
        insertions=state.insertions._replace(**small),
        turns=state.turns._replace(path=small["path"].copy(), head=small["head"].copy()),
    )
    rooms = [len(state.insertions.path)]
    while kernels.run(climber._problem, state, order, 10**6, -1, -1) != kernels.DONE:
        state = climb._with_room(state)
        rooms.append(len(state.insertions.path))
        assert len(rooms) < 50
    assert rooms[-1] > rooms[0]
    assert (state.graph.edge == expected.adjacency).all()
    assert state.total[0] == pytest.approx(expected.score - score.empty.sum(), abs=1e-6)


def test_recovers_the_class_of_the_true_graph():
    rows, dag, _ = gaussian(1, 10, n=20000)
    found = fit_gies(rows, penalty=2.0)
    assert (found.adjacency == essential.dag_to_essential(dag)).all()


def test_interventions_orient_what_observation_cannot():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    environments = np.repeat([0, 1], 1000)
    x[1000:] = rng.normal(3, 1, 1000)
    rows = np.stack([x, x + rng.normal(size=2000)], axis=1)
    assert edges(fit_gies(rows).adjacency) == "0-1"
    found = fit_gies(rows, environments=environments, targets=[[], [0]])
    assert edges(found.adjacency) == "0>1"


PROBLEMS = {
    "gauss": lambda: (gaussian(3, 120, degree=4.0)[0], None, None),
    "dense": lambda: (gaussian(8, 60, degree=8.0)[0], None, None),
    "binary": lambda: (noisy_or(3, 60)[0], None, None),
    "interventional": lambda: (
        *gaussian(4, 80, degree=4.0, targets=[[], [1], [2, 3], [7]])[::2],
        [[], [1], [2, 3], [7]],
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("search", ["fast", "textbook"])
def test_what_is_kept_between_steps_changes_nothing(kind, search):
    """Scoring every candidate anew after each step gives the same graph."""
    from causal import climb, scores
    from causal import search as kernels

    rows, environments, targets = PROBLEMS[kind]()
    moments = statistics.from_dense(rows, environments, targets)
    p = moments.num_columns
    free = ~np.eye(p, dtype=bool)
    local = scores.gaussian_score(moments, 0.5 * np.log(len(rows)), "pooled")
    climber = climb.Climber(
        local, free, np.zeros((p, p), bool), essential.node_kinds(p, moments.targets), np.inf
    )
    order = kernels.FAST if search == "fast" else kernels.TEXTBOOK
    found, _ = climber._climb(np.zeros((p, p), np.int8), order)

    from causal import pdag, pool

    graph = pdag.empty_graph(climber._kinds)
    state = kernels.make_state(graph)
    status = kernels.PAUSED
    while status != kernels.DONE:
        state = state._replace(
            insertions=pool.make_pool(p, 64 * p + 1024),
            turns=pool.make_pool(p, 64 * p + 1024),
        )
        state.deletion_stale[:] = 1
        status = kernels.run(climber._problem, state, order, 1, -1, -1)
        assert status != kernels.POOL_FULL
    assert found.steps > p
    assert (state.graph.edge == found.adjacency).all()


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("search", ["fast", "textbook"])
def test_a_result_is_where_its_own_search_stops(kind, search):
    rows, environments, targets = PROBLEMS[kind]()
    moments = statistics.from_dense(rows, environments, targets)
    found = gies.fit_statistics(moments, search=search)
    again = gies.fit_statistics(moments, search=search, start=found.adjacency)
    assert again.steps == 0
    assert (again.adjacency == found.adjacency).all()
    assert gies.score_dag(moments, found.dag) == pytest.approx(found.score, abs=1e-7)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_best_is_never_worse(kind):
    rows, environments, targets = PROBLEMS[kind]()
    moments = statistics.from_dense(rows, environments, targets)
    score = {s: gies.fit_statistics(moments, search=s).score for s in gies.SEARCHES}
    assert score["best"] >= max(score.values()) - 1e-9
    bounded = gies.fit_statistics(moments, max_restarts=0).score
    assert bounded == pytest.approx(max(score["fast"], score["textbook"]), abs=1e-9)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_order_and_scale_of_columns_and_rows_do_not_matter(kind):
    rows, environments, targets = PROBLEMS[kind]()
    found = fit_gies(rows, environments=environments, targets=targets, search="textbook")
    rng = np.random.default_rng(0)
    columns, order = rng.permutation(rows.shape[1]), rng.permutation(len(rows))
    place = np.argsort(columns)
    shuffled = fit_gies(
        rows[order][:, columns],
        environments=None if environments is None else environments[order],
        targets=None if targets is None else [[int(place[t]) for t in ts] for ts in targets],
        search="textbook",
    )
    assert (shuffled.adjacency == found.adjacency[np.ix_(columns, columns)]).all()
    assert shuffled.score == pytest.approx(found.score, abs=1e-8)
    scale = 10.0 ** rng.integers(-6, 6, rows.shape[1])
    scaled = fit_gies(
        rows * scale + 3.0, environments=environments, targets=targets, search="textbook"
    )
    assert (scaled.adjacency == found.adjacency).all()


def test_sparse_and_dense_rows_give_the_same_graph():
    rows, _ = noisy_or(5, 20)
    dense, thin = fit_gies(rows), fit_gies(sparse.csr_array(rows))
    assert (dense.adjacency == thin.adjacency).all()
    assert dense.score == pytest.approx(thin.score, abs=1e-7)


def test_restrictions_are_obeyed():
    rows, _, _ = gaussian(7, 20, degree=3.0)
    rng = np.random.default_rng(0)
    tiers = rng.integers(0, 3, 20)
    forbidden = rng.random((20, 20)) < 0.3
    required = np.zeros((20, 20), bool)
    low, high = np.argmin(tiers), np.argmax(tiers)
    required[low, high] = True
    forbidden[low, high] = False
    for search in gies.SEARCHES:
        found = fit_gies(rows, search=search, tiers=tiers, forbidden=forbidden, required=required)
        arrow_from, arrow_to = np.nonzero(found.adjacency)
        assert (tiers[arrow_from] <= tiers[arrow_to]).all()
        assert found.adjacency[low, high] == 1
        assert found.adjacency[high, low] == 0
        assert not (found.dag.astype(bool) & forbidden).any()
        assert essential.is_acyclic(found.dag)
        assert ((found.adjacency | found.adjacency.T) == (found.dag | found.dag.T)).all()
        assert (found.adjacency >= found.dag).all()


def test_tiers_orient_edges_across_them_and_only_those():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    b = a + rng.normal(size=500)
    rows = np.stack([a, b, b + rng.normal(size=500)], axis=1)
    assert edges(fit_gies(rows).adjacency) == "0-1 1-2"
    assert edges(fit_gies(rows, tiers=np.array([0, 0, 1])).adjacency) == "0-1 1>2"
    # Downstream of an arrow, a line would be a new collider.
    assert edges(fit_gies(rows, tiers=np.array([0, 1, 1])).adjacency) == "0>1 1>2"


def test_rare_pairs_have_no_edge():
    rows, _ = noisy_or(6, 30)
    together = rows.T.astype(int) @ rows
    found = fit_gies(rows, min_support=40)
    assert found.adjacency.any()
    assert not found.adjacency[together < 40].any()
    with pytest.raises(ConfigError, match="min_support"):
        fit_gies(rows + 0.5, min_support=5)


def test_extended_bic_finds_fewer_edges_among_independent_columns():
    rows = np.random.default_rng(0).random((1000, 60)) < 0.05
    plain = fit_gies(rows, search="fast").adjacency.sum()
    assert fit_gies(rows, search="fast", score="extended_bic").adjacency.sum() < plain / 5
    assert fit_gies(rows, search="fast", penalty=100.0).adjacency.sum() == 0


def test_a_time_budget_marks_the_result_truncated():
    rows, _, _ = gaussian(3, 60, degree=3.0)
    cut = fit_gies(rows, time_budget_s=0.0)
    assert cut.truncated
    assert essential.is_essential(cut.adjacency)
    assert not fit_gies(rows, time_budget_s=600.0).truncated


def column(rng, kind, n, others):
    """A column of one of the kinds that have made engines fail."""
    first, last = others[0], others[-1]
    return {
        "normal": lambda: rng.normal(size=n),
        "binary": lambda: (rng.random(n) < 0.2).astype(float),
        "constant": lambda: np.full(n, 3.0),
        "same": lambda: first.copy(),
        "sum": lambda: first + last,
        "affine": lambda: 2.0 * first - 7.0,
        "child": lambda: first + 0.5 * rng.normal(size=n),
        "offset": lambda: first * 0.5 + rng.normal(size=n) + 1e6,
        "tiny": lambda: (last + rng.normal(size=n)) * 1e-9,
        "missing": lambda: np.where(rng.random(n) < 0.2, np.nan, 1.0),
    }[kind]()


KINDS = [
    "normal",
    "binary",
    "constant",
    "same",
    "sum",
    "affine",
    "child",
    "offset",
    "tiny",
    "missing",
]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([3, 6, 12, 80]),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=7),
    st.sampled_from(gies.SEARCHES),
    st.booleans(),
)
def test_any_columns_end_in_a_valid_graph(seed, n, kinds, search, interventional):
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=n)]
    for kind in kinds:
        columns.append(column(rng, kind, n, columns))
    rows = np.stack(columns, axis=1)
    targets = [[], [len(kinds)]] if interventional else None
    environments = np.arange(n) % 2 if interventional else None
    found = fit_gies(rows, environments=environments, targets=targets, search=search)
    assert essential.is_essential(
        found.adjacency, essential.node_kinds(rows.shape[1], targets or ((),))
    )
    assert np.isfinite(found.score)
    for j in range(rows.shape[1]):
        spread = not np.isnan(rows[:, j]).any() and rows[:, j].std() > 0
        if not spread:
            assert j in found.dropped
        if j in found.dropped:
            assert not found.adjacency[j].any()
            assert not found.adjacency[:, j].any()
    # A node never has more parents than the rows can tell apart.
    assert found.dag.sum(axis=0).max() < n


def test_dropped_columns_are_reported():
    rows = np.random.default_rng(0).normal(size=(50, 5))
    rows[:, 1], rows[:, 3], rows[7, 4] = 2.0, rows[:, 0], np.nan
    assert fit_gies(rows).dropped == {1: "constant", 3: "same as 0", 4: "missing values"}


@pytest.mark.parametrize(("p", "n"), [(0, 5), (1, 5), (3, 1)])
def test_almost_no_data(p, n):
    found = fit_gies(np.random.default_rng(0).normal(size=(n, p)))
    assert found.adjacency.shape == (p, p)
    assert not found.adjacency.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "slow"}, "search: expected one of fast, textbook, best, got 'slow'"),
        ({"score": "bge"}, "score: expected one of"),
        ({"penalty": -1.0}, "penalty"),
        ({"intercept": "none"}, "intercept: expected one of pooled, per_environment"),
        ({"targets": [[], [9]], "environments": np.zeros(20, int)}, r"targets\[1\]: column 9"),
        ({"targets": [[], [0]]}, "environments is missing"),
        ({"environments": np.arange(20), "targets": [[], [1]]}, "expected values 0 to 1"),
        ({"environments": np.zeros(3, int)}, "expected 20 whole numbers"),
        ({"forbidden": np.zeros((2, 2))}, r"forbidden: expected shape \(4, 4\)"),
        ({"required": np.eye(4, k=1) + np.eye(4, k=-1)}, "required: 0 → 1 → 0 is a cycle"),
        ({"required": np.eye(4, k=1), "tiers": [3, 2, 1, 0]}, "0 → 1 is forbidden"),
        ({"tiers": [1, 2]}, "tiers: expected 4"),
        ({"start": np.eye(4, k=1), "forbidden": np.eye(4, k=1)}, "0 → 1 is not allowed"),
        ({"start": np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])}, "start"),
    ],
)
def test_wrong_options_are_named(options, message):
    rows = np.random.default_rng(0).normal(size=(20, 4))
    with pytest.raises(ConfigError, match=message):
        fit_gies(rows, **options)


def test_wrong_data_are_named():
    with pytest.raises(DataError, match="expected a table of numbers"):
        fit_gies(np.array([["a", "b"]]))
    rows = np.random.default_rng(0).normal(size=(20, 4))
    rows[3] = np.nan
    with pytest.raises(DataError, match="1 rows have no value at all"):
        fit_gies(rows)


def test_importing_the_package_loads_neither_numba_nor_cdt():
    code = "import causal, sys; print(sorted({'numba', 'cdt', 'torch'} & set(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"
