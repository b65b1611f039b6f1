"""This visit's medications in the graph: sinks, each with its causes among what is known before.

A model has to predict these medications, so they are added only when the graph over the inputs is
finished, and change nothing of it. There is no edge between two of them (they are decided together)
and none away from them, so each is a regression of its own: the score that chose all other edges
chooses its causes among the inputs, with the engine that searches everything else.
"""

import dataclasses
import time

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed import console
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import blocks, columns, tasks
from causal.columns import Columns, Cooccurrence
from causal.discovery import CausalConfig, Discovery
from causal.local_scores import LocalScores
from causal.tasks import Problem, Task


@dataclasses.dataclass(frozen=True)
class SinkEdges:
    """Edges from inputs to sinks.

    Attributes:
        source: int64 (E,), columns of the inputs.
        sink: int64 (E,), columns of the sinks, ascending.
        strength: float64 (E,), what each adds to its sink's score, in nats.
        support: int64 (E,), visits that have both ends.
    """

    source: NDArray[np.int64]
    sink: NDArray[np.int64]
    strength: NDArray[np.float64]
    support: NDArray[np.int64]


def add_to(found: Discovery, cohort: Cohort, config: CausalConfig) -> Discovery:
    """Adds sinks to what `discover` found, by the same score.

    Args:
        found: its graph is over the inputs.
        cohort: its training patients' visits are read, no others.
        config: that of the discovery.
    """
    started = time.thread_time()
    penalty = found.report["edge_penalty"]
    graph = add(cohort, found.graph, penalty, config.min_support, config.search)
    added = {
        "sink_edges": graph.num_edges - found.graph.num_edges,
        "sinks_cpu_s": round(time.thread_time() - started, 3),
    }
    return Discovery(graph, {**found.report, **added})


def add(
    cohort: Cohort, graph: CausalGraph, penalty: float, min_support: int, search: str
) -> CausalGraph:
    """Adds this visit's medications, and what leads to them, to the graph that `discover` gave.

    Args:
        cohort: its training patients' visits are read, no others.
        graph: over the inputs.
        penalty: what an edge costs, the same as in the graph.
        min_support: visits that must have both ends of an edge.
        search: see `causal.fit_gies`.
    """
    inputs, sinks = columns.of_cohort(cohort), columns.sinks_of(cohort)
    edges = learn(inputs, columns.count(inputs), sinks, penalty, min_support, search)
    return attach(graph, inputs.names, sinks.names, edges)


def learn(
    inputs: Columns,
    counts: Cooccurrence,
    sinks: Columns,
    penalty: float,
    min_support: int,
    search: str,
) -> SinkEdges:
    """Chooses the causes of every sink.

    Args:
        inputs: p columns.
        counts: of the inputs.
        sinks: s columns of the same visits, in a higher tier.
        penalty: what an edge costs.
        min_support: visits that must have both ends of an edge.
        search: see `causal.fit_gies`.
    """
    joint, across = _joint_counts(inputs, counts, sinks)
    pairs = blocks.screen(across, penalty, min_support)
    tiers = np.concatenate([inputs.tiers, sinks.tiers])
    problem = Problem(joint, tiers, penalty, search)
    score = LocalScores.of(joint, penalty)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for sink in console.progress(np.unique(pairs.second).tolist(), "medications as sinks"):
        candidates = pairs.first[pairs.second == sink]
        parents, strength = _parents(problem, score, candidates, sink)
        found.append((parents, np.full(len(parents), sink, np.int64), strength))
    if not found:
        none = np.zeros(0, np.int64)
        return SinkEdges(none, none, none.astype(np.float64), none)
    source, sink_of, strengths = (np.concatenate(part) for part in zip(*found, strict=True))
    support = columns.values_at(across.total, source, sink_of)
    return SinkEdges(source, sink_of - len(inputs.names), strengths, support)


def attach(
    graph: CausalGraph, inputs: tuple[str, ...], sinks: tuple[str, ...], edges: SinkEdges
) -> CausalGraph:
    """Adds sinks and their edges to a graph over the inputs; `without_sinks` gives it back.

    Args:
        graph: its nodes are those of `inputs`.
        inputs: names of the columns that `edges.source` counts.
        sinks: names of the columns that `edges.sink` counts.
        edges: see SinkEdges.
    """
    nodes = tuple(sorted([*graph.nodes, *sinks]))
    number = {name: i for i, name in enumerate(nodes)}
    old, first, second = (
        np.array([number[name] for name in names], np.int32)
        for names in (graph.nodes, inputs, sinks)
    )
    source = np.concatenate([old[graph.source], first[edges.source]])
    target = np.concatenate([old[graph.target], second[edges.sink]])
    order = np.lexsort((target, source))
    more = len(edges.source)
    unknown = np.full(more, np.nan, np.float32)
    return CausalGraph(
        nodes=nodes,
        source=source[order],
        target=target[order],
        directed=np.concatenate([graph.directed, np.ones(more, np.bool_)])[order],
        stability=np.concatenate([graph.stability, unknown])[order],
        support=np.concatenate([graph.support, edges.support])[order],
        strength=np.concatenate([graph.strength, edges.strength.astype(np.float32)])[order],
    )


def _joint_counts(
    inputs: Columns, counts: Cooccurrence, sinks: Columns
) -> tuple[Cooccurrence, Cooccurrence]:
    """Counts of inputs and sinks together, (p + s, p + s), without those of two sinks.

    Returns:
        All of them, and those of pairs of an input and a sink alone (with the diagonal).
    """
    whole: list[sparse.csr_array] = []
    across: list[sparse.csr_array] = []
    for stratum, among in zip(np.unique(inputs.strata), counts.strata, strict=True):
        rows = inputs.strata == stratum
        given = sinks.present[rows]
        between = sparse.csr_array(inputs.present[rows].T @ given)
        own = sparse.diags_array(np.asarray(given.sum(axis=0), np.int64), dtype=np.int64)
        alone = sparse.diags_array(among.diagonal(), dtype=np.int64)
        for block, parts in ((among, whole), (alone, across)):
            joined = sparse.block_array([[block, between], [between.T, own]], format="csr")
            parts.append(sparse.csr_array(joined, dtype=np.int64))
    return Cooccurrence(counts.rows, tuple(whole)), Cooccurrence(counts.rows, tuple(across))


def _parents(
    problem: Problem, score: LocalScores, candidates: NDArray[np.int64], sink: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The chosen causes of one sink, ascending, and what each adds to the score."""
    chosen = np.append(candidates, sink)  # ascending: sinks are numbered after the inputs
    found = tasks.search(problem, Task(chosen, candidates, np.full(len(candidates), sink)))
    own = candidates[found.dag[:-1, -1] != 0]
    return own, score.losses(int(sink), own)
