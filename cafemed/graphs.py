"""Causal graphs and effect tables as files and arrays, and the node classes of visits.

`causal` produces them; models, training and serving read them from here.
"""

import dataclasses
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from cafemed import untrusted
from cafemed.codes import CodeLists
from cafemed.errors import ArtifactError

#: Classes of a visit's codes in the graph over that visit's codes (models.md 1.9).
CAUSE, ORPHAN, MIDDLE, EFFECT = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class CausalGraph:
    """An essential graph over codes.

    This visit's medications ("medication/…") are sinks: edges lead to them, none between them and
    none away. They explain; what a model sees of a visit (`node_classes`) is among its inputs.

    Attributes:
        nodes: names, "diagnosis/icd9:4019" (`codes.node_name`), sorted.
        source, target: int32 (edges,), indices into nodes; source → target if directed.
        directed: bool (edges,); an undirected edge is listed once, source < target.
        stability: float32 (edges,), share of bootstraps that have the edge; NaN if none were run.
        support: int64 (edges,), visits in which both ends are present.
        strength: float32 (edges,), what the edge adds to the graph's score, in nats (an undirected
            edge: in one graph of the class); NaN where unknown.
    """

    nodes: tuple[str, ...]
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    directed: NDArray[np.bool_]
    stability: NDArray[np.float32]
    support: NDArray[np.int64]
    strength: NDArray[np.float32]

    @property
    def num_edges(self) -> int:
        """Edges, directed and undirected."""
        return len(self.source)

    def without_sinks(self) -> "CausalGraph":
        """The graph over what is known at a visit: no "medication/…" nodes, nor their edges."""
        known = np.array([not name.startswith("medication/") for name in self.nodes], np.bool_)
        number = np.cumsum(known, dtype=np.int32) - 1
        kept = known[self.source] & known[self.target]
        return CausalGraph(
            nodes=tuple(name for name in self.nodes if not name.startswith("medication/")),
            source=number[self.source[kept]].astype(np.int32),
            target=number[self.target[kept]].astype(np.int32),
            directed=self.directed[kept],
            stability=self.stability[kept],
            support=self.support[kept],
            strength=self.strength[kept],
        )

    def directed_adjacency(self, nodes: list[str]) -> sparse.csr_array:
        """Directed edges among the named nodes, float32 CSR (n, n); [i, j] = 1 means i → j.

        A name that the graph does not have is an isolated node.
        """
        position = {name: i for i, name in enumerate(nodes)}
        index = np.array([position.get(name, -1) for name in self.nodes], np.int64)
        a, b = index[self.source], index[self.target]
        keep = self.directed & (a >= 0) & (b >= 0)
        return sparse.csr_array(
            (np.ones(int(keep.sum()), np.float32), (a[keep], b[keep])),
            shape=(len(nodes), len(nodes)),
        )


