"""Scores on counts against the formulas written plainly, over enumerated graphs and by the move."""

import itertools
import math

import numpy as np
import pytest
from scipy import sparse

from cafemed.errors import ConfigError
from causal import essential, fit_gies, gies, scores, statistics
from causal.count_scores import CountScores

PRIOR = 1.0


def noisy_or(seed, p, n=1500, degree=2.0):
    """0/1 rows of a random noisy-or DAG with prevalences from 1 % to 40 %."""
    rng = np.random.default_rng(seed)
    dag = np.triu(rng.random((p, p)) < degree / (p - 1), 1)
    strength, leak = rng.uniform(0.3, 0.8, (p, p)), rng.uniform(0.01, 0.4, p)
    rows = np.zeros((n, p), np.int8)
    for j in range(p):
        off = (1 - leak[j]) * np.where(dag[:, j], 1 - strength[:, j] * rows, 1).prod(axis=1)
        rows[:, j] = rng.random(n) > off
    return rows[:, rng.permutation(p)]


def plain_bic(rows, y, parents, total):
    """Log-likelihood less half a log(total) for each configuration of parents that vary."""
    if len(set(rows[:, y].tolist())) < 2:
        return 0.0
    parents = [x for x in parents if len(set(rows[:, x].tolist())) == 2]
    fit = 0.0
    for configuration in itertools.product((0, 1), repeat=len(parents)):
        chosen = rows[(rows[:, parents] == configuration).all(axis=1), y]
        for value in (0, 1):
            count = int((chosen == value).sum())
            fit += count * math.log(count / len(chosen)) if count else 0.0
    return fit - 0.5 * math.log(total) * 2 ** len(parents)


def plain_bdeu(rows, y, parents, _total):
    """Heckerman, Geiger and Chickering (1995), equation 28, with N' = 1, parents that vary."""
    if len(set(rows[:, y].tolist())) < 2:
        return 0.0
    parents = [x for x in parents if len(set(rows[:, x].tolist())) == 2]
    fit, prior = 0.0, PRIOR / 2 ** len(parents)
    for configuration in itertools.product((0, 1), repeat=len(parents)):
        chosen = rows[(rows[:, parents] == configuration).all(axis=1), y]
        fit += math.lgamma(prior) - math.lgamma(prior + len(chosen))
        for value in (0, 1):
            count = int((chosen == value).sum())
            fit += math.lgamma(prior / 2 + count) - math.lgamma(prior / 2)
    return fit


PLAIN = {"discrete_bic": plain_bic, "bdeu": plain_bdeu}


def plain_score(name, rows, dag, gamma=1.0, parts=None):
    """The score of a DAG; `parts` are the row sets that have tables of their own."""
    p = rows.shape[1]
    total = 0.0
    for y in range(p):
        parents = np.flatnonzero(dag[:, y]).tolist()
        for part in [np.arange(len(rows))] if parts is None else parts(y):
            total += PLAIN[name](rows[part], y, parents, len(rows))
        total -= gamma * math.log(p) * len(parents) if name == "bdeu" else 0.0
    return total


def random_dag(rng, p, degree=2.0):
    order = rng.permutation(p)
    dag = np.zeros((p, p), np.int8)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < degree / (p - 1), 1)
    return dag


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_the_formulas(name, seed):
    rows = noisy_or(seed, 7, n=300)
    moments = statistics.from_dense(rows)
    rng = np.random.default_rng(seed)
    for degree in (0.0, 2.0, 6.0):
        dag = random_dag(rng, 7, degree)
        expected = plain_score(name, rows, dag)
        assert gies.score_dag(moments, dag, score=name) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("intercept", scores.INTERCEPTS)
