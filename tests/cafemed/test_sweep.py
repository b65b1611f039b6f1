"""The table of a sweep's trials, and tables that earlier versions wrote."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cafemed import sweep
from cafemed.conductor import Conductor
from cafemed.ledger import Header, Ledger
from cafemed.sweep import SweepResult

RESOURCES = ("cpus", "gpus", "memory_gb", "num_workers")


@pytest.mark.parametrize(
    ("search", "reserved"),
    [
        ({"cpus": 2.0, "gpus": 0.5, "memory_gb": 1.5}, (2.0, 0.5, 1.5, 1)),
        ({"cpus": 2.0, "memory_gb": 1.5, "num_workers": 3}, (6.0, 0.0, 4.5, 3)),
        ({"num_workers": 2}, (2.0, 0.0, None, 2)),
    ],
)
def test_what_all_workers_of_a_trial_reserve_is_in_the_table(
    sweeps: Any, tmp_path: Path, search: dict[str, Any], reserved: tuple[Any, ...]
):
    plan = sweeps.plan_of(num_samples=2, **search)
    ledger = Ledger(tmp_path / "trials")
    ledger.open(Header("f", {}, plan.settings(), {}))
    conductor = Conductor(plan, ledger)
    sweeps.play(conductor)
    sweep.write(conductor.result(), tmp_path, None)
    rows = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert [tuple(row[name] for name in RESOURCES) for row in rows] == [reserved] * 2
    for found in (sweep.read_trials(tmp_path / "sweep.parquet"), conductor.ended):
        assert [tuple(getattr(t, name) for name in RESOURCES) for t in found] == [reserved] * 2


def test_a_table_of_an_earlier_version_is_read(sweeps: Any, tmp_path: Path):
    record = dataclasses.replace(
        sweeps.record_of(0, {"train.learning_rate": 0.01}), attempts=2, memory_gb=1.5, num_workers=2
    )
    path = tmp_path / "sweep.parquet"
    table = SweepResult((record,)).table()
    pq.write_table(table.drop_columns(["memory_gb", "num_workers"]), path)
    (found,) = sweep.read_trials(path)
    assert (found.attempts, found.memory_gb, found.num_workers) == (2, None, None)
    # What is not known stays so where it is written again.
    assert SweepResult((found,)).table()["num_workers"].null_count == 1
    pq.write_table(table, path)
    (found,) = sweep.read_trials(path)
    assert (found.attempts, found.memory_gb, found.num_workers) == (2, 1.5, 2)
