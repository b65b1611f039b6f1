"""The engine against definitions: every DAG of four or five nodes is written down and compared."""

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from causal import essential, fit_gies

FAMILIES = [
    [[]],
    [[], [0]],
    [[0], [1]],
    [[], [0, 1]],
    [[0, 2], [1], [3]],
    [[], [1], [2]],
]


@functools.cache
def all_dags(p: int) -> NDArray[np.bool_]:
    """Every DAG on p nodes, (number, p, p)."""
    pairs = [(i, j) for i in range(p) for j in range(p) if i != j]
    parents = np.zeros((1 << len(pairs), p), np.int64)
    codes = np.arange(1 << len(pairs))
    for bit, (i, j) in enumerate(pairs):
        parents[:, j] |= ((codes >> bit) & 1) << i
    left = np.full(len(codes), (1 << p) - 1)
    for _ in range(p):
        for j in range(p):
            left[(parents[:, j] & left) == 0] &= ~(1 << j)
    acyclic = parents[left == 0]
    return ((acyclic[:, None, :] >> np.arange(p)[None, :, None]) & 1).astype(bool)


def class_key(dag: NDArray[np.bool_], family: list[list[int]]) -> bytes:
    """Equal for interventionally equivalent DAGs (Hauser and Bühlmann 2012, theorem 10)."""
    skeleton = dag | dag.T
    # A collider a → c ← b: a and b not connected.
    collider = dag[:, None, :] & dag[None, :, :] & ~skeleton[:, :, None]
    for a in range(len(dag)):
        collider[a, a] = False
    parts = [skeleton.tobytes(), collider.tobytes()]
    for target in family:
        cut = dag.copy()
        cut[:, target] = False
        parts.append((cut | cut.T).tobytes())
    return b"".join(parts)


