"""What keeps a sweep's bundle from serving."""

import json
from pathlib import Path
from typing import Any

import pytest

from cafemed import artifacts, promotion, registry, sweep
from cafemed.sweep import SweepResult


@pytest.mark.parametrize(
    ("limit", "rate", "aliases"),
    [
        (None, 0.9, ["candidate", "production"]),
        (0.06, 0.06, ["candidate", "production"]),
        (0.06, 0.0712, ["candidate"]),
    ],
)
def test_a_bundle_that_exceeds_the_ddi_rate_as_served_is_a_candidate_alone(
    sweeps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: float | None,
    rate: float,
    aliases: list[str],
):
    plan = sweeps.plan_of(max_ddi_rate=limit)
    trial = sweeps.record_of(0, {"train.learning_rate": 0.01})
    folder = tmp_path / "sweep"
    published: list[list[str]] = []
    with artifacts.new_folder(folder, sweep.STAGE, {}, plan.settings()) as (partial, _):
        sweep.write(SweepResult((trial,), max_ddi_rate=limit), partial, "f")
        (partial / "bundle").mkdir()
        content = {"validation": {"ddi_rate": rate}}
        (partial / "bundle" / "metrics.json").write_text(json.dumps(content))

    def publish(*given: Any) -> tuple[int, bool]:
        published.append(["candidate", "production"] if given[-1] else ["candidate"])
        return 1, True

    monkeypatch.setattr(promotion, "publish", publish)
    monkeypatch.setattr(registry, "read_card", lambda *_: None)
    promotion.publish_best(folder, tmp_path / "registry", True)
    assert published == [aliases]
    said = "its DDI rate is 0.0712 on the validation patients, and search.max_ddi_rate allows 0.06"
    out = capsys.readouterr().out
    assert (said in out) == ("production" not in aliases)
    assert ("none before jobs/evaluate.py measures version 0001" in out) == (
        "production" in aliases
    )
