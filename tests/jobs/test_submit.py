"""Jobs submitted to a real local cluster under token authentication."""

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SMALL = [
    "data=synthetic_demo",
    "data.generator.num_patients=150",
    "data.generator.num_visits=350",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Head:
    """A head of two CPUs, and `ray job submit` to it."""

    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes
        self.home: Path = nodes.home

    def submit(self, *arguments: str, **env: str) -> Any:
        command = ["ray", "job", "submit", "--address", self.nodes.dashboard, *arguments]
        return self.nodes.run(command, **env)


@pytest.fixture(scope="module")
def head(ray_nodes: ModuleType) -> Iterator[Head]:
    with ray_nodes.head(cpus=2) as nodes:
        yield Head(nodes)


def assert_succeeded(result: Any) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout


def test_python_entry_point_from_an_uploaded_working_directory(head: Head):
    result = head.submit(
        "--working-dir", ".", "--", "python", "jobs/prepare.py", "name=first", *SMALL
    )
    assert_succeeded(result)
    assert str(head.home) in result.stdout  # the job prints its root
    assert (head.home / "experiments/first/cohort/manifest.json").is_file()


def test_executable_entry_point_from_an_uploaded_working_directory(head: Head):
    arguments = ["--working-dir", ".", "--", "jobs/prepare.py", "name=second", *SMALL]
    assert_succeeded(head.submit(*arguments))
    again = head.submit(*arguments)
    assert_succeeded(again)
    assert "unchanged, skipped" in again.stdout


def test_sweep_runs_on_the_cluster_in_all_three_forms(head: Head):
    assert_succeeded(
        head.submit("--working-dir", ".", "--", "python", "jobs/prepare.py", "name=s", *SMALL)
    )
    discover = ["python", "jobs/discover.py", "name=s"]
    assert_succeeded(head.submit("--working-dir", ".", "--", *discover))
    sweep = ["name=s", "search=smoke", "search.num_samples=2", "train.epochs=2", "force=true"]
    forms = (
        ["--working-dir", ".", "--", "python", "jobs/tune.py", *sweep],
        ["--working-dir", ".", "--", "jobs/tune.py", *sweep],
        # Literally this, on a head that was started in the project's folder.
        ["jobs/tune.py", *sweep],
    )
    for form in forms:
        assert_succeeded(head.submit(*form))
    assert (head.home / "experiments/s/sweep/sweep.parquet").is_file()


def test_users_error_in_a_submitted_job_is_one_line_and_fails_the_job(head: Head):
    result = head.submit(
        "--working-dir", ".", "--", "python", "jobs/discover.py", "name=never_prepared"
    )
    assert result.returncode != 0
    assert "error:" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout


# What `ray job submit` says is Ray's own; docs/cluster.md quotes it.
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": ""}, "couldn't find an authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the authentication token is invalid or incorrect"),
    ],
    ids=["mode", "missing", "wrong"],
)
def test_a_client_without_the_right_token_is_refused(
    head: Head, env: dict[str, str], expected: str
):
    result = head.submit("--working-dir", ".", "--", "python", "jobs/prepare.py", **env)
    assert result.returncode != 0
    assert expected in result.stdout + result.stderr
    assert not (head.home / "experiments" / "default").exists()


@pytest.fixture(scope="module")
def prepared(head: Head) -> str:
    """The name of an experiment that a sweep can run on."""
    for job in (["jobs/prepare.py", "name=own", *SMALL], ["jobs/discover.py", "name=own"]):
        done = head.nodes.run(["python", *job])
        assert done.returncode == 0, done.stderr
    return "own"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token and none was sent; export RAY_AUTH_MODE"),
        ({"RAY_AUTH_TOKEN": ""}, "there is no token; write the cluster's into ~/.ray/auth_token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refused the token of RAY_AUTH_TOKEN; it has to be the one"),
    ],
    ids=["mode", "missing", "wrong"],
)
def test_a_job_that_connects_itself_is_told_what_to_do(
    head: Head, prepared: str, env: dict[str, str], expected: str
):
    started = time.monotonic()
    sweep = ["python", "jobs/tune.py", f"name={prepared}", "search=smoke"]
    result = head.nodes.run(sweep, RAY_ADDRESS=head.nodes.address, **env)
    assert result.returncode == 2
    *before, line = result.stderr.splitlines()
    assert line.startswith(f"error: RAY_ADDRESS={head.nodes.address}: ")
    assert expected in line
    assert all(text.startswith("the sweep goes on with: ") for text in before), before
    assert time.monotonic() - started < 60


def test_health_is_told_without_a_token(head: Head):
    """The Kubernetes manifests' probe."""
    with urllib.request.urlopen(f"{head.nodes.dashboard}/api/gcs_healthz") as answer:
        assert answer.read() == b"success"