@dataclasses.dataclass(frozen=True)
class EffectTable:
    """Effects of diagnoses, procedures and medications of the visit before on medications.

    Attributes:
        codes: row names, "diagnosis/…", then "procedure/…", then "previous_medication/…", in
            vocabulary order. The last are missing where nothing was estimated of them: in a table
            of an earlier version, and in a synthetic truth.
        medications: column names, "medication/…", in vocabulary order.
        effect: float32 (codes, medications), difference of probabilities; finite, 0 where there is
            nothing to tell it by.
        standard_error: float32 (codes, medications); NaN where it has no meaning.
        estimator: "raw", "adjusted" or "doubly_robust"; "true" for a synthetic truth.
        minimum, maximum: float32 (codes, medications), range of the effect over the members of the
            graph's Markov class; `effect` itself where one adjustment set was used.
        support: int32 (codes, medications), visits with code and medication; for previous
            medications, of those that have a visit before, as all that is said of them.
        supported: bool (codes, medications), there are visits enough to tell the effect by.
        visits: float32 (codes,), how many visits the comparison with and without the code is worth
            after adjustment; NaN if nothing was estimated.
    """

    codes: tuple[str, ...]
    medications: tuple[str, ...]
    effect: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    estimator: str
    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    support: NDArray[np.int32]
    supported: NDArray[np.bool_]
    visits: NDArray[np.float32]

    @classmethod
    def known(
        cls,
        codes: tuple[str, ...],
        medications: tuple[str, ...],
        effect: NDArray[np.float32],
        standard_error: NDArray[np.float32],
        estimator: str,
    ) -> "EffectTable":
        """A table of effects that no visits were counted for: all supported, without a range."""
        return cls(
            codes=codes,
            medications=medications,
            effect=effect,
            standard_error=standard_error,
            estimator=estimator,
            minimum=effect,
            maximum=effect,
            support=np.zeros(effect.shape, np.int32),
            supported=np.ones(effect.shape, np.bool_),
            visits=np.full(len(codes), np.nan, np.float32),
        )

    def of_kinds(self, *kinds: str) -> "EffectTable":
        """The rows of these kinds of nodes alone, such as "previous_medication"."""
        rows = [i for i, name in enumerate(self.codes) if name.partition("/")[0] in kinds]
        return dataclasses.replace(
            self,
            codes=tuple(self.codes[i] for i in rows),
            **{name: getattr(self, name)[np.array(rows, np.int64)] for name in _EFFECT_ARRAYS},
        )

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Confidence interval of each effect, two float32 (codes, medications).

        NaN where there is no standard error. It tells of the chance that is in the visits, not of
        which member of the Markov class is true: for that see `minimum` and `maximum`.
        """
        half = np.float32(NormalDist().inv_cdf((1 + level) / 2)) * self.standard_error
        return self.effect - half, self.effect + half


def node_classes(lists: CodeLists, adjacency: sparse.csr_array) -> NDArray[np.int8]:
    """Classes of every visit's codes in the graph restricted to that visit's codes.

    Class 0 cause (in 0, out > 0), 1 orphan (in 0, out 0), 2 middle (in > 0, out > 0), 3 effect
    (in > 0, out 0); models.md 1.9. All visits at once with sparse products.

    Args:
        lists: code lists of one modality; each code at most once a visit.
        adjacency: CSR (N, N) of that modality, [i, j] = 1 means i → j (`directed_adjacency`).

    Returns:
        int8, aligned with `lists.ids`.
    """
    size = adjacency.shape[0]
    present = sparse.csr_array(
        (np.ones(len(lists.ids), np.float32), lists.ids, lists.offsets),
        shape=(len(lists), size),
    )
    present.sort_indices()
    row = np.repeat(np.arange(len(lists)), lists.counts)
    incoming = _at(present @ adjacency, row, lists.ids) > 0
    outgoing = _at(present @ adjacency.T.tocsr(), row, lists.ids) > 0
    classes = np.where(
        incoming, np.where(outgoing, MIDDLE, EFFECT), np.where(outgoing, CAUSE, ORPHAN)
    )
    return classes.astype(np.int8)


def _at(
    matrix: sparse.csr_array, row: NDArray[np.int64], column: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Values of a sparse matrix at (row, column) pairs, without making it dense."""
    matrix.sum_duplicates()
    keys = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    keys = keys * matrix.shape[1] + matrix.indices
    wanted = row * matrix.shape[1] + column
    place = np.searchsorted(keys, wanted)
    inside = np.minimum(place, max(len(keys) - 1, 0))
    if len(keys) == 0:
        return np.zeros(len(wanted), np.float32)
    values: NDArray[np.float32] = np.where(keys[inside] == wanted, matrix.data[inside], 0)
    return values


