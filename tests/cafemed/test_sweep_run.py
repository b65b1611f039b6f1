"""From a ledger whose trials have all ended to a sweep's folder, without Ray."""

from pathlib import Path
from typing import Any

import pytest

import models
from cafemed import artifacts, sweep, sweep_run
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError
from cafemed.invocation import Invocation
from cafemed.ledger import Header, Ledger
from cafemed.sweep_tracking import SweepTracking

INPUTS = {"cohort": "c" * 64, "graph": "g" * 64}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def ledger(sweeps: Any, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Three trials that ended, and none of their checkpoints."""
    monkeypatch.setattr(sweep_run.experiment, "load_inputs", lambda _: given)
    plan, found = sweeps.plan_of(num_samples=3), Ledger(tmp_path / "trials")
    found.open(Header("f", INPUTS, plan.settings(), {}))
    sweeps.play(Conductor(plan, found))
    (Path(found.storage) / "run-001").rename(tmp_path / "lost")
    return found


@pytest.mark.parametrize("before", ["nothing", "another sweep", "another best trial"])
def test_a_best_trial_without_a_checkpoint_takes_no_other_models_place(
    sweeps: Any, ledger: Ledger, tmp_path: Path, before: str
):
    plan = sweeps.plan_of(num_samples=3)
    result = Conductor(plan, ledger).result()
    if before != "nothing":
        other = sweeps.plan_of(num_samples=3, seed=1) if before == "another sweep" else plan
        stage = (tmp_path / "sweep", sweep.STAGE, INPUTS, other.settings())
        with artifacts.new_folder(*stage) as (partial, _):
            (partial / "bundle").mkdir()
            chosen = result.best.number
            kept = [t for t in result.trials if (t.number == chosen) == (other is not plan)]
            sweep.write(sweep.SweepResult(tuple(kept)), partial, None)
    tracked = SweepTracking({"tensorboard": False}, Invocation(tmp_path, "x", False))
    with pytest.raises(ArtifactError, match=rf"trial {result.best.number}, the best one, has no"):
        sweep_run.run(tmp_path, plan, ledger, INPUTS, models.build, tracked)
    assert ledger.exists()


@pytest.mark.parametrize(
    ("space", "starts", "expected"),
    [
        ({}, 3, "the last 1 of 4 starting points"),
        (
            {"model": {"name": {"type": "categorical", "choices": list(models.NAMES)}}},
            2,
            "the last 2 of 5 starting points (causalmed, graphdiffmed)",
        ),
        ({}, 2, None),
    ],
)
def test_starting_points_that_are_not_tried_are_told(
    sweeps: Any,
    ledger: Ledger,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    space: Any,
    starts: int,
    expected: str | None,
):
    points = [{"train.learning_rate": 0.01 * (1 + i)} for i in range(starts)]
    plan = sweeps.plan_of(
        num_samples=3, space={"train": sweeps.SPACE["train"]} | space, starts=points
    )
    tracked = SweepTracking({"tensorboard": False}, Invocation(tmp_path, "x", False))
    with pytest.raises(ArtifactError):  # as above, after it
        sweep_run.run(tmp_path, plan, ledger, INPUTS, models.build, tracked)
    said = [line for line in capsys.readouterr().out.splitlines() if "not tried" in line]
    wanted = f"tune      not tried, as search.num_samples is 3: {expected}"
    assert said == ([] if expected is None else [wanted])
