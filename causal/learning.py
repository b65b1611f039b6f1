"""From visits to a graph: screen pairs, learn blocks, merge them. A bootstrap is the same again.

1. Co-occurrences are counted, once.
2. Pairs of codes are screened, and the codes split into blocks (`causal.blocks`).
3. An engine learns every block (`causal.tasks`), wherever the runner runs it (`causal.workers`).
4. The acyclic union of the block graphs (`causal.merge`) starts a search over all codes, which may
   use the edges of the blocks and the screened pairs between blocks. Codes that no allowed pair
   joins, directly or by way of others, are searched apart, which changes nothing but time. Where
   more hang together than one search can hold, hill climbing over the pairs takes its place
   (`causal.sparse_climb`).

That is one round of ring-distributed GES (Laborda et al. 2024, arXiv 2409.13314); the result is an
essential graph.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cafemed.config import Range
from causal import blocks as blocks_of
from causal import merge, orientation, sparse_climb, tasks
from causal.blocks import Block, BlocksConfig, Pairs
from causal.columns import Columns, Cooccurrence
from causal.local_scores import ColumnScores
from causal.merge import Arrows
from causal.scores import Rule
from causal.tasks import Batch, Learned, Problem, Task
from causal.workers import Runner

#: Searches that go into one task together: so many columns' squares, so many searches.
_BATCH_SQUARES, _BATCH_SEARCHES = 250_000, 256


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    """How a graph is learned from visits.

    Attributes:
        engine: of the blocks: "native", or "cdt" (R's pcalg through the package cdt, with the plain
            BIC). The merging and the direct search are native in either case.
        search: how far the native engine looks: "fast", "textbook" or "best" (`causal.fit_gies`).
        score: see `causal.scores`.
        penalty: factor on the BIC's penalty; 1 with "bdeu".
        gamma: weight of log(number of columns) in "extended_bic" and "bdeu".
        min_support: visits that must have both codes of an edge.
        blocks: see BlocksConfig.
        seed: of the communities, and of whatever is drawn.
    """

    engine: Literal["native", "cdt"] = "native"
    search: Literal["fast", "textbook", "best"] = "fast"
    score: Literal["gaussian_bic", "extended_bic", "discrete_bic", "bdeu"] = "bdeu"
    penalty: Annotated[float, Range(0, 1000, open_low=True)] = 1.0
    gamma: Annotated[float, Range(0, 1000)] = 1.0
    min_support: Annotated[int, Range(1)] = 3
    blocks: BlocksConfig = dataclasses.field(default_factory=BlocksConfig)
    seed: Annotated[int, Range(0, 2**31)] = 0


@dataclasses.dataclass(frozen=True)
class Screened:
    """What a search over the visits starts from. Columns are numbered among those with a pair.

    Attributes:
        active: int64 (a,), columns that have a screened pair; the others stay alone.
        pairs: of active columns, numbered 0 to a - 1, as everything below.
        problem: what the searches share.
        present: the visits' active columns.
    """

    active: NDArray[np.int64]
    pairs: Pairs
    problem: Problem
    present: Columns


@dataclasses.dataclass(frozen=True)
class Found:
    """A graph over active columns.

    Attributes:
        dag: one member of its class.
        edges: the essential graph; a line is an arrow each way.
        cpu_s: CPU seconds of the search.
    """

    dag: Arrows
    edges: Arrows
    cpu_s: float


def screen(columns: Columns, counts: Cooccurrence, config: LearningConfig) -> Screened:
    """Finds the pairs that are worth an edge's penalty by themselves.

    Args:
        columns: at least one visit.
        counts: of the columns.
        config: see LearningConfig.
    """
    rule = Rule(config.score, config.penalty, config.gamma, len(columns.names))
    active, pairs = blocks_of.screen(counts, rule, config.min_support).compact()
    present = columns.take(active)
    problem = Problem(
        counts.take(active),
        present.tiers,
        rule,
        config.search,
        present if rule.counts_rows or config.engine == "cdt" else None,
        pairs.matrix(len(active)),
    )
    return Screened(active, pairs, problem, present)


def learn(
    screened: Screened, score: ColumnScores, config: LearningConfig, runner: Runner
) -> tuple[Found, dict[str, Any]]:
    """Learns blocks and merges them.

    Args:
        screened: see Screened.
        score: of the active columns.
        config: see LearningConfig.
        runner: runs searches on `screened.problem`; the result is the same to the bit on any.

    Returns:
        The merged graph, and what was counted, scored and timed on the way.
    """
    pairs = screened.pairs
    if config.blocks.by == "visits":
        blocks = blocks_of.of_visits(screened.present.present, pairs)
    else:
        blocks = blocks_of.split(pairs, config.blocks, config.seed)
    learned = _run(
        [Task(block.columns, engine=config.engine) for block in blocks], "blocks", runner
    )
    graphs = [_touching(found, block) for found, block in zip(learned, blocks, strict=True)]
    union, dropped = merge.acyclic_union(graphs, score)
    first, second = _merge_pairs(graphs, blocks, pairs, config.blocks.by)
    merged = search_pairs(screened.problem, score, first, second, union, config, runner, "merge")
    return merged, {
        "blocks": len(blocks),
        "largest_block": max((len(block.columns) for block in blocks), default=0),
        "cycle_edges_dropped": dropped,
        "scores": {
            "union": scored(score, union, sum(found.cpu_s for found in learned)),
            "merged": scored(score, merged.dag, merged.cpu_s),
        },
    }


def search_pairs(
    problem: Problem,
    score: ColumnScores,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    start: Arrows | None,
    config: LearningConfig,
    runner: Runner,
    what: str,
) -> Found:
    """Searches all columns, edges between the given pairs only.

    Args:
        problem: what the runner shares.
        score: of its columns.
        first, second: int64 (E,).
        start: acyclic, of these pairs; None: the empty graph.
        config: see LearningConfig; here the engine is always the native one.
        runner: runs searches on `problem`.
        what: names the searches for people.
    """
    parts = blocks_of.components(first, second, len(problem.tiers))
    part_of = np.full(len(problem.tiers), -1, np.int64)
    for number, part in enumerate(parts):
        part_of[part] = number
    pairs_of = _grouped(part_of[first], first, second, len(parts))
    begin = merge.arrows_from([]) if start is None else start
    start_of = _grouped(part_of[begin.source], begin.source, begin.target, len(parts))
    small, found = [], []
    for part, pairs, arrows in zip(parts, pairs_of, start_of, strict=True):
        if len(part) <= config.blocks.max_search:
            small.append(Task(part, *pairs, start=Arrows(*arrows)))
        else:
            found.append(_climb(score, problem.tiers, pairs, Arrows(*arrows)))
    found += [Found(f.arrows(), f.edges(), f.cpu_s) for f in _run(small, what, runner)]
    dag, edges = _joined(f.dag for f in found), _joined(f.edges for f in found)
    return Found(dag, edges, sum(f.cpu_s for f in found))


def search_directly(screened: Screened, runner: Runner) -> Found:
    """One search over all active columns and screened pairs at once."""
    (found,) = runner.run([Task(np.arange(len(screened.active)))], "direct", tasks.search)
    return Found(found.arrows(), found.edges(), found.cpu_s)


def scored(score: ColumnScores, arrows: Arrows, cpu_s: float) -> dict[str, float]:
    """A line of the report."""
    return {
        "score": merge.total_score(score, arrows),
        "edges": len(arrows),
        "cpu_s": round(cpu_s, 3),
    }


def _run(searches: list[Task], what: str, runner: Runner) -> list[Learned]:
    """Runs searches, small ones together."""
    batches: list[list[Task]] = []
    squares = math.inf
    for task in searches:
        size = len(task.columns) ** 2
        if squares + size > _BATCH_SQUARES or len(batches[-1]) >= _BATCH_SEARCHES:
            batches.append([])
            squares = 0
        batches[-1].append(task)
        squares += size
    results = runner.run([Batch(tuple(b)) for b in batches], what, tasks.search_batch)
    return [found for batch in results for found in batch]


def _climb(
    score: ColumnScores,
    tiers: NDArray[np.int64],
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
    start: Arrows,
) -> Found:
    began = time.thread_time()
    dag = sparse_climb.climb(score, start, *pairs, tiers)
    fixed = orientation.compelled(dag, tiers)
    edges = Arrows(
        np.concatenate([dag.source, dag.target[~fixed]]),
        np.concatenate([dag.target, dag.source[~fixed]]),
    )
    return Found(dag, edges, time.thread_time() - began)


def _grouped(
    label: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64], number: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (a, b) by their label, 0 to number - 1."""
    order = np.argsort(label, kind="stable")
    ends = np.searchsorted(label[order], np.arange(number + 1))
    return [(a[order[i:j]], b[order[i:j]]) for i, j in itertools.pairwise(ends)]


