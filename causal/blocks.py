"""Blocks: communities of codes that occur together, each with its boundary, or the visits' codes.

Two codes may be joined by an edge only if they co-occur often enough and depend on each other
beyond what the score's penalty asks (the "superstructure"). Its communities are learned apart, each
together with its strongest outside neighbours, so that a common cause in another block is not
mistaken for an edge (the boundary of an expansive partition: Shah et al., TMLR 2025,
arXiv 2406.06348).

CausalMed's way is the other one: a block per visit, of the codes that the visit has. Every two
codes that ever met are then learned together somewhere, but seldom with all that matters to them.
"""

import dataclasses
import itertools
import math
from typing import Annotated, Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed.config import Range
from causal.columns import Cooccurrence, values_at
from causal.scores import Rule, term_tables

#: Squared correlations are cut here: two codes that never differ have no finite gain.
_MAX_R2 = 1 - 1e-12


@dataclasses.dataclass(frozen=True)
class BlocksConfig:
    """How codes are split into blocks.

    Attributes:
        by: "communities", or "visits": the codes of each visit are a block, equal ones once; then
            the next three are not read.
        max_size: codes of a block without its boundary; a larger community is split again.
        max_boundary: neighbours in other blocks that a block is learned together with, the
            strongest ones.
        resolution: of the modularity; higher gives more and smaller communities.
        max_search: codes that one search may hold; it takes about 150 bytes for every two of them.
            More that are joined by allowed pairs are merged by hill climbing over pairs, and not
            searched directly.
    """

    by: Literal["communities", "visits"] = "communities"
    max_size: Annotated[int, Range(2, 5000)] = 300
    max_boundary: Annotated[int, Range(0, 5000)] = 100
    resolution: Annotated[float, Range(0, 100, open_low=True)] = 1.0
    max_search: Annotated[int, Range(2, 100_000)] = 5000


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The screened pairs of columns, each once with first < second, in ascending order.

    Attributes:
        first, second: int64 (E,), columns.
        gain: float64 (E,), log-likelihood that one end gains from the other as its only parent.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    gain: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)

    def compact(self) -> tuple[NDArray[np.int64], "Pairs"]:
        """The columns that occur in a pair, int64 ascending, and the pairs numbered among them."""
        columns = np.union1d(self.first, self.second)
        first, second = np.searchsorted(columns, self.first), np.searchsorted(columns, self.second)
        return columns, Pairs(first.astype(np.int64), second.astype(np.int64), self.gain)

    def matrix(self, num_columns: int) -> sparse.csr_array:
        """The pairs as a symmetric matrix, CSR bool (p, p)."""
        return symmetric(self.first, self.second, num_columns)


@dataclasses.dataclass(frozen=True)
class Block:
    """Columns that are learned together.

    Attributes:
        members: int64, ascending. Every column with a screened pair is a member of one community.
        boundary: int64, ascending; members of other blocks.
    """

    members: NDArray[np.int64]
    boundary: NDArray[np.int64]

    @property
    def columns(self) -> NDArray[np.int64]:
        """Members and boundary, int64, ascending."""
        return np.union1d(self.members, self.boundary)


def screen(counts: Cooccurrence, rule: Rule, min_support: int) -> Pairs:
    """Finds the pairs whose dependence is worth an edge's penalty.

    Args:
        counts: of all columns.
        rule: the score, of whose penalty for an edge the gain has to exceed.
        min_support: visits that must have both codes.
    """
    total = counts.total
    upper = total.tocoo()
    kept = (upper.row < upper.col) & (upper.data >= min_support)
    a, b = upper.row[kept].astype(np.int64), upper.col[kept].astype(np.int64)
    gain = _table_gain(counts, rule, a, b) if rule.counts_rows else _gaussian_gain(counts, a, b)
    order = np.lexsort((b, a))
    order = order[gain[order] > rule.edge_penalty(counts.num_rows)]
    return Pairs(a[order], b[order], gain[order])