def test_environments_and_targets(name, intercept):
    """Rows in which a column is a target take no part in its score; columns may be constant."""
    rng = np.random.default_rng(5)
    rows, environments = noisy_or(1, 6, n=400), np.arange(400) % 3
    targets = [[], [2], [0, 4]]
    for e, nodes in enumerate(targets):
        for node in nodes:
            rows[environments == e, node] = rng.random((environments == e).sum()) < 0.5
    rows[environments == 1, 3] = 0  # never seen there, by design or by chance

    def parts(y):
        free = [e for e, nodes in enumerate(targets) if y not in nodes]
        if intercept == "pooled":
            return [np.isin(environments, free)]
        return [environments == e for e in free]

    moments = statistics.from_dense(rows, environments, targets)
    for _ in range(5):
        dag = random_dag(rng, 6, 3.0)
        found = gies.score_dag(moments, dag, score=name, intercept=intercept)
        assert found == pytest.approx(plain_score(name, rows, dag, parts=parts), abs=1e-8)


@pytest.mark.parametrize("name", PLAIN)
def test_scores_straight_from_the_rows_are_the_same(name):
    rows, environments = noisy_or(4, 8, n=500), np.arange(500) % 2
    rows[environments == 0, 6] = 0
    moments = statistics.from_dense(rows, environments, [[], []])
    options = {"penalty": 1.0, "gamma": 1.5, "intercept": "per_environment"}
    rule = scores.Rule(name, 1.0, 1.5, 8)
    straight = CountScores.of(sparse.csr_array(rows), environments + 3, rule)
    rng = np.random.default_rng(0)

    def score(dag):
        return gies.score_dag(moments, dag, score=name, **options)

    for degree in (0.0, 3.0, 6.0):
        dag = random_dag(rng, 8, degree)
        parents = [np.flatnonzero(dag[:, y]) for y in range(8)]
        expected = score(dag)
        total = sum(straight.local(y, parents[y]) for y in range(8))
        assert total == pytest.approx(expected, abs=1e-8)
        for y in range(8):
            others = np.setdiff1d(np.arange(8), [*parents[y], y])
            kept, added = straight.changes(y, parents[y], others)
            assert straight.losses(y, parents[y]) == pytest.approx(kept)
            for value, x in [*zip(kept, parents[y], strict=True)]:
                without = dag.copy()
                without[x, y] = 0
                assert value == pytest.approx(expected - score(without), abs=1e-8)
            for value, x in zip(added, others, strict=True):
                alone = straight.local(y, np.append(parents[y], x))
                assert value == pytest.approx(alone - straight.local(y, parents[y]), abs=1e-8)
    assert np.isneginf(straight.changes(0, np.arange(1, 8).repeat(2)[:12], np.array([7]))[1])


@pytest.mark.parametrize("name", PLAIN)
def test_members_of_a_class_score_the_same(name):
    rng = np.random.default_rng(0)
    rows = noisy_or(2, 6, n=200)
    rows[:, 5] = 0
    rows[0, 5] = 1
    moments = statistics.from_dense(rows)
    seen = {}
    for _ in range(300):
        dag = random_dag(rng, 6, 4.0)
        key = essential.dag_to_essential(dag).tobytes()
        value = gies.score_dag(moments, dag, score=name)
        assert value == pytest.approx(seen.setdefault(key, value), abs=1e-8)
    assert len(seen) < 290  # some classes came up more than once


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("search", gies.SEARCHES)
@pytest.mark.parametrize("seed", range(3))
def test_what_the_search_gained_is_what_the_formula_says(name, search, seed):
    rows = noisy_or(seed, 12, degree=4.0)
    found = fit_gies(rows, score=name, search=search)
    assert found.score == pytest.approx(plain_score(name, rows, found.dag), abs=1e-7)
    assert essential.is_essential(found.adjacency)
    assert (essential.dag_to_essential(found.dag) == found.adjacency).all()
    assert found.adjacency.any()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("order", ["fast", "textbook"])
