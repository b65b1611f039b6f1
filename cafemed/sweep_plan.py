"""What a sweep is to do, read from the configuration and checked before anything starts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from cafemed import search_space
from cafemed.config import Range, from_mapping
from cafemed.search_space import SearchSpace
from cafemed.training import FitConfig


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a sweep is run (group `search`).

    Attributes:
        num_samples: trials.
        max_concurrent: trials at the same time; None: as many as the resources allow.
        cpus: CPUs reserved for a trial.
        gpus: GPUs reserved for a trial; 0.25 lets four share one.
        seed: of the sampler, and with a trial's number of that trial.
        grace_period: epochs that no trial is stopped before.
        reduction_factor: ASHA lets the best 1 / reduction_factor of the trials go on at each rung.
        space: what is varied; see cafemed/search_space.py.
    """

    space: dict[str, Any]
    num_samples: Annotated[int, Range(1)] = 32
    max_concurrent: Annotated[int, Range(1)] | None = None
    cpus: Annotated[float, Range(0, open_low=True)] = 1.0
    gpus: Annotated[float, Range(0)] = 0.0
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    grace_period: Annotated[int, Range(1)] = 5
    reduction_factor: Annotated[float, Range(1, open_low=True)] = 3.0

    @property
    def total_cpus(self) -> float:
        """CPUs that the trials at the same time reserve, if nothing else limits them."""
        return self.cpus * min(self.max_concurrent or self.num_samples, self.num_samples)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """A checked sweep.

    Attributes:
        model_name: passed to the builder.
        model_options: all options of the model, as configured; JSON values.
        fit: training as configured.
        search: see SearchConfig.
        space: what is varied.
    """

    model_name: str
    model_options: Mapping[str, Any]
    fit: FitConfig
    search: SearchConfig
    space: SearchSpace

    @property
    def start(self) -> dict[str, Any] | None:
        """The configured values of what is varied, if the space holds them all: the first trial."""
        configured = {"model": self.model_options, "train": dataclasses.asdict(self.fit)}
        parameters = {}
        for name in self.space.entries:
            section, option = name.split(".", 1)
            parameters[name] = configured[section][option]
        return parameters if self.space.holds(parameters) else None

    def settings(self) -> dict[str, Any]:
        """JSON values that, with the inputs, decide what the sweep finds."""
        return {
            "model": {"name": self.model_name, "options": dict(self.model_options)},
            "train": dataclasses.asdict(self.fit),
            "search": dataclasses.asdict(self.search),
        }


def read(
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    search: Mapping[str, Any],
    options_class: Callable[[str], type],
) -> SweepPlan:
    """Reads and checks the sections `model`, `train` and `search` of the configuration.

    Args:
        model: "name" and the model's options.
        train: see FitConfig.
        search: see SearchConfig.
        options_class: gives the dataclass of a model's options; jobs pass `models.options_class`.

    Raises:
        ConfigError: with everything that is wrong in a section.
    """
    given = dict(model)
    name = given.pop("name")
    options = options_class(name)
    checked = dataclasses.asdict(from_mapping(options, given, "model"))
    fit = from_mapping(FitConfig, train, "train")
    settings = from_mapping(SearchConfig, search, "search")
    sections = {"model": (options, checked), "train": (FitConfig, dataclasses.asdict(fit))}
    space = search_space.parse(settings.space, sections)
    return SweepPlan(name, checked, fit, settings, space)
