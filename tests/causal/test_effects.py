"""Effects against proportions counted by loops and against statsmodels' least squares."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import sparse

from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import columns, effects
from causal.effects import EffectsConfig

MakeCohort = Callable[..., Cohort]


def graph_of(edges: list[tuple[str, str]], undirected: list[tuple[str, str]] | None = None):
    every = [*edges, *(undirected or [])]
    nodes = tuple(sorted({name for edge in every for name in edge}))
    return CausalGraph(
        nodes=nodes,
        source=np.array([nodes.index(a) for a, _ in every], np.int32),
        target=np.array([nodes.index(b) for _, b in every], np.int32),
        directed=np.array([True] * len(edges) + [False] * len(undirected or []), np.bool_),
        stability=np.full(len(every), np.nan, np.float32),
        support=np.ones(len(every), np.int64),
        strength=np.full(len(every), np.nan, np.float32),
    )


def training_rows(cohort: Cohort) -> list[tuple[set[int], set[int], set[int], set[int]]]:
    """(diagnoses, procedures, previous medications, targets) by plain loops."""
    rows = []
    for patient in range(cohort.num_patients):
        if cohort.split[patient] != 0:
            continue
        start, end = cohort.patient_offsets[patient : patient + 2]
        for t in range(start, end):
            previous = [set(cohort.medications[t - 1])] if t > start else [set()]
            if cohort.inputs == "history":
                if t == start:
                    continue
                seen = [set(cohort.diagnoses[t - 1]), set(cohort.procedures[t - 1])]
            else:
                seen = [set(cohort.diagnoses[t]), set(cohort.procedures[t])]
            rows.append((*seen, *previous, set(cohort.targets[t])))
    return rows


def proportion(rows: list[bool]) -> float:
    return sum(rows) / len(rows)


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_raw_is_the_difference_of_proportions(make_cohort: MakeCohort, inputs: str) -> None:
    cohort = make_cohort(seed=1, inputs=inputs)
    rows = training_rows(cohort)
    expected = np.zeros((15, 5))
    for c in range(15):
        has = [(c in row[0]) if c < 9 else (c - 9 in row[1]) for row in rows]
        for m in range(5):
            with_code = [m in row[3] for row, h in zip(rows, has, strict=True) if h]
            without = [m in row[3] for row, h in zip(rows, has, strict=True) if not h]
            expected[c, m] = proportion(with_code) - proportion(without)
    cols = columns.of_cohort(cohort)
    names = [f"diagnosis/{c}" for c in cohort.vocabularies["diagnosis"]]
    names += [f"procedure/{c}" for c in cohort.vocabularies["procedure"]]
    treated = np.array([cols.names.index(name) for name in names])
    targets = columns.presence(cohort.targets, columns.training_visits(cohort), 5)
    found, _ = effects.regress(cols, treated, [np.zeros(0, np.int64)] * 15, targets)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    table = effects.estimate(cohort, graph_of([]), EffectsConfig("raw"))
    assert table.codes == tuple(names)
    np.testing.assert_array_equal(table.effect, found.astype(np.float32))


def test_adjusted_is_least_squares_on_the_parents(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(num_patients=150, seed=2)
    name = cohort.vocabularies
    d = [f"diagnosis/{c}" for c in name["diagnosis"]]
    p = [f"procedure/{c}" for c in name["procedure"]]
    m = [f"previous_medication/{c}" for c in name["medication"]]
    edges = [(d[0], d[1]), (d[1], p[0]), (d[0], p[0]), (m[2], d[2]), (m[3], p[0]), (m[0], d[3])]
    graph = graph_of(edges, undirected=[(d[4], d[5]), (p[2], p[3])])
    table = effects.estimate(cohort, graph, EffectsConfig("adjusted"))
    rows = training_rows(cohort)
    value = {n: np.array([i in r[0] for r in rows], float) for i, n in enumerate(d)}
    value |= {n: np.array([i in r[1] for r in rows], float) for i, n in enumerate(p)}
    value |= {n: np.array([i in r[2] for r in rows], float) for i, n in enumerate(m)}
    for c, code in enumerate(table.codes):
        parents = [a for a, b in edges if b == code]
        design = np.column_stack([np.ones(len(rows)), value[code], *(value[a] for a in parents)])
        for j in range(5):
            outcome = np.array([j in r[3] for r in rows], float)
            fit = sm.OLS(outcome, design).fit()
            # The table is float32; regress() itself is held to 1e-12 below.
            assert table.effect[c, j] == pytest.approx(fit.params[1], abs=1e-6)
            assert table.standard_error[c, j] == pytest.approx(fit.bse[1], rel=1e-5)


def test_regression_of_random_tables_equals_numpy_to_1e_12() -> None:
    rng = np.random.default_rng(3)
    n, p, num_targets = 400, 12, 4
    dense = (rng.random((n, p)) < 0.3).astype(np.int64)
    outcome = (rng.random((n, num_targets)) < 0.2 + 0.3 * dense[:, :1]).astype(np.int64)
    cols = columns.Columns(
        tuple(f"x{i:02}" for i in range(p)),
        sparse.csr_array(dense),
        np.zeros(p, np.int64),
        np.zeros(n, np.int8),
    )
    parents = [np.sort(rng.choice([i for i in range(p) if i != j], j % 6, False)) for j in range(p)]
    found, error = effects.regress(cols, np.arange(p), parents, sparse.csr_array(outcome))
    for j in range(p):
        design = np.column_stack([np.ones(n), dense[:, j], dense[:, parents[j]]])
        coefficients, rss, *_ = np.linalg.lstsq(design, outcome.astype(float))
        inverse = np.linalg.inv(design.T @ design)
        expected_error = np.sqrt(rss / (n - design.shape[1]) * inverse[1, 1])
        np.testing.assert_allclose(found[j], coefficients[1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(error[j], expected_error, rtol=1e-9)


def test_codes_without_variance_of_their_own_have_no_effect() -> None:
    rng = np.random.default_rng(4)
    n = 300
    a, b = rng.random((2, n)) < 0.4
    dense = np.column_stack([np.zeros(n), np.ones(n), a, a, b]).astype(np.int64)
    cols = columns.Columns(
        ("always", "never", "a", "copy", "b"),
        sparse.csr_array(dense),
        np.zeros(5, np.int64),
        np.zeros(n, np.int8),
    )
    outcome = sparse.csr_array((rng.random((n, 3)) < 0.3).astype(np.int64))
    nothing = np.zeros(0, np.int64)
    parents = [nothing, nothing, np.array([3]), nothing, np.array([2, 3])]
    found, error = effects.regress(cols, np.arange(5), parents, outcome)
    assert (found[:3] == 0).all()
    assert np.isnan(error[:3]).all()
    # Two copies of one parent adjust like one.
    once, once_error = effects.regress(cols, np.array([4]), [np.array([2])], outcome)
    np.testing.assert_allclose(found[4], once[0], atol=1e-12)
    np.testing.assert_allclose(error[4], once_error[0], rtol=1e-12)


def test_adjustment_removes_a_confounder(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(num_patients=3000, seed=5)
    d0, d1 = (f"diagnosis/{c}" for c in cohort.vocabularies["diagnosis"][:2])
    graph = graph_of([(d0, d1)])
    raw = effects.estimate(cohort, graph, EffectsConfig("raw"))
    adjusted = effects.estimate(cohort, graph, EffectsConfig("adjusted"))
    # d0 causes d1 and drug 0; d1 has no effect on drug 0.
    assert raw.effect[1, 0] > 0.2
    assert abs(adjusted.effect[1, 0]) < 4 * adjusted.standard_error[1, 0] < 0.1


def test_other_patients_change_nothing(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(seed=6)
    held_out = np.repeat(cohort.split != 0, np.diff(cohort.patient_offsets))
    emptied = [[] if held_out[v] else cohort.targets[v].tolist() for v in range(cohort.num_visits)]
    changed = dataclasses.replace(cohort, targets=CodeLists.of(emptied))
    for estimator in ("raw", "adjusted"):
        a = effects.estimate(cohort, graph_of([]), EffectsConfig(estimator))
        b = effects.estimate(changed, graph_of([]), EffectsConfig(estimator))
        np.testing.assert_array_equal(a.effect, b.effect)


def test_no_training_visits_give_no_effects(make_cohort: MakeCohort) -> None:
    cohort = dataclasses.replace(make_cohort(), split=np.full(120, 2, np.int8))
    table = effects.estimate(cohort, graph_of([]), EffectsConfig())
    assert (table.effect == 0).all()
    assert np.isnan(table.standard_error).all()
