"""`report.html`: what a sweep found, for people; one file that needs nothing but a browser.

It is made from the sweep's files alone, so it can be made again without training. The files beside
this one are its markup, style and program; Plotly's program is copied into the page, the data are
JSON in a block of it, and nothing is loaded from anywhere.
"""

import base64
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cafemed import artifacts, findings, importance, sweep
from cafemed.findings import Findings

REPORT = "report.html"

#: Rows of the table of the best trials.
MOST_BEST = 10

#: Significant digits of an epoch's numbers, of which there are many.
_DIGITS = 6

_CURVES = ("jaccard", "f1", "prauc", "ddi_rate", "num_medications", "train_loss")
_ASSESSED = ("jaccard", "ddi_rate")


def write(folder: Path, root: str | None = None) -> Path:
    """Makes `report.html` of a sweep's folder anew and gives its path.

    The page is no file of the manifest: a sweep without it, or with an older one, is still whole.

    Args:
        folder: see `findings.read`.
        root: `paths.root`, where the user gave it: the command that trains the best trial has it.

    Raises:
        ArtifactError: as `findings.read`.
    """
    page = render(findings.read(folder, root))
    path = folder / REPORT
    artifacts.write_text(path, page)
    path.chmod(0o644)
    return path


def note_tested(
    folder: Path, bundle: str, reached: Mapping[str, Any], root: str | None = None
) -> Path | None:
    """Notes what the chosen trial reached on the test patients, and makes the report anew.

    Args:
        folder: see `findings.read`.
        bundle: fingerprint of the bundle that was evaluated.
        reached: on the test patients, as `fits.measure` gives it.
        root: see `write`.

    Returns:
        The report's path; None if the bundle is not of the sweep's chosen trial, or all is there.

    Raises:
        ArtifactError: as `findings.read`.
    """
    if not (folder / artifacts.MANIFEST).is_file() or not (folder / "best.json").is_file():
        return None
    best = sweep.read_best(folder)
    if best.get("trial") is None or findings.published(folder) != bundle:
        return None
    found = findings.read(folder, root)
    told = {key: reached[key] for key in ("patients", "visits", "metrics", "intervals")}
    tested = {**found.tested, str(best["trial"]): told}
    if tested == found.tested and (folder / REPORT).exists():
        return None
    path = folder / findings.TESTED
    artifacts.write_text(path, json.dumps(tested, indent=1, allow_nan=False) + "\n")
    path.chmod(0o644)
    return write(folder, root)


def render(found: Findings) -> str:
    """The whole page."""
    bundle = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js")
    plotly = _script(bundle.read_text("utf-8"))
    program = _script(_beside("sweep_charts.js") + _beside("sweep_report.js"))
    parts = {
        "STYLE": _beside("sweep_report.css"),
        "HASHES": " ".join(_hash(text) for text in (plotly, program)),
        "PLOTLY": plotly,
        "PROGRAM": program,
        "DATA": _embedded(content(found)),
    }
    # One pass over the markup, so that no text of the data is taken for one of its places.
    return re.sub("__([A-Z]+)__", lambda place: parts[place[1]], _beside("sweep_report.html"))


def content(found: Findings) -> dict[str, Any]:
    """What the page's program reads: JSON values; lists have one entry a trial, in its order."""
    table, space = found.table, found.space
    return {
        "name": found.name,
        "facts": found.facts(),
        "decision": found.decision(),
        "command": found.command(),
        "columns": {
            name: [_plain(value) for value in table[name].to_pylist()]
            for name in table.column_names
            if name != "history"
        },
        "parameters": [
            {"name": name, **_scale(importance.entry_of(space, name))}
            for name in importance.parameters(table)
        ],
        "history": _history(table),
        "front": found.front(),
        "best": found.ranking()[:MOST_BEST],
        "chosen": found.best.get("trial"),
        "limit": found.limit,
        "importances": [
            {
                "metric": metric,
                "sets": [
                    {"trials": one.trials, "values": list(one.values.items())}
                    for one in importance.assess(table, space, metric)
                ],
            }
            for metric in _ASSESSED
        ],
        "tested": {trial: _split(reached) for trial, reached in found.tested.items()},
    }


def _history(table: pa.Table) -> dict[str, list[list[float | None]]]:
    """For each metric the values of each trial's epochs."""
    trials = table["history"].to_pylist()
    return {
        name: [[_plain(_rounded(epoch[name])) for epoch in (epochs or ())] for epochs in trials]
        for name in ("epoch", *_CURVES)
    }


def _scale(entry: Mapping[str, Any]) -> dict[str, Any]:
    """How a parameter's axis is drawn."""
    return {key: entry[key] for key in ("type", "low", "high", "log", "choices") if key in entry}


def _split(reached: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "patients": reached["patients"],
        "visits": reached["visits"],
        "metrics": {name: _plain(reached["metrics"][name]) for name in sweep.METRICS},
        "intervals": {
            name: [_plain(end) for end in ends] for name, ends in reached["intervals"].items()
        },
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor times: null says that nothing is known."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value


def _embedded(values: Any) -> str:
    """JSON that can stand in a script block: no character of it opens or ends markup."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def _script(text: str) -> str:
    """A program that can stand in a script block, as a browser reads it there."""
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("<(?=/script|!--|script)", r"\\x3c", unix, flags=re.IGNORECASE)


def _hash(program: str) -> str:
    """Names a program in the page's policy, so that no other one runs (w3.org/TR/CSP3)."""
    digest = hashlib.sha256(program.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
