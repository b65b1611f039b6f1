"""The command that trains a trial again: a shell and Hydra read the same configuration from it."""

import dataclasses
import shlex
import subprocess
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import models
from cafemed import paths, reproduction
from cafemed.calibration import CalibrationConfig
from cafemed.training import FitConfig

TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20),
    st.text("\\\"'${}a: ,[]=()x1.#&<>|*~-", max_size=12),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT
)  # fmt: skip


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        values: Any = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    return dict(values)


@settings(deadline=None)  # Hydra's first parse loads its grammar
@given(st.one_of(SCALARS, st.lists(SCALARS, max_size=3)))
@example("1e5")
@example("007")
@example("null")
@example("")
@example("ends in \\")
@example("\\${a}\\\\")
def test_hydra_reads_a_value_back_with_its_type(value: Any):
    # As `compose` does with every override, without the files.
    override = OverridesParser.create().parse_override(f"x={reproduction.hydra_value(value)}")
    config: Any = OmegaConf.to_container(OmegaConf.create({"x": override.value()}), resolve=True)
    read = config["x"]
    assert read == value
    assert type(read) is type(value)


def configured_in(model: str = "cafemed") -> dict[str, Any]:
    return {
        "model": {"name": model, "options": dataclasses.asdict(models.options_class(model)())},
        "train": dataclasses.asdict(FitConfig(epochs=30, patience=7)),
        "calibration": dataclasses.asdict(CalibrationConfig(temperature="fixed")),
    }


def overrides_in(command: list[str]) -> list[str]:
    words = shlex.split(" ".join(command))
    assert words[:2] == ["python", "jobs/train.py"]
    return words[2:]


@pytest.mark.parametrize("root", [None, '/data/it\'s a "root" $HOME; `x` \\ ${y}'])
def test_the_command_configures_exactly_the_trial(root: str | None):
    parameters = {
        "model.modulation_strength": 0.08171478915115864,
        "model.cafemed.cwg_hidden": 16,
        "model.use_charm": False,
        "train.learning_rate": 1.0e-05,
        "train.batch_size": 20,
    }
    configured = reproduction.configuration(configured_in(), parameters, seed=2**32 - 1)
    values = composed(overrides_in(reproduction.command("hospital_1", configured, root)))
    assert values["name"] == "hospital_1"
    assert values["paths"]["root"] == root
    assert values["model"] == {
        **configured_in()["model"]["options"],
        "name": "cafemed",
        "modulation_strength": 0.08171478915115864,
        "cwg_hidden": 16,
        "use_charm": False,
    }
    assert values["train"] == {
        **configured_in()["train"],
        "learning_rate": 1.0e-05,
        "batch_size": 20,
        "seed": 2**32 - 1,
    }
    assert values["calibration"]["temperature"] == "fixed"
    assert reproduction.command("hospital_1", configured, root)[2:4] == [
        "name=hospital_1", "model=cafemed"
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(models.NAMES))
def test_every_model_can_be_trained_again(name: str):
    configured = reproduction.configuration(configured_in(name), {}, seed=5)
    values = composed(overrides_in(reproduction.command("a", configured)))
    assert values["model"] == {"name": name, **configured_in(name)["model"]["options"]}
    assert values["train"]["seed"] == 5


OF_ANOTHER = {"model.name": "causalmed", "model.causalmed.effect_levels": 9, "model.dropout": 0.2}


def test_another_model_than_the_configured_one_has_the_options_that_the_sweep_gave_it():
    """Also where a default is another one by now."""
    then = configured_in("causalmed")["model"]["options"]
    changed = {name: value + 8 for name, value in then.items() if name == "dimension"}
    changed |= {name: not value for name, value in then.items() if isinstance(value, bool)}
    assert len(changed) > 1
    recorded = {**configured_in("cafemed"), "models": {"causalmed": {**then, **changed}}}
    configured = reproduction.configuration(recorded, OF_ANOTHER, seed=1)
    overrides = overrides_in(reproduction.command("a", configured))
    varied = {"effect_levels": 9, "dropout": 0.2}
    assert composed(overrides)["model"] == {**then, **changed, **varied, "name": "causalmed"}
    named = {part.split("=")[0] for part in overrides}
    assert {f"model.{name}" for name in then} <= named


def test_another_model_of_a_sweep_that_did_not_record_its_options_has_the_defaults():
    configured = reproduction.configuration(configured_in("cafemed"), OF_ANOTHER, seed=1)
    values = composed(overrides_in(reproduction.command("a", configured)))
    defaults = configured_in("causalmed")["model"]["options"]
    assert values["model"] == {**defaults, "name": "causalmed", "effect_levels": 9, "dropout": 0.2}


def test_a_stopped_trial_is_trained_for_as_long_as_it_was():
    configured = reproduction.configuration(configured_in(), {}, seed=1, epochs=4)
    assert configured["train"]["epochs"] == 4
    assert reproduction.configuration(configured_in(), {}, seed=1)["train"]["epochs"] == 30


def test_a_shell_gives_the_words_to_the_program():
    configured = {"model": {"name": "a b"}, "train": {"x": "$HOME `id` 'q' \"r\" *"}}
    command = reproduction.command("n", configured, "/a b")
    told = subprocess.run(
        ["sh", "-c", 'show() { printf "%s\\n" "$@"; }; ' + " ".join(["show", *command[2:]])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.splitlines() == overrides_in(command)
