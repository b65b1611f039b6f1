"""Subgroups against loops over visits that share no code with them."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed import subgroups
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort

SEXES = ("unknown", "female", "male")


@dataclasses.dataclass
class Case:
    probabilities: np.ndarray
    targets: np.ndarray
    visits: subgroups.Visits
    ddi: np.ndarray


def make(seed=0, patients=90, medications=9, longest=6, sexes=(0.2, 0.4, 0.4)) -> Case:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, patients)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    shape = (int(offsets[-1]), medications)
    targets = rng.random(shape) < 0.35
    age = rng.integers(0, 100, shape[0]).astype(np.float32)
    age[rng.random(shape[0]) < 0.1] = np.nan
    before = np.zeros(shape, np.bool_)
    before[1:] = targets[:-1]
    before[offsets[:-1]] = False
    visits = subgroups.Visits(
        offsets, rng.choice(3, patients, p=sexes).astype(np.int8), age, before
    )
    noise = rng.normal(0, 1, shape)
    probabilities = (1 / (1 + np.exp(-(2 * targets - 1 + noise)))).astype(np.float32)
    ddi = np.triu(rng.random((medications, medications)) < 0.3, 1)
    return Case(probabilities, targets, visits, ddi | ddi.T)


def groups_of(case, patient, visit):
    """The group of one visit in every table, from the words of the documentation."""
    age, counts = float(case.visits.age[visit]), np.diff(case.visits.patient_offsets)
    number = int(counts[patient])
    if math.isnan(age):
        band = "unknown"
    elif age < 18:
        band = "under 18"
    elif age < 45:
        band = "18 to 44"
    elif age < 65:
        band = "45 to 64"
    else:
        band = "65 to 79" if age < 80 else "80 and over"
    first = visit == case.visits.patient_offsets[patient]
    return {
        "sex": SEXES[case.visits.sex[patient]],
        "age": band,
        "visit": "first" if first else "later",
        "visits of the patient": "1" if number == 1 else "2 to 3" if number < 4 else "4 or more",
    }


def plain(case, rows_of_patients, threshold):
    """Jaccard, F1, PRAUC, DDI rate, medications, ECE of some visits, patient by patient."""
    means, pairs, interacting, medications, visits = [], 0, 0, 0, 0
    inside = [[] for _ in range(15)]
    for rows in rows_of_patients:
        scores = []
        for v in rows:
            p, y = case.probabilities[v], case.targets[v]
            said, given_ = set(np.flatnonzero(p >= threshold)), set(np.flatnonzero(y))
            common, union = len(said & given_), len(said | given_)
            order = np.argsort(-p)
            at = [rank for rank, m in enumerate(order.tolist(), 1) if m in given_]
            precise = sum(i / rank for i, rank in enumerate(at, 1)) / max(len(at), 1)
            f1 = 2 * common / (len(said) + len(given_)) if union else 0.0
            scores.append((common / union if union else 0.0, f1, precise))
            both = list(itertools.combinations(sorted(said), 2))
            pairs += len(both)
            interacting += sum(bool(case.ddi[a, b]) for a, b in both)
            medications, visits = medications + len(said), visits + 1
            for value, truth in zip(p.tolist(), y.tolist(), strict=True):
                inside[min(int(value * 15), 14)].append(value - truth)
        means.append(np.mean(scores, axis=0))
    total = sum(map(len, inside))
    error = sum(abs(sum(gaps)) for gaps in inside) / total
    rate = interacting / pairs if pairs else 0.0
    return [*np.mean(means, axis=0), rate, medications / visits, error]


def patients_in(case, table, group):
    """The visits in a group of every patient that has one."""
    found = []
    for patient, (start, end) in enumerate(itertools.pairwise(case.visits.patient_offsets)):
        rows = [
            v
            for v in range(start, end)
            if table is None or groups_of(case, patient, v)[table] == group
        ]
        if rows:
            found.append(rows)
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.37])
def test_every_cell_is_a_loop_over_its_visits(threshold):
    case = make()
    found = subgroups.measure(
        case.probabilities, case.targets, case.visits, case.ddi, threshold, seed=1
    )
    cells = [(None, None, found["all"])]
    cells += [(t, cell["group"], cell) for t, rows in found["tables"].items() for cell in rows]
    assert [len(rows) for rows in found["tables"].values()] == [3, 6, 2, 3]
    for table, group, cell in cells:
        rows = patients_in(case, table, group)
        assert (cell["patients"], cell["visits"]) == (len(rows), sum(map(len, rows)))
        expected = plain(case, rows, threshold)
        for name, value in zip(subgroups.NAMES, expected, strict=True):
            assert cell[name][0] == pytest.approx(value, abs=1e-9), (table, group, name)
            assert cell[name][1] < cell[name][2]
            if name != "ece":
                assert cell[name][1] <= cell[name][0] <= cell[name][2]
    json.dumps(found, allow_nan=False)


def test_intervals_draw_whole_patients_with_their_visits_of_the_group():
    case = make(3, patients=40, longest=3)
    found = subgroups.measure(
        case.probabilities, case.targets, case.visits, case.ddi, 0.5, seed=7, rounds=40
    )
    cell = next(c for c in found["tables"]["visit"] if c["group"] == "later")
    rows = patients_in(case, "visit", "later")
    draws = np.random.default_rng(7).integers(len(rows), size=(40, len(rows)))
    drawn = [plain(case, [rows[i] for i in draw], 0.5) for draw in draws]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    for i, name in enumerate(subgroups.NAMES[:-1]):
        assert cell[name][1:] == pytest.approx([low[i], high[i]])
    value = cell["ece"][0]
    turned = [max(2 * value - high[-1], 0), max(2 * value - low[-1], 0)]
    assert cell["ece"][1:] == pytest.approx(turned)


def test_changes_are_counted_medication_by_medication():
    case = make(4, longest=4)
    found = subgroups.measure(case.probabilities, case.targets, case.visits, case.ddi, 0.5)
    changes = found["changes"]
    counts = dict.fromkeys(("started", "new", "both", "stopped", "dropped", "rightly"), 0)
    visits = 0
    for start, end in itertools.pairwise(case.visits.patient_offsets):
        for v in range(start + 1, end):
            visits += 1
            for m in range(case.targets.shape[1]):
                before, now = case.targets[v - 1, m], case.targets[v, m]
                said = case.probabilities[v, m] >= 0.5
                counts["started"] += now and not before
                counts["new"] += said and not before
                counts["both"] += said and now and not before
                counts["stopped"] += before and not now
                counts["dropped"] += before and not said
                counts["rightly"] += before and not now and not said
    expected = {
        "started": ("both", "started", "new"),
        "stopped": ("rightly", "stopped", "dropped"),
    }
    assert changes["visits"] == visits
    assert changes["patients"] == (np.diff(case.visits.patient_offsets) > 1).sum()
    for name, keys in expected.items():
        hits, true, said = (counts[key] for key in keys)
        recall, precision = hits / true, hits / said
        values = {"recall": recall, "precision": precision, "per_visit": true / visits}
        values["f1"] = 2 * recall * precision / (recall + precision)
        for key, value in values.items():
            assert changes[name][key][0] == pytest.approx(value)
            assert changes[name][key][1] < value < changes[name][key][2]


def test_repeating_the_last_visit_finds_no_change():
    case = make(5)
    repeated = case.visits.before.astype(np.float32)
    found = subgroups.measure(repeated, case.targets, case.visits, case.ddi, 0.5)["changes"]
    assert found["started"]["recall"][0] == found["stopped"]["recall"][0] == 0
    assert found["started"]["precision"] == found["stopped"]["precision"] == [None] * 3
    perfect = case.targets.astype(np.float32)
    found = subgroups.measure(perfect, case.targets, case.visits, case.ddi, 0.5)["changes"]
    assert found["started"]["f1"] == found["stopped"]["f1"] == [1.0, 1.0, 1.0]


def test_small_groups_are_kept_back_and_so_is_the_next():
    case = make(6, patients=90)
    sex = np.repeat([0, 1, 2], [4, 30, 56]).astype(np.int8)
    visits = dataclasses.replace(case.visits, sex=sex)
    found = subgroups.measure(case.probabilities, case.targets, visits, case.ddi, 0.5)
    cells = {cell["group"]: cell for cell in found["tables"]["sex"]}
    assert cells["unknown"] == {"group": "unknown", "hidden": True}
    assert cells["female"] == {"group": "female", "hidden": True}  # 4 is 90 less 56 less 30
    assert cells["male"]["patients"] == 56


def test_changes_are_kept_back_with_the_later_visits():
    case = make(7, patients=60, longest=1)
    offsets = np.arange(61) + np.concatenate([np.arange(6), np.full(55, 5)])  # five have a second
    rows = int(offsets[-1])
    visits = subgroups.Visits(
        offsets, case.visits.sex, np.full(rows, 50, np.float32), np.zeros((rows, 9), np.bool_)
    )
    values = np.random.default_rng(0).random((rows, 9))
    found = subgroups.measure(values, values > 0.6, visits, case.ddi, 0.5)
    assert found["changes"] == {"hidden": True}
    assert all(cell["hidden"] for cell in found["tables"]["visit"])
    assert all(cell["hidden"] for cell in found["tables"]["visits of the patient"])
    assert [cell["group"] for cell in found["tables"]["age"]] == ["45 to 64"]


def test_without_demographics_there_is_one_group_of_unknown():
    case = make(8)
    unknown = dataclasses.replace(
        case.visits,
        sex=np.zeros_like(case.visits.sex),
        age=np.full_like(case.visits.age, np.nan),
    )
    found = subgroups.measure(case.probabilities, case.targets, unknown, case.ddi, 0.5)
    for table in ("sex", "age"):
        (cell,) = found["tables"][table]
        assert cell == {"group": "unknown"} | found["all"]


@pytest.mark.parametrize("patients", [1, 9])
def test_of_a_few_patients_nothing_is_told(patients):
    case = make(9, patients=patients)
    found = subgroups.measure(case.probabilities, case.targets, case.visits, case.ddi, 0.5)
    cells = [found["all"], found["changes"], *itertools.chain(*found["tables"].values())]
    assert all(cell["hidden"] and set(cell) <= {"hidden", "group"} for cell in cells)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6))
def test_tables_partition_the_visits_and_tell_of_ten_patients_or_more(seed, patients, longest):
    case = make(seed, patients, longest=longest, sexes=(0.05, 0.55, 0.4))
    total = len(case.targets)
    for groups in case.visits.groups().values():
        np.testing.assert_array_equal(np.sum(list(groups.values()), axis=0), np.ones(total))
        shown = subgroups.shown(groups, case.visits.patient_offsets)
        for name, visible in shown.items():
            patient = np.repeat(np.arange(patients), np.diff(case.visits.patient_offsets))
            size = len(set(patient[groups[name]]))
            assert size >= 1
            assert not visible or size >= 10
        left = [groups[name] for name, visible in shown.items() if not visible]
        if left and any(shown.values()):
            # What the total less all that is shown would be of.
            assert len(left) > 1
            assert len(set(patient[np.any(left, axis=0)])) >= 10


def test_the_fields_come_from_the_cohort_and_the_visit_before():
    none = CodeLists.of([[], [], [], [], []])
    cohort = Cohort(
        patient_offsets=np.array([0, 2, 3, 5]),
        patient_ids=("a", "b", "c"),
        visit_ids=tuple("vwxyz"),
        admitted=np.full(5, np.datetime64("NaT"), "datetime64[s]"),
        diagnoses=none,
        procedures=none,
        medications=CodeLists.of([[0, 2], [1], [2], [1, 0], [2]]),
        targets=CodeLists.of([[0], [1], [2], [1], []]),
        vocabularies={"diagnosis": (), "procedure": (), "medication": ("A", "B", "C")},
        ddi=np.zeros((3, 3), np.bool_),
        split=np.array([0, 2, 2], np.int8),
        sex=np.array([1, 2, 0], np.int8),
        age=np.array([1, 2, 3, 4, np.nan], np.float32),
    )
    found = subgroups.Visits.of(cohort, np.array([2, 0]))
    assert found.patient_offsets.tolist() == [0, 2, 4]
    assert found.sex.tolist() == [0, 1]
    np.testing.assert_array_equal(found.age, np.array([4, np.nan, 1, 2], np.float32))
    assert found.before.astype(int).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]
