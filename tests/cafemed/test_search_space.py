"""Search spaces: typed, checked against the options they vary, drawn as they say."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import optuna
import pytest
import yaml

import models
from cafemed import paths, search_space, sweep_plan
from cafemed.config import Range
from cafemed.errors import ConfigError
from cafemed.search_space import Categorical, Float, Integer
from cafemed.training import FitConfig

#: Spaces of CafeMed; those of another model are named after it.
SPACES = sorted(
    path for path in (paths.CONF_DIR / "search").glob("*.yaml") if path.stem not in models.NAMES
)
OTHER_MODELS = [name for name in models.NAMES if name != "cafemed"]


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


SECTIONS: dict[str, Any] = {"train": (Train, {"rate": 0.2}), "model": (Model, {"width": 12})}


def parse(space: dict[str, Any]) -> search_space.SearchSpace:
    return search_space.parse(space, SECTIONS)


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
        "search.space.model.parts": "expected a divisor of width = 12",
        "search.space.model.width.type": "got 3",
        "search.space.modle": "unknown section, expected one of train, model",
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
        (None, "rate.type"),
    ],
)
def test_a_bad_entry_is_refused(entry: Any, message: str):
    with pytest.raises(ConfigError, match=r"^search\.space\.train\.rate") as caught:
        parse({"train": {"rate": entry}})
    assert message in str(caught.value)


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
    parameters = {"model.parts": 3, "train.rate": 0.1, "train.size": 2}
    assert search_space.split(parameters) == {
        "model": {"parts": 3},
        "train": {"rate": 0.1, "size": 2},
    }


@pytest.fixture
def read() -> Callable[[dict[str, Any]], sweep_plan.SweepPlan]:
    def read(search: dict[str, Any]) -> sweep_plan.SweepPlan:
        return sweep_plan.read({"name": "cafemed"}, {}, search, models.options_class)

    return read


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_spaces_of_the_configuration_fit_the_model(path, read):
    plan = read(yaml.load(path.read_text(), yaml.CSafeLoader))
    needed = {"model.modulation_strength", "model.reduction_ratio", "train.ddi_coefficient"}
    assert needed <= set(plan.space.entries)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_space_named_after_a_model_fits_it_and_holds_its_defaults(name):
    content = yaml.safe_load((paths.CONF_DIR / "search" / f"{name}.yaml").read_text())
    plan = sweep_plan.read({"name": name}, {}, content, models.options_class)
    assert "train.ddi_coefficient" in plan.space.entries
    assert any(entry.startswith("model.") for entry in plan.space.entries)
    assert plan.start is not None


def test_the_papers_space_starts_from_the_papers_values(read):
    content = yaml.safe_load((paths.CONF_DIR / "search" / "paper.yaml").read_text())
    assert read(content).start == {
        "model.modulation_strength": 0.1,
        "model.reduction_ratio": 4,
        "train.ddi_coefficient": FitConfig().ddi_coefficient,
    }


def test_configured_values_outside_the_space_are_no_start(read):
    space = {"train": {"learning_rate": {"type": "float", "low": 0.1, "high": 0.2}}}
    assert read({"space": space}).start is None


def test_bad_settings_of_a_sweep_are_named(read):
    space = {"train": {"learning_rate": {"type": "float", "low": 0.1, "high": 0.2}}}
    with pytest.raises(ConfigError) as caught:
        read({"space": space, "num_samples": 0, "cpu": 1, "gpus": -1.0})
    for problem in ("search.cpu: unknown key", "search.num_samples: ", "search.gpus: "):
        assert problem in str(caught.value)