@functools.cache
def classes(p: int, family_index: int) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Class number of every DAG, and the DAGs of every class."""
    number: dict[bytes, int] = {}
    family = FAMILIES[family_index]
    of_dag = np.array(
        [number.setdefault(class_key(d, family), len(number)) for d in all_dags(p)], np.int64
    )
    order = np.argsort(of_dag, kind="stable")
    members = np.split(order, np.searchsorted(of_dag[order], np.arange(1, len(number))))
    return of_dag, members


def union(p: int, members: NDArray[np.int64]) -> NDArray[np.int8]:
    return all_dags(p)[members].any(axis=0).astype(np.int8)


@pytest.mark.parametrize("family_index", range(len(FAMILIES)))
def test_essential_graph_is_the_union_of_all_equivalent_dags(family_index):
    of_dag, members = classes(4, family_index)
    kinds = essential.node_kinds(4, FAMILIES[family_index])
    unions = [union(4, m) for m in members]
    for dag, number in zip(all_dags(4), of_dag, strict=True):
        found = essential.dag_to_essential(dag, kinds)
        assert (found == unions[number]).all(), (dag, found)
    for graph, m in zip(unions, members, strict=True):
        assert essential.is_essential(graph, kinds)
        member = essential.extend_to_dag(graph)
        assert any((member == d).all() for d in all_dags(4)[m])


def test_essential_graphs_of_five_nodes():
    assert len(all_dags(5)) == 29281
    rng = np.random.default_rng(0)
    for index in rng.choice(29281, 60, replace=False):
        dag = all_dags(5)[index]
        key = class_key(dag, [[]])
        skeleton = dag | dag.T
        same = [
            d
            for d in all_dags(5)[
                ((all_dags(5) | all_dags(5).transpose(0, 2, 1)) == skeleton).all((1, 2))
            ]
            if class_key(d, [[]]) == key
        ]
        assert (essential.dag_to_essential(dag) == np.any(same, axis=0)).all()


def test_graphs_that_are_not_essential_are_recognised():
    chain_of_arrows = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert not essential.is_essential(chain_of_arrows)
    square_of_lines = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
    assert essential.extend_to_dag(square_of_lines) is None
    assert essential.is_essential(chain_of_arrows, essential.node_kinds(3, [[], [1]]))


def random_rows(seed: int, p: int, n: int) -> NDArray[np.float64]:
    """Linear Gaussian rows of a random dense DAG, noisy enough for wrong turns."""
    rng = np.random.default_rng(seed)
    weights = np.triu(rng.normal(size=(p, p)) * (rng.random((p, p)) < 0.6), 1)
    rows = np.zeros((n, p))
    for j in range(p):
        rows[:, j] = rows @ weights[:, j] + rng.normal(size=n)
    return rows[:, rng.permutation(p)]


def local_scores(rows, environment, family, intercept="pooled") -> NDArray[np.float64]:
    """Score of every node with every set of parents, (p, 2^p), by least squares on the rows."""
    n, p = rows.shape
    table = np.full((p, 1 << p), np.nan)
    for j in range(p):
        use = np.array([j not in family[e] for e in environment])
        y = rows[use]
        groups = environment[use] if intercept == "per_environment" else np.zeros(len(y), int)
        ones = (groups[:, None] == np.unique(groups)[None, :]).astype(float)
        for mask in range(1 << p):
            if mask >> j & 1:
                continue
            parents = [i for i in range(p) if mask >> i & 1]
            design = np.hstack([ones, y[:, parents]])
            rest = y[:, j] - design @ np.linalg.lstsq(design, y[:, j], rcond=None)[0]
            m = len(y)
            fit = -0.5 * m * (1 + np.log(rest @ rest / m))
            table[j, mask] = fit - 0.5 * np.log(n) * (1 + len(parents))
    return table


def dag_scores(p: int, table: NDArray[np.float64]) -> NDArray[np.float64]:
    masks = (all_dags(p) * (1 << np.arange(p))[None, :, None]).sum(axis=1)
    return table[np.arange(p), masks].sum(axis=1)


@functools.cache
def moves(p: int) -> dict[str, list[NDArray[np.int64]]]:
    """For every DAG, the DAGs with one edge more, one fewer, and one turned."""
    number = {d.tobytes(): i for i, d in enumerate(all_dags(p))}
    result: dict[str, list[NDArray[np.int64]]] = {"insert": [], "delete": [], "turn": []}
    for dag in all_dags(p):
        near: dict[str, list[int]] = {kind: [] for kind in result}
        for i in range(p):
            for j in range(p):
                changed = dag.copy()
                if i != j and not dag[i, j] and not dag[j, i]:
                    kind = "insert"
                    changed[i, j] = True
                elif dag[i, j]:
                    changed[i, j] = False
                    near["delete"].append(number[changed.tobytes()])
                    kind = "turn"
                    changed[j, i] = True
                else:
                    continue
                if changed.tobytes() in number:
                    near[kind].append(number[changed.tobytes()])
        for kind, found in near.items():
            result[kind].append(np.array(found, np.int64))
    return result


def greedy_by_definition(
    p: int, score: NDArray[np.float64], family_index: int, start: int | None = None
) -> int:
    """GIES as it is defined: the best step over all members of the class, phase by phase."""
    of_dag, members = classes(p, family_index)
    current = of_dag[~all_dags(p).any(axis=(1, 2)) if start is None else start]
    current = np.atleast_1d(current)[0]
    changed = True
    while changed:
        changed = False
        for kind in ("insert", "delete", "turn"):
            while True:
                reach = np.concatenate([moves(p)[kind][d] for d in members[current]])
                reach = reach[of_dag[reach] != current]
                if not len(reach):
                    break
                best = reach[np.argmax(score[reach])]
                if score[best] - score[members[current][0]] <= 1.49e-8:
                    break
                current, changed = of_dag[best], True
    return current


@pytest.mark.parametrize("family_index", range(len(FAMILIES)))
@pytest.mark.parametrize("intercept", ["pooled", "per_environment"])
def test_textbook_makes_the_steps_of_the_definition(family_index, intercept):
    family = FAMILIES[family_index]
    members = classes(4, family_index)[1]
    for seed in range(12):
        rows = random_rows(100 * family_index + seed, 4, 60)
        environment = np.arange(60) % len(family)
        for e, target in enumerate(family):
            rows[np.ix_(environment == e, target)] += np.random.default_rng(seed).normal(
                2, 1, ((environment == e).sum(), len(target))
            )
        scores = dag_scores(4, local_scores(rows, environment, family, intercept))
        expected = greedy_by_definition(4, scores, family_index)
        found = fit_gies(
            rows,
            environments=environment,
            targets=family,
            search="textbook",
            intercept=intercept,
        )
        assert (found.adjacency == union(4, members[expected])).all(), seed
        assert found.score == pytest.approx(scores[members[expected][0]], abs=1e-8)


@pytest.mark.parametrize("family_index", [0, 5])
def test_textbook_makes_the_steps_of_the_definition_on_five_nodes(family_index):
    """Five nodes are the fewest on which every condition on a turn can matter."""
    family = FAMILIES[family_index]
    members = classes(5, family_index)[1]
    for seed in range(150):
        rows = random_rows(7000 + seed, 5, 80)
        environment = np.arange(80) % len(family)
        for e, target in enumerate(family):
            rows[np.ix_(environment == e, target)] = np.random.default_rng(seed).normal(
                2, 1, ((environment == e).sum(), len(target))
            )
        scores = dag_scores(5, local_scores(rows, environment, family))
        # From a random graph, so that deletions and turns of all kinds are needed.
        start = int(np.random.default_rng(seed).integers(len(all_dags(5))))
        expected = greedy_by_definition(5, scores, family_index, start)
        found = fit_gies(
            rows,
            environments=environment,
            targets=family,
            search="textbook",
            start=all_dags(5)[start],
        )
        assert (found.adjacency == union(5, members[expected])).all(), seed


def test_scores_against_the_best_of_all_dags_of_five_nodes():
    reached = {"fast": 0, "textbook": 0, "best": 0}
    for seed in range(200):
        rows = random_rows(seed, 5, 150)
        scores = dag_scores(5, local_scores(rows, np.zeros(150, int), [[]]))
        top = scores.max()
        results = {search: fit_gies(rows, search=search).score for search in reached}
        assert results["best"] >= max(results["fast"], results["textbook"]) - 1e-9
        for search, score in results.items():
            assert score <= top + 1e-7
            reached[search] += score >= top - 1e-7
    # Dense graphs, few rows: greedy search misses the optimum now and then (counted, of 200).
    assert reached["best"] >= 160
    assert min(reached["fast"], reached["textbook"]) >= 140, reached