def _gaussian_gain(
    counts: Cooccurrence, a: NDArray[np.int64], b: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Log-likelihood that one of two columns gains from the other, means taken out by stratum."""
    sums = np.array([stratum.diagonal() for stratum in counts.strata])
    rows = np.maximum(counts.rows, 1)[:, None]
    total = counts.total
    covariance = values_at(total, a, b) - (sums[:, a] * sums[:, b] / rows).sum(axis=0)
    variance = total.diagonal() - (sums * sums / rows).sum(axis=0)
    scale = variance[a] * variance[b]
    varies = scale > 0
    r2 = np.where(varies, covariance**2 / np.where(varies, scale, 1.0), 0.0)
    gain: NDArray[np.float64] = -0.5 * counts.num_rows * np.log1p(-np.minimum(r2, _MAX_R2))
    return gain


def _table_gain(
    counts: Cooccurrence, rule: Rule, a: NDArray[np.int64], b: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What the tables of two columns, one for each stratum, gain if one is the other's parent."""
    terms, gain = term_tables(rule.name, counts.num_rows, rule.penalty), np.zeros(len(a))
    for rows, joint in zip(counts.rows.tolist(), counts.strata, strict=True):
        often = joint.diagonal()
        n_a, n_b, both = often[a], often[b], values_at(joint, a, b)
        varies = (n_a > 0) & (n_a < rows) & (n_b > 0) & (n_b < rows)
        split = terms.of(1, both, n_a) + terms.of(1, n_b - both, rows - n_a)
        whole = terms.of(0, n_b, np.full_like(n_b, rows))
        gain += np.where(varies, split - whole - terms.cost[1] + terms.cost[0], 0.0)
    return gain


def split(pairs: Pairs, config: BlocksConfig, seed: int) -> list[Block]:
    """Splits the columns that have a screened pair into blocks, by Louvain communities.

    Returns:
        Blocks ordered by their smallest member; the same for the same pairs, config and seed.
    """
    graph = nx.Graph()
    graph.add_nodes_from(np.union1d(pairs.first, pairs.second).tolist())
    # Square roots, so that a few very common codes do not decide every community.
    weights = np.sqrt(pairs.gain).tolist()
    graph.add_weighted_edges_from(
        zip(pairs.first.tolist(), pairs.second.tolist(), weights, strict=True)
    )
    communities = _communities(graph, config, config.resolution, seed)
    members = sorted((np.array(sorted(c), np.int64) for c in communities), key=lambda m: int(m[0]))
    return [Block(m, _boundary(m, pairs, config.max_boundary)) for m in members]


def of_visits(present: sparse.csr_array, pairs: Pairs, rows_at_once: int = 1000) -> list[Block]:
    """The codes of each visit that have a screened pair in it; equal sets once, ascending.

    A code without one gets no edge, whatever else the block holds.

    Args:
        present: CSR (n, p), 0 or 1.
        pairs: of the p columns.
        rows_at_once: bounds the memory.
    """
    joined = pairs.matrix(present.shape[1]).astype(np.int64)
    found: set[bytes] = set()
    for start in range(0, present.shape[0], rows_at_once):
        part = sparse.csr_array(present[start : start + rows_at_once])
        partners = sparse.csr_array(part.multiply(part @ joined))
        partners.eliminate_zeros()
        partners.sort_indices()
        columns = partners.indices.astype(">i8")  # big-endian: bytes sort as the numbers do
        ends = partners.indptr
        found |= {columns[a:b].tobytes() for a, b in itertools.pairwise(ends) if b > a}
    none = np.zeros(0, np.int64)
    return [Block(np.frombuffer(key, ">i8").astype(np.int64), none) for key in sorted(found)]


def symmetric(
    first: NDArray[np.int64], second: NDArray[np.int64], num_columns: int
) -> sparse.csr_array:
    """Pairs, in any order and repeated or not, as CSR bool (p, p)."""
    ends = np.concatenate([first, second]), np.concatenate([second, first])
    matrix = sparse.csr_array(
        (np.ones(len(ends[0]), np.bool_), ends), shape=(num_columns, num_columns)
    )
    matrix.sum_duplicates()
    matrix.sort_indices()
    return matrix


def components(
    first: NDArray[np.int64], second: NDArray[np.int64], num_columns: int
) -> list[NDArray[np.int64]]:
    """Columns that pairs join, directly or not: ascending, int64, ordered by their smallest.

    A search that may join no others falls apart into one for each. Columns without a pair are in
    none.
    """
    matrix = symmetric(first, second, num_columns)
    _, label = sparse.csgraph.connected_components(matrix, directed=False)
    columns = np.flatnonzero(np.diff(matrix.indptr))
    order = np.argsort(label[columns], kind="stable")
    starts = np.flatnonzero(np.diff(label[columns][order])) + 1
    parts = np.split(columns[order].astype(np.int64), starts) if len(columns) else []
    return sorted(parts, key=lambda part: int(part[0]))


def _communities(
    graph: nx.Graph, config: BlocksConfig, resolution: float, seed: int
) -> list[set[int]]:
    if len(graph) == 0:
        return []
    found = nx.community.louvain_communities(graph, resolution=resolution, seed=seed)
    small: list[set[int]] = []
    for community in found:
        if len(community) <= config.max_size:
            small.append(community)
        elif len(found) == 1:
            small += _chunks(community, config.max_size)
        else:
            inner = graph.subgraph(sorted(community))
            small += _communities(_copy_sorted(inner), config, resolution, seed)
    return small


def _copy_sorted(graph: nx.Graph) -> nx.Graph:
    # A subgraph view lists nodes in the parent's set order; Louvain's result depends on the order.
    copy = nx.Graph()
    copy.add_nodes_from(sorted(graph.nodes))
    copy.add_weighted_edges_from(
        sorted((min(e), max(e), w) for *e, w in graph.edges.data("weight"))
    )
    return copy


def _chunks(community: set[int], max_size: int) -> list[set[int]]:
    """Equal parts by position, for a community that does not fall apart any further."""
    ordered = sorted(community)
    parts = math.ceil(len(ordered) / max_size)
    return [set(part.tolist()) for part in np.array_split(np.array(ordered), parts)]


def _boundary(members: NDArray[np.int64], pairs: Pairs, limit: int) -> NDArray[np.int64]:
    """The outside columns with the largest gain to a member, at most `limit`."""
    inside_first = np.isin(pairs.first, members)
    inside_second = np.isin(pairs.second, members)
    crossing = inside_first ^ inside_second
    outside = np.where(inside_first, pairs.second, pairs.first)[crossing]
    gain = pairs.gain[crossing]
    order = np.lexsort((outside, -gain))
    unique, first_seen = np.unique(outside[order], return_index=True)
    strongest = unique[np.argsort(first_seen, kind="stable")][:limit]
    return np.sort(strongest)
