"""`report.html`: an evaluation for people, one file that needs nothing but a browser.

The files beside this one are its markup and style. It has no program and loads nothing.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cafemed import card_text

#: Plot area of the reliability diagram, and the margins for its axes, in its own units.
_SIZE, _LEFT, _TOP, _BELOW = 300, 46, 10, 42
#: Width and height of the intervals drawn in a table.
_BAR_WIDTH, _BAR_HEIGHT = 100, 16


def render(card: Mapping[str, Any], reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The whole page.

    Args:
        card: of `card.make`.
        reliability: "before" and "after" temperature, as in `assessment.measure`.
    """
    model = card["model"]
    folder = Path(__file__).parent
    page = (folder / "evaluation_page.html").read_text()
    title = f"{model['name']}, version {model['version']} of {model['experiment']}"
    sections = (
        _comparison(card),
        _calibration(card, reliability),
        _subgroups(card["subgroups"]),
        _changes(card["subgroups"]),
        _limits(card["limits"]),
        _facts(card),
    )
    parts = {
        "__STYLE__": (folder / "evaluation_page.css").read_text(),
        "__TITLE__": html.escape(title),
        "__INTENDED_USE__": html.escape(card["intended_use"]),
        "__FEWEST__": str(card["subgroups"]["fewest"]),
        # Last, so that no text of the data is taken for one of the places above.
        "__BODY__": "\n".join(sections),
    }
    for place, text in parts.items():
        page = page.replace(place, text)
    return page


