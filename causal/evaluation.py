"""A found graph and found effects against true ones, by cdt's metrics.

cdt takes seconds to import, so nothing of a discovery does: only who has a truth to compare with.
"""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cafemed import graphs
from cafemed.errors import ArtifactError, ConfigError, MissingProgramError
from cafemed.graphs import CausalGraph, EffectTable
from causal import cdt_engine, essential

GRAPH_FILE, EFFECTS_FILE = "graph.parquet", "effects.npz"
_CODES = ("diagnosis", "procedure")
_INPUTS = (*_CODES, "previous_medication")

#: cdt's metrics take dense matrices, and R's SID a time that grows with the third power of these.
_MOST_NODES, _MOST_NODES_OF_SID = 6000, 150


@dataclasses.dataclass(frozen=True)
class Truth:
    """A true graph, and true effects where they are known."""

    graph: CausalGraph
    effects: EffectTable | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A part of a found graph against the same part of the true one.

    Attributes:
        part: which edges are compared.
        true_edges: those between nodes that the found graph has.
        found_edges: those between nodes that the true graph has.
        hits: found edges whose ends are joined in the true graph, whatever their direction.
        directed: hits that are directed.
        right: directed hits whose direction is that of the true graph.
        shd: structural Hamming distance of the essential graphs (`cdt.metrics.SHD`, a wrong
            direction counts once); None where there are too many nodes.
        aupr: area under the precision-recall curve of directed pairs, ranked by stability, or by
            strength where there is none (`cdt.metrics.precision_recall`); None likewise, or where
            the true graph has no edge.
        sid: structural intervention distance, smallest and largest over the found graph's members
            (`cdt.metrics.SID_CPDAG`); None where it was left out.
        no_sid: why it was left out; "" where it was not.
    """

    part: str
    true_edges: int
    found_edges: int
    hits: int
    directed: int
    right: int
    shd: int | None
    aupr: float | None
    sid: tuple[float, float] | None
    no_sid: str

    @property
    def precision(self) -> float:
        """Share of the found edges that are true; NaN if there are none."""
        return self.hits / self.found_edges if self.found_edges else float("nan")

    @property
    def recall(self) -> float:
        """Share of the true edges that were found; NaN if there are none."""
        return self.hits / self.true_edges if self.true_edges else float("nan")

    @property
    def directions_right(self) -> float:
        """Share of the directed hits with the true direction; NaN if there are none."""
        return self.right / self.directed if self.directed else float("nan")


def read_truth(given: str) -> Truth:
    """Reads a true graph, and the true effects that lie beside it.

    Args:
        given: a graph.parquet, or the folder of one.

    Raises:
        ConfigError: if there is no such file.
        ArtifactError: if a file is not what it should be.
    """
    path = Path(given).expanduser()
    path = path / GRAPH_FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"causal.truth: expected a {GRAPH_FILE} or its folder (data=synthetic writes one into "
            f"tables/truth), found no file {path}"
        )
    beside = path.with_name(EFFECTS_FILE)
    effects = graphs.read_effects(beside) if beside.is_file() else None
    return Truth(graphs.read_graph(path), effects)


def compare_graphs(found: CausalGraph, true: CausalGraph) -> list[Comparison]:
    """Compares edges among diagnoses and procedures, and edges to this visit's medications.

    Only nodes that both graphs have are looked at. Edges of previous medications to one another
    are not: what joins them is a diagnosis of the previous visit, which is no node.

    Raises:
        ArtifactError: if the true graph has a cycle, or shares no code with the found one.
    """
    shared = sorted(set(found.nodes) & set(true.nodes))
    codes = [name for name in shared if name.startswith(_CODES)]
    if not codes:
        raise ArtifactError("causal.truth: a graph over other codes than this cohort's")
    class_of_true = _essential(true.without_sinks())
    parts = [_compare("diagnoses and procedures", found, true, class_of_true, codes, codes)]
    sinks = [name for name in shared if name.startswith("medication/")]
    if sinks:
        inputs = [name for name in shared if name.startswith(_INPUTS)]
        parts.append(_compare("this visit's medications", found, true, true, inputs, sinks))
    return parts


def _compare(
    part: str,
    found: CausalGraph,
    true: CausalGraph,
    class_of_true: CausalGraph,
    sources: list[str],
    targets: list[str],
) -> Comparison:
    nodes = sorted({*sources, *targets})
    compared = np.zeros((len(nodes), len(nodes)), np.bool_)
    compared[np.ix_(*(np.isin(nodes, names) for names in (sources, targets)))] = True
    ours = (_confidence(found, nodes) > 0) & compared
    real = (_adjacency(true, nodes) != 0) & compared
    hits = (ours | ours.T) & (real | real.T)
    arrows = ours & ~ours.T & hits
    shd, aupr = None, None
    if len(nodes) <= _MOST_NODES:
        target = np.where(compared, _adjacency(class_of_true, nodes), 0)
        shd, aupr = _by_cdt(target, np.where(compared, _confidence(found, nodes), 0), compared)
    sid, no_sid = _sid(real, ours)
    return Comparison(
        part=part,
        true_edges=_pairs(real),
        found_edges=_pairs(ours),
        hits=_pairs(hits),
        directed=int(arrows.sum()),
        right=int((arrows & real & ~real.T).sum()),
        shd=shd,
        aupr=aupr,
        sid=sid,
        no_sid=no_sid,
    )


def _adjacency(graph: CausalGraph, nodes: list[str]) -> NDArray[np.int8]:
    """int8 (n, n) over some nodes; [i, j] = 1 for i → j, both for an undirected edge."""
    return _matrix(graph, nodes, np.ones(graph.num_edges, np.float32)).astype(np.int8)


def _confidence(graph: CausalGraph, nodes: list[str]) -> NDArray[np.float32]:
    """How sure each edge is, float32 (n, n), positive: its stability, or else its strength."""
    known = graph.stability if np.isfinite(graph.stability).any() else graph.strength
    floor = np.float32(1e-6)  # an edge stays an edge, however little is known of it
    return _matrix(graph, nodes, np.maximum(np.nan_to_num(known), floor))


def _matrix(
    graph: CausalGraph, nodes: list[str], values: NDArray[np.float32]
) -> NDArray[np.float32]:
    position = {name: i for i, name in enumerate(nodes)}
    place = np.array([position.get(name, -1) for name in graph.nodes], np.int64)
    a, b = place[graph.source], place[graph.target]
    kept = (a >= 0) & (b >= 0)
    lines = kept & ~graph.directed
    matrix = np.zeros((len(nodes), len(nodes)), np.float32)
    matrix[a[kept], b[kept]] = values[kept]
    matrix[b[lines], a[lines]] = values[lines]
    return matrix


def _pairs(edges: NDArray[np.bool_]) -> int:
    return int(np.triu(edges | edges.T).sum())


def _essential(true: CausalGraph) -> CausalGraph:
    """The essential graph of a true one, with time known; itself if it has lines already."""
    if not true.directed.all():
        return true
    nodes = list(true.nodes)
    before = np.array([name.startswith("previous_medication/") for name in nodes], np.int64)
    kinds = essential.node_kinds(len(nodes), tiers=before)
    try:
        adjacency = essential.dag_to_essential(_adjacency(true, nodes), kinds)
    except ConfigError as err:
        raise ArtifactError("causal.truth: expected an acyclic graph, found a cycle") from err
    return dataclasses.replace(true, directed=adjacency[true.target, true.source] == 0)


def _by_cdt(
    target: NDArray[np.int8], confidence: NDArray[np.float32], compared: NDArray[np.bool_]
) -> tuple[int, float | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cdt warns on import that there is no GPU
        from cdt.metrics import SHD, precision_recall
    predicted = (confidence > 0).astype(np.int8)
    shd = int(SHD(target, predicted, double_for_anticausal=False))
    if not target.any():
        return shd, None
    possible = compared & ~np.eye(len(target), dtype=np.bool_)
    return shd, float(precision_recall(target[possible], confidence[possible])[0])


def _sid(
    real: NDArray[np.bool_], ours: NDArray[np.bool_]
) -> tuple[tuple[float, float] | None, str]:
    """Nodes without an edge in either graph add nothing to it, and are left out."""
    touched = np.flatnonzero((real | ours).any(axis=0) | (real | ours).any(axis=1))
    if len(touched) > _MOST_NODES_OF_SID:
        return None, f"{len(touched):,} nodes have an edge, at most {_MOST_NODES_OF_SID} can be"
    if (real & real.T).any():
        return None, "the true graph has undirected edges"
    if not len(touched):
        return (0.0, 0.0), ""
    square = np.ix_(touched, touched)
    try:
        return cdt_engine.intervention_distance(real[square], ours[square]), ""
    except MissingProgramError as err:
        return None, str(err)


@dataclasses.dataclass(frozen=True)
class EffectComparison:
    """Estimated effects against true ones, over supported pairs with a standard error.

    Attributes:
        pairs: how many these are.
        rmse: root mean square error of the estimates; NaN without a pair.
        rmse_of_none: that of "no effect" for every pair, for scale.
        coverage: share of the 95 % intervals that hold the true effect.
    """

    pairs: int
    rmse: float
    rmse_of_none: float
    coverage: float


def compare_effects(found: EffectTable, true: EffectTable) -> EffectComparison:
    """Compares the codes and medications that both tables have."""
    rows, true_rows = _shared(found.codes, true.codes)
    columns, true_columns = _shared(found.medications, true.medications)
    ours, theirs = np.ix_(rows, columns), np.ix_(true_rows, true_columns)
    judged = found.supported[ours] & np.isfinite(found.standard_error[ours])
    truth = true.effect[theirs][judged].astype(np.float64)
    if not len(truth):
        return EffectComparison(0, float("nan"), float("nan"), float("nan"))
    low, high = (bound[ours][judged] for bound in found.interval())
    error = found.effect[ours][judged] - truth
    return EffectComparison(
        pairs=len(truth),
        rmse=float(np.sqrt(np.mean(error**2))),
        rmse_of_none=float(np.sqrt(np.mean(truth**2))),
        coverage=float(np.mean((low <= truth) & (truth <= high))),
    )


def _shared(
    ours: tuple[str, ...], theirs: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    place = {name: i for i, name in enumerate(theirs)}
    pairs = [(i, place[name]) for i, name in enumerate(ours) if name in place]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def lines(found: CausalGraph, effects: EffectTable, truth: Truth) -> list[str]:
    """What a job prints."""
    told = []
    for part in compare_graphs(found, truth.graph):
        told.append(
            f"truth, {part.part}: {part.found_edges:,} edges, {part.true_edges:,} true; "
            f"precision {part.precision:.2f}, recall {part.recall:.2f}, "
            f"{part.directions_right:.2f} of {part.directed:,} directions right"
        )
        shd = "left out (too many nodes)" if part.shd is None else f"{part.shd:,}"
        aupr = "left out" if part.aupr is None else f"{part.aupr:.3f}"
        sid = part.no_sid if part.sid is None else f"{part.sid[0]:g} to {part.sid[1]:g}"
        told.append(f"  SHD {shd}; AUPR {aupr}; SID {'left out: ' * (part.sid is None)}{sid}")
    if truth.effects is not None:
        judged = compare_effects(effects, truth.effects)
        told.append(
            f"truth, effects of {judged.pairs:,} supported pairs: root mean square error "
            f"{judged.rmse:.4f} ({judged.rmse_of_none:.4f} if all were 0), "
            f"{judged.coverage:.3f} of the 95 % intervals hold the truth"
        )
    return told