def write_graph(graph: CausalGraph, path: Path) -> None:
    """Writes `graph.parquet`: one row an edge, node names in the schema's metadata."""
    names = np.asarray(graph.nodes, dtype=object)
    table = pa.table(
        {
            "source": pa.array(names[graph.source], pa.string()),
            "target": pa.array(names[graph.target], pa.string()),
            "directed": pa.array(graph.directed),
            "stability": pa.array(graph.stability),
            "support": pa.array(graph.support),
            "strength": pa.array(graph.strength),
        }
    )
    table = table.replace_schema_metadata({"nodes": json.dumps(graph.nodes)})
    pq.write_table(table, path)


def read_graph(path: Path) -> CausalGraph:
    """Reads `graph.parquet`.

    Raises:
        ArtifactError: if it is not such a file.
    """
    try:
        table = untrusted.read_table(path)
        nodes = tuple(json.loads(table.schema.metadata[b"nodes"]))
        index = {name: i for i, name in enumerate(nodes)}

        def ends(name: str) -> NDArray[np.int32]:
            names, rows = untrusted.labels(table[name])
            return np.array([index[n] for n in names], np.int32)[rows]

        return CausalGraph(
            nodes=nodes,
            source=ends("source"),
            target=ends("target"),
            directed=np.array(table["directed"].to_numpy(), np.bool_),
            stability=np.array(table["stability"].to_numpy(), np.float32),
            support=np.array(table["support"].to_numpy(), np.int64),
            strength=_strength(table),
        )
    except untrusted.STRANGE as err:
        raise ArtifactError(f"{path}: not a causal graph ({type(err).__name__})") from err


def _strength(table: pa.Table) -> NDArray[np.float32]:
    """The column of that name; files of bundles published before there was one have none."""
    if "strength" not in table.column_names:
        return np.full(table.num_rows, np.nan, np.float32)
    return np.array(table["strength"].to_numpy(), np.float32)


#: The arrays of an effect table: name, type, whether one value a pair (else one a code).
_EFFECT_ARRAYS: dict[str, tuple[type[np.generic], bool]] = {
    "effect": (np.float32, True),
    "standard_error": (np.float32, True),
    "minimum": (np.float32, True),
    "maximum": (np.float32, True),
    "support": (np.int32, True),
    "supported": (np.bool_, True),
    "visits": (np.float32, False),
}


def write_effects(effects: EffectTable, path: Path) -> None:
    """Writes `effects.npz` (no pickled objects)."""
    np.savez_compressed(
        path,
        codes=np.array(effects.codes, dtype=np.str_),
        medications=np.array(effects.medications, dtype=np.str_),
        estimator=np.array(effects.estimator, dtype=np.str_),
        **{name: getattr(effects, name) for name in _EFFECT_ARRAYS},
    )


def read_effects(path: Path) -> EffectTable:
    """Reads `effects.npz`.

    Raises:
        ArtifactError: if it is not such a file, or one that an earlier version wrote.
    """
    try:
        with untrusted.open_arrays(path) as content:
            lacking = [name for name in _EFFECT_ARRAYS if name not in content]
            if lacking and "effect" in content:
                raise ArtifactError(
                    f"{path}: an effect table of an earlier version, without {', '.join(lacking)}; "
                    "write it again (jobs/discover.py, or jobs/prepare.py for a synthetic truth)"
                )
            codes = tuple(content["codes"].tolist())
            medications = tuple(content["medications"].tolist())
            estimator = str(content["estimator"])
            arrays = {
                name: content[name].astype(dtype) for name, (dtype, _) in _EFFECT_ARRAYS.items()
            }
    except untrusted.STRANGE as err:
        raise ArtifactError(f"{path}: not an effect table ({type(err).__name__})") from err
    shape = (len(codes), len(medications))
    for name, (_, of_pairs) in _EFFECT_ARRAYS.items():
        wanted = shape if of_pairs else shape[:1]
        if arrays[name].shape != wanted:
            raise ArtifactError(
                f"{path}: expected {name} of shape {wanted} for {shape} codes and medications, "
                f"got {arrays[name].shape}"
            )
    return EffectTable(codes=codes, medications=medications, estimator=estimator, **arrays)
