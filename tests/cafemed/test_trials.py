"""What a trial does in its worker, without Ray's processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cafemed import trials, tuning_hooks
from cafemed.conductor import Conductor
from cafemed.ledger import Ledger


@pytest.mark.parametrize(
    ("gpus", "visible", "device"), [(0.0, True, "cpu"), (0.5, True, "cuda"), (1.0, False, "cpu")]
)
def test_a_trial_trains_where_it_reserved(
    sweeps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    visible: bool,
    device: str,
):
    conductor = Conductor(sweeps.plan_of(gpus=gpus), Ledger(tmp_path / "trials"))
    config = tuning_hooks.Search(conductor, "paths.root").suggest("") | {"ledger": None}
    used: list[str] = []
    context = SimpleNamespace(get_trial_dir=lambda: str(tmp_path))
    monkeypatch.setattr(trials.tune, "get_context", lambda: context)
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trials.tune, "report", lambda *_, **__: None)
    monkeypatch.setattr(trials.torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(trials.training, "fit", lambda *_, **more: used.append(more["device"]))
    missing = ("build", "inputs", "arrays", "train_patients", "validation_patients")
    nothing: dict[str, Any] = dict.fromkeys(missing)
    plan = conductor.plan
    data = trials.TrialData(
        model_name=plan.model_name, models=plan.models, config=plan.fit, **nothing
    )
    trials.run_trial(config, data)
    assert used == [device]
