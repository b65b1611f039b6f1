"""A small bundle with an untrained model; its vocabulary is invented."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import models
from cafemed import bundle as bundles
from cafemed import registry
from cafemed.batches import model_inputs
from cafemed.bundle import Bundle, Preprocessing
from cafemed.codes import KINDS, node_name
from cafemed.graphs import CausalGraph, EffectTable
from cafemed.reference import Reference, make_self_check, score_histogram
from cafemed.scaling import Scaling
from serve.encoding import EncodedPatient
from serve.recommender import Recommender

with warnings.catch_warnings():  # Ray's own use of pydantic
    warnings.filterwarnings("ignore", r"Using extra keyword arguments on `Field`", module="ray")
    import ray.serve  # noqa: F401

VOCABULARIES = {
    "diagnosis": (*(f"icd9:{n}" for n in range(4010, 4022)), "icd10:I10"),
    "procedure": tuple(f"icd9:{n}" for n in range(990, 996)),
    "medication": tuple(f"atc:{letter}0{n}B" for letter in "ABCN" for n in (1, 2, 3)),
}
ITEMS = tuple(f"lab:{50801 + i}" for i in range(5))
SCALING = Scaling(60.0, 17.0, (140.0, 7.0, 0.9, 11.0, 80.0), (4.0, 1.5, 0.4, 2.0, 30.0))
MOLECULES = {
    code: tuple(f"C{'O' * (i % 4)}{'N' * j}" for j in range(i % 3))
    for i, code in enumerate(VOCABULARIES["medication"])
    if i % 3
}
MODEL_OPTIONS = {"dimension": 24}


def make_bundle(
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    model_name: str = "cafemed",
    modalities: str | None = None,
    without: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Bundle:
    """A bundle whose model has random weights, larger than at a start, so that scores differ.

    With `modalities` the model is given these of the cohort's laboratory values, sexes and ages,
    and its medications have molecules. `without` names kinds whose vocabulary is empty,
    `options` those of the model that are others than MODEL_OPTIONS.
    """
    preprocessing = preprocessing or Preprocessing(scaling=SCALING if modalities else Scaling())
    vocabularies = VOCABULARIES | dict.fromkeys(without, ())
    vocabularies |= {"laboratory": ITEMS} if modalities else {}
    given = {"modalities": modalities} if modalities else {}
    options = MODEL_OPTIONS | given | dict(options or {})
    molecules = MOLECULES if modalities else {}
    rng = np.random.default_rng(seed)
    nodes = sorted(
        node_name(kind, code)
        for kind, of in (
            ("diagnosis", "diagnosis"),
            ("procedure", "procedure"),
            ("previous_medication", "medication"),
        )
        for code in vocabularies[of]
    )
    source = np.arange(0, len(nodes) - 1, 2, dtype=np.int32)
    graph = CausalGraph(
        nodes=tuple(nodes),
        source=source,
        target=source + 1,
        directed=np.ones(len(source), np.bool_),
        stability=np.full(len(source), np.nan, np.float32),
        support=np.ones(len(source), np.int64),
        strength=np.full(len(source), np.nan, np.float32),
    )
    rows = tuple(node_name(kind, c) for kind in KINDS[:2] for c in vocabularies[kind])
    columns = tuple(node_name("medication", c) for c in vocabularies["medication"])
    effect = rng.normal(0, 0.3, (len(rows), len(columns))).astype(np.float32)
    rows += tuple(node_name("previous_medication", c) for c in vocabularies["medication"])
    before = np.random.default_rng((seed, 1)).normal(0, 0.3, (len(columns),) * 2)
    effect = np.concatenate([effect, before.astype(np.float32)])
    effects = EffectTable.known(rows, columns, effect, np.full_like(effect, 0.01), "raw")
    ddi = np.triu(rng.random((len(columns), len(columns))) < 0.3, 1)
    ddi |= ddi.T
    inputs = model_inputs(vocabularies, effects, ddi, molecules)
    model = models.build(model_name, inputs, options, seed=seed)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.eval()
    return Bundle(
        model_name=model_name,
        model_options=options,
        weights=model.state_dict(),
        vocabularies=vocabularies,
        graph=graph,
        effects=effects,
        ddi=ddi,
        preprocessing=preprocessing,
        reference=Reference(
            score_histogram(rng.random(100)),
            make_self_check(model, graph, vocabularies, preprocessing.scaling),
        ),
        metrics={"jaccard": 0.5},
        sources={"cohort": "0" * 64},
        molecules=molecules,
    )


@pytest.fixture(scope="session")
def served() -> Bundle:
    """The bundle, in memory."""
    return make_bundle()


@pytest.fixture(scope="session", params=[*models.NAMES, "graphdiffmed LGY"])
def served_model(request: pytest.FixtureRequest) -> Bundle:
    """A bundle of each model, and of one that reads all there is, in memory."""
    name, _, modalities = request.param.partition(" ")
    return make_bundle(model_name=name, modalities=modalities or None)


@pytest.fixture(scope="session")
def served_reading_all() -> Bundle:
    """A bundle whose model reads laboratory values, sexes and ages too, in memory."""
    return make_bundle(model_name="graphdiffmed", modalities="LGY")


@pytest.fixture(params=[("procedure",), ("diagnosis",), ("diagnosis", "procedure")], ids="+".join)
def without(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Kinds of which a cohort has no codes."""
    kinds: tuple[str, ...] = request.param
    return kinds


@pytest.fixture(params=models.NAMES)
def served_without(request: pytest.FixtureRequest, without: tuple[str, ...]) -> Bundle:
    """A bundle of each model for such a cohort, in memory."""
    return make_bundle(model_name=request.param, without=without)


@pytest.fixture(scope="session")
def other() -> Bundle:
    """Another bundle with the same vocabularies."""
    return make_bundle(seed=1)


@pytest.fixture(scope="session")
def root(served: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose experiment "tiny" has the bundle as version 1, in production."""
    folder = tmp_path_factory.mktemp("root")
    bundles.write(folder / "bundle", served)
    registry_dir = folder / "registry" / "tiny"
    registry.promote(registry_dir, registry.publish(registry_dir, folder / "bundle", {}))
    return folder


@pytest.fixture
def certificate(certificates: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    made: tuple[Path, Path] = certificates.make(tmp_path)
    return made


class Direct:
    """A service without Ray, queue or batch."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[Any]:
        return list(recommender.probabilities(patients))


@pytest.fixture(scope="session")
def direct() -> type[Direct]:
    """Makes a service of a recommender."""
    return Direct


@pytest.fixture(scope="session")
def service(served: Bundle) -> Direct:
    """The bundle behind the routes, as version 3."""
    return Direct(Recommender(served, 3))
