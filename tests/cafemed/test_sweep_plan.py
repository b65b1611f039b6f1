"""Plans of sweeps: what the configuration says, its starting points, what does not go together."""

import dataclasses
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import models
from cafemed import paths, sweep_plan
from cafemed.errors import ConfigError
from cafemed.sweep_plan import SearchConfig, SweepPlan
from cafemed.training import FitConfig

SPACE = {"train": {"learning_rate": {"type": "float", "low": 0.001, "high": 0.2}}}
COUNTED = {
    "model": {"reduction_ratio": {"type": "categorical", "choices": [2, 4]}},
    "train": {"batch_size": {"type": "int", "low": 8, "high": 10}},
}


def composed(*overrides: str) -> SweepPlan:
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        values: Any = OmegaConf.to_container(
            compose("tune", overrides=list(overrides)), resolve=True
        )
    return sweep_plan.read(values, models.options_class, models.NAMES)


def read(model: str = "cafemed", **search: Any) -> SweepPlan:
    values = {"model": {"name": model}, "train": {}, "search": {"space": SPACE} | search}
    return sweep_plan.read(values, models.options_class, models.NAMES)


def test_yaml_spells_the_defaults_out():
    written = yaml.safe_load((paths.CONF_DIR / "search" / "base.yaml").read_text())
    defaults = dataclasses.asdict(SearchConfig(space={}))
    del defaults["space"]
    assert written == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


@pytest.mark.parametrize("model", models.NAMES)
@pytest.mark.parametrize("search", ["smoke", "wide", None])
def test_spaces_of_the_configuration_fit_every_model(model: str, search: str | None):
    chosen = [] if search is None else [f"search={search}"]
    plan = composed(f"model={model}", *chosen)
    assert {"train.learning_rate", "train.ddi_coefficient"} <= set(plan.space.entries)
    assert any(name.startswith("model.") for name in plan.space.entries)
    # The configured model's values are the first trial.
    first = plan.starts[0]
    assert first.get("model.name", model) == model
    assert first["model.dropout"] == (0.5 if search == "smoke" else 0.7)
    assert first["train.learning_rate"] == FitConfig().learning_rate


def test_the_wide_space_varies_the_model_and_what_each_of_them_has():
    plan = composed("search=wide", "model=causalmed")
    wanted = {"learning_rate", "batch_size", "weight_decay"}
    assert {f"train.{name}" for name in wanted} <= set(plan.space.entries)
    assert {"model.name", "model.dropout", "model.dimension"} <= set(plan.space.entries)
    assert set(plan.space.models) == set(models.NAMES)
    own = {name.split(".")[1] for name in plan.space.conditional}
    assert own == set(models.NAMES)
    # One start a model, the configured one first; its weight decay is 0, on a logarithmic scale.
    assert plan.starts[0]["model.name"] == "causalmed"
    assert {start["model.name"] for start in plan.starts} == set(models.NAMES)
    assert plan.starts[0]["train.weight_decay"] == 1e-7


def test_the_papers_space_starts_from_the_papers_values():
    assert composed("search=paper").starts == (
        {
            "model.modulation_strength": 0.1,
            "model.reduction_ratio": 4,
            "train.ddi_coefficient": FitConfig().ddi_coefficient,
        },
    )


def test_the_papers_space_is_cafemeds_and_says_so_in_one_line():
    with pytest.raises(ConfigError) as caught:
        composed("search=paper", "model=causalmed")
    assert str(caught.value) == (
        "search.space.model: modulation_strength, reduction_ratio: only cafemed has, and causalmed "
        "has not; choose model=cafemed, search=causalmed or search=wide, or put what one model has "
        "under search.space.model.cafemed"
    )


def test_starts_come_first_completed_by_the_configured_values():
    plan = read(space=COUNTED, starts=[{"train.batch_size": 9}, {"model.reduction_ratio": 2}])
    assert plan.starts == (
        {"model.reduction_ratio": 4, "train.batch_size": 9},
        {"model.reduction_ratio": 2, "train.batch_size": 10},  # 32, as near as it can be
        {"model.reduction_ratio": 4, "train.batch_size": 10},
    )


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"starts": [{"train.learning_rate": 3.0}]}, "search.starts[0].train.learning_rate: 3.0"),
        ({"starts": [{"train.rate": 0.1}]}, "search.starts[0].train.rate: 0.1 is not in the space"),
        ({"objectives": ["ddi_rate"]}, "search.objectives: expected [jaccard] or"),
        ({"objectives": ["jaccard", "f1"]}, "search.objectives[1]: expected one of"),
        ({"objectives": ["jaccard", "ddi_rate"]}, "would cut off the front's low DDI rates"),
        ({"sampler": "nsga2"}, "nsga2 breeds from finished trials only, and asha stops most"),
        (
            {"sampler": "nsga2", "scheduler": "none", "num_samples": 16},
            "search.population_size: the first generation of nsga2 is drawn at random",
        ),
        ({"sampler": "grid"}, "search.space.train.learning_rate: sampler=grid needs values that"),
        (
            {"sampler": "grid", "space": COUNTED},
            "search.num_samples: the grid has 6 points, got 32",
        ),
        (
            {"sampler": "grid", "space": COUNTED, "num_samples": 6, "starts": [{}]},
            "search.starts: sampler=grid tries every point",
        ),
        ({"sampler": "cmaes"}, "search.sampler: expected one of 'tpe', 'tpe_multivariate'"),
        ({"max_ddi_rate": 6}, "search.max_ddi_rate: expected a value in [0, 1], got 6.0"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(search: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        read(**search)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nsga2_refuses_parameters_that_not_all_trials_have():
    with pytest.raises(
        ConfigError, match=r"nsga2 crosses .* model\.cafemed\.modulation_strength is"
    ):
        composed("search=wide", "search.sampler=nsga2", "search.scheduler=none")


def test_everything_wrong_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        read(space={"train": {"rate": 3}}, sampler="nsga2", objectives=["ddi_rate"])
    for problem in ("search.space.train.rate.type: ", "search.scheduler: ", "search.objectives: "):
        assert problem in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        read(num_samples=0, cpu=1, gpus=-1.0)
    for problem in ("search.cpu: unknown key", "search.num_samples: ", "search.gpus: "):
        assert problem in str(caught.value)


def test_a_plan_keeps_its_settings_when_only_size_and_place_change():
    plan = read(num_samples=4)
    more = read(num_samples=8, max_hours=2.0, cpus=2.0, gpus=0.5, max_concurrent=1, storage="/x")
    assert plan.settings() != more.settings()
    assert plan.kept_settings() == more.kept_settings()
    for other in ({"seed": 1}, {"sampler": "random"}, {"max_ddi_rate": 0.1}, {"grace_period": 1}):
        assert read(num_samples=4, **other).kept_settings() != plan.kept_settings()
