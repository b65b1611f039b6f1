"""The image's Dockerfile: what it installs, as whom, and what its commands do."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from cafemed import paths
from serve import haproxy

PROJECT = paths.PROJECT_DIR
TEXT = (PROJECT / "platform/docker/Dockerfile").read_text()
# Instructions with their continued lines joined, without comments.
STEPS = [
    line
    for line in re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).split("\n")
    if line
]


def position(start: str) -> int:
    [found] = [i for i, step in enumerate(STEPS) if step.startswith(start)]
    return found


def installing() -> str:
    [step] = [step for step in STEPS if "-r requirements.lock" in step]
    return step.removeprefix("RUN ")


@pytest.mark.parametrize("index", ["", "https://example.org/whl/cu130"])
def test_torch_of_the_locked_version_comes_from_the_given_index_and_nothing_else_does(
    tmp_path: Path, index: str
):
    log = tmp_path / "log"
    for name in ("pip", "python"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n')
        program.chmod(0o755)
    lock = (PROJECT / "requirements.lock").read_text()
    (tmp_path / "requirements.lock").write_text(lock)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TORCH_INDEX_URL": index}
    subprocess.run(["sh", "-ec", installing()], cwd=tmp_path, env=env, check=True)
    [torch] = re.findall(r"^torch==\S+$", lock, re.MULTILINE)
    source = f"--index-url {index} " if index else ""
    assert log.read_text().splitlines() == [
        "python -m venv .venv",
        f"pip install --no-cache-dir {source}{torch}",
        "pip install --no-cache-dir -r requirements.lock",
    ]


def test_the_dependencies_are_installed_before_the_code_is_copied():
    assert position("COPY --chown=ray:ray requirements.lock") < STEPS.index(f"RUN {installing()}")
    assert STEPS.index(f"RUN {installing()}") < position("COPY --chown=ray:ray . .")
    assert position("FROM ") < position("ARG TORCH_INDEX_URL")


def test_python_is_one_that_the_project_takes():
    [version] = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", TEXT, re.MULTILINE)
    assert version == "3.11"
    assert f'requires-python = ">={version}"' in (PROJECT / "pyproject.toml").read_text()


def test_nothing_runs_as_root_after_the_users_change():
    user = position("USER ")
    assert STEPS[user] == "USER ray"
    assert 'useradd --create-home --uid "${UID}" ray' in STEPS[user - 3]
    assert all("apt-get" not in step for step in STEPS[user:])
    assert position("WORKDIR ") < user


def test_a_login_shell_finds_the_environments_programs():
    """The cluster launcher runs its commands in one, and /etc/profile sets PATH anew."""
    [line] = re.findall(r"echo '(.*)' > /etc/profile.d/cafemed.sh", TEXT)
    [folder] = re.findall(r"^WORKDIR (\S+)$", TEXT, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f'{line}\nprintf %s "$PATH"'],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{folder}/.venv/bin:/usr/bin:/bin"
    environment = STEPS[position("ENV ")]
    assert f"PATH={folder}/.venv/bin:$PATH" in environment
    # Where it is not spelled out, the launcher mounts the token into root's home.
    assert "ENV HOME=/home/ray " in environment
    assert "RAY_AUTH_MODE=token" in environment


def test_the_image_holds_no_data_and_no_environment_of_ours():
    ignored = (PROJECT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".bench", "outputs", "multirun"} <= set(ignored)


def test_every_node_has_what_a_local_endpoints_ray_has():
    """Whichever proxy it has; the image is that of every cluster."""
    [env] = [step for step in STEPS if step.startswith("ENV ")]
    settings = dict(pair.split("=", 1) for pair in env.removeprefix("ENV ").split())
    of_serve = {name: value for name, value in settings.items() if name.startswith("RAY_SERVE_")}
    assert of_serve == haproxy.ON_NODES
    assert position("WORKDIR /home/ray/cafemed") < position("ENV ")


def test_the_guide_tells_those_without_the_image_the_same():
    guide = (PROJECT / "docs/serving.md").read_text()
    exports = dict(re.findall(r"^export (RAY_SERVE_\w+)=(\"[^\"]*\"|\S+)", guide, re.MULTILINE))
    told = {name: value.strip('"').replace("$PWD/", "") for name, value in exports.items()}
    fallback = {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "8500"}
    assert told == haproxy.ON_NODES | haproxy.ON_NODES_WITH_HAPROXY | fallback
