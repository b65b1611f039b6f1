"""docs/cluster.md: the files, headings and messages that it names are there."""

import inspect
import re
import sys
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk
import yaml

from cafemed import cluster_access, paths, shared_storage

TEXT = (paths.PROJECT_DIR / "docs/cluster.md").read_text()


def test_every_file_it_names_exists():
    named = set(re.findall(r"(?:platform|jobs|tests)/[\w./-]+\w", TEXT)) | {"ray_cluster.yaml"}
    assert len(named) > 8
    for name in named - {"jobs/first"}:
        assert (paths.PROJECT_DIR / name).exists(), name
    for name in re.findall(r"\]\((\w+\.md)\)", TEXT):
        assert (paths.PROJECT_DIR / "docs" / name).is_file(), name


def test_every_heading_it_points_to_exists():
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    slugs = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= slugs


def test_the_messages_it_quotes_are_ours(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    said = [cluster_access._refused(), cluster_access._no_token(), shared_storage._ADVICE]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    said.append(cluster_access._refused())
    for message in said:
        assert message[:60] in TEXT, message


def test_the_names_it_uses_are_the_files():
    def read(name: str):
        return yaml.safe_load((paths.PROJECT_DIR / "platform/k8s" / f"{name}.yaml").read_text())

    # KubeRay's names: of the cluster's head service, and of the job that submits.
    assert f"service/{read('raycluster')['metadata']['name']}-head-svc 8265:8265" in TEXT
    assert f"job-name={read('rayjob')['metadata']['name']}\n" in TEXT
    launcher = yaml.safe_load((paths.PROJECT_DIR / "ray_cluster.yaml").read_text())
    assert f"ray-autoscaler-{launcher['cluster_name']}" in TEXT
    assert f"ray-cluster-name,Values={launcher['cluster_name']}" in TEXT
    for kind in launcher["available_node_types"].values():
        assert f"`{kind['node_config']['InstanceType']}`" in TEXT


@pytest.mark.parametrize("count", [2, 0])
def test_the_program_that_asks_for_gpus_waits_for_them(monkeypatch: pytest.MonkeyPatch, count: int):
    """One node with a GPU comes up each time it looks; 0 takes back what was asked for."""
    program = re.search(r"^GPUS='([^']+)'$", TEXT, re.MULTILINE)
    assert program
    shape = inspect.signature(ray.autoscaler.sdk.request_resources)
    asked: list[dict[str, Any]] = []
    up: list[int] = []

    def request(*args: Any, **kwargs: Any) -> None:
        asked.append(dict(shape.bind(*args, **kwargs).arguments))

    def resources() -> dict[str, float]:
        return {"CPU": 4.0, **({"GPU": float(len(up))} if up else {})}

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request)
    monkeypatch.setattr("ray.init", lambda: None)
    monkeypatch.setattr("ray.cluster_resources", resources)
    monkeypatch.setattr("time.sleep", up.append)
    monkeypatch.setattr(sys, "argv", ["-c", str(count)])
    exec(program[1], {})
    assert asked == [{"bundles": [{"GPU": 1}] * count}]
    assert len(up) == count
    assert f'submit -- python -c "$GPUS" {count} ' in TEXT
