"""True effects against enumeration, and against what back-door adjustment finds in the data."""

import numpy as np
import pytest
from scipy import sparse

from cafemed.synthetic.effects import interventions, previous_effects
from cafemed.synthetic.generator import previous
from cafemed.synthetic.model import draft_log_miss, draw_medications


@pytest.mark.parametrize("name", ["tiny", "persistent"])
def test_effects_equal_enumeration_of_the_intervened_model(name, request, enumeration):
    model = request.getfixturevalue(name)
    before, medications = (1, 0, 1, 0, 0), (0, 1, 0, 1)
    rows = 20_000
    effect, error = interventions(
        model,
        np.repeat([medications], rows, axis=0).astype(np.bool_),
        np.repeat([before], rows, axis=0).T.astype(np.bool_),
        np.random.default_rng(0),
    )
    expected = np.zeros((5, 4))
    for code in range(5):
        for value, sign in ((1, 1), (0, -1)):
            distribution = enumeration.code_distribution(model, before, {code: value})
            for codes, probability in distribution.items():
                given = enumeration.medication_distribution(model, codes, medications)
                expected[code] += sign * probability * enumeration.marginals(given)
    assert error.max() < 0.005
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(effect, expected, atol=5 * error.max())
    # The stated error is the spread over repetitions, not merely larger than it.
    distance = (effect - expected)[error > 1e-4] / error[error > 1e-4]
    assert 0.4 < np.sqrt(np.mean(distance**2)) < 2


def test_effects_of_previous_medications_are_those_of_drawing_visits_again(population):
    model, table = population.model, previous_effects(population)
    assert table.codes == tuple(f"previous_medication/{code}" for code in model.medications)
    rng = np.random.default_rng(2)
    later = rng.choice(np.flatnonzero(~population.is_first_visit()), 30_000)
    codes = np.hstack(
        [
            population.diagnoses.take(later).multi_hot(len(model.diagnoses)),
            population.procedures.take(later).multi_hot(len(model.procedures)),
        ]
    )
    codes = sparse.csr_array(codes.astype(np.float64))
    before = population.medications.take(later - 1).multi_hot(len(model.medications))
    for medication in (0, 7, 19):
        shares = []
        for value in (True, False):
            before[:, medication] = value
            shares.append(draw_medications(model, draft_log_miss(model, codes, before), rng))
        found = shares[0].mean(axis=0) - shares[1].mean(axis=0)
        before = population.medications.take(later - 1).multi_hot(len(model.medications))
        chance = np.sqrt(0.5 / len(later)) + table.standard_error[medication]
        assert (np.abs(found - table.effect[medication]) < 4 * chance).all()
        assert found[medication] > 0.2


def test_raw_risk_difference_is_biased_where_adjustment_is_not(population):
    """For codes without any effect whose parent causes the medication."""
    model = population.model
    medications = population.medications.multi_hot(len(model.medications))
    codes = np.hstack(
        [
            population.diagnoses.multi_hot(len(model.diagnoses)),
            population.procedures.multi_hot(len(model.procedures)),
        ]
    )
    before = previous(population, population.medications).multi_hot(len(model.medications))
    causes = set(zip(model.cause.tolist(), model.caused.tolist(), strict=True))
    parents_of_others = set(model.parent.tolist())
    raw, adjusted = [], []
    for code, parents in model.parents.items():
        confounders = [parent for parent, strength in parents if strength > 0.3]
        if code in parents_of_others or not confounders or codes[:, code].sum() < 100:
            continue
        for confounder in confounders:
            for medication in model.caused[model.cause == confounder]:
                if (code, medication) in causes:
                    continue
                outcome, strata = medications[:, medication], before[:, medication].astype(int)
                for place, (parent, _) in enumerate(parents):
                    strata = strata + (codes[:, parent].astype(int) << (place + 1))
                raw.append(_difference(outcome, codes[:, code]))
                adjusted.append(_adjusted(outcome, codes[:, code], strata))
    assert len(raw) >= 20
    error = np.std(adjusted) / np.sqrt(len(adjusted))
    assert np.mean(raw) > 0.1
    assert abs(np.mean(adjusted)) < 4 * error < 0.05


def _difference(outcome, treated):
    return outcome[treated].mean() - outcome[~treated].mean()


def _adjusted(outcome, treated, strata):
    total = weight = 0.0
    for stratum in np.unique(strata):
        inside = strata == stratum
        if treated[inside].any() and not treated[inside].all():
            total += inside.sum() * _difference(outcome[inside], treated[inside])
            weight += inside.sum()
    return total / weight
