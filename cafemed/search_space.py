"""Search spaces: which options a sweep varies, written in the configuration with their types.

    space:
      model:
        name: {type: categorical, choices: [cafemed, causalmed]}   # the model itself
        dropout: {type: float, low: 0.0, high: 0.8}                # an option that all of them have
        cafemed:                                                   # options of this one alone
          modulation_strength: {type: float, low: 0.01, high: 1.0, log: true}
        causalmed:
          effect_levels: {type: int, low: 2, high: 20}
      train:
        batch_size: {type: int, low: 8, high: 64}

A parameter is addressed by section and option, `model.dropout`, `model.cafemed.reduction_ratio`.
Without `name` the configured model is the only one, and the other models' sections do not count.
Every entry is checked against the options it varies before anything starts, and all that is wrong
is reported at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_type_hints

from cafemed.config import checked, from_mapping
from cafemed.errors import ConfigError
from cafemed.search_entries import Categorical, Entry, Suggests, read_entry

#: A dataclass of options, and the values that are configured for this run; None if those are wrong.
Options: TypeAlias = tuple[type, Mapping[str, Any] | None]

#: The parameter that chooses the model.
MODEL = "model.name"

#: Options of `train` that the sweep itself sets, or that do not change what is learned.
FIXED = ("epochs", "seed", "num_threads")


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The parameters of a sweep.

    Attributes:
        entries: "train.learning_rate" → what it may be; `MODEL`, if it is varied, comes first.
        model: the configured one, which all trials have unless `MODEL` is varied.
    """

    entries: Mapping[str, Entry]
    model: str

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that trials have."""
        entry = self.entries.get(MODEL)
        if entry is None:
            return (self.model,)
        return tuple(str(choice) for choice in entry.values or ())

    @property
    def conditional(self) -> tuple[str, ...]:
        """The parameters that not every trial has."""
        return tuple(name for name in self.entries if _owner(name) and len(self.models) > 1)

    def active(self, model: str) -> dict[str, Entry]:
        """The parameters of a trial with this model."""
        return {n: e for n, e in self.entries.items() if _owner(n) in (None, model)}

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Draws the model, if it is varied, and a value for every parameter it has."""
        drawn: dict[str, Any] = {}
        for name, entry in self.entries.items():
            if _owner(name) in (None, drawn.get(MODEL, self.model)):
                drawn[name] = entry.suggest(name, trial)
        return drawn

    def holds(self, parameters: Mapping[str, Any]) -> bool:
        """Says whether these are values of exactly a trial's parameters, each within its entry."""
        active = self.active(parameters.get(MODEL, self.model))
        return set(parameters) == set(active) and all(
            entry.holds(parameters[name]) for name, entry in active.items()
        )

    def grid_size(self) -> int:
        """Number of points that `grid` gives."""
        return sum(
            math.prod(len(e.values or ()) for n, e in self.active(model).items() if n != MODEL)
            for model in self.models
        )

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations of values; there are some only if no parameter is a real number."""
        for model in self.models:
            active = self.active(model).items()
            values: dict[str, Sequence[Any]] = {n: entry.values or () for n, entry in active}
            if MODEL in values:
                values[MODEL] = (model,)
            for point in itertools.product(*values.values()):
                yield dict(zip(values, point, strict=True))


def parse(
    space: Mapping[str, Any],
    model: str,
    models: Mapping[str, Options],
    train: Options,
    prefix: str = "search.space",
) -> SearchSpace:
    """Reads and checks a search space.

    Args:
        space: section → option → entry, as in the configuration; see the module's text.
        model: name of the configured model.
        models: name → options, of all models that there are.
        train: the options of training.
        prefix: how the user addresses the space.

    Raises:
        ConfigError: with everything that is wrong: unknown sections, options, types and keys;
            bounds in the wrong order or of the wrong type; values that the option does not allow.
    """
    reader = _Reader(model, models, [])
    entries: dict[str, Entry] = {}
    for section, options in space.items():
        key = f"{prefix}.{section}"
        if section not in ("model", "train"):
            reader.problems.append(f"{key}: unknown section, expected one of model, train")
        elif not isinstance(options, Mapping):
            reader.problems.append(f"{key}: expected a mapping of options, got {options!r}")
        elif section == "model":
            entries = reader.model_section(options, key) | entries
        else:
            entries |= reader.options(options, key, "train", [("train", train)])
    if not entries and not reader.problems:
        reader.problems.append(f"{prefix}: expected at least one parameter to vary, got none")
    if reader.problems:
        raise ConfigError("; ".join(reader.problems))
    return SearchSpace(entries, model)


def split(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Puts parameters back under their sections: {"model": {"name": …, …}, "train": {…}}."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in parameters.items():
        section, *_, option = name.split(".")
        sections.setdefault(section, {})[option] = value
    return sections


def _owner(name: str) -> str | None:
    """The model that alone has this parameter; None if all trials have it."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads sections of a space and gathers what is wrong with them."""

    model: str
    models: Mapping[str, Options]
    problems: list[str]

    def model_section(self, options: Mapping[str, Any], key: str) -> dict[str, Entry]:
        """The entries under `model`, `MODEL` first; those of models that no trial has are left."""
        entries: dict[str, Entry] = {}
        varied: list[str] = [self.model]
        if "name" in options:
            chosen = self._model_names(options["name"], f"{key}.name")
            if chosen is not None:
                entries[MODEL] = chosen
                varied = [str(name) for name in chosen.choices]
        shared = {k: v for k, v in options.items() if k != "name" and k not in self.models}
        self._refuse_foreign(shared, varied, key)
        known: dict[str, Any] = {}
        for option, content in shared.items():
            if self._foreign(option, varied):
                read_entry(content, f"{key}.{option}", self.problems)  # for what is wrong with it
            else:
                known[option] = content
        asked = [(name, self.models[name]) for name in varied]
        entries |= self.options(known, key, "model", asked)
        for name in (name for name in options if name in self.models):
            own, address = options[name], f"{key}.{name}"
            if not isinstance(own, Mapping):
                self.problems.append(f"{address}: expected a mapping of options, got {own!r}")
                continue
            for option in sorted(set(own) & set(shared)):
                self.problems.append(f"{address}.{option}: stands under {key} too")
            found = self.options(own, address, f"model.{name}", [(name, self.models[name])])
            entries |= found if name in varied else {}
        return entries

    def options(
        self,
        options: Mapping[str, Any],
        key: str,
        address: str,
        allowed: Sequence[tuple[str, Options]],
    ) -> dict[str, Entry]:
        """Reads the entries of a section, each checked against everything that takes it."""
        entries: dict[str, Entry] = {}
        for option, content in options.items():
            place = f"{key}.{option}"
            entry = read_entry(content, place, self.problems)
            if entry is not None:
                entries[f"{address}.{option}"] = entry
            if address == "train" and option in FIXED:
                self.problems.append(f"{place}: is the same for all trials, set it under train")
                continue
            for name, given in allowed:
                of = f" (of {name})" if len(allowed) > 1 else ""
                if option not in (known := _fields(given)):
                    self.problems.append(
                        f"{place}: unknown key; known keys: {', '.join(known)}{of}"
                    )
                    break
                if entry and _check_values(option, entry, given, key, of, self.problems):
                    break
        return entries

    def _model_names(self, content: Any, key: str) -> Categorical | None:
        entry = read_entry(content, key, self.problems)
        if entry is None:
            return None
        names = ", ".join(self.models)
        if not isinstance(entry, Categorical):
            self.problems.append(f"{key}.type: expected categorical, with choices among {names}")
            return None
        unknown = [choice for choice in entry.choices if choice not in self.models]
        if unknown:
            self.problems.append(
                f"{key}.choices: expected names of models ({names}), got {unknown[0]!r}"
            )
            return None
        return entry

    def _foreign(self, option: str, varied: Sequence[str]) -> list[str]:
        """The models that have an option which one of those varied has not; [] if nobody has it."""
        having = [name for name, given in self.models.items() if option in _fields(given)]
        return [] if set(varied) <= set(having) else having

    def _refuse_foreign(self, options: Mapping[str, Any], varied: Sequence[str], key: str) -> None:
        """Says in one line which options are another model's, and what can be chosen instead."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for option in options:
            if having := self._foreign(option, varied):
                groups.setdefault(tuple(having), []).append(option)
        for models, foreign in groups.items():
            having, lacking = list(models), [n for n in varied if n not in models]
            self.problems.append(
                f"{key}: {', '.join(foreign)}: only {_words(having)} has, and {_words(lacking)} "
                f"has not; choose model={having[0]}, search={lacking[0]} or search=wide, or put "
                f"what one model has under {key}.{having[0]}"
            )


def _fields(options: Options) -> list[str]:
    return [field.name for field in dataclasses.fields(options[0])]


def _words(names: Sequence[str]) -> str:
    return " and ".join(names)


def _check_values(
    option: str, entry: Entry, allowed: Options, key: str, of: str, problems: list[str]
) -> bool:
    """Tries the entry's extreme values on the options' dataclass; says whether one is refused.

    Where the configured values are wrong it is tried alone: what it goes with is not known.
    """
    options, configured = allowed
    hint = get_type_hints(options, include_extras=True)[option]
    for value in entry.extremes:
        try:
            if configured is None:
                checked(hint, value, f"{key}.{option}")
            else:
                from_mapping(options, {**configured, option: value}, key)
        except ConfigError as err:
            message = str(err)
            if not message.startswith(f"{key}.{option}"):  # a check of several options together
                reason = message.removeprefix(f"{key}: ").removeprefix(f"{option}: ")
                message = f"{key}.{option}: {reason}"
            problems.append(message + of)
            return True
    return False
