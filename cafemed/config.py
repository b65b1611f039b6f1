"""Plain mappings (from Hydra, JSON or a test) to frozen, checked dataclasses.

A field's type is written with its allowed range, `rate: Annotated[float, Range(0, 1)] = 0.7`.
Every wrong key, type and value is collected and reported at once, under the key as the user typed
it (`train.dropout`).
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cafemed.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed interval of a number: `low <= x <= high`, or open at an end where that is asked."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, x: float) -> bool:
        """Says whether x lies in the interval (NaN does not)."""
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Builds the dataclass `cls` from `values`; nested dataclasses take nested mappings.

    Args:
        cls: a dataclass whose annotations use bool, int, float, str, None, Literal, tuple[X, ...],
            dict, another such dataclass, or Annotated with a Range.
        values: keys are field names; keys left out take the field's default.
        prefix: how the user addresses these keys, for instance "train".

    Raises:
        ConfigError: with every unknown key, missing key, wrong type and value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix}: expected a mapping, got {values!r}")
    problems: list[str] = []
    built = _build(cls, values, prefix, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return built  # type: ignore[no-any-return]


def checked(hint: type[T], value: Any, key: str) -> T:
    """Gives a single value of this type, as `from_mapping` reads a field of it.

    Raises:
        ConfigError: if the value is of another type.
    """
    problems: list[str] = []
    converted = _convert(hint, value, key, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return converted  # type: ignore[no-any-return]


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    arguments: dict[str, Any] = {}
    for key in sorted(set(values) - set(fields)):
        known = ", ".join(fields)
        problems.append(f"{_dotted(prefix, key)}: unknown key; known keys: {known}")
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _dotted(prefix, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_dotted(prefix, name)}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ConfigError as err:  # a check across fields, in __post_init__
        problems.append(f"{prefix}: {err}" if prefix else str(err))
        return None


def _convert(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        base, *notes = get_args(hint)
        before = len(problems)
        value = _convert(base, value, key, problems)
        for note in notes:
            if (
                isinstance(note, Range)
                and value is not None
                and len(problems) == before
                and not note.holds(value)
            ):
                problems.append(f"{key}: expected a value in {note}, got {value!r}")
        return value
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool) != any(
            isinstance(a, bool) for a in get_args(hint) if a == value
        ):
            allowed = ", ".join(repr(a) for a in get_args(hint))
            problems.append(f"{key}: expected one of {allowed}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, key, problems)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{key}: expected a list, got {value!r}")
            return ()
        inner = get_args(hint)[0]
        return tuple(_convert(inner, v, f"{key}[{i}]", problems) for i, v in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{key}: expected a mapping, got {value!r}")
            return {}
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            problems.append(f"{key}: expected a mapping, got {value!r}")
            return None
        return _build(hint, value, key, problems)
    return _convert_scalar(hint, value, key, problems)


def _convert_union(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    options = get_args(hint)
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    attempts: list[list[str]] = []
    for option in kinds:
        attempt: list[str] = []
        converted = _convert(option, value, key, attempt)
        if not attempt:
            return converted
        attempts.append(attempt)
    if all(isinstance(option, type) for option in kinds) and len(kinds) > 1:
        names = " or ".join(option.__name__ for option in kinds)
        problems.append(f"{key}: expected {names}, got {value!r}")
    else:
        problems.extend(attempts[0])
    return None


def _convert_scalar(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    problems.append(f"{key}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _dotted(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
