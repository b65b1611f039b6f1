"""The report: its data as they were in the sweep's files, nothing loaded or run but its own."""

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cafemed import artifacts, findings, importance, sweep, sweep_report
from cafemed.findings import Findings
from cafemed.sweep import TrialRecord

Make = Callable[..., Findings]
EVIL = "</script><script>alert(1)</script>"
EVIL += "<!--<script>&amp;\u2028\u2029__DATA____PLOTLY__\0\U0001f600'\""


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, _tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def data_of(text: str) -> Any:
    return json.loads(Page(text).scripts[0])


def test_the_data_block_holds_the_table(findings_of: Make):
    found = findings_of(20, failed=3)
    data = data_of(sweep_report.render(found))
    assert data == json.loads(json.dumps(sweep_report.content(found)))
    columns = set(found.table.column_names) - {"history"}
    assert set(data["columns"]) == columns
    for name in columns - {"started"}:
        assert data["columns"][name] == found.table[name].to_pylist()
    for shown, started in zip(
        data["columns"]["started"], found.table["started"].to_pylist(), strict=True
    ):
        assert shown == (started and started.isoformat())
    for name, trials in data["history"].items():
        for shown, epochs in zip(trials, found.table["history"].to_pylist(), strict=True):
            np.testing.assert_allclose(shown, [epoch[name] for epoch in epochs], rtol=1e-5)
    assert data["chosen"] == found.best["trial"]
    assert data["front"] == found.front()
    assert data["best"] == found.ranking()[:10]
    assert data["command"] == found.command()


def test_parameters_have_the_axes_of_their_space(findings_of: Make):
    data = sweep_report.content(findings_of(20))
    assert data["parameters"][0] == {
        "name": "model.name",
        "type": "categorical",
        "choices": ["cafemed", "causalmed"],
    }
    shown = {entry["name"]: entry for entry in data["parameters"]}
    assert shown["model.causalmed.effect_levels"] == {
        "name": "model.causalmed.effect_levels", "type": "int", "low": 2, "high": 20, "log": True,
    }  # fmt: skip
    assert len(shown) == 7


def test_importances_are_shown_for_both_metrics(findings_of: Make):
    found = findings_of(30)
    jaccard, ddi_rate = sweep_report.content(found)["importances"]
    assert (jaccard["metric"], ddi_rate["metric"]) == ("jaccard", "ddi_rate")
    for shown in (jaccard, ddi_rate):
        assessed = importance.assess(found.table, found.space, shown["metric"])
        assert [dict(one["values"]) for one in shown["sets"]] == [one.values for one in assessed]
    assert jaccard["sets"][0]["values"][0][0] == "train.learning_rate"
    assert ddi_rate["sets"][0]["values"][0][0] == "model.dropout"


def test_test_metrics_are_shown_where_there_are_any(findings_of: Make):
    metrics = dict.fromkeys(sweep.METRICS, 0.5)
    intervals = {name: [0.4, float("nan")] for name in sweep.METRICS}
    split = {"patients": 10, "visits": 22, "metrics": metrics, "intervals": intervals, "more": 1}
    found = findings_of(tested={"3": split})
    assert data_of(sweep_report.render(found))["tested"] == {
        "3": {
            "patients": 10,
            "visits": 22,
            "metrics": metrics,
            "intervals": {name: [0.4, None] for name in sweep.METRICS},
        }
    }
    assert sweep_report.content(findings_of())["tested"] == {}


def hostile(trial: TrialRecord) -> TrialRecord:
    parameters = {**trial.parameters, "train.note": EVIL, f"model.{EVIL}": 1}
    return dataclasses.replace(trial, parameters=parameters, error=EVIL, host=EVIL)


def test_no_text_of_the_sweep_can_leave_the_data_block(findings_of: Make, trials_of: Any):
    trials = [hostile(t) for t in trials_of(6, 2, 0, 2)]
    space = {"train": {"note": {"type": "categorical", "choices": [EVIL, "other"]}}}
    found = findings_of(trials=trials, name=EVIL, cohort=EVIL)
    found = dataclasses.replace(
        found, settings={**found.settings, "search": {"space": space, "sampler": EVIL}}
    )
    text = sweep_report.render(found)
    page = Page(text)
    assert len(page.scripts) == 3
    assert len(re.findall("<script", text)) == 3
    assert "alert(1)" not in page.scripts[1] + page.scripts[2]
    data = data_of(text)
    assert data["name"] == EVIL
    assert data["columns"]["error"][0] == data["columns"]["train.note"][0] == EVIL
    assert f"model.{EVIL}" in data["columns"]
    plain = sweep_report.render(findings_of())
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(plain).tags]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_sweeps_have_a_page(findings_of: Make, count: int):
    for failed in {0, count}:
        data = data_of(sweep_report.render(findings_of(count, 2, failed=failed)))
        assert len(data["columns"]["trial"]) == count
        assert data["chosen"] == (None if failed == count else data["best"][0])
        assert all(shown["sets"] == [] for shown in data["importances"])


