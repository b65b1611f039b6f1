"""Search spaces: which options a sweep varies, written in the configuration with their types.

    space:
      model:
        modulation_strength: {type: float, low: 0.01, high: 1.0, log: true}
        reduction_ratio: {type: categorical, choices: [2, 4, 8]}
      train:
        batch_size: {type: int, low: 8, high: 64}

A parameter is addressed by section and option, `model.modulation_strength`. Every entry is checked
against the options it varies before anything starts, and all that is wrong is reported at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from cafemed.config import from_mapping
from cafemed.errors import ConfigError

Scalar: TypeAlias = bool | int | float | str | None

#: Options of `train` that the sweep itself sets, or that do not change what is learned.
FIXED = {"train": ("epochs", "seed", "num_threads")}


class Suggests(Protocol):
    """The part of `optuna.Trial` that is used; so this module needs no Optuna."""

    @property
    def number(self) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Float:
    """A real number in [low, high]; log: drawn evenly on the logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _require_bounds(self.low, self.high, self.log)

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        """The values that have to be allowed for all to be."""
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Says whether the value can be drawn."""
        return _is_number(value) and self.low <= value <= self.high

    def suggest(self, name: str, trial: Suggests) -> float:
        """Draws a value."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number in [low, high], both included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _require_bounds(self.low, self.high, self.log)

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        """The values that have to be allowed for all to be."""
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Says whether the value can be drawn."""
        return _is_number(value) and isinstance(value, int) and self.low <= value <= self.high

    def suggest(self, name: str, trial: Suggests) -> int:
        """Draws a value."""
        return trial.suggest_int(name, self.low, self.high, log=self.log)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One of the choices, without an order among them."""

    choices: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        if len(self.choices) < 1:
            raise ConfigError("choices: expected at least one value, got none")
        kinds = {(type(choice), choice) for choice in self.choices}
        if len(kinds) < len(self.choices):
            raise ConfigError(f"choices: expected distinct values, got {list(self.choices)}")

    @property
    def extremes(self) -> tuple[Scalar, ...]:
        """The values that have to be allowed for all to be."""
        return self.choices

    def holds(self, value: Any) -> bool:
        """Says whether the value can be drawn."""
        return any(type(value) is type(c) and value == c for c in self.choices)

    def suggest(self, name: str, trial: Suggests) -> Any:
        """Draws a value."""
        return trial.suggest_categorical(name, list(self.choices))


Entry: TypeAlias = Float | Integer | Categorical
_TYPES: dict[str, type[Entry]] = {"float": Float, "int": Integer, "categorical": Categorical}


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The parameters of a sweep: "model.modulation_strength" → what it may be."""

    entries: Mapping[str, Entry]

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Draws a value for every parameter."""
        return {name: entry.suggest(name, trial) for name, entry in self.entries.items()}

    def holds(self, parameters: Mapping[str, Any]) -> bool:
        """Says whether these are values of exactly these parameters, each within its entry."""
        return set(parameters) == set(self.entries) and all(
            entry.holds(parameters[name]) for name, entry in self.entries.items()
        )


def parse(
    space: Mapping[str, Any],
    sections: Mapping[str, tuple[type, Mapping[str, Any]]],
    prefix: str = "search.space",
) -> SearchSpace:
    """Reads and checks a search space.

    Args:
        space: section → option → entry, as in the configuration.
        sections: section → the dataclass of its options, and the values configured for this run.
        prefix: how the user addresses the space.

    Raises:
        ConfigError: with everything that is wrong: unknown sections, options, types and keys;
            bounds in the wrong order or of the wrong type; values that the option does not allow.
    """
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    for section, options in space.items():
        key = f"{prefix}.{section}"
        if section not in sections:
            problems.append(f"{key}: unknown section, expected one of {', '.join(sections)}")
        elif not isinstance(options, Mapping):
            problems.append(f"{key}: expected a mapping of options, got {options!r}")
        else:
            for option, content in options.items():
                entry = _read_entry(content, f"{key}.{option}", problems)
                if entry is not None:
                    _check_values(section, option, entry, sections[section], key, problems)
                    entries[f"{section}.{option}"] = entry
    if not entries and not problems:
        problems.append(f"{prefix}: expected at least one parameter to vary, got none")
    if problems:
        raise ConfigError("; ".join(problems))
    return SearchSpace(entries)


def split(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Puts parameters back under their sections: {"model": {…}, "train": {…}}."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in parameters.items():
        section, option = name.split(".", 1)
        sections.setdefault(section, {})[option] = value
    return sections


def _read_entry(content: Any, key: str, problems: list[str]) -> Entry | None:
    if not isinstance(content, Mapping) or content.get("type") not in _TYPES:
        got = content.get("type") if isinstance(content, Mapping) else content
        problems.append(f"{key}.type: expected one of {', '.join(_TYPES)}, got {got!r}")
        return None
    rest = {name: value for name, value in content.items() if name != "type"}
    try:
        return from_mapping(_TYPES[content["type"]], rest, key)
    except ConfigError as err:
        problems.append(str(err))
        return None


def _check_values(
    section: str,
    option: str,
    entry: Entry,
    allowed: tuple[type, Mapping[str, Any]],
    key: str,
    problems: list[str],
) -> None:
    """Tries the entry's extreme values on the options' dataclass, which knows what is allowed."""
    if option in FIXED.get(section, ()):
        problems.append(f"{key}.{option}: is the same for all trials, set it under {section}")
        return
    options, configured = allowed
    for value in entry.extremes:
        try:
            from_mapping(options, {**configured, option: value}, key)
        except ConfigError as err:
            message = str(err)
            if not message.startswith(f"{key}.{option}"):  # a check of several options together
                reason = message.removeprefix(f"{key}: ").removeprefix(f"{option}: ")
                message = f"{key}.{option}: {reason}"
            problems.append(message)
            return


def _require_bounds(low: float, high: float, log: bool) -> None:
    if not (float("-inf") < low < high < float("inf")):
        raise ConfigError(f"expected finite low < high, got low {low!r} and high {high!r}")
    if log and low <= 0:
        raise ConfigError(f"low: expected more than 0 on the logarithmic scale, got {low!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
