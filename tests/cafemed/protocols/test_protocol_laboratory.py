"""Which items a cohort keeps, against plain counting; nothing comes from held-out patients."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cafemed import scaling
from cafemed.codes import CodeLists
from cafemed.cohort import SPLITS, Cohort
from cafemed.protocols import with_laboratory
from cafemed.records import Dropped, SourceFile
from cafemed.sources.laboratory import Measured

NAMES = tuple(f"lab:{i}" for i in range(8))
NUM_VISITS = 60


@pytest.fixture
def cohort():
    nothing = CodeLists.of([[]] * NUM_VISITS)
    return Cohort(
        patient_offsets=np.arange(0, NUM_VISITS + 1, 3),
        patient_ids=tuple(f"p{i}" for i in range(20)),
        visit_ids=tuple(f"v{i}" for i in range(NUM_VISITS)),
        admitted=np.full(NUM_VISITS, "NaT", "datetime64[s]"),
        diagnoses=nothing,
        procedures=nothing,
        medications=nothing,
        targets=nothing,
        vocabularies={"diagnosis": (), "procedure": (), "medication": ()},
        ddi=np.zeros((0, 0), np.bool_),
        split=np.random.default_rng(0)
        .permutation(np.repeat([0, 1, 2], [12, 4, 4]))
        .astype(np.int8),
        sex=np.zeros(20, np.int8),
        age=np.full(NUM_VISITS, 50, np.float32),
    )


@pytest.fixture
def measured(cohort):
    rng = np.random.default_rng(1)
    # Item 7 is measured often, but never in training; items 2 and 3 equally often.
    training = np.repeat(cohort.split == SPLITS.index("train"), 3)
    present = rng.random((NUM_VISITS, 8)) < np.linspace(0.9, 0.1, 8)
    present[:, 7] = ~training
    present[:, 3] = present[:, 2]
    visit, item = np.nonzero(present)
    return Measured(
        visit=visit,
        item=item,
        value=rng.normal(item, 1).astype(np.float32),
        names=NAMES,
        file=SourceFile(Path("LABEVENTS.csv"), "0" * 64, 1, 999),
        dropped=(Dropped("laboratory", "no visit", 5),),
    )


def rows(measured, cohort):
    training = np.repeat(cohort.split == 0, 3)
    return [
        (v, NAMES[i], float(x), bool(training[v]))
        for v, i, x in zip(measured.visit, measured.item, measured.value, strict=True)
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_the_items_in_most_training_visits_stay(most, cohort, measured):
    added, dropped = with_laboratory(cohort, measured, most)
    given = rows(measured, cohort)
    counts = Counter(name for _, name, _, training in given if training)
    patients = {
        name: {v // 3 for v, n, _, training in given if n == name and training} for name in NAMES
    }
    usual = [name for name in counts if len(patients[name]) >= 10]
    kept = sorted(sorted(usual, key=lambda name: (-counts[name], name))[:most])
    assert added.vocabularies["laboratory"] == tuple(kept)
    # One item is of too few training patients although it is measured there.
    assert 0 < len(patients["lab:6"]) < 10
    assert len(usual) == 6
    found = [
        (visit, kept[i], x)
        for visit in range(NUM_VISITS)
        for i, x in zip(
            added.laboratory.items[visit],
            added.laboratory.values[slice(*added.laboratory.items.offsets[visit : visit + 2])],
            strict=True,
        )
    ]
    assert found == [(v, name, x) for v, name, x, _ in given if name in kept]
    lost = [(d.reason, d.num_rows) for d in dropped]
    rare = sum(name not in usual for _, name, _, _ in given)
    assert lost == [
        ("no visit", 5),
        (f"not among the {most} items kept", len(given) - len(found) - rare),
        ("item of under 10 training patients", rare),
    ]
    for field in dataclasses.fields(cohort):
        if field.name not in ("vocabularies", "laboratory"):
            assert getattr(added, field.name) is getattr(cohort, field.name)


def test_held_out_patients_decide_nothing(cohort, measured):
    held_out = np.repeat(cohort.split != 0, 3)[measured.visit]
    item, value = measured.item.copy(), measured.value.copy()
    item[held_out] = (item[held_out] + 3) % 7
    value[held_out] = 1e6
    order = np.lexsort((item, measured.visit))
    other = dataclasses.replace(measured, item=item[order], value=value[order])
    ours, theirs = (with_laboratory(cohort, m, 4)[0] for m in (measured, other))
    assert ours.vocabularies == theirs.vocabularies
    assert scaling.fit(ours) == scaling.fit(theirs)
    assert not np.array_equal(ours.laboratory.items.offsets, theirs.laboratory.items.offsets)
    # The same change in training patients would be seen.
    everyone = dataclasses.replace(cohort, split=np.zeros(20, np.int8))
    ours, theirs = (with_laboratory(everyone, m, 4)[0] for m in (measured, other))
    assert scaling.fit(ours) != scaling.fit(theirs)


def test_a_cohort_in_which_nothing_was_measured(cohort, measured):
    nothing = dataclasses.replace(
        measured, visit=measured.visit[:0], item=measured.item[:0], value=measured.value[:0]
    )
    added, _ = with_laboratory(cohort, nothing, 4)
    assert added.vocabularies["laboratory"] == ()
    assert added.laboratory.items.counts.tolist() == [0] * NUM_VISITS
