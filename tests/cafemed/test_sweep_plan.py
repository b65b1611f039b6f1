"""Plans of sweeps: what the configuration says, its starting points, what does not go together."""

import dataclasses
from pathlib import Path
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
        (
            {"objectives": ["jaccard", "ddi_rate"]},
            "search.scheduler: asha compares trials by Jaccard alone and would cut off the front's",
        ),
        (
            {"objectives": ["jaccard", "ddi_rate"], "scheduler": "median"},
            "search.scheduler: median compares trials by Jaccard alone and would cut off the front",
        ),
        ({"sampler": "nsga2"}, "nsga2 breeds from finished trials only, and asha stops most"),
        (
            {"sampler": "nsga2", "scheduler": "median"},
            "nsga2 breeds from finished trials only, and median stops most",
        ),
        (
            {"sampler": "random", "prior": ["x"]},
            "search.prior: random learns from no trial, and other sweeps' would change nothing",
        ),
        ({"sampler": "grid", "prior": ["x"]}, "search.prior: grid learns from no trial"),
        ({"prior": ["no.parquet"]}, "search.prior[0]: expected a sweep.parquet, found no file no"),
        ({"storage": "here"}, "search.storage: expected an absolute folder or a URL, got 'here'"),
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


def problems_of(**sections: Any) -> list[str]:
    values: dict[str, Any] = {"model": {"name": "cafemed"}, "train": {}} | sections
    with pytest.raises(ConfigError) as caught:
        sweep_plan.read(values, models.options_class, models.NAMES)
    assert "\n" not in str(caught.value)
    return str(caught.value).split("; ")


def test_everything_wrong_is_reported_at_once(tmp_path: Path):
    table = tmp_path / "sweep.parquet"
    table.touch()
    found = problems_of(
        model={"name": "cafemed", "dropout": 2.0},
        train={"epochs": 0, "patients": 3},
        calibration={"threshold": "best"},
        tracking={"name": "mlflow", "uri": "ftp://host"},
        search={
            "space": {
                "train": {
                    "rate": {"type": "real"},
                    "learning_rate": {"type": "float", "low": 0.0, "high": 0.1},
                    "batch_size": {"type": "int", "low": 9, "high": 8},
                },
                "model": {"dropout": 3, "dimension": {"type": "float", "low": 8, "high": 16}},
            },
            "sampler": "nsga2",
            "objectives": ["ddi_rate"],
            "num_samples": 0,
            "cpu": 1,
            "gpus": -1.0,
            "prior": [str(table), "no.parquet"],
            "storage": "here",
        },
    )
    for problem in (
        "model.dropout: expected a value in",
        "train.epochs: expected a value in",
        "train.patients: unknown key",
        "calibration.threshold: expected one of",
        "tracking.uri: expected a server's URL",
        "search.num_samples: expected a value in",
        "search.cpu: unknown key",
        "search.gpus: expected a value in",
        "search.prior[1]: expected a sweep.parquet, found no file no.parquet",
        "search.storage: expected an absolute folder",
        "search.scheduler: nsga2 breeds from finished trials only",
        "search.objectives: expected [jaccard] or",
        "search.space.train.rate.type: expected one of",
        "search.space.train.rate: unknown key",
        "search.space.train.learning_rate: expected a value in",
        "search.space.train.batch_size: expected finite low < high",
        "search.space.model.dropout.type: expected one of",
        "search.space.model.dimension: expected int, got 8.0",
    ):
        assert sum(line.startswith(problem) for line in found) == 1, (problem, found)
    advice = [line for line in found if line.startswith(("known keys: ", "choose "))]
    assert len(found) - len(advice) == 18, found


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"sampler": "nsga2", "scheduler": "ash", "num_samples": 40}, "search.scheduler: expected"),
        ({"sampler": "nsga2", "scheduler": "none", "num_samples": 0}, "search.num_samples: expect"),
        (
            {"sampler": "nsga2", "scheduler": "none", "num_samples": 9, "population_size": 1},
            "search.population_size: expected a value",
        ),
        ({"sampler": "grid", "num_samples": 0, "space": COUNTED}, "search.num_samples: expected a"),
        ({"objectives": ["jaccard", "ddi_rate"], "scheduler": 1}, "search.scheduler: expected one"),
        ({"sampler": "rando", "prior": [__file__]}, "search.sampler: expected one of"),
    ],
)
def test_nothing_is_said_of_what_goes_with_a_setting_that_is_wrong(
    search: dict[str, Any], expected: str
):
    [found] = problems_of(search={"space": SPACE} | search)
    assert found.startswith(expected)


def test_starts_are_checked_beside_other_sections():
    search = {"space": SPACE, "starts": [{"train.learning_rate": 3.0}], "num_samples": 0}
    found = problems_of(train={"epochs": 0}, tracking={"uri": "/x"}, search=search)
    assert [line.split(": ")[0] for line in found] == [
        "train.epochs",
        "search.num_samples",
        "tracking",
        "search.starts[0].train.learning_rate",
    ]


def test_an_entry_is_not_blamed_for_what_its_section_has_wrong():
    """Three heads go with the dimension that is configured, and not with the default one."""
    model = {"name": "graphdiffmed", "dimension": 48, "dropout": 2.0}
    space = {"model": {"heads": {"type": "categorical", "choices": [3]}}}
    [found] = problems_of(model=model, search={"space": space})
    assert found.startswith("model.dropout: ")


def test_a_plan_keeps_its_settings_when_only_size_and_place_change():
    plan = read(num_samples=4)
    more = read(num_samples=8, max_hours=2.0, cpus=2.0, gpus=0.5, max_concurrent=1, storage="/x")
    assert plan.settings() != more.settings()
    assert plan.kept_settings() == more.kept_settings()
    for other in ({"seed": 1}, {"sampler": "random"}, {"max_ddi_rate": 0.1}, {"grace_period": 1}):
        assert read(num_samples=4, **other).kept_settings() != plan.kept_settings()
