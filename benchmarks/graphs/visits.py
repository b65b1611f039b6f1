"""Discovery as the job runs it, blocks on workers, on invented visits with a planted graph."""

import dataclasses
import time
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.graphs.rival_process import peak_mb
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort

WORKERS = 2
#: Codes drawn for a visit by themselves; their effects come on top.
_CODES_PER_VISIT = 18
_EDGES_PER_CODE = 1.25
#: Edges join codes of one group of this size, and one in ten any two codes.
_GROUP, _FAR = 60, 0.1


class VisitCase(NamedTuple):
    """Visits, codes, and how they are made into blocks; "direct" also searches without blocks."""

    visits: int
    codes: int
    score: Literal["gaussian_bic", "bdeu"]
    by: Literal["visits", "communities", "direct"]

    @property
    def name(self) -> str:
        """As in the table and the JSON rows."""
        return f"visits n={self.visits} p={self.codes} {self.score} {self.by}"


#: 15,032 visits and 3,519 codes: MIMIC-III as the literature prepares it. 20,000 codes: ICD-10.
#: One graph a visit by Gaussian BIC is what the literature does.
CASES = (
    VisitCase(15_032, 3_519, "gaussian_bic", "visits"),
    VisitCase(15_032, 3_519, "bdeu", "visits"),
    VisitCase(15_032, 3_519, "bdeu", "communities"),
    VisitCase(15_032, 3_519, "bdeu", "direct"),
    VisitCase(15_032, 20_000, "bdeu", "communities"),
)


def draw(visits: int, codes: int, seed: int) -> tuple[Cohort, NDArray[np.int64]]:
    """Patients of two visits each, with diagnoses only, in time that grows with what occurs.

    Returns:
        The cohort, all of it for training, and the planted edges, int64 (edges, 2).
    """
    rng = np.random.default_rng([seed, visits, codes])
    often = rng.permutation(1 / np.arange(1, codes + 1) ** 0.9)
    prevalence = np.minimum(often / often.sum() * _CODES_PER_VISIT, 0.4)
    order = rng.permutation(codes)
    edges = _edges(order, rng)
    incoming: list[list[int]] = [[] for _ in range(codes)]
    for source, target in edges.tolist():
        incoming[target].append(source)
    having: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * codes
    for code in order.tolist():
        own = rng.choice(visits, rng.binomial(visits, prevalence[code]), replace=False)
        caused = [
            having[source][rng.random(len(having[source])) < rng.uniform(0.2, 0.6)]
            for source in incoming[code]
        ]
        having[code] = np.unique(np.concatenate([own, *caused]))
    visit = np.concatenate(having)
    code = np.repeat(np.arange(codes), [len(at) for at in having])
    by_visit = np.lexsort((code, visit))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(visit, minlength=visits))])
    return _cohort(CodeLists(code[by_visit].astype(np.int32), offsets), visits, codes), edges


def _edges(order: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Random edges along the order, most within a group of codes."""
    codes = len(order)
    place = np.empty(codes, np.int64)
    place[order] = np.arange(codes)
    a = rng.integers(0, codes, int(_EDGES_PER_CODE * codes))
    b = np.minimum(a // _GROUP * _GROUP + rng.integers(0, _GROUP, len(a)), codes - 1)
    far = rng.random(len(a)) < _FAR
    b[far] = rng.integers(0, codes, int(far.sum()))
    a, b = a[a != b], b[a != b]
    source, target = np.where(place[a] < place[b], [a, b], [b, a])
    return np.unique(np.stack([source, target], axis=1), axis=0)


def _cohort(diagnoses: CodeLists, visits: int, codes: int) -> Cohort:
    nothing = CodeLists(np.zeros(0, np.int32), np.zeros(visits + 1, np.int64))
    patient_offsets = np.append(np.arange(0, visits, 2), visits)
    patients = len(patient_offsets) - 1
    return Cohort(
        patient_offsets=patient_offsets,
        patient_ids=tuple(str(i) for i in range(patients)),
        visit_ids=tuple(str(i) for i in range(visits)),
        admitted=np.full(visits, "NaT", "datetime64[s]"),
        diagnoses=diagnoses,
        procedures=nothing,
        medications=nothing,
        targets=nothing,
        vocabularies={
            "diagnosis": tuple(f"x:{code:05}" for code in range(codes)),
            "procedure": (),
            "medication": (),
        },
        ddi=np.zeros((0, 0), np.bool_),
        split=np.zeros(patients, np.int8),
        sex=np.zeros(patients, np.int8),
        age=np.full(visits, np.nan, np.float32),
    )


def measure(case: VisitCase, seed: int) -> dict[str, float]:
    """Runs discovery with the job's defaults, the score aside, on two workers that have it loaded.

    `wall_s` is from the visits to the merged graph; `cpu_s` is that of the searches, of blocks and
    of the merge ("direct": of the one search instead, and `worker_peak_mb` is with it).
    """
    from causal import cluster, discovery
    from causal.blocks import BlocksConfig

    cohort, edges = draw(case.visits, case.codes, seed)
    direct = case.by == "direct"
    config = discovery.CausalConfig(
        score=case.score,
        blocks=BlocksConfig(by="visits" if case.by == "visits" else "communities"),
        compare_direct=False,
    )
    with cluster.connect("local", WORKERS) as client:
        discovery.discover(draw(500, 100, seed)[0], config, client)
        begin = time.perf_counter()
        found = discovery.discover(
            cohort, dataclasses.replace(config, compare_direct=direct), client
        )
        wall_s = time.perf_counter() - begin
        worker_peak = max(client.run(peak_mb).values())
    scores = found.report["scores"]
    own = scores["direct"] if direct else scores["merged"]
    cpu_s = own["cpu_s"] + (0 if direct else scores["union"]["cpu_s"])
    return {
        **({} if direct else {"wall_s": wall_s, **_quality(found.graph, edges)}),
        "cpu_s": cpu_s,
        "peak_mb": peak_mb(),
        "worker_peak_mb": worker_peak,
        "blocks": found.report["blocks"],
        "score": own["score"],
        "edges": own["edges"],
    }


def _quality(graph: Any, edges: NDArray[np.int64]) -> dict[str, float]:
    """Precision and recall of the graph's pairs; its nodes are in the order of the codes."""
    codes = len(graph.nodes)

    def keys(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.int64]:
        low, high = np.minimum(a, b).astype(np.int64), np.maximum(a, b).astype(np.int64)
        return np.unique(low * codes + high)

    ours, real = keys(graph.source, graph.target), keys(edges[:, 0], edges[:, 1])
    hits = len(np.intersect1d(ours, real))
    return {"precision": hits / max(len(ours), 1), "recall": hits / len(real)}
