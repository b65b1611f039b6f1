"""What GPUs are needed for, on a Ray of this machine or, with RAY_ADDRESS, on a cluster's.

`pytest -m gpu` asks for two real GPUs or more. The same with gloo on CPUs, among the slow tests,
shows that the test itself works.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.distributed
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cafemed import cluster, paths

SMALL = [
    "data=synthetic_demo",
    "data.generator.num_patients=60",
    "data.generator.num_visits=140",
]


@pytest.fixture
def gpus() -> Iterator[int]:
    """The cluster's GPUs, two or more; Ray is connected."""
    with cluster.ray_cluster(os.cpu_count() or 1, num_gpus=1):
        count = int(ray.cluster_resources().get("GPU", 0))
        if count < 2:
            pytest.skip(f"{count} GPUs; two or more are needed")
        yield count


def averaged_gradients(backend: str, size: int, resources: dict[str, float]) -> list[float]:
    """One process a rank; rank r's gradient is r + 1, and each gives what DDP made of it."""

    def member(rank: int, host: str, port: int) -> float:
        import datetime

        import torch
        from torch import distributed

        limit = datetime.timedelta(seconds=120)
        store = distributed.TCPStore(host, port, is_master=False, timeout=limit)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit
        )
        device = "cuda" if backend == "nccl" else "cpu"
        model = torch.nn.Linear(1, 1, bias=False).to(device)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(torch.full((1, 1), rank + 1.0, device=device)).sum().backward()
        distributed.destroy_process_group()
        assert model.weight.grad is not None
        return float(model.weight.grad)

    host = ray.util.get_node_ip_address()
    store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    group = ray.util.placement_group([resources] * size, strategy="SPREAD")
    try:
        assert group.wait(60), f"no place for {size} times {resources}"
        task = ray.remote(member)
        asked = [
            task.options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, i),
            ).remote(i, host, store.port)
            for i in range(size)
        ]
        found: list[float] = ray.get(asked, timeout=240)
    finally:
        ray.util.remove_placement_group(group)
    return found


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore")  # of Ray's and torch's own
def test_gradients_are_averaged_between_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster.ray_cluster(2):
        assert averaged_gradients("gloo", 2, {"CPU": 1}) == [1.5, 1.5]


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # of Ray's and torch's own
def test_gradients_are_averaged_between_all_gpus(gpus: int):
    expected = (gpus + 1) / 2
    found = averaged_gradients("nccl", gpus, {"CPU": 1, "GPU": 1})
    assert found == pytest.approx([expected] * gpus)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_two_trials_share_a_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPUs; two or more are needed")
    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="cm", dir="/tmp") as root:
        sweep = ["search=smoke", "search.gpus=0.5", "search.max_concurrent=4", "train.epochs=2"]
        for job, options in (("prepare", SMALL), ("discover", []), ("tune", sweep)):
            command = [sys.executable, f"jobs/{job}.py", "name=g", *options]
            env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            done = subprocess.run(
                command,
                cwd=paths.PROJECT_DIR,
                env=env | {"CAFEMED_HOME": root},
                capture_output=True,
                text=True,
                timeout=250,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        table = pq.read_table(Path(root) / "experiments/g/sweep/sweep.parquet")
    assert set(table["gpus"].to_pylist()) == {0.5}
    assert set(table["status"].to_pylist()) <= {"finished", "stopped"}
