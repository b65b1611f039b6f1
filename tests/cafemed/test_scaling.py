"""Scaling against plain loops, and that nothing of it comes from validation or test patients."""

import dataclasses
import math

import numpy as np
import pytest

from cafemed import scaling as scalings
from cafemed import suppression
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.config import from_mapping
from cafemed.errors import ConfigError
from cafemed.laboratory import Laboratory
from cafemed.scaling import Scaling

SPLIT = np.array([0, 0, 1, 2, 0], np.int8)
VISITS = (2, 40, 3, 2, 1)
ITEMS = ("lab:a", "lab:b", "lab:never", "lab:same", "lab:test_only")


@pytest.fixture(autouse=True)
def three_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cohort's training patients are enough to publish a mean of."""
    monkeypatch.setattr(suppression, "FEWEST", 3)


@pytest.fixture
def cohort() -> Cohort:
    rng = np.random.default_rng(0)
    total = sum(VISITS)
    offsets = np.concatenate([[0], np.cumsum(VISITS)])
    held_out = np.isin(np.repeat(np.arange(5), VISITS), [2, 3])
    lists, values = [], []
    for visit in range(total):
        items = [i for i in (1, 0, 3) if rng.random() < 0.7] + [4] * bool(held_out[visit])
        lists.append(items)
        values += [{0: rng.normal(140, 4), 1: rng.gamma(2, 3), 3: 7.0, 4: 1.0}[i] for i in items]
    nothing = CodeLists.of([[]] * total)
    age = rng.uniform(20, 90, total).astype(np.float32)
    age[[0, 5, 44]] = np.nan
    return Cohort(
        patient_offsets=offsets,
        patient_ids=tuple("abcde"),
        visit_ids=tuple(str(v) for v in range(total)),
        admitted=np.full(total, "NaT", "datetime64[s]"),
        diagnoses=nothing,
        procedures=nothing,
        medications=nothing,
        targets=nothing,
        vocabularies={"diagnosis": (), "procedure": (), "medication": (), "laboratory": ITEMS},
        ddi=np.zeros((0, 0), np.bool_),
        split=SPLIT,
        sex=np.zeros(5, np.int8),
        age=age,
        laboratory=Laboratory(CodeLists.of(lists), np.array(values, np.float32)),
    )


def training_values(cohort: Cohort, item: int) -> list[float]:
    patient = cohort.patient_of_visit()
    found = []
    for visit in range(cohort.num_visits):
        start = cohort.laboratory.items.offsets[visit]
        for place, i in enumerate(cohort.laboratory.items[visit]):
            if i == item and SPLIT[patient[visit]] == 0:
                found.append(float(cohort.laboratory.values[start + place]))
    return found


def test_means_and_deviations_are_those_of_training_visits(cohort: Cohort) -> None:
    made = scalings.fit(cohort)
    patient = cohort.patient_of_visit()
    ages = [
        float(a)
        for a, p in zip(cohort.age, patient, strict=True)
        if SPLIT[p] == 0 and not math.isnan(a)
    ]
    assert made.age_mean == pytest.approx(np.mean(ages))
    assert made.age_sd == pytest.approx(np.std(ages))
    for item in (0, 1):
        values = np.array(training_values(cohort, item))
        trimmed = values.clip(np.percentile(values, 1), np.percentile(values, 99))
        assert made.laboratory_mean[item] == pytest.approx(trimmed.mean())
        assert made.laboratory_sd[item] == pytest.approx(trimmed.std())
    assert (made.laboratory_mean[2], made.laboratory_sd[2]) == (0.0, 1.0)  # never measured
    assert (made.laboratory_mean[3], made.laboratory_sd[3]) == (7.0, 1.0)  # always the same
    assert (made.laboratory_mean[4], made.laboratory_sd[4]) == (0.0, 1.0)  # not in training


def test_other_patients_change_nothing(cohort: Cohort) -> None:
    held_out = np.isin(cohort.patient_of_visit(), [2, 3])
    age, values = cohort.age.copy(), cohort.laboratory.values.copy()
    age[held_out] = 1.0
    values[np.repeat(held_out, cohort.laboratory.items.counts)] = -1e6
    changed = dataclasses.replace(
        cohort, age=age, laboratory=Laboratory(cohort.laboratory.items, values)
    )
    assert scalings.fit(changed) == scalings.fit(cohort)
    in_training = dataclasses.replace(changed, split=np.zeros(5, np.int8))
    assert scalings.fit(in_training) != scalings.fit(cohort)


def test_ages_of_few_patients_do_not_leave_with_the_model(cohort: Cohort) -> None:
    assert scalings.fit(cohort).age_mean > 0
    age = cohort.age.copy()
    age[cohort.patient_of_visit() == 4] = np.nan  # two are left, with 41 visits between them
    made = scalings.fit(dataclasses.replace(cohort, age=age))
    assert (made.age_mean, made.age_sd) == (0.0, 1.0)
    assert made.laboratory_mean == scalings.fit(cohort).laboratory_mean


def test_one_absurd_value_does_not_flatten_the_others(cohort: Cohort) -> None:
    values = np.full(1000, 5.0, np.float32) + np.arange(1000, dtype=np.float32) % 3
    values[17] = 999_999
    lists = CodeLists(np.zeros(1000, np.int32), np.arange(1001))
    patients = {
        "patient_offsets": np.array([0, 1000]),
        "split": np.zeros(1, np.int8),
        "age": np.full(1000, np.nan, np.float32),
    }
    made = scalings.fit(
        dataclasses.replace(cohort, laboratory=Laboratory(lists, values), **patients)
    )
    assert made.laboratory_sd[0] < 1
    scaled = made.values(np.zeros(3, int), np.array([6.0, 999_999, -np.inf]))
    assert abs(scaled[0]) < 0.1
    assert scaled.tolist()[1:] == [10.0, -10.0]
    assert (made.age_mean, made.age_sd) == (0.0, 1.0)  # no age is known


def test_scaled_numbers_are_float32_and_unknown_ages_stay_unknown() -> None:
    scaling = Scaling(60.0, 10.0, (140.0, 1.0), (4.0, 0.5))
    ages = scaling.ages(np.array([70.0, np.nan, 55.0]))
    assert ages.dtype == np.float32
    np.testing.assert_array_equal(ages, np.array([1.0, np.nan, -0.5], np.float32))
    values = scaling.values(np.array([1, 0, 1]), np.array([2.0, 136.0, 1.0], np.float32))
    assert values.dtype == np.float32
    assert values.tolist() == [2.0, -1.0, 0.0]
    assert Scaling().values(np.zeros(0, np.int32), np.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"age_sd": 0.0}, "age_sd: expected a value in"),
        ({"laboratory_mean": [1.0]}, "laboratory_sd: expected 1 numbers, one an item, got 0"),
        ({"laboratory_mean": [1.0], "laboratory_sd": [-1.0]}, "laboratory_sd"),
        ({"age_mean": math.nan}, "expected finite numbers"),
    ],
)
def test_numbers_that_cannot_scale_are_refused(content: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Scaling, content, "")
