"""What a sweep is to do, read from the configuration and checked before anything starts."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_type_hints

from cafemed import paths, placement, search_space, tracking
from cafemed.calibration import CalibrationConfig
from cafemed.config import Range, checked, from_mapping
from cafemed.errors import ConfigError
from cafemed.placement import Workers
from cafemed.search_space import MODEL, Options, SearchSpace
from cafemed.tracking import TrackingConfig
from cafemed.training import FitConfig

T = TypeVar("T")

Sampler: TypeAlias = Literal["tpe", "tpe_multivariate", "nsga2", "random", "grid"]
Scheduler: TypeAlias = Literal["asha", "median", "none"]
Objective: TypeAlias = Literal["jaccard", "ddi_rate"]

#: Settings of `search` that may change when a sweep goes on: they decide how many trials there are
#: and where they run, not what a trial finds.
FREE = (
    "num_samples",
    "max_hours",
    "max_concurrent",
    "cpus",
    "gpus",
    "memory_gb",
    "max_failures",
    "max_failed_trials",
    "storage",
)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a sweep is run (group `search`).

    Attributes:
        space: what is varied; see cafemed/search_space.py.
        num_samples: trials.
        max_hours: no trial goes on when the sweep has run for so long, in all; None: no limit.
        sampler: what proposes parameters; see cafemed/sampling.py.
        scheduler: what stops poor trials early; see cafemed/stopping.py.
        objectives: what is searched for: Jaccard up, or that and DDI rate down.
        max_ddi_rate: of the trial that is promoted; samplers learn which trials keep it.
        starts: parameters of the first trials; what one leaves out has its configured value.
        prior: `sweep.parquet` files of other sweeps, whose trials the sampler is told first.
        population_size: trials a generation of nsga2.
        seed: of the sampler, and with a trial's number of that trial.
        grace_period: epochs that no trial is stopped before.
        reduction_factor: ASHA lets the best 1 / reduction_factor of the trials go on at each rung.
        max_concurrent: trials at the same time; None: as many as the resources allow.
        num_workers: processes that train a trial's model together; see cafemed/distributed.py.
        cpus: CPUs reserved for a worker.
        gpus: GPUs reserved for a worker: a whole number, or 0.25, which lets four trials of one
            worker share one.
        memory_gb: memory reserved for a worker, in units of 1e9 bytes; None: not counted.
        max_failures: how often a trial is started again, from its checkpoint, before it is failed.
        max_failed_trials: the sweep ends when more have failed; None: it always goes on.
        storage: folder or URL of checkpoints and history, seen by every node; None: under the root.
    """

    space: dict[str, Any]
    num_samples: Annotated[int, Range(1)] = 32
    max_hours: Annotated[float, Range(0, open_low=True)] | None = None
    sampler: Sampler = "tpe_multivariate"
    scheduler: Scheduler = "asha"
    objectives: tuple[Objective, ...] = ("jaccard",)
    max_ddi_rate: Annotated[float, Range(0, 1)] | None = None
    starts: tuple[dict[str, Any], ...] = ()
    prior: tuple[str, ...] = ()
    population_size: Annotated[int, Range(2)] = 16
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    grace_period: Annotated[int, Range(1)] = 5
    reduction_factor: Annotated[float, Range(1, open_low=True)] = 3.0
    max_concurrent: Annotated[int, Range(1)] | None = None
    num_workers: Annotated[int, Range(1)] = 1
    cpus: Annotated[float, Range(0, open_low=True)] = 1.0
    gpus: Annotated[float, Range(0)] = 0.0
    memory_gb: Annotated[float, Range(0, open_low=True)] | None = None
    max_failures: Annotated[int, Range(0)] = 3
    max_failed_trials: Annotated[int, Range(0)] | None = None
    storage: str | None = None

    @property
    def total_cpus(self) -> float:
        """CPUs that the trials at the same time reserve, if nothing else limits them."""
        at_once = min(self.max_concurrent or self.num_samples, self.num_samples)
        return self.cpus * self.num_workers * at_once

    @property
    def workers(self) -> Workers:
        """What each trial reserves."""
        return Workers(self.num_workers, self.cpus, self.gpus, self.memory_gb)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """A checked sweep.

    Attributes:
        model_name: the configured model.
        models: name → all options, of the models that trials have; as configured for `model_name`,
            the model's own defaults for the others. JSON values.
        fit: training as configured.
        search: see SearchConfig.
        space: what is varied.
        starts: parameters of the first trials, for all samplers but grid.
        calibrated: what is chosen on the validation patients for the trial that is promoted.
    """

    model_name: str
    models: Mapping[str, Mapping[str, Any]]
    fit: FitConfig
    search: SearchConfig
    space: SearchSpace
    starts: tuple[Mapping[str, Any], ...]
    calibrated: CalibrationConfig

    @property
    def untried(self) -> tuple[Mapping[str, Any], ...]:
        """The starts for which there are not enough trials."""
        return self.starts[self.search.num_samples :]

    def settings(self) -> dict[str, Any]:
        """JSON values that, with the inputs, decide what the sweep finds."""
        others = {name: dict(o) for name, o in self.models.items() if name != self.model_name}
        own = {"name": self.model_name, "options": dict(self.models[self.model_name])}
        content = {
            "model": own,
            **({"models": others} if others else {}),
            "train": dataclasses.asdict(self.fit),
            "calibration": dataclasses.asdict(self.calibrated),
            "search": dataclasses.asdict(self.search),
        }
        return dict(json.loads(json.dumps(content)))

    def kept_settings(self) -> dict[str, Any]:
        """Those of the settings that a sweep keeps when it goes on; see FREE."""
        return kept(self.settings())


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of those that there were not yet when they were written."""
    classes = {"train": FitConfig, "search": SearchConfig}
    return {**settings, **{name: _filled(cls, settings[name]) for name, cls in classes.items()}}


def _filled(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a dataclass's fields, as JSON has them, and over them the values."""
    fields = dataclasses.fields(cls)
    given = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {**json.loads(json.dumps(given)), **values}


