"""Discovery of a causal graph over a cohort's codes: blocks learned on Dask, then merged.

1. Co-occurrences are counted, once.
2. Pairs of codes are screened, and the codes split into blocks (`causal.blocks`).
3. An engine learns every block, on whatever cluster the client leads to (`causal.tasks`).
4. The acyclic union of the block graphs (`causal.merge`) starts one more search over all codes,
   which may use the edges of the blocks and the screened pairs between blocks.

That is one round of ring-distributed GES (Laborda et al. 2024, arXiv 2409.13314); the result is an
essential graph.
"""

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from cafemed import console
from cafemed.cohort import Cohort
from cafemed.config import Range
from cafemed.errors import DataError
from cafemed.graphs import CausalGraph
from causal import blocks as blocks_of
from causal import cluster, merge, tasks
from causal import columns as columns_of
from causal.blocks import Block, BlocksConfig, Pairs
from causal.columns import Cooccurrence
from causal.effects import EffectsConfig
from causal.merge import Arrows
from causal.scores import GaussianScore, gaussian_score, parent_penalty
from causal.tasks import Learned, Problem, Task, Workers


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """How the graph and the effects are learned.

    Attributes:
        engine: of the blocks: "native", or "cdt" (R's pcalg through the package cdt, with the plain
            BIC). The merging and the direct search are native in either case.
        search: how far the native engine looks: "fast", "textbook" or "best" (`causal.fit_gies`).
        score: "gaussian_bic" or "extended_bic".
        penalty: factor on the BIC penalty of an edge.
        gamma: weight of log(number of columns) in the extended BIC.
        min_support: visits that must have both codes of an edge.
        sinks: also give this visit's medications their causes, when the rest is done
            (`causal.sinks`).
        compare_direct: also search once without blocks, to report what the blocks change.
        blocks: see BlocksConfig.
        effects: see EffectsConfig.
        cluster: "local", "ray" or a Dask scheduler's address; changes no result.
        workers: processes or actors to start, None for one a core; changes no result.
        seed: of the communities.
        truth: a true graph's graph.parquet, or the folder that holds it (and true effects), to
            compare the result with; changes no result.
    """

    engine: Literal["native", "cdt"] = "native"
    search: Literal["fast", "textbook", "best"] = "fast"
    score: Literal["gaussian_bic", "extended_bic"] = "extended_bic"
    penalty: Annotated[float, Range(0, 1000, open_low=True)] = 1.0
    gamma: Annotated[float, Range(0, 1000)] = 2.0
    min_support: Annotated[int, Range(1)] = 5
    sinks: bool = True
    compare_direct: bool = True
    blocks: BlocksConfig = dataclasses.field(default_factory=BlocksConfig)
    effects: EffectsConfig = dataclasses.field(default_factory=EffectsConfig)
    cluster: str = "local"
    workers: Annotated[int, Range(1, 10_000)] | None = None
    seed: Annotated[int, Range(0, 2**31)] = 0
    truth: str | None = None

    def __post_init__(self) -> None:
        cluster.check(self.cluster)

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
    penalty = parent_penalty(
        config.score, counts.num_rows, len(columns.names), config.penalty, config.gamma
    )
    screened = blocks_of.screen(counts, penalty, config.min_support)
    # From here on columns are numbered among those with a screened pair; the others stay alone.
    active, pairs = screened.compact()
    problem = Problem(
        counts.take(active),
        columns.tiers[active],
        penalty,
        config.search,
        columns.take(active) if config.engine == "cdt" else None,
    )
    with console.waiting("loading the search, compiling it if it is new here"):
        tasks.load_engine(config.search)
    everything = np.arange(len(active))
    score = gaussian_score(
        problem.counts.statistics(everything), problem.penalty, "per_environment"
    )
    learned, report = _learn(problem, pairs, config, Workers(client, problem), score)
    graph = _graph(columns.names, counts, active, learned, score)
    report = {
        "visits": counts.num_rows,
        "columns": len(columns.names),
        "edge_penalty": penalty,
        "screened_pairs": len(pairs),
        "edges": graph.num_edges,
        "directed_edges": int(graph.directed.sum()),
        **report,
    }
    return Discovery(graph, report)


