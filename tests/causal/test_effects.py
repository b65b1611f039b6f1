"""Effects of cohorts against proportions counted by loops, statsmodels and known truths."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import columns, effects, regression
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


Row = tuple[set[int], set[int], set[int], set[int]]


def training_rows(cohort: Cohort, *, later: bool = False) -> list[Row]:
    """(diagnoses, procedures, previous medications, targets) by plain loops.

    With `later`, of visits alone that are not the first of a patient.
    """
    rows = []
    for patient in range(cohort.num_patients):
        if cohort.split[patient] != 0:
            continue
        start, end = cohort.patient_offsets[patient : patient + 2]
        for t in range(start + 1 if later else start, end):
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
    found, _ = regression.regress(cols, treated, [np.zeros(0, np.int64)] * 15, targets)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    table = effects.estimate(cohort, graph_of([]), EffectsConfig("raw"))
    previous = [f"previous_medication/{c}" for c in cohort.vocabularies["medication"]]
    assert table.codes == (*names, *previous)
    np.testing.assert_array_equal(table.effect[:15], found.astype(np.float32))


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_raw_of_a_previous_medication_is_that_of_visits_with_a_visit_before(
    make_cohort: MakeCohort, inputs: str
) -> None:
    cohort = make_cohort(num_patients=60, seed=1, inputs=inputs)
    table = effects.estimate(cohort, graph_of([]), EffectsConfig("raw"))

    def counted(rows: list[Row], before: int, m: int) -> tuple[float, int]:
        given = [m in row[3] for row in rows if before in row[2]]
        not_given = [m in row[3] for row in rows if before not in row[2]]
        return proportion(given) - proportion(not_given), sum(given)

    later, every = training_rows(cohort, later=True), training_rows(cohort)
    assert (len(later) < len(every)) == (inputs == "current")
    furthest = 0.0
    for before in range(5):
        for m in range(5):
            expected, support = counted(later, before, m)
            assert table.effect[15 + before, m] == pytest.approx(expected, abs=1e-7)
            assert table.support[15 + before, m] == support
            furthest = max(furthest, abs(counted(every, before, m)[0] - expected))
    # First visits in the comparison would have made another number of it.
    assert (furthest > 0.05) == (inputs == "current")


@pytest.mark.parametrize("estimator", ["raw", "adjusted", "doubly_robust"])
def test_first_visits_change_no_effect_of_a_previous_medication(
    make_cohort: MakeCohort, estimator: Any
) -> None:
    cohort = make_cohort(seed=12)
    first = cohort.is_first_visit()
    changed = dataclasses.replace(
        cohort,
        targets=CodeLists.of(
            [[0, 1] if first[v] else cohort.targets[v].tolist() for v in range(cohort.num_visits)]
        ),
    )
    d, p = (f"{kind}/{cohort.vocabularies[kind][0]}" for kind in ("diagnosis", "procedure"))
    m = [f"previous_medication/{c}" for c in cohort.vocabularies["medication"][:2]]
    graph = graph_of([(d, p), (m[0], m[1])])
    a = effects.estimate(cohort, graph, EffectsConfig(estimator))
    b = effects.estimate(changed, graph, EffectsConfig(estimator))
    assert a.supported[15:].any()
    assert not np.array_equal(a.effect[:15], b.effect[:15])
    for name in ("effect", "standard_error", "support", "supported", "visits"):
        np.testing.assert_array_equal(getattr(a, name)[15:], getattr(b, name)[15:])


@pytest.mark.parametrize("estimator", ["raw", "adjusted", "doubly_robust"])
def test_without_later_visits_previous_medications_have_no_effect(
    make_cohort: MakeCohort, estimator: Any
) -> None:
    cohort = make_cohort(num_patients=300, seed=3)
    visits = cohort.patient_offsets[:-1]
    alone = dataclasses.replace(
        cohort,
        patient_offsets=np.arange(301),
        visit_ids=tuple(cohort.visit_ids[v] for v in visits),
        admitted=cohort.admitted[visits],
        age=cohort.age[visits],
        **{
            name: getattr(cohort, name).take(visits)
            for name in ("diagnoses", "procedures", "medications", "targets")
        },
    )
    table = effects.estimate(alone, graph_of([]), EffectsConfig(estimator, min_visits=0))
    assert table.supported[:15].any()
    assert not table.supported[15:].any()
    assert (table.effect[15:] == 0).all()
    assert np.isnan(table.standard_error[15:]).all()


@pytest.mark.parametrize("estimator", ["adjusted", "doubly_robust"])
def test_adjustment_removes_a_confounder_of_a_previous_medication(
    make_cohort: MakeCohort, estimator: Any
) -> None:
    cohort = make_cohort(num_patients=3000, seed=5)
    rng = np.random.default_rng(0)
    # Drug 3 is given again, and drug 4 often with it: drug 4 seems to bring drug 3 a visit later.
    taken = []
    for v in range(cohort.num_visits):
        others = [m for m in cohort.medications[v].tolist() if m != 4]
        taken.append(others + [4] * (rng.random() < (0.7 if 3 in others else 0.1)))
    targets = [[m for m in visit if m == 3] for visit in taken]
    cohort = dataclasses.replace(
        cohort, medications=CodeLists.of(taken), targets=CodeLists.of(targets)
    )
    before = [f"previous_medication/{c}" for c in cohort.vocabularies["medication"]]
    graph = graph_of([(before[3], before[4])])
    raw = effects.estimate(cohort, graph, EffectsConfig("raw")).of_kinds("previous_medication")
    table = effects.estimate(cohort, graph, EffectsConfig(estimator))
    adjusted = table.of_kinds("previous_medication")
    assert adjusted.codes == tuple(before)
    assert raw.effect[4, 3] > 0.3
    assert adjusted.supported[4, 3]
    assert abs(adjusted.effect[4, 3]) < 4 * adjusted.standard_error[4, 3] < 0.2
    assert adjusted.effect[3, 3] > 0.6  # drug 3 itself is not adjusted for anything


def test_adjusted_is_least_squares_on_the_parents(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(num_patients=150, seed=2)
    name = cohort.vocabularies
    d = [f"diagnosis/{c}" for c in name["diagnosis"]]
    p = [f"procedure/{c}" for c in name["procedure"]]
    m = [f"previous_medication/{c}" for c in name["medication"]]
    edges = [(d[0], d[1]), (d[1], p[0]), (d[0], p[0]), (m[2], d[2]), (m[3], p[0]), (m[0], d[3])]
    edges += [(m[0], m[1]), (m[2], m[1]), (m[0], m[4])]
    graph = graph_of(edges, undirected=[(d[4], d[5]), (p[2], p[3])])
    table = effects.estimate(cohort, graph, EffectsConfig("adjusted", min_support=1, min_visits=0))
    assert table.supported.all()
    assert len(table.codes) == 20
    for c, code in enumerate(table.codes):
        rows = training_rows(cohort, later=code in m)
        value = {
            name: np.array([i in r[k] for r in rows], float)
            for k, names in enumerate((d, p, m))
            for i, name in enumerate(names)
        }
        parents = [a for a, b in edges if b == code]
        design = np.column_stack([np.ones(len(rows)), value[code], *(value[a] for a in parents)])
        for j in range(5):
            outcome = np.array([j in r[3] for r in rows], float)
            fit = sm.OLS(outcome, design).fit()
            # The table is float32; regress() itself is held to 1e-12 in test_regression.py.
            assert table.effect[c, j] == pytest.approx(fit.params[1], abs=1e-6)
            assert table.standard_error[c, j] == pytest.approx(fit.bse[1], rel=1e-5)


@pytest.mark.parametrize("estimator", ["adjusted", "doubly_robust"])
def test_adjustment_removes_a_confounder(make_cohort: MakeCohort, estimator: Any) -> None:
    cohort = make_cohort(num_patients=3000, seed=5)
    d0, d1 = (f"diagnosis/{c}" for c in cohort.vocabularies["diagnosis"][:2])
    graph = graph_of([(d0, d1)])
    raw = effects.estimate(cohort, graph, EffectsConfig("raw"))
    adjusted = effects.estimate(cohort, graph, EffectsConfig(estimator))
    # d0 causes d1 and drug 0; d1 has no effect on drug 0.
    assert raw.effect[1, 0] > 0.2
    assert abs(adjusted.effect[1, 0]) < 4 * adjusted.standard_error[1, 0] < 0.1


@pytest.mark.parametrize("estimator", ["adjusted", "doubly_robust"])
def test_a_class_gives_mean_and_range_over_its_members(
    make_cohort: MakeCohort, estimator: Any
) -> None:
    cohort = make_cohort(num_patients=800, seed=7)
    d = [f"diagnosis/{c}" for c in cohort.vocabularies["diagnosis"]]
    # d0 - d1 - d2: d1 has no parent, d0 or d2, but not both, which would be a collider.
    graph = graph_of([], undirected=[(d[0], d[1]), (d[1], d[2])])
    table = effects.estimate(cohort, graph, EffectsConfig(estimator, "class"))
    members = [
        effects.estimate(cohort, graph_of(edges), EffectsConfig(estimator))
        for edges in ([(d[1], d[0]), (d[1], d[2])], [(d[0], d[1])], [(d[2], d[1])])
    ]
    every = np.stack([member.effect[1] for member in members])
    assert np.ptp(every, axis=0).max() > 0.05
    np.testing.assert_allclose(table.effect[1], every.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(table.minimum[1], every.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(table.maximum[1], every.max(axis=0), atol=1e-6)
    mean_error = np.stack([member.standard_error[1] for member in members]).mean(axis=0)
    np.testing.assert_allclose(table.standard_error[1], mean_error, rtol=1e-5)
    assert table.visits[1] == min(member.visits[1] for member in members)
    assert (table.minimum <= table.effect).all()
    assert (table.effect <= table.maximum).all()
    # Codes without undirected edges have one set, whatever the option.
    parents = effects.estimate(cohort, graph, EffectsConfig(estimator))
    np.testing.assert_array_equal(table.minimum[3:], table.maximum[3:])
    np.testing.assert_array_equal(table.effect[3:], parents.effect[3:])
    np.testing.assert_array_equal(parents.minimum, parents.effect)
    np.testing.assert_array_equal(parents.maximum, parents.effect)


def test_support_is_counted_and_decides_which_effects_are_given(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(num_patients=60, seed=8)
    parts = []
    for later, kinds in ((False, ((0, 9), (1, 6))), (True, ((2, 5),))):
        rows = training_rows(cohort, later=later)
        n = len(rows)
        has = np.array([[c in r[k] for k, size in kinds for c in range(size)] for r in rows])
        given = np.array([[m in r[3] for m in range(5)] for r in rows])
        both = has.T.astype(int) @ given
        worth = has.sum(axis=0) * (n - has.sum(axis=0)) / n
        expected = worth[:, None] * given.mean(axis=0)
        supported = (np.maximum(both, expected) >= 4) & (worth >= 8)[:, None]
        assert 0.2 < supported.mean() < 0.8
        parts.append((both, worth, supported, raw_effects(has, given)))
    both, worth, supported, raw = (np.concatenate(part) for part in zip(*parts, strict=True))
    for estimator in ("raw", "adjusted", "doubly_robust"):
        config = EffectsConfig(estimator, min_support=4, min_visits=8)
        table = effects.estimate(cohort, graph_of([]), config)
        np.testing.assert_array_equal(table.support, both)
        np.testing.assert_array_equal(table.supported, supported)
        np.testing.assert_allclose(table.visits, worth, rtol=1e-6)
        assert (table.effect[supported] != 0).all()
        assert np.isfinite(table.standard_error[supported]).all()
        if estimator == "raw":  # what the literature has, whatever the support
            np.testing.assert_allclose(table.effect, raw, atol=1e-7)
        else:
            for values in (table.effect, table.minimum, table.maximum):
                assert (values[~supported] == 0).all()
            assert np.isnan(table.standard_error[~supported]).all()


def raw_effects(has: np.ndarray, given: np.ndarray) -> np.ndarray:
    return np.array([given[h].mean(axis=0) - given[~h].mean(axis=0) for h in has.T])


def test_a_code_that_goes_with_another_always_has_no_effect_beside_it(
    make_cohort: MakeCohort,
) -> None:
    cohort = make_cohort(num_patients=300, seed=9)
    lists = [list(cohort.diagnoses[v]) for v in range(cohort.num_visits)]
    copied = [[c for c in codes if c != 1] + [1] * (0 in codes) for codes in lists]
    cohort = dataclasses.replace(cohort, diagnoses=CodeLists.of(copied))
    d0, d1 = (f"diagnosis/{c}" for c in cohort.vocabularies["diagnosis"][:2])
    for estimator in ("adjusted", "doubly_robust"):
        table = effects.estimate(cohort, graph_of([(d0, d1)]), EffectsConfig(estimator))
        assert table.supported[0].all()
        assert not table.supported[1].any()
        assert (table.effect[1] == 0).all()
        assert table.visits[1] < 5


def test_other_patients_change_nothing(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(seed=6)
    held_out = np.repeat(cohort.split != 0, np.diff(cohort.patient_offsets))
    emptied = [[] if held_out[v] else cohort.targets[v].tolist() for v in range(cohort.num_visits)]
    changed = dataclasses.replace(cohort, targets=CodeLists.of(emptied))
    for estimator in ("raw", "adjusted", "doubly_robust"):
        a = effects.estimate(cohort, graph_of([]), EffectsConfig(estimator))
        b = effects.estimate(changed, graph_of([]), EffectsConfig(estimator))
        np.testing.assert_array_equal(a.effect, b.effect)


@pytest.mark.parametrize("estimator", ["raw", "adjusted", "doubly_robust"])
def test_no_training_visits_give_no_effects(make_cohort: MakeCohort, estimator: Any) -> None:
    cohort = dataclasses.replace(make_cohort(), split=np.full(120, 2, np.int8))
    table = effects.estimate(cohort, graph_of([]), EffectsConfig(estimator, min_visits=0))
    assert (table.effect == 0).all()
    assert np.isnan(table.standard_error).all()
    assert not table.supported.any()
