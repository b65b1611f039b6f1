"""What GPUs are needed for, on a Ray of this machine or, with RAY_ADDRESS, on a cluster's.

`pytest -m gpu` asks for two real GPUs or more. The same on two nodes whose GPUs are numbers, with
gloo, is among the slow tests and shows that the test itself works.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch

import models
from cafemed import cluster, distributed, paths, training
from cafemed.distributed import FitData, Workers
from cafemed.training import FitConfig, FitResult

SMALL = [
    "data=synthetic_demo",
    "data.generator.num_patients=60",
    "data.generator.num_visits=140",
]
OPTIONS = {"dimension": 16, "dropout": 0.0}
CONFIG = FitConfig(epochs=3, batch_size=13, learning_rate=0.005)


@pytest.fixture
def data() -> FitData:
    """The patients of the tests of sweeps."""
    path = paths.PROJECT_DIR / "tests" / "cafemed" / "sweeps.py"
    spec = importlib.util.spec_from_file_location("sweeps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweeps"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    given: Any = module.invented_experiment()
    patients = (given.cohort.patients_of(split) for split in ("train", "validation"))
    return FitData(models.build, given.inputs, given.arrays, *patients)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The cluster's GPUs, two or more; Ray is connected."""
    if "RAY_ADDRESS" not in os.environ:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with cluster.ray_cluster(os.cpu_count() or 1, num_gpus=1):
        count = int(ray.cluster_resources().get("GPU", 0))
        if count < 2:
            pytest.skip(f"{count} GPUs; two or more are needed")
        yield count


def check(data: FitData, num_workers: int, tolerance: float) -> FitResult:
    """Trains with a GPU for each worker and, the same, in one process."""
    alone = training.fit(
        *(data.build, "cafemed", OPTIONS, data.inputs, data.arrays),
        *(data.train_patients, data.validation_patients, CONFIG),
    )
    workers = Workers(num_workers, 1.0, gpus=1.0)
    together = distributed.fit(ray.put(data), "cafemed", OPTIONS, CONFIG, workers)
    for got, wanted in zip(together.history, alone.history, strict=True):
        assert got.losses == pytest.approx(wanted.losses, rel=tolerance)
    return together


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # of Ray's and torch's own
def test_workers_on_two_nodes_train_as_one_process(data: FitData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    if not torch.cuda.is_available():  # NCCL of a CUDA build would look for the GPUs
        monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    from ray.cluster_utils import Cluster

    # A worker's GPU is on a node of its own.
    size = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size)
    try:
        nodes.add_node(**size)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        with cluster.ray_cluster(2) as where:
            assert where.endswith("2 CPUs, 2 GPUs")
            check(data, 2, 1e-5)
    finally:
        nodes.shutdown()


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # of Ray's and torch's own
def test_workers_on_all_gpus_train_as_one_process(data: FitData, gpus: int):
    """Through NCCL; a GPU adds up in another order than this process's CPU."""
    check(data, gpus, 1e-3)


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
