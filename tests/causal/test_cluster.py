"""Where blocks run: what each choice opens, closes and refuses."""

import os
import signal
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from cafemed import config
from cafemed.errors import ConfigError
from causal import cluster
from causal.discovery import CausalConfig


def profiled(client: Client) -> set[bool]:
    """Whether the workers run Dask's profiler, which may hang them."""
    return set(
        client.run(
            lambda: __import__("dask").config.get("distributed.worker.profile.enabled")
        ).values()
    )


def test_local_starts_processes_and_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED")
    with cluster.connect("local", 2) as client:
        info = client.scheduler_info()["workers"].values()
        pids = set(client.run(__import__("os").getpid).values())
        folders = {Path(worker["local_directory"]) for worker in info}
        assert [worker["nthreads"] for worker in info] == [1, 1]
        assert len(pids) == 2
        environments = client.run(lambda: dict(__import__("os").environ)).values()
        assert all(int(e["MALLOC_MMAP_THRESHOLD_"]) >= 1 << 20 for e in environments)
        assert all(folder.exists() for folder in folders)
        assert profiled(client) == {False}
    assert not any(folder.exists() for folder in folders)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_address_joins_a_scheduler_and_leaves_it_running() -> None:
    with LocalCluster(
        n_workers=1,
        processes=False,
        protocol="tcp",
        dashboard_address=":0",
        worker_dashboard_address=":0",
    ) as running:
        with cluster.connect(running.scheduler_address) as client:
            assert client.submit(lambda: 7).result(timeout=20) == 7
        with Client(running) as again:
            assert again.submit(lambda: 8).result(timeout=20) == 8


def test_an_address_without_workers_is_refused_in_one_line() -> None:
    with (
        LocalCluster(
            n_workers=0, processes=False, protocol="tcp", dashboard_address=":0"
        ) as running,
        pytest.raises(ConfigError, match="has no workers") as caught,
        cluster.connect(running.scheduler_address),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "tcp://"])
def test_an_address_where_nobody_answers_is_refused_within_seconds(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no Dask scheduler answered") as caught:
        cluster.connect(address).__enter__()
    assert time.monotonic() - began < 8
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["", "dask", "localhost:8786", "http://host:8786"])
def test_other_values_are_refused_when_the_configuration_is_read(where: str) -> None:
    with pytest.raises(ConfigError, match=r"causal: cluster: expected 'local', 'ray'"):
        config.from_mapping(CausalConfig, {"cluster": where}, "causal")


def test_ray_runs_tasks_in_actors_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED")
    with cluster.connect("ray", 2) as client:
        assert len(client.scheduler_info()["workers"]) == 2
        assert client.gather(client.map(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
        assert ray.is_initialized()
        assert profiled(client) == {False}
    assert not ray.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_the_workers_are_up(number: signal.Signals) -> None:
    reached: list[bool] = []

    def started() -> None:
        with cluster._interrupts_deferred():
            os.kill(os.getpid(), number)
            reached.append(True)

    before = signal.signal(number, signal.default_int_handler)  # as in a job
    try:
        with pytest.raises(KeyboardInterrupt):
            started()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert reached == [True]
