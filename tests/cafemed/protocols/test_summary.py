import itertools

import numpy as np
import pytest

from cafemed.codes import CodeLists
from cafemed.protocols import CohortConfig, build, ddi_rate, summary


@pytest.mark.parametrize("seed", range(5))
def test_ddi_rate_equals_counting_pairs(seed):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((9, 9)) < 0.3, 1)
    ddi = upper | upper.T
    sets = [rng.choice(9, rng.integers(0, 7), replace=False).tolist() for _ in range(30)]
    pairs = [pair for drugs in sets for pair in itertools.combinations(drugs, 2)]
    expected = sum(ddi[a, b] for a, b in pairs) / len(pairs)
    assert ddi_rate(CodeLists.of(sets), ddi) == pytest.approx(expected, rel=1e-12)


def test_ddi_rate_without_any_pair_is_zero():
    assert ddi_rate(CodeLists.of([[0], []]), np.zeros((2, 2), np.bool_)) == 0.0


def test_summary_counts(hospitals, read):
    cohort, _ = build(*read(hospitals.draw(2, num_patients=40)), CohortConfig(target_window_h=6))
    numbers = summary(cohort)
    assert numbers["visits"] == len(cohort.visit_ids)
    assert sum(numbers["split"].values()) == numbers["patients"] == len(cohort.patient_ids)
    assert numbers["codes"]["medication"] == len(cohort.vocabularies["medication"])
    sizes = [len(cohort.diagnoses[v]) for v in range(cohort.num_visits)]
    assert numbers["codes_per_visit"]["diagnosis"] == round(sum(sizes) / len(sizes), 2)
    assert numbers["most_codes"]["diagnosis"] == max(sizes)
    assert numbers["empty_targets"] == (cohort.targets.counts == 0).sum() > 0
    assert numbers["ddi_pairs"] == cohort.ddi.sum() / 2
