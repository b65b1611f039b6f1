"""What proposes a sweep's parameters: an Optuna study that is told the truth about every trial.

Before each draw the sampler is made anew, seeded with the sweep's seed and the trial's number. So
what it draws depends on the trials that it was told, and on nothing else: a sweep that goes on from
its history, told in the same order, draws what it would have drawn without the interruption.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cafemed.sweep import TrialRecord
from cafemed.sweep_plan import SweepPlan

if TYPE_CHECKING:
    import optuna

_DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "jaccard": "maximize",
    "ddi_rate": "minimize",
}
#: Tells the sampler's stream of random numbers from the trial's own.
_SAMPLER_STREAM = 1


def trial_seed(seed: int, number: int) -> int:
    """The seed of trial `number` in a sweep with this seed."""
    return _seed(seed, number)


def sampler_seed(seed: int, number: int) -> int:
    """The seed of the sampler when it draws trial `number`."""
    return _seed(seed, number, _SAMPLER_STREAM)


def make_sampler(plan: SweepPlan, seed: int) -> "optuna.samplers.BaseSampler":
    """The sampler that `search.sampler` names; grid needs none, its points are set."""
    import optuna

    samplers, name = optuna.samplers, plan.search.sampler
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=plan.search.population_size, seed=seed)
    if name in ("random", "grid"):
        return samplers.RandomSampler(seed=seed)
    multivariate = name == "tpe_multivariate"
    with warnings.catch_warnings():
        # `group`, for parameters that not all trials have, is called experimental since 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return samplers.TPESampler(
            multivariate=multivariate,
            group=multivariate and bool(plan.space.conditional),
            seed=seed,
        )


class Proposer:
    """Draws the parameters of trials, and is told what came of them.

    A trial that the scheduler stopped is told as pruned, with its values epoch by epoch: told as
    complete, its low value would count against its parameters as if it had had all its epochs. One
    that failed is told as failed, and the sampler leaves it out.
    """

    def __init__(self, plan: SweepPlan) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        self._plan = plan
        self._first: list[Mapping[str, Any]] = list(plan.starts)
        if plan.search.sampler == "grid":
            self._first = list(plan.space.grid())
        self.study = optuna.create_study(
            directions=[_DIRECTIONS[name] for name in plan.search.objectives]
        )
        self._asked: dict[int, optuna.Trial] = {}

    def draw(self, number: int) -> dict[str, Any]:
        """The parameters of a new trial: the starting points first, then what is drawn."""
        first = self._first[number] if number < len(self._first) else None
        return self._ask(number, first)

    def repeat(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Takes note of a trial that was drawn before an interruption."""
        self._ask(number, parameters)

    def tell(self, record: TrialRecord) -> None:
        """Takes note of what came of a trial that was drawn or repeated."""
        self._tell(self._asked.pop(record.number), record)

    def know(self, record: TrialRecord) -> None:
        """Takes note of another sweep's trial."""
        self._ask(-1, record.parameters)
        self._tell(self._asked.pop(-1), record)

    def _ask(self, number: int, fixed: Mapping[str, Any] | None) -> dict[str, Any]:
        import optuna

        sampler = make_sampler(self._plan, sampler_seed(self._plan.search.seed, max(number, 0)))
        if fixed is not None:
            # Not `enqueue_trial`, which asks no sampler: nsga2 would leave the trial out for ever.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.PartialFixedSampler(dict(fixed), sampler)
        self.study.sampler = sampler
        trial = self._asked[number] = self.study.ask()
        return self._plan.space.suggest(trial)

    def _tell(self, trial: "optuna.Trial", record: TrialRecord) -> None:
        from optuna.trial import TrialState

        objectives, best = self._plan.search.objectives, record.best_epoch
        if best is None or record.status == "failed":
            self.study.tell(trial, state=TrialState.FAIL)
            return
        if (limit := self._plan.search.max_ddi_rate) is not None:
            trial.set_constraint("ddi_rate", best["metrics"]["ddi_rate"] - limit)
        if record.status == "finished":
            self.study.tell(trial, [best["metrics"][name] for name in objectives])
        elif len(objectives) > 1:  # cut off by the time limit; Optuna prunes for one objective
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            for epoch, value in enumerate(record.best_so_far, 1):
                trial.report(value, epoch)
            self.study.tell(trial, state=TrialState.PRUNED)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
