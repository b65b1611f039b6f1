"""`graph.html`: the graph and the effects for people, one file that needs nothing but a browser.

The files beside this one are its markup, style and program; the data are JSON in a block of the
page. Nothing is loaded from anywhere.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafemed.graphs import CausalGraph, EffectTable

#: Estimates shown for each code and for each medication, the largest; effects.npz has all.
MOST_EFFECTS = 20

#: Effects are written as whole multiples of one in so many.
_SCALE = 10_000


def render(graph: CausalGraph, effects: EffectTable, facts: dict[str, Any]) -> str:
    """The whole page.

    Args:
        graph: with or without sinks.
        effects: of the same codes.
        facts: a discovery's report; "visits" is read.
    """
    folder = Path(__file__).parent
    page = (folder / "page.html").read_text()
    parts = {
        "__STYLE__": (folder / "page.css").read_text(),
        "__PROGRAM__": (folder / "page.js").read_text(),
        # Last, so that no text of the data is taken for one of the places above.
        "__DATA__": _embedded(content(graph, effects, facts)),
    }
    for place, text in parts.items():
        page = page.replace(place, text)
    return page


def content(graph: CausalGraph, effects: EffectTable, facts: dict[str, Any]) -> dict[str, Any]:
    """What the page's program reads: JSON values, columns of equal length."""
    known = set(graph.nodes)
    others = (name for name in (*effects.codes, *effects.medications) if name not in known)
    nodes = [*graph.nodes, *others]
    number = {name: i for i, name in enumerate(nodes)}
    directed = int(graph.directed.sum())
    return {
        "summary": f"{facts['visits']:,} training visits, {len(nodes):,} codes, {directed:,} "
        f"arrows and {graph.num_edges - directed:,} edges without direction.",
        "nodes": nodes,
        "edges": {
            "source": graph.source.tolist(),
            "target": graph.target.tolist(),
            "directed": graph.directed.astype(int).tolist(),
            "strength": _rounded(graph.strength, 2),
            "stability": _rounded(graph.stability, 3),
            "support": graph.support.tolist(),
        },
        "effects": _estimates(effects, number),
    }


def _estimates(effects: EffectTable, number: dict[str, int]) -> dict[str, Any]:
    low, high = effects.interval()
    row, column = _largest(effects, np.isfinite(low) & np.isfinite(high) & effects.supported)
    codes = np.array([number[name] for name in effects.codes], np.int64)
    medications = np.array([number[name] for name in effects.medications], np.int64)
    scaled = {
        name: np.rint(values[row, column].astype(np.float64) * _SCALE).astype(int).tolist()
        for name, values in (
            *(("effect", effects.effect), ("low", low), ("high", high)),
            *(("minimum", effects.minimum), ("maximum", effects.maximum)),
        )
    }
    return {
        "estimator": effects.estimator,
        "scale": _SCALE,
        "code": codes[row].tolist(),
        "medication": medications[column].tolist(),
        "support": effects.support[row, column].tolist(),
        **scaled,
    }


def _largest(
    effects: EffectTable, shown: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the largest estimates of each row and each column, row by row."""
    size = np.where(shown, np.abs(effects.effect), -1.0)
    kept = np.zeros(size.shape, np.bool_)
    for axis in (0, 1):
        first = np.argsort(-size, axis=axis, kind="stable")
        first = first[:MOST_EFFECTS] if axis == 0 else first[:, :MOST_EFFECTS]
        np.put_along_axis(kept, first, values=True, axis=axis)
    row, column = np.nonzero(kept & shown)
    return row, column


def _rounded(values: NDArray[np.float32], digits: int) -> list[float | None]:
    """JSON has no NaN: null says that nothing is known."""
    return [
        round(value, digits) if np.isfinite(value) else None
        for value in values.astype(np.float64).tolist()
    ]


def _embedded(values: Any) -> str:
    """JSON that can stand in a script block: no character of it opens or ends markup."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
