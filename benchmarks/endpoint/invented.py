"""An invented bundle of MIMIC-III's size, and requests about invented patients.

The model's weights are drawn, not learned: what an answer costs does not depend on them. Visits are
those of benchmarks/epochs/data.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import models
from benchmarks.epochs import data
from cafemed import bundle as bundles
from cafemed import registry
from cafemed.batches import model_inputs
from cafemed.bundle import Bundle, Preprocessing
from cafemed.codes import KINDS, node_name
from cafemed.graphs import CausalGraph, EffectTable
from cafemed.reference import Reference, make_self_check, score_histogram
from cafemed.scaling import Scaling
from serve.recommender import Recommender
from serve.schema import RecommendRequest

SHAPE = data.SHAPES["mimic3 light"]
MODEL = "cafemed"
#: The threshold is such that as many medications are recommended as a visit has; a model with drawn
#: weights would otherwise recommend half of them.
_RECOMMENDED_SHARE = SHAPE.codes[2] / SHAPE.sizes[2]
_NUM_TRIED = 64
_GRAPH_EDGES = 3000


def make_bundle(seed: int) -> Bundle:
    """A bundle of MODEL with drawn weights, graph and effects."""
    rng = np.random.default_rng((seed, 2))
    vocabularies = _vocabularies()
    drawn = data.inputs(SHAPE, seed)
    nodes = tuple(
        sorted(
            node_name(node, code)
            for node, kind in zip(
                ("diagnosis", "procedure", "previous_medication"), KINDS, strict=True
            )
            for code in vocabularies[kind]
        )
    )
    pairs = np.sort(rng.integers(0, len(nodes), (2 * _GRAPH_EDGES, 2)), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
    graph = CausalGraph(
        nodes=nodes,
        source=pairs[:, 0].astype(np.int32),
        target=pairs[:, 1].astype(np.int32),
        directed=np.ones(len(pairs), np.bool_),
        stability=np.full(len(pairs), np.nan, np.float32),
        support=np.ones(len(pairs), np.int64),
        strength=np.full(len(pairs), np.nan, np.float32),
    )
    rows = tuple(node_name(kind, code) for kind in KINDS[:2] for code in vocabularies[kind])
    columns = tuple(node_name("medication", code) for code in vocabularies["medication"])
    effect = np.asarray(drawn.effects, np.float32)
    effects = EffectTable.known(rows, columns, effect, np.full_like(effect, 0.01), "raw")
    ddi = np.asarray(drawn.ddi)
    model = models.build(MODEL, model_inputs(vocabularies, effects, ddi, {}), {}, seed=seed).eval()
    check = make_self_check(model, graph, vocabularies, Scaling())
    scores = 1 / (1 + np.exp(-check.logits))
    bundle = Bundle(
        model_name=MODEL,
        model_options={},
        weights=model.state_dict(),
        vocabularies=vocabularies,
        graph=graph,
        effects=effects,
        ddi=ddi,
        preprocessing=Preprocessing(),
        reference=Reference(score_histogram(scores), check),
        metrics={},
        sources={"cohort": "0" * 64},
    )
    recommender = Recommender(bundle, 0)
    request = RecommendRequest.model_validate(
        {"patients": [one for body in bodies(_NUM_TRIED, seed) for one in body["patients"]]}
    )
    tried = recommender.probabilities(recommender.encode(request))
    threshold = float(np.quantile(tried, 1 - _RECOMMENDED_SHARE))
    return dataclasses.replace(bundle, preprocessing=Preprocessing(threshold=threshold))


def write_registry(folder: Path, seed: int) -> Path:
    """Writes a registry whose production version is such a bundle; gives the registry's folder."""
    bundles.write(folder / "bundle", make_bundle(seed))
    found = folder / "registry"
    registry.promote(found, registry.publish(found, folder / "bundle", {}))
    return found


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of one patient each: the first `count` patients, with all their visits."""
    arrays = data.arrays(SHAPE, seed)
    vocabularies = _vocabularies()
    return [{"patients": [_patient(arrays, p, vocabularies)]} for p in range(count)]


def _patient(arrays: Any, p: int, vocabularies: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """A visit's medications are its targets; the current visit's are not known yet."""
    first, end = arrays.patient_offsets[p], arrays.patient_offsets[p + 1]
    visits = []
    for v in range(first, end):
        lists = [arrays.codes[v, k, : arrays.counts[v, k]].tolist() for k in range(2)]
        lists.append(np.flatnonzero(arrays.targets[v]).tolist() if v < end - 1 else [])
        visits.append(
            {
                field: [_code(vocabularies[kind][i]) for i in indices]
                for field, kind, indices in zip(
                    ("diagnoses", "procedures", "medications"), KINDS, lists, strict=True
                )
            }
        )
    return {"sex": "female" if p % 2 else "male", "age": 40.0 + p % 50, "visits": visits}


def _code(name: str) -> dict[str, str]:
    system, _, code = name.partition(":")
    return {"system": system, "code": code}


def _vocabularies() -> dict[str, tuple[str, ...]]:
    num_diagnoses, num_procedures, num_medications = SHAPE.sizes
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return {
        "diagnosis": tuple(f"icd9:{i:05d}" for i in range(num_diagnoses)),
        "procedure": tuple(f"icd9:{i:04d}" for i in range(num_procedures)),
        "medication": tuple(
            f"atc:{letters[i // 26]}{i % 26 + 1:02d}{letters[i % 26]}"
            for i in range(num_medications)
        ),
    }
