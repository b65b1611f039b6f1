from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cafemed import config, paths
from cafemed.errors import ArtifactError, ConfigError
from serve import access, app
from serve.settings import ApplicationArgs, DeployConfig, HttpConfig, ServeConfig


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_yaml_spells_the_defaults_out() -> None:
    group = read(paths.CONF_DIR / "serve" / "default.yaml")
    assert set(group) == set(ServeConfig.__dataclass_fields__)
    assert config.from_mapping(ServeConfig, group, "serve") == ServeConfig()
    root = read(paths.CONF_DIR / "deploy.yaml")
    assert config.from_mapping(HttpConfig, root["http"], "http") == HttpConfig()
    assert root["once"] == DeployConfig().once


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_replicas": -1}, "serve.min_replicas: expected a value in"),
        ({"min_replicas": 3}, "max_replicas: expected at least min_replicas"),
        ({"max_ongoing_requests": 256}, "expected more than max_admitted_requests"),
        ({"replicas": 3}, "serve.replicas: unknown key"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.from_mapping(ServeConfig, values, "serve")


@pytest.fixture
def deployable() -> dict[str, Any]:
    return read(paths.PROJECT_DIR / "serve" / "config.yaml")


def test_config_yaml_is_one_that_ray_serve_takes(deployable: dict[str, Any]) -> None:
    schema = ServeDeploySchema(**deployable)
    assert set(deployable) <= set(ServeDeploySchema.model_fields)  # which takes unknown keys too
    [application] = schema.applications
    assert application.import_path == "serve.app:build"
    assert set(deployable["applications"][0]) <= set(type(application).model_fields)
    assert schema.http_options.host == "127.0.0.1"


def test_config_yaml_builds_the_application(deployable: dict[str, Any], root: Path) -> None:
    [application] = deployable["applications"]
    args = {**application["args"], "root": str(root), "name": "tiny"}
    assert config.from_mapping(ApplicationArgs, application["args"], "args").root is None
    deployment = app.build(args)._bound_deployment
    registry_dir, settings = deployment.init_args
    assert registry_dir == str(root / "registry" / "tiny")
    assert settings == config.from_mapping(ServeConfig, application["args"]["serve"], "serve")
    assert deployment.max_queued_requests == ServeConfig().max_queued_requests


def test_build_refuses_a_certificate_that_haproxy_would_not_use(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `serve deploy` has it: Ray would speak HTTP, without a word."""
    args = {"root": str(root), "name": "tiny"}
    monkeypatch.setattr(access, "listening_certificate", lambda: "/a.crt")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    app.build(args)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="ssl_certfile: HAProxy takes no certificate from Ray"):
        app.build(args)


def test_build_refuses_unknown_arguments_and_an_empty_registry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args\.serve\.replicas: unknown key"):
        app.build({"name": "tiny", "serve": {"replicas": 1}})
    with pytest.raises(ArtifactError, match="no version is promoted to 'production'"):
        app.build({"name": "tiny", "root": str(tmp_path)})


def test_settings_reach_ray(root: Path) -> None:
    serve_settings = {
        "num_gpus": 0.25,
        "num_cpus": 0.5,
        "min_replicas": 0,
        "downscale_to_zero_delay_s": 7.0,
        "look_back_s": 11.0,
        "shadow": "candidate",
        "shadow_queue": 3,
        "drain_s": 4.0,
    }
    bound = app.build({"root": str(root), "name": "tiny", "serve": serve_settings})
    endpoint = bound._bound_deployment
    assert endpoint.ray_actor_options["num_gpus"] == 0.25
    assert endpoint.ray_actor_options["num_cpus"] == 0.5
    scaling = endpoint._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.downscale_to_zero_delay_s) == (0, 7.0)
    assert scaling.look_back_period_s == 11.0
    assert endpoint._deployment_config.graceful_shutdown_timeout_s == 4.0
    assert endpoint._deployment_config.backpressure_config.retry_after_s is not None
    assert endpoint.max_ongoing_requests > ServeConfig().max_admitted_requests
    shadow = endpoint.init_args[2]._bound_deployment
    assert (shadow.name, shadow.max_ongoing_requests) == ("Shadow", 3)
    assert "num_gpus" not in shadow.ray_actor_options
