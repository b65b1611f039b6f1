import dataclasses
import math
from typing import Annotated, Any, Literal

import pytest

from cafemed.config import Range, checked, from_mapping
from cafemed.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Range(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 10)]
    name: str = "x"
    mode: Literal["a", "b"] = "a"
    limit: Annotated[float | None, Range(0, open_low=True)] = None
    share: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    sizes: tuple[Annotated[int, Range(1)], ...] = (1,)
    flag: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.name == "bad" and self.flag:
            raise ConfigError("name: bad does not go with flag")


def test_values_are_taken_and_the_rest_defaults():
    built = from_mapping(
        Outer,
        {"count": 3, "limit": 2, "sizes": [4, 5], "inner": {"rate": 1}, "options": {"k": 1}},
        "job",
    )
    assert built == Outer(3, limit=2.0, sizes=(4, 5), inner=Inner(1.0), options={"k": 1})
    assert isinstance(built.limit, float)
    assert isinstance(built.inner.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "job.count: expected a value in [1, 10], got 0"),
        ({"count": 11}, "job.count: expected a value in [1, 10], got 11"),
        ({"count": True}, "job.count: expected int, got True"),
        ({"count": 1.0}, "job.count: expected int, got 1.0"),
        ({"count": "3"}, "job.count: expected int, got '3'"),
        ({"count": None}, "job.count: expected int, got None"),
        ({}, "job.count: missing"),
        ({"limit": 0}, "job.limit: expected a value in (0, inf], got 0.0"),
        ({"limit": "soon"}, "job.limit: expected float, got 'soon'"),
        ({"limit": math.nan}, "job.limit: expected a value in (0, inf], got nan"),
        ({"share": 1}, "job.share: expected a value in [0, 1), got 1.0"),
        ({"mode": "c"}, "job.mode: expected one of 'a', 'b', got 'c'"),
        ({"flag": 1}, "job.flag: expected bool, got 1"),
        ({"sizes": 3}, "job.sizes: expected a list, got 3"),
        ({"sizes": [1, 0]}, "job.sizes[1]: expected a value in [1, inf], got 0"),
        ({"options": 3}, "job.options: expected a mapping, got 3"),
        ({"inner": 3}, "job.inner: expected a mapping, got 3"),
        ({"inner": {"rate": 2}}, "job.inner.rate: expected a value in [0, 1], got 2.0"),
        ({"inner": {"rat": 2}}, "job.inner.rat: unknown key; known keys: rate"),
        ({"name": "bad", "flag": True}, "job: name: bad does not go with flag"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    if message != "job.count: missing":
        values = {"count": 3} | values
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, values, "job")
    assert str(error.value) == message


@pytest.mark.parametrize("values", [None, 3, "group", [1]])
def test_a_section_that_is_no_mapping_is_named(values):
    with pytest.raises(ConfigError, match=r"^job: expected a mapping, got "):
        from_mapping(Outer, values, "job")


@dataclasses.dataclass(frozen=True)
class Version:
    alias: int | str


def test_a_value_of_none_of_several_types_is_told_all_of_them():
    assert from_mapping(Version, {"alias": "a"}, "job").alias == "a"
    with pytest.raises(ConfigError, match=r"^job.alias: expected int or str, got 3.5$"):
        from_mapping(Version, {"alias": 3.5}, "job")


def test_a_single_value_is_read_as_a_field():
    assert checked(bool, True, "promote") is True
    with pytest.raises(ConfigError, match=r"^promote: expected bool, got 'maybe'$"):
        checked(bool, "maybe", "promote")


def test_all_problems_come_together():
    values = {"count": 0, "colour": "red", "mode": "c", "inner": {"rate": 2, "rat": 1}}
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, values, "job")
    keys = {problem.split(":")[0] for problem in str(error.value).split("; ") if "." in problem}
    assert keys == {"job.count", "job.colour", "job.mode", "job.inner.rate", "job.inner.rat"}


def test_keys_have_no_prefix_at_the_top():
    with pytest.raises(ConfigError, match=r"^count: missing$"):
        from_mapping(Outer, {}, "")


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(0, 1), (0, 1, 0.5), (-0.1, 1.1, math.nan)),
        (Range(0, 1, open_low=True), (1e-9, 1), (0,)),
        (Range(0, 1, open_high=True), (0, 0.999), (1,)),
        (Range(low=2), (2, math.inf), (1.9,)),
    ],
)
def test_ranges_hold_what_they_should(limits, inside, outside):
    assert all(limits.holds(x) for x in inside)
    assert not any(limits.holds(x) for x in outside)