def _learn(
    problem: Problem, pairs: Pairs, config: CausalConfig, workers: Workers, score: GaussianScore
) -> tuple[Learned, dict[str, Any]]:
    """Blocks, union, merge, and the direct run to compare with."""
    everything = np.arange(len(problem.tiers))
    blocks = blocks_of.split(pairs, config.blocks, config.seed)
    block_tasks = [
        Task(block.columns, pairs.first, pairs.second, engine=config.engine) for block in blocks
    ]
    learned: list[Learned] = workers.run(block_tasks, "blocks")
    graphs = [_touching(found, block) for found, block in zip(learned, blocks, strict=True)]
    union, dropped = merge.acyclic_union(graphs, score)
    allowed = _merge_pairs(graphs, blocks, pairs)
    merged: Learned
    (merged,) = workers.run([Task(everything, *allowed, start=union)], "merge")
    scores = {
        "union": _scored(score, union, sum(found.cpu_s for found in learned)),
        "merged": _scored(score, merge.arrows_of(merged.dag), merged.cpu_s),
    }
    if config.compare_direct:
        task = Task(everything, pairs.first, pairs.second)
        (direct,) = workers.run([task], "direct")
        scores["direct"] = _scored(score, merge.arrows_of(direct.dag), direct.cpu_s)
    return merged, {
        "blocks": len(blocks),
        "largest_block": max((len(block.columns) for block in blocks), default=0),
        "cycle_edges_dropped": dropped,
        "scores": scores,
    }


def _touching(found: Learned, block: Block) -> Arrows:
    """A block's graph, directed, without edges whose ends are both in the boundary."""
    arrows = merge.arrows_of(found.dag)
    source, target = found.columns[arrows.source], found.columns[arrows.target]
    own = np.isin(source, block.members) | np.isin(target, block.members)
    return Arrows(source[own], target[own])


def _merge_pairs(
    graphs: list[Arrows], blocks: list[Block], pairs: Pairs
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that the merging search may join: edges of blocks, screened pairs between blocks."""
    owner = np.zeros(1 + max(pairs.second.max(initial=0), pairs.first.max(initial=0)), np.int64)
    for number, block in enumerate(blocks):
        owner[block.members] = number
    between = owner[pairs.first] != owner[pairs.second]
    first = [pairs.first[between], *(g.source for g in graphs)]
    second = [pairs.second[between], *(g.target for g in graphs)]
    return np.concatenate(first), np.concatenate(second)


def _scored(score: GaussianScore, arrows: Arrows, cpu_s: float) -> dict[str, float]:
    return {
        "score": merge.total_score(score, arrows),
        "edges": len(arrows),
        "cpu_s": round(cpu_s, 3),
    }


def _graph(
    names: tuple[str, ...],
    counts: Cooccurrence,
    active: NDArray[np.int64],
    found: Learned,
    score: GaussianScore,
) -> CausalGraph:
    edge = found.adjacency.astype(np.bool_)
    directed = edge & ~edge.T
    source, target = np.nonzero(directed | np.triu(edge & edge.T))
    a, b = active[source], active[target]
    # An undirected edge counts in the direction that it has in the member that was found.
    forward = found.dag[source, target] != 0
    arrows = Arrows(np.where(forward, source, target), np.where(forward, target, source))
    return CausalGraph(
        nodes=names,
        source=a.astype(np.int32),
        target=b.astype(np.int32),
        directed=directed[source, target],
        stability=np.full(len(a), np.nan, np.float32),
        support=columns_of.values_at(counts.total, a, b),
        strength=merge.strengths(score, arrows).astype(np.float32),
    )
