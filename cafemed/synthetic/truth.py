"""The truth behind a population: its parameters, its graph, and the effects of interventions.

Files of a truth folder: `parameters.npz`, `graph.parquet`, `effects.npz`.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from cafemed import graphs
from cafemed.codes import CodeLists, node_name
from cafemed.errors import ArtifactError
from cafemed.graphs import CausalGraph, EffectTable
from cafemed.synthetic import effects
from cafemed.synthetic.generator import Population, previous
from cafemed.synthetic.model import Model

PARAMETERS = "parameters.npz"
GRAPH = "graph.parquet"
EFFECTS = "effects.npz"
#: What reading a damaged npz file raises.
_DAMAGED = (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
_NAMES = ("diagnoses", "procedures", "medications")


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a truth folder holds.

    Attributes:
        model: the parameters of the generative model.
        graph: its graph over "diagnosis/…", "procedure/…", "previous_medication/…" and
            "medication/…"; all edges directed.
        effects: effects of every code on every medication under intervention, and their
            simulation's standard error; estimator "true".
        start_shares: float64 (days,), distribution of the day of a stay on which a medication
            starts, 0 the day of admission.
    """

    model: Model
    graph: CausalGraph
    effects: EffectTable
    start_shares: NDArray[np.float64]


def write(population: Population, start_shares: NDArray[np.float64], folder: Path) -> None:
    """Writes the truth of a population into an existing folder."""
    model = population.model
    columns = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
    for name in _NAMES:
        columns[name] = np.array(columns[name], np.str_)
    np.savez_compressed(folder / PARAMETERS, start_shares=start_shares, **columns)
    graphs.write_graph(graph_of(population), folder / GRAPH)
    graphs.write_effects(effects.true_effects(population), folder / EFFECTS)


def read(folder: Path) -> Truth:
    """Reads a truth folder.

    Raises:
        ArtifactError: if a file is missing or not what it should be.
    """
    path = folder / PARAMETERS
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            columns = {field.name: content[field.name] for field in dataclasses.fields(Model)}
            start_shares = content["start_shares"]
    except _DAMAGED as err:
        raise ArtifactError(
            f"{path}: not the parameters of a synthetic population ({type(err).__name__})"
        ) from err
    for name in _NAMES:
        columns[name] = tuple(columns[name].tolist())
    columns["avoidance"] = float(columns["avoidance"])
    return Truth(
        model=Model(**columns),
        graph=graphs.read_graph(folder / GRAPH),
        effects=graphs.read_effects(folder / EFFECTS),
        start_shares=start_shares,
    )


def graph_of(population: Population) -> CausalGraph:
    """The graph of the generative model, with the population's visits as support.

    Edges: code → code, code → medication, previous medication → the same medication, and, where
    prescribers strike, the interacting medication of higher priority → the other.
    """
    model = population.model
    kept = list(model.medications)
    names = [
        *effects.code_names(model),
        *(node_name("previous_medication", code) for code in kept),
        *(node_name("medication", code) for code in kept),
    ]
    first_previous, first_medication = model.num_codes, model.num_codes + len(kept)
    persistent = np.flatnonzero(model.medication_persistence > 0)
    striker, struck = np.nonzero(model.strikes if model.avoidance else model.strikes * 0)
    source = np.concatenate(
        [model.parent, model.cause, first_previous + persistent, first_medication + striker]
    )
    target = np.concatenate(
        [
            model.child,
            first_medication + model.caused,
            first_medication + persistent,
            first_medication + struck,
        ]
    )
    support = _support(population, source, target)
    order = np.argsort(names)
    position = np.empty(len(names), np.int64)
    position[order] = np.arange(len(names))
    return CausalGraph(
        nodes=tuple(names[i] for i in order),
        source=position[source].astype(np.int32),
        target=position[target].astype(np.int32),
        directed=np.ones(len(source), np.bool_),
        stability=np.full(len(source), np.nan, np.float32),
        support=support,
        strength=np.full(len(source), np.nan, np.float32),
    )


def _support(
    population: Population, source: NDArray[np.int64], target: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Visits in which both ends of each edge are present, int64 (edges,)."""
    model = population.model
    num_medications = len(model.medications)
    present = sparse.hstack(
        [
            _present(population.diagnoses, len(model.diagnoses)),
            _present(population.procedures, len(model.procedures)),
            _present(previous(population, population.medications), num_medications),
            _present(population.medications, num_medications),
        ]
    ).tocsc()
    counts = np.zeros(len(source), np.int64)
    for edge, (a, b) in enumerate(zip(source, target, strict=True)):
        rows = present.indices[present.indptr[a] : present.indptr[a + 1]]
        others = present.indices[present.indptr[b] : present.indptr[b + 1]]
        counts[edge] = len(np.intersect1d(rows, others, assume_unique=True))
    return counts


def _present(lists: CodeLists, size: int) -> sparse.csr_array:
    return sparse.csr_array(
        (np.ones(len(lists.ids), np.int32), lists.ids, lists.offsets), shape=(len(lists), size)
    )