def test_every_move_gains_what_it_said(name, order):
    """The running total of the kernels' gains is the difference of the scores, move by move."""
    from causal import pdag
    from causal import search as kernels
    from causal.climb import Climber

    rows, environments = noisy_or(3, 14, degree=5.0), np.arange(1500) % 2
    rows[environments == 0, 2] = 0
    moments = statistics.from_dense(rows, environments, [[], []])
    score = scores.make_score(moments, scores.Rule(name, 1.0, 0.5, 14), "per_environment")
    allowed = ~np.eye(14, dtype=bool)
    climber = Climber(score, allowed, ~allowed & False, np.zeros(14, np.int32), math.inf)
    state = kernels.make_state(pdag.empty_graph(np.zeros(14, np.int32)))
    code = kernels.FAST if order == "fast" else kernels.TEXTBOOK
    empty, moves, status = score.empty.sum(), 0, kernels.PAUSED
    while status == kernels.PAUSED:
        status = kernels.run(climber._problem, state, code, 1, -1, -1)
        dag = essential.extend_to_dag(state.graph.edge)
        assert climber.score(dag) == pytest.approx(empty + state.total[0], abs=1e-7)
        moves += 1
    assert moves > 15


def all_dags(p):
    pairs = list(itertools.permutations(range(p), 2))
    for bits in range(1 << len(pairs)):
        dag = np.zeros((p, p), np.int8)
        for i, (a, b) in enumerate(pairs):
            dag[a, b] = bits >> i & 1
        if essential.is_acyclic(dag):
            yield dag


@pytest.mark.parametrize("name", PLAIN)
def test_the_best_of_all_graphs_is_nearly_always_found(name):
    dags = list(all_dags(4))
    assert len(dags) == 543
    missed = 0
    for seed in range(40):
        rows = noisy_or(100 + seed, 4, n=400, degree=3.0)
        local = {
            (y, s): plain_score(name, rows, _family(4, y, s)) - plain_rest(name, rows, y)
            for y in range(4)
            for size in range(4)
            for s in itertools.combinations([x for x in range(4) if x != y], size)
        }
        best = max(
            sum(local[y, tuple(np.flatnonzero(dag[:, y]).tolist())] for y in range(4))
            for dag in dags
        )
        found = fit_gies(rows, score=name).score
        assert found <= best + 1e-7
        missed += found < best - 1e-7
    assert missed <= 4


def _family(p, y, parents):
    dag = np.zeros((p, p), np.int8)
    dag[list(parents), y] = 1
    return dag


def plain_rest(name, rows, y):
    """What the other columns, without parents, add."""
    return sum(PLAIN[name](rows, x, [], len(rows)) for x in range(rows.shape[1]) if x != y)


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_rows_changes_no_bit_and_that_of_columns_not_the_class(name):
    rows = noisy_or(9, 10)
    rng = np.random.default_rng(1)
    first = fit_gies(rows, score=name)
    again = fit_gies(rows[rng.permutation(len(rows))], score=name)
    assert again.score == first.score
    assert (again.adjacency == first.adjacency).all()
    order = rng.permutation(10)
    moved = fit_gies(rows[:, order], score=name)
    assert moved.score == pytest.approx(first.score, abs=1e-9 * abs(first.score))
    assert (moved.adjacency == first.adjacency[np.ix_(order, order)]).all()


def test_more_parents_than_there_are_tables_for_are_left_out_and_said():
    rng = np.random.default_rng(0)
    causes = rng.random((6000, 16)) < 0.04
    effect = causes.any(axis=1)
    found = fit_gies(np.column_stack([causes, effect]), score="bdeu", search="fast")
    assert found.truncated
    assert found.dag[:, 16].sum() == 12
    assert essential.is_essential(found.adjacency)


def test_options_without_meaning_are_refused():
    rows = noisy_or(0, 4)
    with pytest.raises(ConfigError, match="bdeu needs rows of columns that are 0 and 1 only"):
        fit_gies(rows * 2.0, score="bdeu")
    with pytest.raises(ConfigError, match=r"penalty: has no meaning for bdeu, expected 1, got 2"):
        fit_gies(rows, score="bdeu", penalty=2.0)
    with pytest.raises(ConfigError, match="score: expected one of gaussian_bic, extended_bic"):
        fit_gies(rows, score="bdu")
