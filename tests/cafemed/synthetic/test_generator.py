"""Populations: the same for a seed, with the marginals that were asked for."""

import dataclasses

import numpy as np
import pytest

from cafemed.config import from_mapping
from cafemed.errors import ConfigError
from cafemed.synthetic import SyntheticConfig, generate
from cafemed.synthetic.calibration import ddi_rate
from cafemed.synthetic.design import zipf
from cafemed.synthetic.generator import previous

LISTS = ("diagnoses", "procedures", "medications")


def test_a_seed_gives_the_same_population(population):
    again = generate(population.config, population.seed)
    for name in LISTS:
        np.testing.assert_array_equal(getattr(again, name).ids, getattr(population, name).ids)
    other = generate(population.config, population.seed + 1)
    assert not np.array_equal(other.medications.offsets, population.medications.offsets)


def test_sizes_and_visit_counts(population):
    config, counts = population.config, np.diff(population.patient_offsets)
    assert len(counts) == config.num_patients
    assert counts.sum() == population.num_visits == config.num_visits
    assert counts.min() == 2
    assert counts.max() >= 5
    for name in LISTS:
        lists = getattr(population, name)
        assert len(lists) == config.num_visits
        assert lists.counts.min() >= 1
        visit = np.repeat(np.arange(len(lists)), lists.counts)
        assert len(np.unique(visit * 1_000 + lists.ids)) == len(lists.ids)


def test_means_and_prevalences_are_near_the_settings(population):
    config = population.config
    # The spread of a mean over 1,900 visits is under 0.1; medications are calibrated on a pilot.
    assert population.diagnoses.counts.mean() == pytest.approx(10.5, abs=0.4)
    assert population.procedures.counts.mean() == pytest.approx(3.8, abs=0.2)
    assert population.medications.counts.mean() == pytest.approx(11.6, abs=0.6)
    found = np.sort(population.diagnoses.multi_hot(80).mean(axis=0))[::-1]
    np.testing.assert_allclose(found, zipf(config, 80, 10.5), atol=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ddi_rate_is_near_the_setting(seed):
    population = generate(SyntheticConfig(num_patients=600, num_visits=1_422), seed)
    sets = population.medications.multi_hot(100)
    ddi = population.model.ddi
    assert ddi_rate(sets, ddi) == pytest.approx(0.08, abs=0.012)
    assert (ddi == ddi.T).all()
    assert not ddi.diagonal().any()
    interacting = sum(ddi[np.ix_(s, s)].sum() for s in map(np.flatnonzero, sets))
    pairs = sum(len(s) * (len(s) - 1) for s in map(np.flatnonzero, sets))
    assert ddi_rate(sets, ddi) == pytest.approx(interacting / pairs)


def test_chunks_of_patients_join_up(population, monkeypatch):
    monkeypatch.setattr("cafemed.synthetic.generator._CHUNK_PATIENTS", 97)
    chunked = generate(population.config, population.seed)
    np.testing.assert_array_equal(chunked.patient_offsets, population.patient_offsets)
    later = np.flatnonzero(~population.is_first_visit())
    before = previous(chunked, chunked.medications)
    kept = [len(np.intersect1d(before[v], chunked.medications[v])) for v in later]
    share = np.sum(kept) / before.counts.sum()
    # Medications persist with 0.6 to 0.95, less what is struck: shuffled visits would give 0.3.
    assert share > 0.6


def test_previous_is_empty_at_first_visits(population):
    before = previous(population, population.medications)
    first = population.is_first_visit()
    assert (before.counts[first] == 0).all()
    later = np.flatnonzero(~first)
    np.testing.assert_array_equal(before.counts[later], population.medications.counts[later - 1])
    np.testing.assert_array_equal(before[later[5]], population.medications[later[5] - 1])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_visits": 30, "num_patients": 20}, "num_visits"),
        ({"strength_low": 0.9, "strength_high": 0.8}, "strength_low"),
        ({"diagnoses_per_visit": 300.0}, "diagnoses_per_visit"),
        ({"medications_per_visit": 100.0}, "medications_per_visit"),
        ({"avoidance": 1.5}, "data.generator.avoidance"),
        ({"leak_share": 0.0}, "data.generator.leak_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, key):
    with pytest.raises(ConfigError, match=key):
        from_mapping(SyntheticConfig, values, "data.generator")


def test_persistence_of_diagnoses_shows_in_the_visits(population):
    lasting = generate(
        dataclasses.replace(population.config, diagnosis_persistence=0.7), population.seed
    )

    def repeated(drawn):
        before = previous(drawn, drawn.diagnoses).multi_hot(80)
        now = drawn.diagnoses.multi_hot(80)
        return (before & now).sum() / before.sum()

    assert repeated(lasting) > 0.7 > 0.5 > repeated(population)
