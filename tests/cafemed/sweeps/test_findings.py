"""What a sweep's files say: the decision in words, the facts, the ranking, and damage refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafemed import artifacts, findings
from cafemed.errors import ArtifactError
from cafemed.findings import Findings
from cafemed.sweep import METRICS, TrialRecord

Make = Callable[..., Findings]


def with_metrics(trial: TrialRecord, jaccard: float, ddi_rate: float) -> TrialRecord:
    (epoch, *_) = trial.history
    found = {**epoch["metrics"], "jaccard": jaccard, "ddi_rate": ddi_rate}
    return dataclasses.replace(trial, history=({**epoch, "metrics": found},))


@pytest.fixture
def four(trials_of: Callable[..., list[TrialRecord]]) -> list[TrialRecord]:
    """Trials 0 to 3: (Jaccard, DDI rate) of (.5, .09), (.4, .05), (.45, .06), (.3, .07)."""
    values = [(0.5, 0.09), (0.4, 0.05), (0.45, 0.06), (0.3, 0.07)]
    return [with_metrics(t, *v) for t, v in zip(trials_of(4, 1, 0), values, strict=True)]


def test_the_highest_jaccard_decides(findings_of: Make, four: list[TrialRecord]):
    found = findings_of(trials=four)
    assert found.decision() == (
        "Trial 0 has the highest Jaccard of 4 trials: Jaccard 0.5000 and DDI rate 0.0900 on the "
        "validation patients, in epoch 1."
    )
    assert found.ranking() == [0, 2, 1, 3]
    assert found.front() == [True, True, True, False]


def test_a_constraint_decides_first(findings_of: Make, four: list[TrialRecord]):
    found = findings_of(trials=four, limit=0.06)
    assert found.decision().startswith(
        "Trial 2 has the highest Jaccard of the 2 with a DDI rate of at most 0.06: Jaccard 0.4500"
    )
    assert found.ranking() == [2, 1, 0, 3]
    found = findings_of(trials=four, limit=0.055)
    assert found.decision().startswith("Trial 1 is the only one with a DDI rate of at most 0.055:")
    beyond = findings_of(trials=four, limit=0.01)
    assert beyond.decision().endswith("That is more than the DDI rate of 0.01 asked.")


def test_no_choice_is_said_with_its_reason(findings_of: Make, four: list[TrialRecord]):
    best = {"trial": None, "reason": "no trial kept it", "constraint": {"ddi_rate": 0.01}}
    found = findings_of(trials=four, best=best)
    assert found.decision() == "No trial is chosen: no trial kept it"
    assert (found.chosen, found.command(), found.limit) == (None, [], 0.01)
    assert found.ranking() == [0, 2, 1, 3]


def test_failed_trials_have_no_metrics_whatever_they_reported(findings_of: Make):
    found = findings_of(9, failed=4)
    statuses = found.table["status"].to_pylist()
    reported = [value is not None for value in found.table["jaccard"].to_pylist()]
    assert sum(reported) > statuses.count("finished") + statuses.count("stopped")
    assert np.isfinite(found.jaccard).tolist() == [status != "failed" for status in statuses]
    assert not any(found.front()[i] for i, s in enumerate(statuses) if s == "failed")
    facts = dict(found.facts())
    assert facts["Trials"] == "9: 4 finished, 1 stopped early, 4 failed"


def test_all_failed_and_none_at_all(findings_of: Make):
    assert findings_of(4, failed=4).decision() == (
        "No trial gave a model: all 4 failed. The first with ValueError: too <large>"
    )
    nothing = findings_of(0)
    assert nothing.decision() == "The sweep has no trials."
    assert dict(nothing.facts()) == {
        "Model": "cafemed",
        "Trials": "0",
        "Training time": "0.0 s in all trials together",
        "Cohort": "ab12ab12ab12",
    }


def test_facts_add_up(findings_of: Make):
    facts = dict(findings_of(6, 10).facts())
    # Trials 2 and 5 stopped after 3 of 10 epochs of 1.5 s; each begins a minute after the last.
    assert facts["Training time"] == "1 min 9 s in all trials together"
    assert facts["Run"] == "2026-03-01 12:00 UTC, for 5 min 4 s"
    assert facts["Model"] == "cafemed, causalmed"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"),
     (61, "1 min 1 s"), (3599.7, "1 h"), (3660, "1 h 1 min"), (90000, "25 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str):
    assert findings.duration(seconds) == text


def test_the_command_is_of_the_best_trial(findings_of: Make):
    found = findings_of(limit=None)
    assert found.chosen is not None
    command = found.command()
    assert f"train.seed={found.chosen['seed']}" in command
    assert f"train.learning_rate={found.chosen['train.learning_rate']!r}" in command
    assert f"model={found.chosen['model.name']}" in command
    stopped = next(row for row in found.trials if row["status"] == "stopped")
    best = {**found.best, "trial": stopped["trial"]}
    assert "train.epochs=3" in dataclasses.replace(found, best=best).command()
    assert "train.epochs=12" in command


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.25, "auto"), (2.0, "auto")])
def test_the_command_trains_where_the_trial_was_trained(
    findings_of: Make, gpus: float, device: str
):
    """`jobs/train.py` alone takes a GPU that it finds; a trial takes none that it has not."""
    found = findings_of(limit=None)
    column = found.table.column_names.index("gpus")
    reserved = pa.array([gpus] * found.table.num_rows, pa.float64())
    found = dataclasses.replace(found, table=found.table.set_column(column, "gpus", reserved))
    assert f"device={device}" in found.command()


def write_sweep(folder: Path, found: Findings) -> Path:
    target = folder / "experiments" / found.name / "sweep"
    inputs = {"cohort": found.cohort}
    with artifacts.new_folder(target, "sweep", inputs, found.settings) as (partial, _):
        pq.write_table(found.table, partial / "sweep.parquet")
        if found.best:
            (partial / "best.json").write_text(json.dumps(found.best))
        if found.tested:
            (partial / "test.json").write_text(json.dumps(found.tested))
    return target


@pytest.mark.parametrize("failed", [0, 5])
def test_what_is_read_is_what_was_written(findings_of: Make, tmp_path: Path, failed: int):
    metrics = dict.fromkeys(METRICS, 0.5)
    tested = {"0": {"patients": 9, "visits": 20, "metrics": metrics, "intervals": {}}}
    found = findings_of(5, failed=failed, tested={} if failed else tested, root="/r")
    read = findings.read(write_sweep(tmp_path, found), "/r")
    assert read.table.equals(found.table)
    for field in ("best", "name", "cohort", "tested", "root"):
        assert getattr(read, field) == getattr(found, field)
    assert read.command() == found.command()


def test_files_that_do_not_belong_together_are_refused(findings_of: Make, tmp_path: Path):
    folder = write_sweep(tmp_path, findings_of(3))
    (folder / "best.json").write_text(json.dumps({"trial": 7}))
    with pytest.raises(ArtifactError, match=r"best.json: names trial 7, which sweep.parquet does"):
        findings.read(folder)
    shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match="expected the manifest of a sweep"):
        findings.read(folder)
