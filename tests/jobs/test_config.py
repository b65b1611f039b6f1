"""Every job's configuration composes, explains itself, and refuses what it does not know."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cafemed import paths
from cafemed.assessment import EvaluationConfig
from cafemed.calibration import CalibrationConfig
from cafemed.tracking import TrackingConfig
from causal.discovery import CausalConfig
from serve.prediction import PredictConfig

JOBS = sorted(path.stem for path in (paths.PROJECT_DIR / "jobs").glob("*.py"))
ROOT_FILES = sorted(p.stem for p in paths.CONF_DIR.glob("*.yaml") if p.stem != "base")
GROUP_FILES = sorted((path.parent.name, path.stem) for path in paths.CONF_DIR.glob("*/*.yaml"))


def run(job: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, paths.PROJECT_DIR / "jobs" / f"{job}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=home,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "CAFEMED_HOME": str(home / "root")},
    )


@pytest.mark.parametrize("name", ROOT_FILES)
def test_root_file_composes(name: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        values = OmegaConf.to_container(compose(config_name=name), resolve=False)
    assert {"name", "paths", "force"} <= set(values)


@pytest.mark.parametrize(("group", "option"), GROUP_FILES)
def test_group_file_composes_in_the_pipeline(group: str, option: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        chosen = compose(config_name="pipeline", overrides=[f"{group}={option}"])
        assert chosen[group]


@pytest.mark.parametrize(
    ("job", "section", "settings"),
    [
        ("discover", "causal", CausalConfig),
        ("evaluate", "evaluation", EvaluationConfig),
        ("predict", "predict", PredictConfig),
        ("train", "calibration", CalibrationConfig),
        ("tune", "calibration", CalibrationConfig),
        ("train", "tracking", TrackingConfig),
        ("tune", "tracking", TrackingConfig),
    ],
)
def test_yaml_spells_the_defaults_out(job: str, section: str, settings: type):
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        written = OmegaConf.to_container(compose(config_name=job))[section]
    assert written == dataclasses.asdict(settings())


def test_mlflow_has_the_same_defaults():
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        composed = compose(config_name="tune", overrides=["tracking=mlflow"])
        written = OmegaConf.to_container(composed)["tracking"]
    assert written == dataclasses.asdict(TrackingConfig("mlflow"))


@pytest.mark.parametrize("job", JOBS)
def test_help_names_the_job_and_its_keys(job: str, tmp_path: Path):
    result = run(job, "--help", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"jobs/{job}.py" in result.stdout
    assert "force" in result.stdout
    assert list(tmp_path.iterdir()) == []  # asking for help writes nothing


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("key", ["no_such_key", "+no_such_key"])
def test_unknown_key_is_refused(job: str, key: str, tmp_path: Path):
    result = run(job, f"{key}=1", home=tmp_path)
    assert result.returncode != 0
    assert "no_such_key" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", JOBS)
def test_a_name_that_leads_out_of_the_root_is_refused(job: str, tmp_path: Path):
    result = run(job, "name=../x", home=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: name: expected letters")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
