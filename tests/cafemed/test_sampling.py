"""Proposals: those of an Optuna study that is told the same, with what was stopped told as such."""

import warnings
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from cafemed.sampling import Proposer, sampler_seed, trial_seed

SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=False),
    "tpe_multivariate": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=4),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


@pytest.fixture(scope="module")
def plan_of(sweeps: Any) -> Any:
    return sweeps.plan_of


def settings(sampler: str, **more: Any) -> dict[str, Any]:
    return {
        "sampler": sampler,
        "scheduler": "none",
        "population_size": 4,
        "num_samples": 40,
        "seed": 3,
    } | more


def plainly(sweeps: Any, plan: Any, sampler: str, count: int) -> list[dict[str, Any]]:
    """The same draws by Optuna's own loop: fixed starts, ask, suggest, tell."""
    objectives = plan.search.objectives
    directions = ["maximize", "minimize"][: len(objectives)]
    study = optuna.create_study(directions=directions)
    if sampler != "nsga2":  # which leaves out of its generations what was enqueued
        study.enqueue_trial(dict(plan.starts[0]))
    drawn = []
    for number in range(count):
        study.sampler = SAMPLERS[sampler](sampler_seed(plan.search.seed, number))
        if number == 0 and sampler == "nsga2":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                fixed = dict(plan.starts[0])
                study.sampler = optuna.samplers.PartialFixedSampler(fixed, study.sampler)
        trial = study.ask()
        parameters = {
            "model.dropout": trial.suggest_float("model.dropout", 0.0, 0.8),
            "model.reduction_ratio": trial.suggest_categorical("model.reduction_ratio", [2, 4, 8]),
            "train.learning_rate": trial.suggest_float("train.learning_rate", 1e-4, 0.1, log=True),
        }
        drawn.append(parameters)
        history = sweeps.history_of(parameters)
        if number % 3 == 2 and len(objectives) == 1:
            for epoch in history[:4]:
                trial.report(epoch["metrics"]["jaccard"], epoch["epoch"])
            study.tell(trial, state=TrialState.PRUNED)
        elif number % 7 == 4:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [history[-1]["metrics"][name] for name in objectives])
    return drawn


def record(sweeps: Any, number: int, parameters: dict[str, Any], objectives: int) -> Any:
    if number % 3 == 2 and objectives == 1:
        return sweeps.record_of(number, parameters, "stopped", 4)
    return sweeps.record_of(number, parameters, "failed" if number % 7 == 4 else "finished")


