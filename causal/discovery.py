"""Discovery of a causal graph over a cohort's codes: learned in blocks on Dask, then merged.

`causal.learning` says how; here are what decides it, the comparison with one direct search, the
stability of edges, and the graph that comes of it.
"""

import dataclasses
from typing import Annotated, Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from cafemed import console
from cafemed.cohort import Cohort
from cafemed.config import Range
from cafemed.errors import ConfigError, DataError
from cafemed.graphs import CausalGraph
from causal import cluster, learning, merge, stability, tasks
from causal import columns as columns_of
from causal.columns import Columns, Cooccurrence
from causal.effects import EffectsConfig
from causal.learning import Found, LearningConfig, Screened
from causal.local_scores import ColumnScores
from causal.stability import Frequencies, Resampling
from causal.workers import Workers


@dataclasses.dataclass(frozen=True)
class CausalConfig(LearningConfig):
    """How the graph and the effects are learned; see LearningConfig for the rest.

    Attributes:
        sinks: also give this visit's medications their causes, when the rest is done
            (`causal.sinks`).
        compare_direct: also search once without blocks, to report what the blocks change; left out
            where more than `blocks.max_search` codes have a screened pair.
        bootstraps: how often patients are drawn anew to see how stable edges are (0: not).
        false_edge_share: keep only edges so stable that at most this share of them is expected to
            be chance (`causal.stability`); None: keep all.
        permutations: how often columns are shuffled to learn what chance does, each time with as
            many bootstraps again; more make the threshold less a matter of luck.
        effects: see EffectsConfig.
        cluster: "local", "ray" or a Dask scheduler's address; changes no result.
        workers: processes or actors to start, None for one a core; changes no result.
        truth: a true graph's graph.parquet, or the folder that holds it (and true effects), to
            compare the result with; changes no result.
    """

    sinks: bool = True
    compare_direct: bool = True
    bootstraps: Annotated[int, Range(0, 100_000)] = 0
    false_edge_share: Annotated[float, Range(0, 1, open_low=True)] | None = None
    permutations: Annotated[int, Range(1, 1000)] = 1
    effects: EffectsConfig = dataclasses.field(default_factory=EffectsConfig)
    cluster: str = "local"
    workers: Annotated[int, Range(1, 10_000)] | None = None
    truth: str | None = None

    def __post_init__(self) -> None:
        cluster.check(self.cluster)
        if self.false_edge_share is not None and self.bootstraps == 0:
            raise ConfigError(
                f"false_edge_share: {self.false_edge_share:g} needs causal.bootstraps, got 0; "
                "100 is a good number"
            )

    def content(self) -> dict[str, Any]:
        """What decides the result: all but where it runs and what it is compared with."""
        values = dataclasses.asdict(self)
        del values["cluster"], values["workers"], values["truth"]
        return values


@dataclasses.dataclass(frozen=True)
class Discovery:
    """A graph, and what was counted, scored and timed on the way."""

    graph: CausalGraph
    report: dict[str, Any]


def discover(cohort: Cohort, config: CausalConfig, client: Client) -> Discovery:
    """Learns the causal graph of a cohort's training visits.

    Args:
        cohort: its training patients' visits are read, no others.
        config: see CausalConfig; `cluster` and `workers` are not read, the client is given.
        client: where searches run; the result is the same to the bit on any.

    Returns:
        The graph over diagnoses, procedures and previous medications, and a report.

    Raises:
        DataError: if there are no training visits.
    """
    columns = columns_of.of_cohort(cohort)
    if columns.present.shape[0] == 0:
        raise DataError("cohort: no visit of a training patient to learn from; check its split")
    counts = columns_of.count(columns)
    screened = learning.screen(columns, counts, config)
    problem = screened.problem
    with console.waiting("loading the search, compiling it if it is new here"):
        tasks.load_engine(config.search, problem.rule.counts_rows)
    score = problem.scores()
    workers = Workers(client, problem)
    found, report = learning.learn(screened, score, config, workers)
    if config.compare_direct:
        report |= _compare_direct(screened, score, config, workers, report["scores"])
    frequencies = None
    if config.bootstraps:
        resampling = Resampling(columns, _patients(cohort), config)
        found, frequencies, told = _stable(found, screened, score, resampling, config, client)
        report["stability"] = told
    graph = _graph(columns, counts, screened.active, found, score, frequencies)
    report = {
        "visits": counts.num_rows,
        "columns": len(columns.names),
        "edge_penalty": problem.rule.edge_penalty(counts.num_rows),
        "screened_pairs": len(screened.pairs),
        "edges": graph.num_edges,
        "directed_edges": int(graph.directed.sum()),
        **report,
    }
    if frequencies is not None:
        middle = float(np.median(graph.stability)) if graph.num_edges else 0.0
        report["stability"]["median"] = middle
    return Discovery(graph, report)