def diagram(reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The reliability diagram as SVG: share given over mean probability, before and after."""

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + x * _SIZE, 1), round(_TOP + (1 - y) * _SIZE, 1)

    shapes = [f'<rect class="axis" x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(tick, tick)
        label = f"{tick:g}"
        shapes.append(f'<text x="{x}" y="{_TOP + _SIZE + 16}" text-anchor="middle">{label}</text>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    shapes.append(f'<line class="perfect" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    for name, mark in (("before", "ring"), ("after", "dot")):
        shown = [row for row in reliability[name] if not row.get("hidden")]
        at = [place(row["probability"], row["share"]) for row in shown]
        if len(at) > 1:
            points = " ".join(f"{x},{y}" for x, y in at)
            shapes.append(f'<polyline class="{name}" points="{points}"/>')
        shapes += [f'<circle class="{mark}" cx="{x}" cy="{y}" r="4"/>' for x, y in at]
    middle = _LEFT + _SIZE / 2
    below = _TOP + _SIZE + 36
    shapes.append(f'<text x="{middle}" y="{below}" text-anchor="middle">mean probability</text>')
    up = _TOP + _SIZE / 2
    shapes.append(
        f'<text transform="translate(12 {up}) rotate(-90)" text-anchor="middle">share given</text>'
    )
    width, height = _LEFT + _SIZE + 12, _TOP + _SIZE + _BELOW
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Reliability diagram; the '
        f'table below has its numbers">{"".join(shapes)}</svg>'
    )


def _comparison(card: Mapping[str, Any]) -> str:
    test = card["metrics"]["test"]
    intro = (
        f"{test['patients']:,} test patients, {test['visits']:,} visits. Below each value its 95 % "
        "interval over patients."
    )
    rows = card_text.comparison(card)
    return _section("How good it is", intro, _table(("", *card_text.COMPARISON_HEAD), rows))


def _calibration(
    card: Mapping[str, Any], reliability: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    decision = card["decision"]
    intro = (
        f"Logits are divided by the temperature {decision['temperature']:.3f}; what reaches the "
        f"probability {decision['threshold']:.2f} is recommended. On the dashed line probabilities "
        "mean what they say; below it less comes true than the model says."
    )
    legend = "".join(
        f'<span><svg viewBox="0 0 30 14" aria-hidden="true"><line class="{name}" x1="0" y1="7" '
        f'x2="30" y2="7"/><circle class="{mark}" cx="15" cy="7" r="4"/></svg> {text}</span>'
        for name, mark, text in (
            ("before", "ring", "before temperature"),
            ("after", "dot", "after"),
        )
    )
    figure = f'<figure>{diagram(reliability)}<p class="legend">{legend}</p></figure>'
    bins = [
        [
            f"{row['low']:.2f} to {row['high']:.2f}",
            *(
                ["–"] * 3
                if row.get("hidden")
                else [f"{row['pairs']:,}", f"{row['probability']:.3f}", f"{row['share']:.3f}"]
            ),
        ]
        for row in reliability["after"]
    ]
    heads = ("probability", "pairs", "mean probability", "share given")
    details = f"<details><summary>The bins, after</summary>{_table(heads, bins)}</details>"
    table = _table(card_text.CALIBRATION_HEAD, card_text.calibration_rows(card))
    return _section("Probabilities", intro, table + figure + details)


def _subgroups(found: Mapping[str, Any]) -> str:
    cells = [found["all"], *(one for table in found["tables"].values() for one in table)]
    ends = [one["jaccard"] for one in cells if not one.get("hidden")]
    low, high = (min(e[1] for e in ends), max(e[2] for e in ends)) if ends else (0.0, 1.0)
    parts = []
    for table, rows in card_text.subgroup_rows(found).items():
        drawn = []
        for row, one in zip(rows, (found["all"], *found["tables"][table]), strict=True):
            bar = "" if one.get("hidden") else _whisker(one["jaccard"], low, high)
            drawn.append([*(_cell(text) for text in row[:3]), bar, *map(_cell, row[3:])])
        head = (table, *card_text.SUBGROUP_HEAD[:2], "", *card_text.SUBGROUP_HEAD[2:])
        parts.append(f"<h3>By {html.escape(table)}</h3>{_raw_table(head, drawn, first='all')}")
    bars = f'<p class="faint bars">The bars are Jaccard, from {low:.2f} to {high:.2f}.</p>'
    return _section("For whom", "", bars + "".join(parts))


def _changes(found: Mapping[str, Any]) -> str:
    changes = found["changes"]
    intro = "Against the visit before, pooled over all later visits."
    if not changes.get("hidden"):
        intro += f" {changes['patients']:,} patients, {changes['visits']:,} later visits."
    table = _table(card_text.CHANGES_HEAD, card_text.changes_rows(found))
    return _section("Medications started and stopped", intro, table)


def _limits(limits: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(limit)}</li>" for limit in limits)
    return _section("Known limits", "", f"<ul>{items}</ul>")


def _facts(card: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
        for name, text in card_text.facts(card)
    )
    table = f'<table class="facts"><tbody>{rows}</tbody></table>'
    return _section("What it was made from", "", table)


def _section(title: str, intro: str, content: str) -> str:
    first = f'<p class="faint">{html.escape(intro)}</p>' if intro else ""
    return f"<section><h2>{html.escape(title)}</h2>{first}{content}</section>"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return _raw_table(head, [[_cell(text) for text in row] for row in rows])


def _raw_table(head: Sequence[str], rows: Iterable[Sequence[str]], first: str = "") -> str:
    """A table of cells that are markup already; the rows named `first` stand out."""
    heads = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    lines = [
        f"<tr{' class=all' if first and name == first else ''}>"
        f'<th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    ]
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A text, its interval below it."""
    value, bracket, ends = html.escape(text).partition(" [")
    return f'{value}<span class="faint">{bracket.strip()}{ends}</span>' if bracket else value


def _whisker(ends: Sequence[float], low: float, high: float) -> str:
    """A value and its interval between `low` and `high`, drawn."""
    scale = (_BAR_WIDTH - 8) / max(high - low, 1e-9)
    value, left, right = (round(4 + (x - low) * scale, 1) for x in ends)
    middle = _BAR_HEIGHT // 2
    return (
        f'<svg width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" aria-hidden="true">'
        f'<line class="whisker" x1="{left}" y1="{middle}" x2="{right}" y2="{middle}"/>'
        f'<circle class="dot" cx="{value}" cy="{middle}" r="4"/></svg>'
    )
