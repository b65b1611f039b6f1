"""How much of a metric's variation each parameter of a sweep explains (Optuna's fANOVA).

The study is rebuilt from the sweep's table: finished trials are complete, those that the scheduler
stopped are pruned, so that a low value after few epochs is not taken for what the parameters give.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pyarrow as pa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

#: The parameter that chooses the model.
MODEL = "model.name"

_DIRECTIONS = {
    "jaccard": StudyDirection.MAXIMIZE,
    "ddi_rate": StudyDirection.MINIMIZE,
}

#: Different complete trials that an assessment needs: a forest's tree draws as many with
#: replacement, and one that drew the same trial throughout has no variance to divide.
FEWEST = 5

_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}


@dataclasses.dataclass(frozen=True)
class Importances:
    """Importances among the trials that have these parameters; they add up to at most 1.

    Attributes:
        trials: complete trials that have them all.
        values: parameter → its share of the metric's variance, the largest first.
    """

    trials: int
    values: Mapping[str, float]


def parameters(table: pa.Table) -> list[str]:
    """The names of a sweep's parameters, the columns with a section; the model itself first."""
    names = [name for name in table.column_names if "." in name]
    return sorted(names, key=lambda name: name != MODEL)


def assess(
    table: pa.Table, space: Mapping[str, Any], metric: str, seed: int = 0
) -> list[Importances]:
    """Assesses what a metric depends on.

    Parameters of every complete trial are assessed together, as
    `FanovaImportanceEvaluator` does. Conditional ones, which only some trials have,
    are assessed with them among those trials, one result for each set of trials.

    Args:
        table: of a sweep, see `sweep.SweepResult.table`.
        space: `search.space` of its settings: section → option → entry.
        metric: "jaccard" or "ddi_rate".
        seed: of the forests.

    Returns:
        Nothing where fewer than `FEWEST` complete trials differ, or all have the same value.
    """
    rebuilt = study(table, space, metric)
    complete = rebuilt.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    having: dict[str, list[int]] = {
        name: [trial.number for trial in complete if name in trial.params]
        for name in parameters(table)
    }
    common = [name for name, numbers in having.items() if len(numbers) == len(complete)]
    conditional: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in having.items():
        if len(numbers) < len(complete):
            conditional.setdefault(tuple(numbers), []).append(name)
    found = [_assess(rebuilt, complete, common, common, seed)]
    for having_them, names in conditional.items():
        among = [trial for trial in complete if trial.number in having_them]
        found.append(_assess(rebuilt, among, [*common, *names], names, seed))
    return [importances for importances in found if importances is not None]


def study(table: pa.Table, space: Mapping[str, Any], metric: str) -> optuna.Study:
    """Rebuilds a sweep as a study of one metric; trials without a finite value are failed ones."""
    names = [name for name in parameters(table) if table[name].null_count < table.num_rows]
    columns = {name: table[name].to_pylist() for name in names}
    distributions = {name: _distribution(entry_of(space, name), columns[name]) for name in names}
    models = columns.get(MODEL, [None] * table.num_rows)
    trials = []
    for row, (status, value) in enumerate(
        zip(table["status"].to_pylist(), table[metric].to_pylist(), strict=True)
    ):
        drawn = {
            name: columns[name][row]
            for name in names
            if columns[name][row] is not None
            or (_draws_none(distributions[name]) and _owner(name) in (None, models[row]))
        }
        finite = value is not None and math.isfinite(value)
        state = _STATES.get(status, TrialState.FAIL) if finite else TrialState.FAIL
        trials.append(
            optuna.create_trial(
                state=state,
                value=None if state == TrialState.FAIL else value,
                params=drawn,
                distributions={name: distributions[name] for name in drawn},
            )
        )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not "A new study created"
    try:
        rebuilt = optuna.create_study(direction=_DIRECTIONS[metric])
    finally:
        optuna.logging.set_verbosity(verbosity)
    rebuilt.add_trials(trials)
    return rebuilt


def _assess(
    rebuilt: optuna.Study,
    among: Sequence[FrozenTrial],
    names: list[str],
    reported: list[str],
    seed: int,
) -> Importances | None:
    # Where nothing differs, Optuna raises, or divides one rounding error by another.
    drawn = {tuple(trial.params[name] for name in names) for trial in among}
    if not reported or len(drawn) < FEWEST or len({trial.value for trial in among}) < 2:
        return None
    found = FanovaImportanceEvaluator(seed=seed).evaluate(rebuilt, params=names)
    return Importances(len(among), {name: float(found[name]) for name in found if name in reported})


def entry_of(space: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a parameter was drawn from, as configured; empty where that is not known."""
    found: Any = space
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _distribution(entry: Mapping[str, Any], values: Sequence[Any]) -> BaseDistribution:
    """What was drawn from; wide enough for trials that came from elsewhere."""
    drawn = [value for value in values if value is not None]
    kinds = {type(value) for value in drawn}
    if entry.get("type") != "categorical" and drawn and kinds <= {int, float}:
        low = min([entry.get("low", math.inf), *drawn])
        high = max([entry.get("high", -math.inf), *drawn])
        # Without "log", which fANOVA does not look at.
        return (IntDistribution if kinds == {int} else FloatDistribution)(low, high)
    choices = list(entry.get("choices", ()))
    if str in kinds:  # choices of several types are text in the table
        choices = [None if choice is None else str(choice) for choice in choices]
    choices += [value for value in dict.fromkeys(drawn) if value not in choices]
    return CategoricalDistribution(choices)


def _owner(name: str) -> str | None:
    """The model that alone has a parameter, "model.cafemed.gate"; None if all trials have it."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else None


def _draws_none(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution) and None in distribution.choices
