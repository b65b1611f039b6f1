"""What a parameter of a search space may be: a real number, a whole number, one of some choices."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from cafemed.config import from_mapping
from cafemed.errors import ConfigError

Scalar: TypeAlias = bool | int | float | str | None


class Suggests(Protocol):
    """The part of `optuna.Trial` that is used; so this module needs no Optuna."""

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

    def nearest(self, value: Any) -> Scalar:
        """The allowed value that is nearest to a number; the lowest for what is none."""
        return min(max(float(value), self.low), self.high) if _is_number(value) else self.low

    @property
    def values(self) -> Sequence[Scalar] | None:
        """All values, where they can be counted."""
        return None

    def suggest(self, name: str, trial: Suggests) -> float:
        """Draws a value; a real number also where a whole one is fixed beforehand."""
        return float(trial.suggest_float(name, self.low, self.high, log=self.log))


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

    def nearest(self, value: Any) -> Scalar:
        """The allowed value that is nearest to a number; the lowest for what is none."""
        return min(max(int(value), self.low), self.high) if _is_number(value) else self.low

    @property
    def values(self) -> Sequence[Scalar] | None:
        """All values, where they can be counted."""
        return range(self.low, self.high + 1)

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

    def nearest(self, value: Any) -> Scalar:
        """The value itself if it is one of the choices, else the first choice."""
        return value if self.holds(value) else self.choices[0]

    @property
    def values(self) -> Sequence[Scalar] | None:
        """All values, where they can be counted."""
        return self.choices

    def suggest(self, name: str, trial: Suggests) -> Any:
        """Draws a value."""
        return trial.suggest_categorical(name, list(self.choices))


Entry: TypeAlias = Float | Integer | Categorical
_TYPES: dict[str, type[Entry]] = {"float": Float, "int": Integer, "categorical": Categorical}


def read_entry(content: Any, key: str, problems: list[str]) -> Entry | None:
    """Reads an entry of the configuration; None, and a problem, if it is none."""
    got = content.get("type") if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not isinstance(got, str) or got not in _TYPES:
        problems.append(f"{key}.type: expected one of {', '.join(_TYPES)}, got {got!r}")
        return None
    rest = {name: value for name, value in content.items() if name != "type"}
    try:
        return from_mapping(_TYPES[got], rest, key)
    except ConfigError as err:
        problems.append(str(err))
        return None


def _require_bounds(low: float, high: float, log: bool) -> None:
    if not (float("-inf") < low < high < float("inf")):
        raise ConfigError(f"expected finite low < high, got low {low!r} and high {high!r}")
    if log and low <= 0:
        raise ConfigError(f"low: expected more than 0 on the logarithmic scale, got {low!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