@pytest.mark.parametrize("objectives", [["jaccard"], ["jaccard", "ddi_rate"]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_are_those_of_an_optuna_study_told_the_same(
    sweeps: Any, sampler: str, objectives: list[str]
):
    plan = sweeps.plan_of(**settings(sampler, objectives=objectives))
    proposer, drawn = Proposer(plan), []
    for number in range(24):
        drawn.append(proposer.draw(number))
        proposer.tell(record(sweeps, number, drawn[-1], len(objectives)))
    assert drawn[0] == plan.starts[0]
    assert drawn == plainly(sweeps, plan, sampler, 24)
    assert len({parameters["model.dropout"] for parameters in drawn}) > 8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_proposer_told_the_history_draws_what_the_first_one_draws(sweeps: Any, sampler: str):
    plan = sweeps.plan_of(**settings(sampler))
    first, drawn = Proposer(plan), []
    for number in range(24):
        if number == 15:
            again = Proposer(plan)
            for earlier in range(15):
                again.repeat(earlier, drawn[earlier])
                again.tell(record(sweeps, earlier, drawn[earlier], 1))
        drawn.append(first.draw(number))
        first.tell(record(sweeps, number, drawn[-1], 1))
        if number >= 15:
            assert again.draw(number) == drawn[-1]
            again.tell(record(sweeps, number, drawn[-1], 1))


def test_what_was_stopped_is_told_as_pruned_and_what_failed_as_failed(sweeps: Any):
    proposer = Proposer(sweeps.plan_of())
    parameters = [proposer.draw(number) for number in range(3)]
    proposer.tell(sweeps.record_of(2, parameters[2], "failed", 0))
    proposer.tell(sweeps.record_of(1, parameters[1], "stopped", 3))
    proposer.tell(sweeps.record_of(0, parameters[0]))
    states = [trial.state for trial in proposer.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    jaccard = [epoch["metrics"]["jaccard"] for epoch in sweeps.history_of(parameters[1])]
    values = proposer.study.trials[1].intermediate_values
    assert values == {epoch: max(jaccard[:epoch]) for epoch in (1, 2, 3)}


def test_the_sampler_learns_which_trials_keep_the_ddi_rate(sweeps: Any):
    plan = sweeps.plan_of(max_ddi_rate=0.052, sampler="tpe", num_samples=60, scheduler="none")
    proposer, late = Proposer(plan), []
    for number in range(50):
        parameters = proposer.draw(number)
        proposer.tell(sweeps.record_of(number, parameters))
        late += [parameters["train.learning_rate"]] if number >= 25 else []
    told = [trial.constraints["ddi_rate"] for trial in proposer.study.trials]
    rates = [t.params["train.learning_rate"] for t in proposer.study.trials]
    assert told == pytest.approx([0.05 + rate / 10 - 0.052 for rate in rates])
    # Without the limit the best rate is 0.01, half of the draws are below 0.02 only by the limit.
    assert sum(rate <= 0.02 for rate in late) > 0.8 * len(late)


def test_models_with_parameters_of_their_own_are_searched_together(sweeps: Any):
    space = {
        "model": {
            "name": {"type": "categorical", "choices": ["cafemed", "causalmed"]},
            "cafemed": {"modulation_strength": {"type": "float", "low": 0.1, "high": 1.0}},
            "causalmed": {"effect_levels": {"type": "int", "low": 2, "high": 9}},
        },
        **{"train": sweeps.SPACE["train"]},
    }
    for sampler in ("tpe", "tpe_multivariate", "random"):
        plan = sweeps.plan_of(space=space, sampler=sampler, num_samples=30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            proposer = Proposer(plan)
            drawn = []
            for number in range(30):
                drawn.append(proposer.draw(number))
                proposer.tell(sweeps.record_of(number, drawn[-1]))
        assert drawn[:2] == [dict(start) for start in plan.starts]
        assert [start["model.name"] for start in plan.starts] == ["cafemed", "causalmed"]
        assert all(plan.space.holds(parameters) for parameters in drawn)


def test_a_grid_is_walked_point_by_point(sweeps: Any):
    space = {"model": {"reduction_ratio": {"type": "categorical", "choices": [2, 4, 8]}}}
    plan = sweeps.plan_of(space=space, sampler="grid", num_samples=3)
    proposer = Proposer(plan)
    assert [proposer.draw(n)["model.reduction_ratio"] for n in range(3)] == [2, 4, 8]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_other_sweeps_trials_count_for_the_sampler(sweeps: Any, sampler: str):
    plan = sweeps.plan_of(**settings(sampler, seed=1))
    knowing = Proposer(plan)
    for number in range(30):
        rate = 10 ** (-4 + 3 * number / 29)
        found = {"model.dropout": 0.4, "model.reduction_ratio": 4, "train.learning_rate": rate}
        knowing.know(sweeps.record_of(number, found))
    drawn = [knowing.draw(number)["train.learning_rate"] for number in range(1, 15)]
    blank = Proposer(plan)
    at_random = [blank.draw(number)["train.learning_rate"] for number in range(1, 15)]
    near = [sum(0.003 < rate < 0.03 for rate in rates) for rates in (drawn, at_random)]
    assert near[0] >= 10
    assert near[1] <= 5


def test_seeds_differ_by_trial_and_by_purpose():
    seeds = [trial_seed(0, n) for n in range(50)] + [sampler_seed(0, n) for n in range(50)]
    assert len(set(seeds)) == 100
    assert trial_seed(0, 1) != trial_seed(1, 0)
