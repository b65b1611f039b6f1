"""Search spaces: typed, checked against the options they vary, drawn as they say."""

import dataclasses
from typing import Annotated, Any

import optuna
import pytest

from cafemed import search_space
from cafemed.config import Range
from cafemed.errors import ConfigError
from cafemed.search_entries import Categorical, Float, Integer


@dataclasses.dataclass(frozen=True)
class Train:
    rate: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    size: Annotated[int, Range(1)] = 4
    epochs: int = 3
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    parts: int = 2

    def __post_init__(self) -> None:
        if self.width % self.parts:
            raise ConfigError(f"parts: expected a divisor of width = {self.width}")


@dataclasses.dataclass(frozen=True)
class Other:
    width: int = 8
    depth: int = 2


MODELS: dict[str, Any] = {"one": (Model, {"width": 12}), "two": (Other, {"width": 8})}


def parse(space: dict[str, Any], model: str = "one") -> search_space.SearchSpace:
    return search_space.parse(space, model, MODELS, (Train, {"rate": 0.2}))


def test_entries_take_their_types_and_addresses():
    space = parse(
        {
            "train": {
                "rate": {"type": "float", "low": 0.001, "high": 1, "log": True},
                "size": {"type": "int", "low": 1, "high": 8},
                "flag": {"type": "categorical", "choices": [True, False]},
            },
            "model": {"parts": {"type": "categorical", "choices": [1, 3, 6]}},
        }
    )
    assert space.entries == {
        "train.rate": Float(0.001, 1.0, log=True),
        "train.size": Integer(1, 8),
        "train.flag": Categorical((True, False)),
        "model.parts": Categorical((1, 3, 6)),
    }


def test_everything_wrong_is_reported_at_once_under_its_key():
    with pytest.raises(ConfigError) as caught:
        parse(
            {
                "train": {
                    "rate": {"type": "float", "low": 0.0, "high": 1.0},
                    "rat": {"type": "float", "low": 0.1, "high": 1.0},
                    "size": {"type": "float", "low": 1, "high": 8},
                    "epochs": {"type": "int", "low": 1, "high": 8},
                    "flag": {"type": "bool"},
                    "flags": {"type": "bool"},
                },
                "model": {"parts": {"type": "categorical", "choices": [3, 5]}, "width": 3},
                "modle": {},
            }
        )
    problems = str(caught.value).split("; ")
    assert "\n" not in str(caught.value)
    for key, message in {
        "search.space.train.rate": "expected a value in (0, 1], got 0.0",
        "search.space.train.rat": "unknown key",
        "search.space.train.size": "expected int, got 1.0",
        "search.space.train.epochs": "is the same for all trials",
        "search.space.train.flag.type": "expected one of float, int, categorical, got 'bool'",
        "search.space.train.flags.type": "expected one of float, int, categorical, got 'bool'",
        "search.space.train.flags": "unknown key",
        "search.space.model.parts": "expected a divisor of width = 12",
        "search.space.model.width.type": "got 3",
        "search.space.modle": "unknown section, expected one of model, train",
    }.items():
        assert any(p.startswith(f"{key}: ") and message in p for p in problems), (key, problems)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "float", "low": 0.5, "high": 0.5}, "low < high"),
        ({"type": "float", "low": 0.9, "high": 0.1}, "low < high"),
        ({"type": "float", "low": 0.1, "high": float("inf")}, "finite"),
        ({"type": "float", "low": 0.1}, "rate.high: missing"),
        ({"type": "float", "low": "1e-3", "high": 1.0}, "rate.low: expected float, got '1e-3'"),
        ({"type": "float", "low": 0.1, "high": 1.0, "step": 0.1}, "rate.step: unknown key"),
        ({"type": "float", "low": 0.0, "high": 1.0, "log": True}, "logarithmic scale"),
        ({"type": "int", "low": 0.5, "high": 2}, "rate.low: expected int, got 0.5"),
        ({"type": "categorical", "choices": []}, "at least one value"),
        ({"type": "categorical", "choices": [0.1, 0.1]}, "distinct values"),
        ({"type": "categorical", "choices": [[0.1]]}, "rate.choices"),
        ({"type": "categorical", "choices": 0.1}, "rate.choices: expected a list"),
        ({"low": 0.1, "high": 1.0}, "rate.type: expected one of float, int, categorical, got None"),
        ({"type": ["float"], "low": 0.1}, "rate.type: expected one of float, int, categorical"),
        (None, "rate.type"),
    ],
)
def test_a_bad_entry_is_refused(entry: Any, message: str):
    with pytest.raises(ConfigError, match=r"^search\.space\.train\.rate") as caught:
        parse({"train": {"rate": entry}})
    assert message in str(caught.value)


def test_entries_are_tried_alone_where_the_configured_values_are_wrong():
    space = {
        "train": {"rate": {"type": "float", "low": 0.0, "high": 0.5}},
        "model": {"parts": {"type": "categorical", "choices": [5]}, "depth": {"type": "int"}},
    }
    with pytest.raises(ConfigError) as caught:
        search_space.parse(space, "one", {**MODELS, "one": (Model, None)}, (Train, None))
    assert "search.space.train.rate: expected a value in (0, 1], got 0.0" in str(caught.value)
    assert "search.space.model: depth: only two has" in str(caught.value)
    assert "divisor" not in str(caught.value)


def test_an_empty_space_is_refused():
    with pytest.raises(ConfigError, match=r"search\.space: expected at least one parameter"):
        parse({})


