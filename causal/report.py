"""What a discovery leaves behind: two files and a page, and a few lines for whoever ran it."""

from pathlib import Path

import numpy as np

from cafemed.graphs import (
    CausalGraph,
    EffectTable,
    read_effects,
    read_graph,
    write_effects,
    write_graph,
)
from causal import page, stability
from causal.discovery import Discovery

GRAPH_FILE = "graph.parquet"
EFFECTS_FILE = "effects.npz"
PAGE_FILE = "graph.html"


def write(folder: Path, found: Discovery, effects: EffectTable) -> None:
    """Writes graph, effects and page into a folder that `artifacts.new_folder` gave."""
    write_graph(found.graph, folder / GRAPH_FILE)
    write_effects(effects, folder / EFFECTS_FILE)
    (folder / PAGE_FILE).write_text(page.render(found.graph, effects, found.report))


def read(folder: Path) -> tuple[CausalGraph, EffectTable]:
    """Reads the graph and the effects again."""
    return read_graph(folder / GRAPH_FILE), read_effects(folder / EFFECTS_FILE)


def lines(found: Discovery, effects: EffectTable) -> list[str]:
    """The summary: sizes, what blocks changed in score and time, the range of the effects."""
    facts = found.report
    undirected = facts["edges"] - facts["directed_edges"]
    told = [
        f"{facts['visits']:,} training visits, {facts['columns']:,} codes, "
        f"{facts['screened_pairs']:,} screened pairs, {facts['blocks']} blocks "
        f"(largest {facts['largest_block']} with its boundary)",
        f"{facts['edges']:,} edges, {facts['directed_edges']:,} directed and "
        f"{undirected:,} undirected",
    ]
    if "sink_edges" in facts:
        told.append(f"{facts['sink_edges']:,} more edges lead to this visit's medications")
    best = max(entry["score"] for entry in facts["scores"].values())
    for name, entry in facts["scores"].items():
        told.append(
            f"{name:<7} score {entry['score']:.2f} ({entry['score'] - best:+.2f} to the best), "
            f"{entry['edges']:,} edges, {entry['cpu_s']:.2f} CPU-s"
        )
    if "direct_left_out" in facts:
        told.append(facts["direct_left_out"])
    told += stability.lines(facts)
    told.append(_effects_line(effects.of_kinds("diagnosis", "procedure"), "codes"))
    before = effects.of_kinds("previous_medication")
    return [*told, _effects_line(before, "previous medications")] if before.codes else told


def _effects_line(effects: EffectTable, codes: str) -> str:
    """How many pairs visits can tell of, how many rows compare, and the range of the effects."""
    supported = effects.supported
    told = (
        f"{effects.estimator} effects of {codes} on medications: {supported.sum():,} of "
        f"{supported.size:,} pairs have support"
    )
    if not supported.any():
        return told
    worth = np.median(effects.visits[supported.any(axis=1)])
    low, middle, high = np.percentile(effects.effect[supported], (1, 50, 99))
    return (
        f"{told}, {supported.any(axis=1).sum():,} of {len(effects.codes):,} {codes} (median "
        f"comparison worth {worth:,.0f} visits); 1st, 50th, 99th percentile {low:+.4f}, "
        f"{middle:+.4f}, {high:+.4f}"
    )
