"""This visit's medications in the graph: sinks, each with its causes among what is known before.

A model has to predict these medications, so they are added only when the graph over the inputs is
finished, and change nothing of it. There is no edge between two of them (they are decided together)
and none away from them, so each is a regression of its own, by the engine that searches everything
else.
"""

import dataclasses
import time

import numpy as np
from distributed import Client
from numpy.typing import NDArray
from scipy import sparse

from cafemed import console
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph
from causal import blocks, columns, tasks
from causal.columns import Columns, Cooccurrence
from causal.discovery import CausalConfig, Discovery
from causal.local_scores import ColumnScores
from causal.scores import GAUSSIAN_SCORES, Rule
from causal.stability import drawn_visits
from causal.tasks import Problem, Task
from causal.workers import Workers


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


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the causes are chosen from, and how; n visits, p inputs, s sinks.

    Attributes:
        inputs: p columns.
        sinks: s columns of the same visits, in a higher tier.
        patient: int64 (n,), whose visit it is.
        config: that of the discovery.
    """

    inputs: Columns
    sinks: Columns
    patient: NDArray[np.int64]
    config: CausalConfig

    def learn(self) -> SinkEdges:
        """Chooses the causes of every sink."""
        counts = columns.count(self.inputs)
        config = self.config
        rule = rule_of(config, len(self.inputs.names))
        return learn(self.inputs, counts, self.sinks, rule, config.min_support, config.search)


def rule_of(config: CausalConfig, num_inputs: int) -> Rule:
    """The score of sinks: the discovery's if it is Gaussian, else the extended BIC.

    A medication has many causes. Tables of counts split the visits by all of them at once, so that
    few can be told: on planted cohorts BDeu found 34 % of the true causes, the extended BIC 59 %,
    both at a precision of 0.99 (docs/causal.md). What speaks for tables, and against a linear
    score, is the direction of edges and chance among rare codes; here directions are known.
    """
    if config.score in GAUSSIAN_SCORES:
        return Rule(config.score, config.penalty, config.gamma, num_inputs)
    return Rule("extended_bic", 1.0, config.gamma, num_inputs)


def add_to(found: Discovery, cohort: Cohort, config: CausalConfig, client: Client) -> Discovery:
    """Adds this visit's medications, and what leads to them, to what `discover` found.

    Args:
        found: its graph is over the inputs.
        cohort: its training patients' visits are read, no others.
        config: that of the discovery; with bootstraps the new edges get their stability by the same
            draws of patients, each a task.
        client: where bootstraps run; the result is the same to the bit on any.
    """
    selection = Selection(
        columns.of_cohort(cohort),
        columns.sinks_of(cohort),
        cohort.patient_of_visit()[columns.training_visits(cohort)],
        config,
    )
    started = time.thread_time()
    with console.waiting("causes of this visit's medications"):
        edges = selection.learn()
    spent = time.thread_time() - started
    stability = np.full(len(edges.source), np.nan, np.float32)
    if config.bootstraps:
        stability = _frequencies(selection, edges, client)
    graph = attach(found.graph, selection.inputs.names, selection.sinks.names, edges, stability)
    added = {"sink_edges": len(edges.source), "sinks_cpu_s": round(spent, 3)}
    return Discovery(graph, {**found.report, **added})


def bootstrap(selection: Selection, number: int) -> NDArray[np.int64]:
    """Chooses the causes again from patients drawn with replacement; runs on a worker.

    Returns:
        source * s + sink of every edge, int64.
    """
    rows = drawn_visits(selection.patient, selection.config.seed, number)
    drawn = dataclasses.replace(
        selection, inputs=selection.inputs.visits(rows), sinks=selection.sinks.visits(rows)
    )
    return _keys(drawn, drawn.learn())


def _frequencies(selection: Selection, edges: SinkEdges, client: Client) -> NDArray[np.float32]:
    """Share of the bootstraps that have each edge, float32 (E,)."""
    bootstraps = selection.config.bootstraps
    found = Workers(client, selection).run(range(bootstraps), "medications' bootstraps", bootstrap)
    keys, times = np.unique(np.concatenate(found), return_counts=True)
    share = dict(zip(keys.tolist(), (times / bootstraps).tolist(), strict=True))
    return np.array([share.get(key, 0.0) for key in _keys(selection, edges).tolist()], np.float32)


def _keys(selection: Selection, edges: SinkEdges) -> NDArray[np.int64]:
    return edges.source * len(selection.sinks.names) + edges.sink


def learn(
    inputs: Columns,
    counts: Cooccurrence,
    sinks: Columns,
    rule: Rule,
    min_support: int,
    search: str,
) -> SinkEdges:
    """Chooses the causes of every sink.

    Args:
        inputs: p columns.
        counts: of the inputs.
        sinks: s columns of the same visits, in a higher tier.
        rule: a Gaussian score (`rule_of`).
        min_support: visits that must have both ends of an edge.
        search: see `causal.fit_gies`.
    """
    joint, across = _joint_counts(inputs, counts, sinks)
    pairs = blocks.screen(across, rule, min_support)
    tiers = np.concatenate([inputs.tiers, sinks.tiers])
    problem = Problem(joint, tiers, rule, search)
    score = problem.scores()
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for sink in np.unique(pairs.second).tolist():
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
    graph: CausalGraph,
    inputs: tuple[str, ...],
    sinks: tuple[str, ...],
    edges: SinkEdges,
    stability: NDArray[np.float32],
) -> CausalGraph:
    """Adds sinks and their edges to a graph over the inputs; `without_sinks` gives it back.

    Args:
        graph: its nodes are those of `inputs`.
        inputs: names of the columns that `edges.source` counts.
        sinks: names of the columns that `edges.sink` counts.
        edges: see SinkEdges.
        stability: float32 (E,), theirs.
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
    return CausalGraph(
        nodes=nodes,
        source=source[order],
        target=target[order],
        directed=np.concatenate([graph.directed, np.ones(more, np.bool_)])[order],
        stability=np.concatenate([graph.stability, stability])[order],
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
    problem: Problem, score: ColumnScores, candidates: NDArray[np.int64], sink: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The chosen causes of one sink, ascending, and what each adds to the score."""
    chosen = np.append(candidates, sink)  # ascending: sinks are numbered after the inputs
    found = tasks.search(problem, Task(chosen, candidates, np.full(len(candidates), sink)))
    own = candidates[found.dag[:-1, -1] != 0]
    return own, score.losses(int(sink), own)
