"""A sweep on clusters of two and of four nodes of this machine, with GPUs that are numbers only."""

import signal
import subprocess
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from cafemed import paths

SMALL = [
    "name=s",
    "data=synthetic_demo",
    "data.generator.num_patients=60",
    "data.generator.num_visits=140",
    "data.generator.num_diagnoses=40",
    "data.generator.num_procedures=20",
    "data.generator.num_medications=15",
]
SWEEP = ["name=s", "search=smoke", "train.epochs=2", "model.dimension=8", "force=true"]
# The nodes that processes of trials lived on, of the job that was last.
WHERE = """
import sys, ray
from ray._private.state import actors
ray.init(sys.argv[1], logging_level=50)
found = list(actors().values())
last = max(actor["JobID"] for actor in found)
print(len({actor["Address"]["NodeID"] for actor in found if actor["JobID"] == last}))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def nodes(ray_nodes: ModuleType) -> Iterator[Any]:
    """Two nodes, each for one trial at a time."""
    with ray_nodes.head(cpus=1, gpus=1) as found:
        found.add(cpus=1, gpus=1)
        succeeded(found.run(["python", "jobs/prepare.py", *SMALL]))
        succeeded(found.run(["python", "jobs/discover.py", "name=s"]))
        found.wait()
        yield found


def succeeded(result: Any) -> str:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return str(result.stdout)


def check_sweep(nodes: Any, count: int) -> None:
    """Every trial is there and held its half of a GPU, and every node had some."""
    table = pq.read_table(nodes.home / "experiments/s/sweep/sweep.parquet")
    assert table["trial"].to_pylist() == list(range(table.num_rows))
    assert set(table["status"].to_pylist()) <= {"finished", "stopped"}
    assert set(table["gpus"].to_pylist()) == {0.5}
    assert succeeded(nodes.python(WHERE, nodes.address)).split() == [str(count)]


def test_a_sweep_uses_two_nodes_and_then_four(nodes: Any):
    sweep = ["python", "jobs/tune.py", *SWEEP, "search.gpus=0.5", "search.max_concurrent=null"]
    told = succeeded(nodes.run([*sweep, "search.num_samples=4"], RAY_ADDRESS=nodes.address))
    assert f"the cluster at {nodes.address}: 2 CPUs, 2 GPUs" in told
    check_sweep(nodes, 2)
    for _ in range(2):
        nodes.add(cpus=1, gpus=1)
    nodes.wait()
    # The same as a job, which needs the token for its submission and on every node.
    submit = ["ray", "job", "submit", "--address", nodes.dashboard, "--working-dir", ".", "--"]
    told = succeeded(nodes.run([*submit, *sweep, "search.num_samples=8"]))
    assert "4 CPUs, 4 GPUs" in told
    check_sweep(nodes, 4)


def test_a_trial_that_no_node_holds_is_said_and_waited_for(nodes: Any):
    """A cluster may grow; Ctrl-C ends the wait, as `ray job stop` does."""
    process = subprocess.Popen(
        ["python", "jobs/tune.py", *SWEEP, "search.gpus=2"],
        cwd=paths.PROJECT_DIR,
        env=nodes.env | {"RAY_ADDRESS": nodes.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        waits = "search.gpus: a trial reserves 2, but the largest node has 1 GPU now; waiting"
        assert any(waits in line for line in process.stdout)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "interrupted; " in said
