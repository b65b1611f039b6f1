#!/usr/bin/env python3
"""Times the endpoint against a no-op on Ray Serve and against plain FastAPI with the same model.

    python benchmarks/serving.py --quick                   # 1 and 32 clients, less than a minute
    python benchmarks/serving.py --json benchmarks/results/serving.json

All three get the same requests, one invented patient each with the visits and codes of MIMIC-III's
shape, from clients in a process of their own on this machine, each of which asks again as soon as
it has its answer. `endpoint`: this project's, one replica, behind HAProxy, as `jobs/deploy.py`
starts it (checks of the request, metrics and a line of log each included). `noop`: a Ray Serve
deployment, one replica, behind the same HAProxy, whose FastAPI route parses and validates the same
body by the same schema and answers a constant. `plain`: uvicorn and FastAPI with the same model, a
request at a time. Each is one process, and Ray and HAProxy are the same for both that they serve.
The three are asked in turn, round by round, and of each the round with the median of answers a
second is given. `share_of_noop` and `share_of_plain` are the endpoint's answers a second over
theirs. `clients_share` is the most that the clients took of a core in the three: where it is near
1, clients are measured. `cpu_ms`, `noop_cpu_ms` and `plain_cpu_ms` are
the processor time that a request took the three processes.

The model has drawn weights: an answer costs the same. The case `batch` is a Parquet file of such
patients, scored in this process by one thread as `jobs/predict.py` does with `predict.workers=0`:
`patients_per_s` from reading the file to the written results. Of the case `replica`, `start_s` is
the time until one more endpoint on the running Ray gives its first answer, `memory_mb` the resident
memory of the measured replica at the end.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import httpx  # noqa: E402
import psutil  # noqa: E402

from benchmarks.endpoint import clients, invented  # noqa: E402
from benchmarks.endpoint.clients import Measured  # noqa: E402

CLIENTS = (1, 8, 32, 128)
UNITS = dict.fromkeys(("p50_ms", "p99_ms", "cpu_ms", "noop_cpu_ms", "plain_cpu_ms"), "ms")
UNITS |= {"start_s": "s", "memory_mb": "MB"}
UNITS["patients_per_s"] = "patients/s"
UNITS |= dict.fromkeys(("rps", "noop_rps", "plain_rps"), "requests/s")
COLUMNS = (
    *("rps", "p50_ms", "p99_ms", "noop_rps", "plain_rps"),
    *("share_of_noop", "share_of_plain", "p99_over_p50"),
)
CPU_COLUMNS = ("cpu_ms", "noop_cpu_ms", "plain_cpu_ms", "clients_share")
_NUM_BODIES = 512
_GROUP = 10_000  # rows of a Parquet file's group
_READY_S = 120.0
_WARM_S = 1.0


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        clients: numbers of clients.
        warm_s, measured_s: of each number.
        rounds: the median of so many is given; the three are asked in turn.
        scored: patients of the case `batch`.
    """

    clients: tuple[int, ...]
    warm_s: float
    measured_s: float
    rounds: int
    scored: int


FULL = Effort(CLIENTS, warm_s=2.0, measured_s=8.0, rounds=3, scored=100_000)
QUICK = Effort((1, 32), warm_s=0.2, measured_s=0.7, rounds=3, scored=5_000)


def versions() -> str:
    """What the figures were measured with."""
    import fastapi
    import ray
    import torch

    return (
        f"Python {platform.python_version()}, ray {ray.__version__}, torch {torch.__version__}, "
        f"fastapi {fastapi.__version__}"
    )


