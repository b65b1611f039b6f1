"""Importances against Optuna's own, called plainly on a study that is written out here."""

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator

from cafemed import importance

FLAT = {
    "model": {
        "gate": {"type": "categorical", "choices": ["visit", "position", "none"]},
        "strength": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
        "fixed": {"type": "categorical", "choices": [7]},
    },
    "train": {"batch_size": {"type": "int", "low": 4, "high": 128}},
}
DISTRIBUTIONS = {
    "model.gate": CategoricalDistribution(["visit", "position", "none"]),
    "model.strength": FloatDistribution(0.01, 1.0, log=True),
    "model.fixed": CategoricalDistribution([7]),
    "train.batch_size": IntDistribution(4, 128),
}


def flat_table(count: int = 40, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    gate = rng.choice(["visit", "position", "none"], count)
    batch = rng.integers(4, 129, count)
    statuses = np.where(np.arange(count) % 5 == 4, "stopped", "finished").astype(object)
    jaccard = 0.1 * (gate == "none") + 0.001 * batch + rng.normal(0, 0.005, count)
    jaccard[statuses == "stopped"] = 0.9  # would change everything, were it counted
    statuses[1] = "failed"
    jaccard[2] = np.nan
    return pa.table(
        {
            "trial": np.arange(count),
            "status": pa.array(statuses, pa.string()),
            "model.gate": gate,
            "model.strength": rng.uniform(0.01, 1, count),
            "model.fixed": np.full(count, 7),
            "train.batch_size": batch,
            "jaccard": jaccard,
            "ddi_rate": rng.random(count),
        }
    )


def plain(table: pa.Table, metric: str, direction: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.logging.get_logger("optuna"), "disabled", True, raising=False)
        study = optuna.create_study(direction=direction)
    for row in table.to_pylist():
        if row["status"] == "finished" and not np.isnan(row[metric]):
            parameters = {name: row[name] for name in DISTRIBUTIONS}
            study.add_trial(
                optuna.create_trial(
                    value=row[metric], params=parameters, distributions=DISTRIBUTIONS
                )
            )
    return FanovaImportanceEvaluator(seed=0).evaluate(study)


@pytest.mark.parametrize(
    ("metric", "direction"), [("jaccard", "maximize"), ("ddi_rate", "minimize")]
)
def test_importances_are_those_of_a_plain_call(metric: str, direction: str):
    table = flat_table()
    (found,) = importance.assess(table, FLAT, metric)
    expected = plain(table, metric, direction)
    assert found.values == pytest.approx(expected)
    assert list(found.values) == list(expected)  # the largest first
    assert found.values["model.fixed"] == 0
    if metric == "jaccard":
        assert found.trials == 30  # 8 of 40 stopped, one failed, one NaN
        assert found.values["model.gate"] + found.values["train.batch_size"] > 0.9


def test_importances_are_the_same_each_time():
    table = flat_table(seed=3)
    assert importance.assess(table, FLAT, "jaccard") == importance.assess(table, FLAT, "jaccard")


def test_conditional_parameters_are_assessed_among_the_trials_that_have_them(findings_of):
    found = findings_of(60)
    everywhere, *parts = importance.assess(found.table, found.space, "jaccard")
    complete = found.table.filter(pc.equal(found.table["status"], "finished"))
    models = complete["model.name"].to_pylist()
    assert everywhere.trials == len(models)
    assert set(everywhere.values) == {
        "model.name", "model.dropout", "train.learning_rate", "train.batch_size",
    }  # fmt: skip
    assert max(everywhere.values, key=everywhere.values.__getitem__) == "train.learning_rate"
    assert {frozenset(part.values): part.trials for part in parts} == {
        # "cwg_hidden" is null in a third of them, which is a value, not its absence
        frozenset({"model.cafemed.modulation_strength", "model.cafemed.cwg_hidden"}): models.count(
            "cafemed"
        ),
        frozenset({"model.causalmed.effect_levels"}): models.count("causalmed"),
    }


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_trials_have_no_importances(count: int):
    table = flat_table().slice(0, count)  # of 7, 4 are finished with a value
    assert importance.assess(table, FLAT, "jaccard") == []
    assert importance.assess(flat_table().slice(0, 8), FLAT, "jaccard") != []


def test_trials_that_are_all_alike_have_no_importances():
    table = flat_table()
    same = pa.array(np.full(table.num_rows, 0.5))
    column = table.column_names.index("jaccard")
    assert importance.assess(table.set_column(column, "jaccard", same), FLAT, "jaccard") == []
    # Different values, and no parameter that could explain them.
    one = table.take([0] * 10)
    drawn = pa.array(np.random.default_rng(0).random(10))
    assert importance.assess(one.set_column(column, "jaccard", drawn), FLAT, "jaccard") == []


def test_values_from_outside_the_space_widen_it():
    table = flat_table()
    narrow = {
        **FLAT,
        "model": {**FLAT["model"], "gate": {"type": "categorical", "choices": ["visit"]}},
        "train": {"batch_size": {"type": "int", "low": 10, "high": 20}},
    }
    (found,) = importance.assess(table, narrow, "jaccard")
    assert found.values["model.gate"] + found.values["train.batch_size"] > 0.9
    (unknown,) = importance.assess(table, {}, "jaccard")
    assert set(unknown.values) == set(DISTRIBUTIONS)


def test_choices_of_several_types_are_text_in_the_table():
    table = flat_table()
    text = pa.array([["1", "auto", None][i % 3] for i in range(table.num_rows)])
    column = table.column_names.index("model.gate")
    space = {"model": {"gate": {"type": "categorical", "choices": [1, "auto", None]}}}
    rebuilt = importance.study(table.set_column(column, "model.gate", text), space, "jaccard")
    for trial in rebuilt.trials:
        assert trial.distributions["model.gate"] == CategoricalDistribution(["1", "auto", None])
        assert trial.params["model.gate"] == ["1", "auto", None][trial.number % 3]
