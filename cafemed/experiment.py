"""What training, tuning and evaluation read of an experiment: its cohort and graph, checked."""

import dataclasses
from pathlib import Path

from cafemed import artifacts, batches, cohort, graphs
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.cohort import Cohort
from cafemed.graphs import CausalGraph, EffectTable


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The artifacts of the stages before training, and what models are given of them.

    Attributes:
        cohort, graph, effects: as their stages wrote them.
        arrays: all visits of the cohort.
        inputs: what models are built from.
        sources: "cohort" and "graph" → fingerprint; the inputs of every later artifact.
    """

    cohort: Cohort
    graph: CausalGraph
    effects: EffectTable
    arrays: VisitArrays
    inputs: ModelInputs
    sources: dict[str, str]


def read_sources(folder: Path) -> dict[str, str]:
    """The fingerprints of an experiment's cohort and graph, without reading their data.

    Args:
        folder: of the experiment, with "cohort" and "graph" in it.

    Raises:
        ArtifactError: if one is missing, or the graph was made from another cohort.
    """
    found = artifacts.read_manifest(folder / "cohort", "cohort")
    graph = artifacts.read_manifest(folder / "graph", "graph")
    artifacts.require_match(
        str(folder / "graph"), found.fingerprint, graph.inputs.get("cohort", "none")
    )
    return {"cohort": found.fingerprint, "graph": graph.fingerprint}


def load_inputs(folder: Path) -> Experiment:
    """Reads an experiment's cohort and graph and makes a model's arrays of them.

    Args:
        folder: of the experiment, with "cohort" and "graph" in it.

    Raises:
        ArtifactError: if one is missing, damaged, or made from another than the other.
    """
    sources = read_sources(folder)
    artifacts.verify(folder / "graph", "graph")
    patients = cohort.load(folder / "cohort")
    graph = graphs.read_graph(folder / "graph" / "graph.parquet")
    effects = graphs.read_effects(folder / "graph" / "effects.npz")
    return Experiment(
        cohort=patients,
        graph=graph,
        effects=effects,
        arrays=batches.cohort_arrays(patients, graph),
        inputs=batches.model_inputs(
            patients.vocabularies, effects, patients.ddi, patients.molecules
        ),
        sources=sources,
    )
