"""A model card's content as text: the rows of its tables, and the whole card in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: How values are called, in the order of every table, with the digits shown.
LABELS = {
    "jaccard": ("Jaccard", 3),
    "f1": ("F1", 3),
    "prauc": ("PRAUC", 3),
    "ddi_rate": ("DDI rate", 4),
    "num_medications": ("Medications", 2),
    "ece": ("Calibration error", 4),
}

#: Headings of the tables whose rows are made below.
COMPARISON_HEAD = tuple(label for name, (label, _) in LABELS.items() if name != "ece")
CALIBRATION_HEAD = ("patients", "calibration error", "after temperature", "log loss", "after")
SUBGROUP_HEAD = ("patients", "visits", *(label for label, _ in LABELS.values()))
CHANGES_HEAD = ("", "a visit", "found", "right of those proposed", "F1")


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    model, decision, test = card["model"], card["decision"], card["metrics"]["test"]
    lines = [
        f"# {model['name']}, version {model['version']} of {model['experiment']}",
        "",
        f"**Intended use: {card['intended_use']}**",
        "",
        "## Known limits",
        "",
        *(f"- {limit}" for limit in card["limits"]),
        "",
        "## How good it is",
        "",
        f"{test['patients']:,} test patients, {test['visits']:,} visits; in brackets 95 % "
        "intervals over patients.",
        "",
        *_table(("", *COMPARISON_HEAD), comparison(card)),
        "",
        "## Probabilities",
        "",
        f"Logits are divided by the temperature {decision['temperature']:.3f}; what reaches the "
        f"probability {decision['threshold']:.2f} is recommended.",
        "",
        *_table(CALIBRATION_HEAD, calibration_rows(card)),
        "",
        "## For whom",
        "",
        f"Groups of under {card['subgroups']['fewest']} patients are kept back (–), and further "
        "ones where a group would follow from the rest.",
    ]
    for table, rows in subgroup_rows(card["subgroups"]).items():
        lines += ["", f"### By {table}", "", *_table((table, *SUBGROUP_HEAD), rows)]
    lines += [
        "",
        "## Medications started and stopped against the visit before",
        "",
        *_table(CHANGES_HEAD, changes_rows(card["subgroups"])),
        "",
        "## What it was made from",
        "",
        *_table(("", ""), facts(card)),
    ]
    return "\n".join(lines) + "\n"


def comparison(card: Mapping[str, Any]) -> list[list[str]]:
    """Rows of model, baselines and ceiling: a name, then a cell for each metric but `ece`."""
    names = [name for name in LABELS if name != "ece"]
    threshold = card["decision"]["threshold"]
    of_model = card["metrics"]["test"]["values"]
    rows = [[f"this model, at {threshold:.2f}", *(cell(n, of_model[n]) for n in names)]]
    for baseline, values in card["baselines"].items():
        rows.append([baseline, *(cell(n, values[n]) for n in names)])
    ceiling = card["ceiling"]
    if ceiling is not None:
        for at, found in ((0.5, ceiling["at_half"]), (ceiling["threshold"], ceiling["at_best"])):
            rows.append([f"best possible, at {at:.2f}", *(cell(n, [found[n]]) for n in names)])
    return rows


def calibration_rows(card: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `CALIBRATION_HEAD`, one a split."""
    rows = []
    for split, found in card["calibration"].items():
        before, after = found["before"], found["after"]
        pairs = ((before["ece"], after["ece"]), (before["log_loss"], after["log_loss"]))
        rows.append([split, *(f"{value:.4f}" for pair in pairs for value in pair)])
    return rows


def subgroup_rows(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Table → rows: a group, everybody first, then the columns of `SUBGROUP_HEAD`."""
    everybody = {"group": "all", **found["all"]}
    return {
        table: [[one["group"], *_group_cells(one)] for one in (everybody, *cells)]
        for table, cells in found["tables"].items()
    }


def changes_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `CHANGES_HEAD`, of started and of stopped medications."""
    changes = found["changes"]
    if changes.get("hidden"):
        return [[name, *["–"] * 4] for name in ("started", "stopped")]
    keys = ("per_visit", "recall", "precision", "f1")
    return [
        [name, *(interval(changes[name][key], 3) for key in keys)]
        for name in ("started", "stopped")
    ]


def facts(card: Mapping[str, Any]) -> list[list[str]]:
    """What the version was made from, as names and texts."""
    model, data, training = card["model"], card["data"], card["training"]
    window = data["target_window_h"]
    split = ", ".join(f"{count:,} {name}" for name, count in data["split"].items())
    rows = [
        ("published", str(model["published"])),
        ("data", f"{data['source']}, protocol {data['protocol']}"),
        ("patients", f"{data['patients']:,} ({split}), {data['visits']:,} visits"),
        ("a visit's own diagnoses", "known" if data["inputs"] == "current" else "not known"),
        ("target", "medications of the stay" if window is None else f"of the first {window:g} h"),
        ("medications are", data["medication_level"]),
        *((f"fingerprint of the {name}", text) for name, text in data["fingerprints"].items()),
        ("model options", _listed(model["options"])),
        ("training", _listed(training["train"] or {})),
        ("temperature and threshold", _listed(training["calibration"] or {})),
    ]
    again = training.get("retrained")
    if again:
        text = f"{again['epochs']} epochs on {again['patients']:,} training and validation patients"
        rows.append(("retrained", text))
    known = {name: training[name] for name in ("job", "trial", "epoch", "seed")}
    rows.append(("chosen by", _listed({k: v for k, v in known.items() if v is not None})))
    return [list(row) for row in rows if row[1]]


def cell(name: str, values: Sequence[float | None]) -> str:
    """A metric's value, and its interval if there is one."""
    return interval(values, LABELS[name][1])


def interval(values: Sequence[float | None], digits: int) -> str:
    """A value, or a value with the ends of its interval."""
    value, *ends = ["–" if x is None else f"{x:.{digits}f}" for x in values]
    return f"{value} [{', '.join(ends)}]" if ends and value != "–" else value


def _group_cells(one: Mapping[str, Any]) -> list[str]:
    if one.get("hidden"):
        return ["–"] * len(SUBGROUP_HEAD)
    counts = [f"{one['patients']:,}", f"{one['visits']:,}"]
    return [*counts, *(cell(name, one[name]) for name in LABELS)]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [list(head), *map(list, rows)]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]