def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that may change when a sweep goes on, complete."""
    settings = completed(settings)
    search = {name: value for name, value in settings["search"].items() if name not in FREE}
    return {**settings, "search": search}


def read(
    values: Mapping[str, Any],
    options_class: Callable[[str], type],
    names: Sequence[str],
) -> SweepPlan:
    """Reads and checks what the configuration says of a sweep.

    Args:
        values: the sections "model" ("name" and the model's options), "train" (FitConfig),
            "search" (SearchConfig), and "calibration" (CalibrationConfig) and "tracking"
            (TrackingConfig), which may be left out.
        options_class: gives the dataclass of a model's options; jobs pass `models.options_class`.
        names: of all models; jobs pass `models.NAMES`.

    Raises:
        ConfigError: with everything wrong that can be found without asking a server.
    """
    given, problems = dict(values["model"]), list[str]()
    name = given.pop("name")
    own = _attempt(problems, lambda: from_mapping(options_class(name), given, "model"))
    fit = _attempt(problems, lambda: from_mapping(FitConfig, values["train"], "train"))
    settings = _attempt(problems, lambda: from_mapping(SearchConfig, values["search"], "search"))
    calibrated = _attempt(
        problems,
        lambda: from_mapping(CalibrationConfig, values.get("calibration", {}), "calibration"),
    )
    _attempt(problems, lambda: _require_tracking(values.get("tracking", {})))
    # What is right is checked further, whatever else is wrong. Defaults stand in for what is not,
    # and nothing is said of what goes with it.
    right, wrong = _right_and_wrong(values["search"])
    search = SearchConfig(**{"space": {}, **right})
    problems += _places(search)
    known = {other: dataclasses.asdict(options_class(other)()) for other in names}
    train = dataclasses.asdict(fit or FitConfig())
    if own is not None:
        known[name] = dataclasses.asdict(own)
    options: dict[str, Options] = {
        other: (options_class(other), None if other == name and own is None else known[other])
        for other in names
    }
    space = None
    if "space" in right and name in names:
        space = _attempt(
            problems, lambda: search_space.parse(search.space, name, options, (FitConfig, train))
        )
    problems += _combinations(search, space, wrong)
    starts: list[dict[str, Any]] = []
    if space is not None:
        starts = _starts(search, space, known, train, problems)
        problems += _grid(search, space, wrong)
    if problems or not (own and fit and settings and calibrated and space):
        raise ConfigError("; ".join(problems))
    chosen = {other: known[other] for other in dict.fromkeys([name, *space.models])}
    return SweepPlan(name, chosen, fit, settings, space, tuple(starts), calibrated)


def _attempt(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives; None, and one more problem, if it refuses."""
    try:
        return read()
    except ConfigError as err:
        problems.append(str(err))
        return None


def _right_and_wrong(section: Any) -> tuple[dict[str, Any], set[str]]:
    """The settings of `search` that are right by themselves, and the names of the others."""
    given = section if isinstance(section, Mapping) else {}
    hints, right = get_type_hints(SearchConfig, include_extras=True), dict[str, Any]()
    for name in given.keys() & hints.keys():
        with contextlib.suppress(ConfigError):
            right[name] = checked(hints[name], given[name], f"search.{name}")
    return right, set(given) - set(right)


def _places(search: SearchConfig) -> list[str]:
    """What is wrong with the files and the folder that are named."""
    problems: list[str] = []
    for number, name in enumerate(search.prior):
        _attempt(problems, partial(prior_file, number, name))
    if search.storage is not None:
        _attempt(problems, partial(require_storage, search.storage))
    return problems


def prior_file(number: int, name: str) -> Path:
    """The file that `search.prior[number]` names.

    Raises:
        ConfigError: if it is not there.
    """
    if not (path := Path(name).expanduser()).is_file():
        raise ConfigError(f"search.prior[{number}]: expected a sweep.parquet, found no file {path}")
    return path


def require_storage(chosen: str) -> None:
    """Refuses a `search.storage` that is neither an absolute folder nor a URL, or holds secrets.

    Raises:
        ConfigError: says which of the two it is.
    """
    paths.require_no_secrets(chosen, "search.storage")
    if "://" not in chosen and not Path(chosen).is_absolute():
        raise ConfigError(f"search.storage: expected an absolute folder or a URL, got {chosen!r}")


def _require_tracking(values: Any) -> None:
    """Refuses a section `tracking` that cannot be right, whatever the server will say."""
    found = from_mapping(TrackingConfig, values, "tracking")
    if found.name == "mlflow":
        tracking.require_uri(found, Path("/"))  # any root: the folder in it is always right


def _starts(
    search: SearchConfig,
    space: SearchSpace,
    models: Mapping[str, Mapping[str, Any]],
    train: Mapping[str, Any],
    problems: list[str],
) -> list[dict[str, Any]]:
    """The first trials: those asked for, then each model as configured, as near as it can be."""
    if search.sampler == "grid":
        if search.starts:
            problems.append("search.starts: sampler=grid tries every point, leave it out")
        return []

    def configured(model: str) -> dict[str, Any]:
        sections: dict[str, Mapping[str, Any]] = {"model": models[model], "train": train}
        values: dict[str, Any] = {}
        for name, entry in space.active(model).items():
            section, *_, option = name.split(".")
            values[name] = model if name == MODEL else entry.nearest(sections[section][option])
        return values

    # The configured model first, if trials have it.
    known = sorted(space.models, key=lambda name: name != space.model)
    found = []
    for number, start in enumerate(search.starts):
        model = start.get(MODEL, known[0])
        entries = space.active(model) if model in known else space.entries
        for name, value in start.items():
            if name not in entries or not entries[name].holds(value):
                problems.append(f"search.starts[{number}].{name}: {value!r} is not in the space")
        found.append({**configured(model), **start} if model in known else {})
    found += [configured(model) for model in known]
    return [start for i, start in enumerate(found) if start not in found[:i]]


def _combinations(
    search: SearchConfig, space: SearchSpace | None, wrong: Collection[str]
) -> list[str]:
    """Settings that do not work together, each with the reason.

    Of those that are `wrong` by themselves it sees the defaults, most of which go with everything.
    """
    problems = placement.problems(search.num_workers, search.gpus, "search.gpus")
    early = "none" if "scheduler" in wrong else search.scheduler
    if search.objectives[:1] != ("jaccard",) or len(set(search.objectives)) < len(
        search.objectives
    ):
        problems.append(
            "search.objectives: expected [jaccard] or [jaccard, ddi_rate], got "
            f"{list(search.objectives)}"
        )
    if early != "none" and len(search.objectives) > 1:
        problems.append(
            f"search.scheduler: {early} compares trials by Jaccard alone and would cut "
            "off the front's low DDI rates; with two objectives choose search.scheduler=none"
        )
    if search.prior and search.sampler in ("random", "grid"):
        problems.append(
            f"search.prior: {search.sampler} learns from no trial, and other sweeps' would change "
            "nothing; leave it out, or choose search.sampler=tpe"
        )
    if search.sampler == "nsga2":
        if early != "none":
            problems.append(
                f"search.scheduler: nsga2 breeds from finished trials only, and {early} "
                "stops most; choose search.scheduler=none or search.sampler=tpe"
            )
        if space is not None and space.conditional:
            problems.append(
                "search.sampler: nsga2 crosses parameters that all trials have, and "
                f"{space.conditional[0]} is one model's; choose tpe, or one model"
            )
        sizes = {"num_samples", "population_size"}
        if sizes.isdisjoint(wrong) and search.num_samples <= search.population_size:
            problems.append(
                f"search.population_size: the first generation of nsga2 is drawn at random, and "
                f"{search.population_size} of {search.num_samples} trials are that; choose fewer"
            )
    return problems


def _grid(search: SearchConfig, space: SearchSpace, wrong: Collection[str]) -> list[str]:
    """What is wrong with a grid over the space."""
    if search.sampler != "grid":
        return []
    real = [name for name, entry in space.entries.items() if entry.values is None]
    if real:
        return [
            f"search.space.{name}: sampler=grid needs values that can be counted, and this is a "
            "float; make it categorical with choices"
            for name in real
        ]
    points = space.grid_size()
    if points != search.num_samples and "num_samples" not in wrong:
        return [f"search.num_samples: the grid has {points} points, got {search.num_samples}"]
    return []
