"""The report in a browser: from a file, without a network, drawn, sorted, filtered and followed."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafemed import sweep, sweep_report
from cafemed.findings import Findings

pytestmark = pytest.mark.slow

Make = Callable[..., Findings]
CHARTS = ("pareto", "history", "curves", "importances", "parallel")
EVIL = "</script><img src=x onerror=alert(1)><b>bold</b>"
TAB, ENTER = "\ue004", "\ue007"


def open_page(browser: Any, folder: Path, found: Findings) -> None:
    path = folder / "report.html"
    path.write_text(sweep_report.render(found), "utf-8")
    browser.cdp("Network.enable")
    browser.cdp("Network.emulateNetworkConditions", offline=True, latency=0,
                downloadThroughput=0, uploadThroughput=0)  # fmt: skip
    browser.post("url", url=path.as_uri())


def column(browser: Any, title: str) -> list[str]:
    """The text of a column of the table of all trials, from the top."""
    script = f"""
        const table = document.querySelector('table[aria-label="All trials"]');
        const at = [...table.tHead.rows[0].cells].findIndex(
            c => c.firstChild.textContent === '{title}');
        return [...table.tBodies[0].rows].map(r => r.cells[at].innerText.split('\\n')[0]);
    """
    found: list[str] = browser.run(script)
    return found


def press_heading(browser: Any, title: str) -> str:
    """Presses Enter on a heading and gives how the table says it is sorted."""
    script = f"""
        const head = [...document.querySelectorAll('table[aria-label="All trials"] th')].find(
            c => c.firstChild.textContent === '{title}');
        head.firstChild.focus();
        return document.activeElement.textContent;
    """
    assert browser.run(script) == title
    browser.press(ENTER)
    return str(browser.run("return document.activeElement.parentElement.getAttribute('aria-sort')"))


def test_a_large_sweep_is_drawn_from_a_file_without_a_network(
    findings_of: Make, browser: Any, tmp_path: Path
):
    metrics = dict.fromkeys(sweep.METRICS, 0.5)
    intervals = {name: [0.4, 0.6] for name in sweep.METRICS}
    split = {"patients": 10, "visits": 22, "metrics": metrics, "intervals": intervals}
    found = findings_of(128, 60, failed=6, limit=0.07)
    found = dataclasses.replace(found, tested={str(found.best["trial"]): split})
    started = time.monotonic()
    open_page(browser, tmp_path, found)
    for chart in CHARTS:
        drawn = f"return document.querySelectorAll('#{chart} .main-svg').length > 0"
        assert browser.comes_to(drawn, True), chart
    assert time.monotonic() - started < 30  # some seconds; a busy machine slows it
    assert browser.run("return document.title") == "hospital – Sweep report"
    assert browser.run("return document.getElementById('decision').textContent") == found.decision()

    # As many points and epochs as the table has.
    usable = int((found.table["status"].to_numpy() != "failed").sum())
    points = "return document.querySelectorAll('#{} .scatterlayer .points path.point').length"
    assert browser.run(points.format("pareto")) == usable + 1  # the star on the chosen one
    assert browser.run(points.format("history")) == found.table.num_rows + 1
    epochs = "return rows.map(row => row.history.epoch.length)"
    assert browser.run(epochs) == found.table["epochs"].to_pylist()
    dashed = "return document.querySelectorAll('#pareto .shapelayer path').length"
    assert browser.run(dashed) == 1  # the constraint
    headings = browser.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert "On the test patients" in headings
    assert "0.4000 to 0.6000" in browser.run("return document.getElementById('best').innerText")
    script = "return document.getElementById('command').textContent.replaceAll(/ \\\\\\n +/g, ' ')"
    assert browser.run(script) == " ".join(found.command())

    for width in (390, 1200):
        browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900,
                    deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        assert browser.comes_to("return document.documentElement.scrollWidth <= innerWidth", True)
        assert browser.comes_to(
            "return document.querySelector('#pareto .main-svg').clientWidth <= innerWidth", True
        )
    loaded = browser.run("return performance.getEntriesByType('resource').map(r => r.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.messages() == []


def test_the_table_is_sorted_by_the_keyboard(findings_of: Make, browser: Any, tmp_path: Path):
    found = findings_of(12, 3, failed=3)
    open_page(browser, tmp_path, found)
    assert column(browser, "Trial") == [str(i) for i in range(12)]

    assert press_heading(browser, "Jaccard") == "ascending"
    values = column(browser, "Jaccard")
    assert values[-3:] == ["–"] * 3  # what failed comes last,
    assert values[:-3] == sorted(values[:-3])
    assert press_heading(browser, "Jaccard") == "descending"
    values = column(browser, "Jaccard")
    assert values[-3:] == ["–"] * 3  # both ways
    assert values[:-3] == sorted(values[:-3], reverse=True)

    assert press_heading(browser, "Error") == "ascending"
    assert column(browser, "Error")[:3] == ["ValueError: too <large>"] * 3
    assert set(column(browser, "Memory (GB)")) == {"1.5"}
    assert set(column(browser, "Workers")) == {"2"}
    assert press_heading(browser, "batch_size") == "ascending"
    assert [int(v) for v in column(browser, "batch_size")] == sorted(
        found.table["train.batch_size"].to_pylist()
    )
    assert browser.messages() == []


def test_a_trial_is_followed_through_the_charts(findings_of: Make, browser: Any, tmp_path: Path):
    found = findings_of(12, 3)
    open_page(browser, tmp_path, found)
    other = (found.best["trial"] + 1) % 12
    script = f"document.querySelector('#trials tr[data-trial=\"{other}\"] button').focus()"
    browser.run(script)
    browser.press(ENTER)
    assert browser.comes_to("return document.getElementById('picked').hidden", False)
    assert browser.run("return document.getElementById('picked').innerText").startswith(
        f"Trial {other} "
    )
    legend = f"""return [...document.querySelectorAll('#curves .legendtext')]
        .some(t => t.textContent === 'trial {other}')"""
    assert browser.comes_to(legend, True)
    browser.run("document.querySelector('#picked button').click()")
    assert browser.comes_to(legend, False)
    assert browser.messages() == []


def test_a_box_over_an_axis_keeps_the_trials_that_pass_there(
    findings_of: Make, browser: Any, tmp_path: Path
):
    found = findings_of(40, 3)
    open_page(browser, tmp_path, found)
    browser.run("document.getElementById('parallel').scrollIntoView({block: 'center'})")
    # The axis of dropout, from 0 to 0.8, down to the middle of the widest gap between two trials.
    values = np.sort(found.table["model.dropout"].to_numpy())
    gap = int(np.argmax(np.diff(values)))
    edge = float(values[gap : gap + 2].mean())
    script = f"""
        const axes = parallelAxes(), at = axes.findIndex(a => a.name === 'model.dropout');
        const {{ xaxis, yaxis }} = document.getElementById('parallel')._fullLayout;
        const box = document.querySelector('#parallel .nsewdrag').getBoundingClientRect();
        return [box.x + xaxis.l2p(at), box.y + yaxis.l2p(1.02), box.y + yaxis.l2p({edge / 0.8})];
    """
    x, top, bottom = browser.run(script)
    steps: list[dict[str, Any]] = [
        {"type": "pointerMove", "x": int(x) - 15, "y": int(top)},
        {"type": "pointerDown", "button": 0},
        {"type": "pointerMove", "duration": 100, "x": int(x), "y": int(bottom) - 20},
        {"type": "pointerMove", "duration": 100, "x": int(x) + 15, "y": int(bottom)},
        {"type": "pointerUp", "button": 0},
    ]
    mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
    browser.post("actions", actions=[{**mouse, "actions": steps}])
    note = "return document.getElementById('parallel-note').textContent.split(' within')[0]"
    kept = int((values > edge).sum())
    assert 0 < kept < 40
    assert browser.comes_to(note, f"{kept} trials of 40")
    browser.run("document.getElementById('clear').click()")
    assert browser.comes_to("return document.getElementById('clear').hidden", True)
    assert browser.messages() == []


def test_hostile_texts_are_shown_as_they_are(
    findings_of: Make, trials_of: Any, browser: Any, tmp_path: Path
):
    trials = [
        dataclasses.replace(
            trial,
            error=EVIL,
            host=EVIL,
            parameters={**trial.parameters, "model.gate": EVIL + str(i)},
        )
        for i, trial in enumerate(trials_of(6, 3, 0, 2))
    ]
    open_page(browser, tmp_path, findings_of(trials=trials, name=EVIL))
    assert browser.run("return document.querySelector('h1').textContent") == EVIL
    assert column(browser, "Error")[0] == EVIL
    browser.run("pick(rows[0])")
    assert EVIL + "0" in browser.run(
        "return document.getElementById('picked').textContent.replaceAll('…', '')"
    ) or "</script>" in browser.run("return document.getElementById('picked').textContent")
    assert browser.run("return document.querySelectorAll('img, main b, script').length") == 3
    assert browser.run("return document.documentElement.innerHTML.includes('onerror=\"')") is False
    assert browser.messages() == []


@pytest.mark.parametrize(("count", "failed"), [(0, 0), (1, 0), (3, 3), (2, 1)])
def test_small_sweeps_have_no_errors(
    findings_of: Make, browser: Any, tmp_path: Path, count: int, failed: int
):
    found = findings_of(count, 2, failed=failed)
    open_page(browser, tmp_path, found)
    assert browser.run("return document.getElementById('decision').textContent") == found.decision()
    rows = "return document.querySelectorAll('#trials tbody tr').length"
    assert browser.run(rows) == count
    shown = browser.run("return document.getElementById('reproduce').hidden")
    assert shown == (count == failed)
    assert browser.messages() == []