def _compare_direct(
    screened: Screened,
    score: ColumnScores,
    config: CausalConfig,
    workers: Workers,
    scores: dict[str, Any],
) -> dict[str, Any]:
    """Adds the direct search to the report's scores, or a line about why it was left out."""
    size, most = len(screened.active), config.blocks.max_search
    if size > most:
        return {
            "direct_left_out": f"one search over all {size:,} codes that have a screened pair was "
            f"left out: causal.blocks.max_search is {most:,} (it would take about "
            f"{150e-9 * size**2:.0f} GB)"
        }
    direct = learning.search_directly(screened, workers)
    return {"scores": {**scores, "direct": learning.scored(score, direct.dag, direct.cpu_s)}}


def _patients(cohort: Cohort) -> NDArray[np.int64]:
    """Whose visit each training visit is, int64 (n,)."""
    of_visit = np.repeat(np.arange(cohort.num_patients), np.diff(cohort.patient_offsets))
    return of_visit[columns_of.training_visits(cohort)].astype(np.int64)


def _stable(
    found: Found,
    screened: Screened,
    score: ColumnScores,
    resampling: Resampling,
    config: CausalConfig,
    client: Client,
) -> tuple[Found, Frequencies, dict[str, Any]]:
    """Bootstraps; if asked, the threshold and the search over what passes it."""
    real = stability.run(resampling, config.bootstraps, client, "bootstraps")
    told: dict[str, Any] = {"bootstraps": config.bootstraps, "pairs": len(real.times)}
    if config.false_edge_share is None:
        return found, real, told
    chance = [
        stability.run(
            dataclasses.replace(
                resampling, columns=stability.shuffled(resampling.columns, config.seed, number)
            ),
            config.bootstraps,
            client,
            "bootstraps of shuffled columns",
        )
        for number in range(config.permutations)
    ]
    least = stability.threshold(real, chance, config.false_edge_share)
    active, pairs = screened.active, screened.pairs
    often = real.of(active[pairs.first], active[pairs.second])
    kept = often >= np.float32(least.times / config.bootstraps)
    stable = learning.search_pairs(
        screened.problem,
        score,
        pairs.first[kept],
        pairs.second[kept],
        None,
        config,
        Workers(client, screened.problem),
        "stable edges",
    )
    return (
        stable,
        real,
        {
            **told,
            "permutations": config.permutations,
            "false_edge_share": config.false_edge_share,
            "threshold": least.times / config.bootstraps,
            "kept_pairs": int(kept.sum()),
            "expected_false": least.expected_false,
            "edges_before": len(found.dag),
        },
    )


def _graph(
    columns: Columns,
    counts: Cooccurrence,
    active: NDArray[np.int64],
    found: Found,
    score: ColumnScores,
    frequencies: Frequencies | None,
) -> CausalGraph:
    edges = set(zip(found.edges.source.tolist(), found.edges.target.tolist(), strict=True))
    # A line counts once, and its strength is that in the member that was found.
    pairs = [(a, b) for a, b in sorted(edges) if a < b or (b, a) not in edges]
    strength: dict[tuple[int, int], float] = {}
    added = merge.strengths(score, found.dag).tolist()
    for a, b, nats in zip(found.dag.source.tolist(), found.dag.target.tolist(), added, strict=True):
        strength[a, b] = strength[b, a] = nats
    arrows = merge.arrows_from(pairs)
    a, b = active[arrows.source], active[arrows.target]
    unknown = np.full(len(pairs), np.nan, np.float32)
    return CausalGraph(
        nodes=columns.names,
        source=a.astype(np.int32),
        target=b.astype(np.int32),
        directed=np.array([(j, i) not in edges for i, j in pairs], np.bool_),
        stability=unknown if frequencies is None else frequencies.of(a, b),
        support=columns_of.values_at(counts.total, a, b),
        strength=np.array([strength[pair] for pair in pairs], np.float32),
    )