def test_values_are_drawn_within_the_entries_and_by_the_seed():
    space = parse(
        {
            "train": {
                "rate": {"type": "float", "low": 0.001, "high": 0.01, "log": True},
                "size": {"type": "int", "low": 2, "high": 3},
                "flag": {"type": "categorical", "choices": [True, False]},
            }
        }
    )

    def draw() -> list[dict[str, Any]]:
        sampler = optuna.samplers.RandomSampler(seed=1)
        study = optuna.create_study(sampler=sampler)
        return [space.suggest(study.ask()) for _ in range(40)]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = draw()
    assert drawn == draw()
    assert all(space.holds(parameters) for parameters in drawn)
    assert {p["train.size"] for p in drawn} == {2, 3}
    assert {p["train.flag"] for p in drawn} == {True, False}
    # Evenly on the logarithmic scale: about half lie below the geometric mean.
    below = sum(p["train.rate"] < 0.001 * 10**0.5 for p in drawn)
    assert 10 <= below <= 30


def test_nearest_is_what_a_start_takes():
    assert [Float(0.1, 1.0).nearest(x) for x in (0.0, 0.5, 2, None)] == [0.1, 0.5, 1.0, 0.1]
    assert [Integer(1, 4).nearest(x) for x in (0, 3, 9, None)] == [1, 3, 4, 1]
    assert [Categorical((2, "a", None)).nearest(x) for x in ("a", None, "b")] == ["a", None, 2]


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        (Float(0.1, 1.0), (0.1, 1, 0.5), (0.09, 1.1, True, "0.5", None)),
        (Integer(1, 4), (1, 4), (0, 5, 2.0, True)),
        (Categorical((1, "a", None)), (1, "a", None), (True, 1.0, "b")),
    ],
)
def test_holds_says_what_can_be_drawn(entry: Any, inside: tuple[Any], outside: tuple[Any]):
    assert all(entry.holds(value) for value in inside)
    assert not any(entry.holds(value) for value in outside)


def test_parameters_go_back_to_their_sections():
    parameters = {"model.name": "one", "model.one.parts": 3, "train.rate": 0.1, "train.size": 2}
    assert search_space.split(parameters) == {
        "model": {"name": "one", "parts": 3},
        "train": {"rate": 0.1, "size": 2},
    }


BY_MODEL: dict[str, Any] = {
    "train": {"size": {"type": "int", "low": 1, "high": 2}},
    "model": {
        "two": {"depth": {"type": "int", "low": 1, "high": 3}},
        "width": {"type": "categorical", "choices": [4, 6]},
        "one": {"parts": {"type": "categorical", "choices": [1, 2]}},
        "name": {"type": "categorical", "choices": ["one", "two"]},
    },
}


def test_a_trial_has_the_parameters_of_its_model_only():
    space = parse(BY_MODEL)
    assert next(iter(space.entries)) == "model.name"
    assert space.models == ("one", "two")
    assert set(space.conditional) == {"model.one.parts", "model.two.depth"}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    shared = {"model.name", "model.width", "train.size"}
    own = {"one": {"model.one.parts"}, "two": {"model.two.depth"}}
    assert {parameters["model.name"] for parameters in drawn} == {"one", "two"}
    for parameters in drawn:
        assert set(parameters) == shared | own[parameters["model.name"]]
        assert space.holds(parameters)
    assert not space.holds(drawn[0] | {"model.one.parts": 1, "model.two.depth": 1})


def test_without_the_models_name_the_configured_one_is_searched():
    fixed = {**BY_MODEL, "model": {k: v for k, v in BY_MODEL["model"].items() if k != "name"}}
    assert set(parse(fixed, "two").entries) == {"model.width", "model.two.depth", "train.size"}
    assert parse(fixed, "two").conditional == ()


def test_a_grid_has_every_point_of_every_model_once():
    space = parse(BY_MODEL)
    points = list(space.grid())
    assert len(points) == space.grid_size() == 2 * 2 * (2 + 3)
    assert all(space.holds(point) for point in points)
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"parts": {"type": "categorical", "choices": [1, 2]}}, "parts: only one has, and two has"),
        ({"parts": {"type": "bool"}}, r"parts: only one has.*; .*model\.parts\.type: expected one"),
        ({"name": {"type": "categorical", "choices": ["one", "six"]}}, r"models \(one, two\), got"),
        ({"name": {"type": "int", "low": 0, "high": 1}}, "name.type: expected categorical"),
        ({"one": {"type": "categorical"}}, "search.space.model.one.type.type: expected one of"),
        ({"one": 3}, "search.space.model.one: expected a mapping of options, got 3"),
        ({"one": {"depth": {"type": "int", "low": 1, "high": 2}}}, "one.depth: unknown key"),
        (
            {"width": {"type": "int", "low": 1, "high": 4}, "two": {"width": {"type": "int"}}},
            "search.space.model.two.width: stands under search.space.model too",
        ),
    ],
)
def test_what_does_not_fit_the_models_is_refused(model: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse({"model": model}, "two")


def test_a_value_that_one_of_the_models_refuses_names_it():
    with pytest.raises(ConfigError, match=r"width: parts: .* \(of one\)$"):
        parse(
            {
                "model": {
                    "width": {"type": "int", "low": 3, "high": 8},
                    "name": {"type": "categorical", "choices": ["two", "one"]},
                }
            }
        )