def test_a_value_that_is_no_number_is_null(findings_of: Make, trials_of: Any):
    trials = trials_of(4, 2, 0)
    epochs = [
        {**epoch, "metrics": {**epoch["metrics"], "prauc": float("nan")}}
        for epoch in trials[0].history
    ]
    trials[0] = dataclasses.replace(trials[0], history=tuple(epochs))
    data = sweep_report.content(findings_of(trials=trials))
    assert data["columns"]["prauc"][0] is None
    assert data["history"]["prauc"][0] == [None, None]


def test_the_page_needs_no_other_file_and_no_host(findings_of: Make):
    text = sweep_report.render(findings_of())
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
        assert tag not in ("link", "iframe", "object", "embed", "base") or (
            attributes.get("href") == "data:,"
        )
    plotly = page.scripts[1]
    rest = text.replace(plotly, "")
    assert (
        re.search(r"(?i)https?:|//[a-z]+\.[a-z]|@import|url\((?!#)|fetch\(|XMLHttp", rest) is None
    )
    assert "__" not in re.sub(r'<script id="data".*?</script>', "", rest, flags=re.S)
    assert 4_000_000 < len(text.encode()) < 6_000_000


def test_only_the_pages_own_programs_may_run(findings_of: Make):
    page = Page(sweep_report.render(findings_of(3)))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"  # no request to anywhere
    allowed = rules["script-src"].split()
    digests = [hashlib.sha256(text.encode()).digest() for text in page.scripts[1:]]
    assert allowed == [f"'sha256-{base64.b64encode(d).decode()}'" for d in digests]


def test_plotly_is_copied_whole(findings_of: Make):
    page = Page(sweep_report.render(findings_of(3)))
    bundle = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    assert page.scripts[1].replace("\\x3c", "<") == bundle.read_text("utf-8").replace("\\x3c", "<")


def test_the_report_can_be_made_again_and_is_no_part_of_the_sweep(
    findings_of: Make, tmp_path: Path
):
    found = findings_of(8)
    folder = tmp_path / "experiments" / found.name / "sweep"
    inputs = {"cohort": found.cohort}
    with artifacts.new_folder(folder, "sweep", inputs, found.settings) as (partial, _):
        sweep_report_files(found, partial)
    path = sweep_report.write(folder)
    assert path == folder / "report.html"
    assert path.stat().st_mode & 0o777 == 0o644
    first = path.read_bytes()
    assert data_of(first.decode()) == json.loads(json.dumps(sweep_report.content(found)))
    manifest = artifacts.verify(folder, "sweep")  # whole with the report,
    assert "report.html" not in manifest.files
    path.unlink()
    assert artifacts.is_current(folder, "sweep", manifest.fingerprint)  # and without it
    assert sweep_report.write(folder).read_bytes() == first
    assert "paths.root" not in " ".join(data_of(first.decode())["command"])
    sweep_report.write(folder, "/data")
    assert 'paths.root="/data"' in " ".join(data_of(path.read_text("utf-8"))["command"])


def test_an_evaluation_of_the_chosen_trial_goes_into_the_report(findings_of: Make, tmp_path: Path):
    found = findings_of(8)
    folder = tmp_path / "experiments" / found.name / "sweep"
    reached = {
        "patients": 10,
        "visits": 22,
        "metrics": dict.fromkeys(sweep.METRICS, 0.5),
        "intervals": {name: [0.4, 0.6] for name in sweep.METRICS},
        "more": 1,
    }
    assert sweep_report.note_tested(folder, "b1", reached) is None  # no sweep at all
    stage = ("sweep", {"cohort": found.cohort}, found.settings)
    with artifacts.new_folder(folder, *stage) as (partial, _):
        sweep_report_files(dataclasses.replace(found, best={**found.best, "bundle": "b1"}), partial)
    assert sweep_report.note_tested(folder, "b2", reached) is None  # another model
    assert not (folder / "test.json").exists()
    path = sweep_report.note_tested(folder, "b1", reached)
    assert path == folder / "report.html"
    chosen = str(found.best["trial"])
    del reached["more"]
    assert data_of(path.read_text("utf-8"))["tested"] == {chosen: reached}
    assert findings.read(folder).tested == {chosen: reached}
    artifacts.verify(folder, "sweep")
    assert sweep_report.note_tested(folder, "b1", reached) is None  # all is there
    path.unlink()
    assert sweep_report.note_tested(folder, "b1", reached) == path


def sweep_report_files(found: Findings, folder: Path) -> None:
    pq.write_table(found.table, folder / "sweep.parquet")
    (folder / "best.json").write_text(json.dumps(found.best))
