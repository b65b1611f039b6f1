"""Trials of earlier sweeps: which of them are trials of this one, and with which parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cafemed import artifacts, knowledge, sweep
from cafemed.errors import ArtifactError, ConfigError
from cafemed.sampling import Proposer
from cafemed.search_entries import Categorical, Float
from cafemed.search_space import SearchSpace
from cafemed.sweep import SweepResult


def written(sweeps: Any, folder: Path, plan: Any, parameters: list[dict[str, Any]]) -> str:
    """A finished sweep with these trials; gives the path of its table."""
    records = tuple(sweeps.record_of(n, p) for n, p in enumerate(parameters))
    with artifacts.new_folder(folder, sweep.STAGE, {}, plan.settings()) as (partial, _):
        sweep.write(SweepResult(records), partial, None)
    return str(folder / "sweep.parquet")


def test_a_table_gives_its_trials_again(sweeps: Any, tmp_path: Path):
    values: list[Any] = [1, "a", None, True]
    space = SearchSpace({"model.x": Categorical(tuple(values)), "train.y": Float(0, 1)}, "m")
    records = tuple(
        dataclasses.replace(
            sweeps.record_of(n, {"model.x": v, "train.y": 0.1, "train.learning_rate": 0.01}),
            parameters={"model.x": v, "train.y": 0.1 + n / 100},
        )
        for n, v in enumerate(values)
    )
    sweep.write(SweepResult(records), tmp_path, None)
    found = knowledge.own_trials(tmp_path, space)
    assert [record.parameters for record in found] == [record.parameters for record in records]
    assert [type(record.parameters["model.x"]) for record in found] == [int, str, type(None), bool]
    for before, after in zip(records, found, strict=True):
        assert after.best_so_far == before.best_so_far
        assert [e["metrics"] for e in after.history] == [e["metrics"] for e in before.history]
        assert [e["losses"] for e in after.history] == [e["losses"] for e in before.history]
        assert (after.status, after.seed, after.number) == (
            before.status,
            before.seed,
            before.number,
        )
    narrow = SearchSpace({"model.x": Categorical((1,)), "train.y": Float(0, 1)}, "m")
    with pytest.raises(ArtifactError, match="trial 1 does not lie in the space"):
        knowledge.own_trials(tmp_path, narrow)


def test_whole_numbers_of_a_real_parameter_are_real_in_the_table(sweeps: Any, tmp_path: Path):
    real = {"dropout": {"type": "float", "low": 0.0, "high": 0.8}}
    rate = {"learning_rate": {"type": "float", "low": 1e-4, "high": 1}}
    starts = [{"model.dropout": 0, "train.learning_rate": 1}]
    plan = sweeps.plan_of(space={"model": real, "train": rate}, starts=starts)
    proposer = Proposer(plan)
    drawn = [proposer.draw(number) for number in range(3)]
    assert drawn[0] == starts[0]
    table = written(sweeps, tmp_path / "sweep", plan, drawn)
    found = knowledge.own_trials(tmp_path / "sweep", plan.space)
    assert [record.parameters for record in found] == drawn
    prior, left = knowledge.prior_trials(sweeps.plan_of(space=plan.search.space, prior=[table]))
    assert ([record.parameters for record in prior], left) == (drawn, 0)
    # Of a sweep that varied it as a choice.
    chosen = {"model": {"dropout": {"type": "categorical", "choices": [0, 0.5]}}, "train": rate}
    values = [{"model.dropout": 0, "train.learning_rate": 0.5}]
    other = written(sweeps, tmp_path / "other", sweeps.plan_of(space=chosen), values)
    prior, left = knowledge.prior_trials(sweeps.plan_of(space=plan.search.space, prior=[other]))
    assert [type(value) for value in prior[0].parameters.values()] == [float, float]


def test_trials_fit_by_what_they_varied_and_what_was_configured(sweeps: Any, tmp_path: Path):
    there = {
        "train": {"learning_rate": {"type": "float", "low": 1e-5, "high": 0.5}},
        "model": {"dimension": {"type": "categorical", "choices": [32, 64]}},
    }
    earlier = sweeps.plan_of(space=there)
    table = written(
        sweeps,
        tmp_path / "sweep",
        earlier,
        [
            {"train.learning_rate": 0.01, "model.dimension": 64},  # dropout 0.7 as configured
            {"train.learning_rate": 0.4, "model.dimension": 64},  # outside the space
            {"train.learning_rate": 0.01, "model.dimension": 32},  # configured as 64 here
        ],
    )
    plan = sweeps.plan_of(prior=[table])
    found, left = knowledge.prior_trials(plan)
    assert [record.parameters for record in found] == [
        {"model.dropout": 0.7, "model.reduction_ratio": 4, "train.learning_rate": 0.01}
    ]
    assert left == 2
    assert knowledge.prior_inputs(plan) == {"prior 0": artifacts.sha256_of(Path(table))}


def test_trials_of_one_model_tell_of_a_space_of_several(sweeps: Any, tmp_path: Path):
    rate = {"learning_rate": {"type": "float", "low": 1e-4, "high": 0.1}}
    ratio = {"reduction_ratio": {"type": "categorical", "choices": [2, 4]}}
    one = sweeps.plan_of(space={"train": rate, "model": ratio})
    table = written(
        sweeps,
        tmp_path / "sweep",
        one,
        [{"train.learning_rate": 0.01, "model.reduction_ratio": 2}],
    )
    several = {
        "train": rate,
        "model": {
            "name": {"type": "categorical", "choices": ["causalmed", "cafemed"]},
            "cafemed": ratio,
            "causalmed": {"effect_levels": {"type": "int", "low": 2, "high": 9}},
        },
    }
    found, left = knowledge.prior_trials(sweeps.plan_of(space=several, prior=[table]))
    assert left == 0
    assert found[0].parameters == {
        "model.name": "cafemed",
        "model.cafemed.reduction_ratio": 2,
        "train.learning_rate": 0.01,
    }
    # And back; a trial of another model tells nothing of this one.
    back = written(
        sweeps,
        tmp_path / "several",
        sweeps.plan_of(space=several),
        [
            dict(found[0].parameters),
            {
                "model.name": "causalmed",
                "model.causalmed.effect_levels": 3,
                "train.learning_rate": 0.02,
            },
        ],
    )
    again, left = knowledge.prior_trials(
        sweeps.plan_of(space={"train": rate, "model": ratio}, prior=[back])
    )
    assert [dict(record.parameters) for record in again] == [
        {"train.learning_rate": 0.01, "model.reduction_ratio": 2}
    ]
    assert left == 1


def test_failed_trials_tell_nothing_and_a_table_alone_is_enough(sweeps: Any, tmp_path: Path):
    good = {"model.dropout": 0.2, "model.reduction_ratio": 2, "train.learning_rate": 0.01}
    records = (sweeps.record_of(0, good), sweeps.record_of(1, good, "failed"))
    sweep.write(SweepResult(records), tmp_path, None)
    plan = sweeps.plan_of(prior=[str(tmp_path / "sweep.parquet")])
    found, left = knowledge.prior_trials(plan)
    assert ([record.number for record in found], left) == ([0], 1)


def test_a_table_alone_of_several_models_is_enough(sweeps: Any, tmp_path: Path):
    several = {
        "train": {"learning_rate": {"type": "float", "low": 1e-4, "high": 0.1}},
        "model": {
            "name": {"type": "categorical", "choices": ["cafemed", "causalmed"]},
            "causalmed": {"effect_levels": {"type": "int", "low": 2, "high": 9}},
        },
    }
    parameters = [
        {"model.name": "cafemed", "train.learning_rate": 0.01},
        {
            "model.name": "causalmed",
            "model.causalmed.effect_levels": 3,
            "train.learning_rate": 0.02,
        },
    ]
    records = tuple(sweeps.record_of(n, p) for n, p in enumerate(parameters))
    sweep.write(SweepResult(records), tmp_path, None)
    plan = sweeps.plan_of(space=several, prior=[str(tmp_path / "sweep.parquet")])
    found, left = knowledge.prior_trials(plan)
    assert ([record.parameters for record in found], left) == (parameters, 0)


def test_what_is_no_table_is_refused(sweeps: Any, tmp_path: Path):
    table = tmp_path / "none.parquet"
    table.touch()
    plan = sweeps.plan_of(prior=[str(table)])
    table.unlink()
    with pytest.raises(ConfigError, match=r"search\.prior\[0\]: expected a sweep\.parquet, found"):
        knowledge.prior_inputs(plan)
    other = tmp_path / "sweep.parquet"
    other.write_text("x")
    with pytest.raises(ArtifactError, match=r"expected the sweep\.parquet of a sweep"):
        knowledge.prior_trials(sweeps.plan_of(prior=[str(other)]))
