"""Effects with the true graph given against the generator's effects under intervention."""

import numpy as np
import pytest

from cafemed.cohort import Cohort
from cafemed.graphs import EffectTable
from cafemed.synthetic import SyntheticConfig, generate, truth
from cafemed.synthetic.confounding import confounded
from cafemed.synthetic.effects import previous_effects, true_effects
from cafemed.synthetic.generator import Population
from causal import effects
from causal.effects import EffectsConfig


def cohort_of(population: Population) -> Cohort:
    """All patients for training, without the detour through hospital tables."""
    model = population.model
    size = len(model.medications)
    return Cohort(
        patient_offsets=population.patient_offsets,
        patient_ids=tuple(str(i) for i in range(len(population.patient_offsets) - 1)),
        visit_ids=tuple(str(i) for i in range(population.num_visits)),
        admitted=np.zeros(population.num_visits, "datetime64[s]"),
        diagnoses=population.diagnoses,
        procedures=population.procedures,
        medications=population.medications,
        targets=population.medications,
        vocabularies={
            "diagnosis": model.diagnoses,
            "procedure": model.procedures,
            "medication": model.medications,
        },
        ddi=np.zeros((size, size), np.bool_),
        split=np.zeros(len(population.patient_offsets) - 1, np.int8),
        sex=np.zeros(len(population.patient_offsets) - 1, np.int8),
        age=np.full(population.num_visits, 50, np.float32),
        inputs="current",
    )


CODES = ("diagnosis", "procedure")

#: Name → settings: the default population, and one whose codes cause each other more strongly.
POPULATIONS = {
    "default": SyntheticConfig(),
    "dependent": SyntheticConfig(
        num_patients=6_000,
        num_visits=14_200,
        parents_per_code=2.0,
        code_strength_low=0.5,
        code_strength_high=0.95,
        specificity=0.5,
    ),
}


@pytest.fixture(scope="module", params=list(POPULATIONS))
def found(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, dict[str, EffectTable]]:
    """True effects, confounded pairs, and what each estimator gives."""
    population = generate(POPULATIONS[request.param], 1)
    graph = truth.graph_of(population)
    cohort = cohort_of(population)
    known = true_effects(population)
    tables = {
        name: effects.estimate(cohort, graph, EffectsConfig(name)).of_kinds(*CODES)
        for name in ("raw", "adjusted", "doubly_robust")
    }
    assert all(table.codes == known.codes for table in tables.values())
    pairs = confounded(graph, known.codes, known.medications)
    return known.effect.astype(float), pairs, tables


def test_intervals_hold_the_true_effect_as_often_as_they_say(
    found: tuple[np.ndarray, np.ndarray, dict[str, EffectTable]],
) -> None:
    real, pairs, tables = found
    table = tables["doubly_robust"]
    low, high = table.interval()
    covered = (low <= real) & (real <= high)
    of_pairs = {
        "all": table.supported,
        "confounded": table.supported & pairs,
        "large": table.supported & (np.abs(real) > 0.1),
        "none": table.supported & (real == 0),
    }
    for name, chosen in of_pairs.items():
        assert chosen.sum() > 300, name
        assert 0.92 <= covered[chosen].mean() <= 0.98, name
    # Where they lie matters too: half of them hold it at the level of a half.
    low, high = table.interval(0.5)
    assert ((low <= real) & (real <= high))[table.supported].mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("estimator", ["adjusted", "doubly_robust"])
def test_adjusting_lowers_the_error_where_pairs_are_confounded(
    found: tuple[np.ndarray, np.ndarray, dict[str, EffectTable]], estimator: str
) -> None:
    real, pairs, tables = found
    chosen = pairs & tables[estimator].supported

    def error(name: str) -> float:
        return float(np.sqrt(((tables[name].effect - real)[chosen] ** 2).mean()))

    assert chosen.sum() > 1000
    assert error(estimator) < 0.97 * error("raw")


def test_the_effect_of_a_medication_on_itself_a_visit_later_is_found() -> None:
    population = generate(POPULATIONS["default"], 1)
    graph, cohort = truth.graph_of(population), cohort_of(population)
    table = effects.estimate(cohort, graph, EffectsConfig()).of_kinds("previous_medication")
    known = previous_effects(population)
    assert (table.codes, table.medications) == (known.codes, known.medications)
    own = np.eye(len(known.codes), dtype=bool) & table.supported
    assert own.sum() > 80
    assert known.effect[own].mean() > 0.5
    error = (table.effect - known.effect)[own]
    assert np.sqrt((error**2).mean()) < 0.07
    assert abs(error.mean()) < 0.02
    # Diagnoses of the visit before are no nodes: what they confound is not adjusted for.
    low, high = table.interval()
    assert 0.85 < ((low <= known.effect) & (known.effect <= high))[own].mean() < 0.99