def _joined(parts: Iterable[Arrows]) -> Arrows:
    every = list(parts)
    if not every:
        return merge.arrows_from([])
    source = np.concatenate([arrows.source for arrows in every])
    target = np.concatenate([arrows.target for arrows in every])
    order = np.lexsort((target, source))
    return Arrows(source[order], target[order])


def _touching(found: Learned, block: Block) -> Arrows:
    """A block's graph, directed, without edges whose ends are both in the boundary."""
    arrows = found.arrows()
    if len(block.boundary) == 0:
        return arrows
    own = np.isin(arrows.source, block.members) | np.isin(arrows.target, block.members)
    return Arrows(arrows.source[own], arrows.target[own])


def _merge_pairs(
    graphs: list[Arrows], blocks: list[Block], pairs: Pairs, by: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that the merging search may join: edges of blocks, screened pairs between blocks.

    Every two codes that ever meet are in a block together if the blocks are visits.
    """
    between = np.zeros(len(pairs), np.bool_)
    if by == "communities":
        owner = np.zeros(1 + int(pairs.second.max(initial=0)), np.int64)
        for number, block in enumerate(blocks):
            owner[block.members] = number
        between = owner[pairs.first] != owner[pairs.second]
    source = np.concatenate([pairs.first[between], *(g.source for g in graphs)])
    target = np.concatenate([pairs.second[between], *(g.target for g in graphs)])
    both = np.unique(np.stack([np.minimum(source, target), np.maximum(source, target)]), axis=1)
    return both[0], both[1]