@contextmanager
def plain(registry_dir: Path) -> Iterator[tuple[int, int]]:
    """Runs the plain endpoint in a process of its own; gives its port and the process's id."""
    from serve import launch
    from serve.settings import HttpConfig

    port = launch.usable_port(HttpConfig(port=0))
    code = (
        "from pathlib import Path; from benchmarks.endpoint.others import run_plain; "
        f"run_plain(Path({str(registry_dir)!r}), {port})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    try:
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def on_ray(registry_dir: Path) -> Iterator[tuple[int, float]]:
    """Runs the endpoint at / and the no-op at /noop; gives the port and a replica's start.

    The start is of one more endpoint beside them, which is taken away again.
    """
    from ray import serve

    from benchmarks.endpoint import others
    from serve import app, launch
    from serve.settings import DeployConfig, HttpConfig, ServeConfig

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    config = ServeConfig(max_replicas=1, num_cpus=0.3)
    http = HttpConfig(port=launch.usable_port(HttpConfig(port=0)), proxy="haproxy")
    deployed = DeployConfig(once=True, http=http, serve=dataclasses.replace(config, num_cpus=1.0))
    with launch.running(app.application(registry_dir, config), "endpoint", deployed):
        serve.run(others.noop(), name="noop", route_prefix="/noop")
        started = time.monotonic()
        serve.run(app.application(registry_dir, config), name="second", route_prefix="/second")
        wait_until_ready(http.port, "/second")
        start_s = time.monotonic() - started
        serve.delete("second")
        yield http.port, start_s


def wait_until_ready(port: int, prefix: str = "") -> None:
    """Waits for an endpoint."""
    started = time.monotonic()
    while time.monotonic() - started < _READY_S:
        try:
            if httpx.get(f"http://127.0.0.1:{port}{prefix}/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"nothing answered at port {port}")


def replica(name: str) -> psutil.Process:
    """The process of an application's only replica."""
    [found] = [
        process
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:{name}:" in " ".join(process.cmdline())
    ]
    return found


def processor_s(process: psutil.Process) -> float:
    """Processor time that a process has taken so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def client_process() -> Iterator[ProcessPoolExecutor]:
    """A process for clients, which shares no interpreter with what is measured."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        process.submit(clients.ready)  # it starts while other things do
        yield process


def batch(registry_dir: Path, bodies: list[dict[str, Any]], number: int, folder: Path) -> float:
    """Patients a second of a file of so many, the bodies' patients again and again."""
    import pyarrow.parquet as pq
    import torch

    from cafemed import registry
    from serve.prediction import PredictConfig, predict
    from serve.recommender import Recommender

    torch.set_num_threads(1)
    recommender = Recommender.load(registry.resolve(registry_dir, "production"), 1)
    invented_patients = [one for body in bodies for one in body["patients"]]
    repeated = [invented_patients[i % len(invented_patients)] for i in range(number)]
    path, output = folder / "patients.parquet", folder / "answers.parquet"
    with pq.ParquetWriter(path, _rows(repeated[:1], 0).schema) as writer:
        for start in range(0, number, _GROUP):
            writer.write_table(_rows(repeated[start : start + _GROUP], start))
    started = time.perf_counter()
    scored = predict(recommender, PredictConfig(input=str(path), output=str(output)))
    return scored / (time.perf_counter() - started)


def _rows(patients: list[dict[str, Any]], first: int) -> Any:
    """A table of patients for `predict`."""
    import pyarrow as pa

    code = pa.struct({"system": pa.string(), "code": pa.string()})
    lists = ("diagnoses", "procedures", "medications")
    visits = pa.list_(pa.struct({name: pa.list_(code) for name in lists}))
    types = {"patient": pa.int64(), "sex": pa.string(), "age": pa.float64(), "visits": visits}
    rows = [{"patient": first + i, **patient} for i, patient in enumerate(patients)]
    return pa.Table.from_pylist(rows, schema=pa.schema(types))


def median(measured: list[Measured]) -> Measured:
    """The round with the median of answers a second."""
    return sorted(measured, key=lambda one: one.rps)[len(measured) // 2]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One of the three: where it is, and its process."""

    port: int
    prefix: str
    process: psutil.Process


def measured(
    process: ProcessPoolExecutor,
    asked: Asked,
    bodies: list[dict[str, Any]],
    number: int,
    warm_s: float,
    measured_s: float,
) -> tuple[Measured, float]:
    """What so many clients see, and the processor time of a request in ms."""
    before = processor_s(asked.process)
    arguments = (asked.port, bodies, number, warm_s, measured_s, asked.prefix)
    seen = process.submit(clients.measure, *arguments).result()
    return seen, 1000 * (processor_s(asked.process) - before) / seen.answers


def run(effort: Effort, seed: int) -> dict[str, dict[str, float]]:
    """Measures everything; metrics by case."""
    bodies = invented.bodies(_NUM_BODIES, seed)
    cases: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary, client_process() as process:
        registry_dir = invented.write_registry(Path(temporary), seed)
        with (
            plain(registry_dir) as (plain_port, plain_pid),
            on_ray(registry_dir) as (port, start_s),
        ):
            wait_until_ready(plain_port)
            asked = {
                "endpoint": Asked(port, "", replica("endpoint")),
                "noop": Asked(port, "/noop", replica("noop")),
                "plain": Asked(plain_port, "", psutil.Process(plain_pid)),
            }
            for one in asked.values():  # every path is warm
                measured(process, one, bodies, 16, 0.0, _WARM_S)
            for number in effort.clients:
                seen: dict[str, list[Measured]] = {name: [] for name in asked}
                cpu_ms: dict[str, list[float]] = {name: [] for name in asked}
                for _ in range(effort.rounds):
                    for name, one in asked.items():
                        times = (effort.warm_s, effort.measured_s)
                        found, took_ms = measured(process, one, bodies, number, *times)
                        seen[name].append(found)
                        cpu_ms[name].append(took_ms)
                case = f"clients={number}"
                cases[case] = compared(
                    {name: median(of) for name, of in seen.items()},
                    {name: statistics.median(of) for name, of in cpu_ms.items()},
                )
                print(shown(case, cases[case]), flush=True)
            memory_mb = asked["endpoint"].process.memory_info().rss / 2**20
            cases["replica"] = {"start_s": start_s, "memory_mb": memory_mb}
            print("replica: " + ", ".join(f"{k} {v:.1f}" for k, v in cases["replica"].items()))
        scored = batch(registry_dir, bodies, effort.scored, Path(temporary))
        cases["batch"] = {"patients_per_s": scored}
        print(f"batch: {scored:.0f} patients/s of {effort.scored}")
    return cases


def compared(seen: dict[str, Measured], cpu_ms: dict[str, float]) -> dict[str, float]:
    """The metrics of one number of clients.

    Args:
        seen: of each of the three.
        cpu_ms: that a request took each.

    Raises:
        SystemExit: if an answer was none.
    """
    for name, one in seen.items():
        if set(one.statuses) != {200}:
            raise SystemExit(f"{name}: expected status 200 alone, got {one.statuses}")
    endpoint = seen["endpoint"]
    return {
        "rps": endpoint.rps,
        "p50_ms": endpoint.p50_ms,
        "p99_ms": endpoint.p99_ms,
        "noop_rps": seen["noop"].rps,
        "plain_rps": seen["plain"].rps,
        "share_of_noop": endpoint.rps / seen["noop"].rps,
        "share_of_plain": endpoint.rps / seen["plain"].rps,
        "p99_over_p50": endpoint.p99_ms / endpoint.p50_ms,
        "cpu_ms": cpu_ms["endpoint"],
        "noop_cpu_ms": cpu_ms["noop"],
        "plain_cpu_ms": cpu_ms["plain"],
        "clients_share": max(one.clients_share for one in seen.values()),
    }


def shown(case: str, values: dict[str, float]) -> str:
    """A row of the table, and one below it on processor time."""
    row = f"{case:12s}" + "".join(f"{values[name]:>15.2f}" for name in COLUMNS)
    return row + "\n" + ", ".join(f"  {name} {values[name]:.2f}" for name in CPU_COLUMNS)


def main() -> None:
    """Measures, prints the table and writes the JSON rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 32 clients, short rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    print(f"load {load} on {os.cpu_count()} cores; one thread a model; {versions()}")
    print(f"{'case':12s}" + "".join(f"{name:>15s}" for name in COLUMNS), flush=True)
    cases = run(QUICK if given.quick else FULL, given.seed)
    origin = {"date": datetime.date.today().isoformat(), "versions": versions(), "load": load}
    rows = [
        {"case": case, "metric": name, "value": value, "unit": UNITS.get(name, "")} | origin
        for case, values in cases.items()
        for name, value in values.items()
    ]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(PROJECT)
    main()
