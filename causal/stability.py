"""How often an edge comes back when the patients are drawn anew, and how often chance does as well.

Each bootstrap draws as many patients as there are, with replacement and with all their visits, and
learns the whole graph from these. A pair's frequency is the share of the bootstraps that join it
(Friedman, Goldszmidt and Wyner, UAI 1999).

What frequency is worth keeping is asked of chance: the same bootstraps of the same visits, after
each column was shuffled by itself within its stratum, so that nothing depends on anything and every
edge is false (as in Tusher, Tibshirani and Chu, PNAS 98, 2001). With V(t) false pairs and R(t) real
ones of frequency t or more, the share of false edges among R(t) is expected to be at most
(1 + V(t)) / R(t); 1 is added because few shufflings may show no false pair by luck, as in Barber
and Candès, Annals of Statistics 43 (2015). It tells of edges between codes that are independent.
A pair that depends by way of other codes is not shuffled apart from them: such false edges it does
not count.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray
from scipy import sparse

from causal import columns as columns_of
from causal import learning
from causal.columns import Columns
from causal.learning import LearningConfig
from causal.workers import Alone, Workers

#: First number of a generator's seed after the user's, so that no two draws share one.
_BOOTSTRAP, _SHUFFLE = 1, 2


@dataclasses.dataclass(frozen=True)
class Resampling:
    """What all bootstraps share.

    Attributes:
        columns: n visits, p columns.
        patient: int64 (n,), whose visit it is.
        config: how each graph is learned.
    """

    columns: Columns
    patient: NDArray[np.int64]
    config: LearningConfig


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """How often pairs of columns were joined.

    Attributes:
        first, second: int64 (E,), first < second, ascending; pairs that never were are left out.
        times: int64 (E,), bootstraps that join them.
        bootstraps: how many were run.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    times: NDArray[np.int64]
    bootstraps: int

    def of(self, first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.float32]:
        """Share of the bootstraps that join each of some pairs, float32, ends in any order."""
        pairs = zip(self.first.tolist(), self.second.tolist(), strict=True)
        share = dict(zip(pairs, (self.times / self.bootstraps).tolist(), strict=True))
        ends = np.sort(np.stack([first, second]), axis=0).T.tolist()
        return np.array([share.get((a, b), 0.0) for a, b in ends], np.float32)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Which pairs are kept.

    Attributes:
        times: bootstraps that have to join a pair; more than were run if no number is enough.
        pairs: how many are kept.
        expected_false: of these, at most so many are expected to be chance.
    """

    times: int
    pairs: int
    expected_false: float


def run(resampling: Resampling, bootstraps: int, client: Client, what: str) -> Frequencies:
    """Runs bootstraps on a client's workers; the result is the same to the bit on any.

    Args:
        resampling: see Resampling.
        bootstraps: at least one.
        client: each bootstrap is a task.
        what: names them for people.
    """
    found = Workers(client, resampling).run(range(bootstraps), what, bootstrap)
    width = len(resampling.columns.names)
    keys = np.concatenate([first * width + second for first, second in found])
    keys, times = np.unique(keys, return_counts=True)
    return Frequencies(keys // width, keys % width, times.astype(np.int64), bootstraps)


def bootstrap(resampling: Resampling, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Learns a graph from patients drawn with replacement; the function that a worker executes.

    Returns:
        The joined pairs of columns, int64, first < second.
    """
    rows = drawn_visits(resampling.patient, resampling.config.seed, number)
    sample = resampling.columns.visits(rows)
    counts = columns_of.count(sample)
    screened = learning.screen(sample, counts, resampling.config)
    problem = screened.problem
    merged, _ = learning.learn(screened, problem.scores(), resampling.config, Alone(problem))
    source, target = screened.active[merged.dag.source], screened.active[merged.dag.target]
    return np.minimum(source, target), np.maximum(source, target)


def drawn_visits(patient: NDArray[np.int64], seed: int, number: int) -> NDArray[np.int64]:
    """Visits of as many patients as there are, drawn with replacement; int64, ascending.

    Args:
        patient: int64 (n,), whose visit it is.
        seed: the user's.
        number: of the bootstrap.
    """
    rng = np.random.default_rng([seed, _BOOTSTRAP, number])
    patients, of_row = np.unique(patient, return_inverse=True)
    drawn = np.bincount(rng.integers(0, len(patients), len(patients)), minlength=len(patients))
    return np.repeat(np.arange(len(of_row)), drawn[of_row])


def shuffled(columns: Columns, seed: int, number: int) -> Columns:
    """The columns after each was permuted by itself within every stratum.

    What is left of a column is how often it is 1 in a stratum.
    """
    rng = np.random.default_rng([seed, _SHUFFLE, number])
    n, p = columns.present.shape
    rows: list[NDArray[np.int64]] = []
    length = np.zeros(p, np.int64)
    inside = [np.flatnonzero(columns.strata == s) for s in np.unique(columns.strata)]
    ones = [np.asarray(columns.present[i].sum(axis=0), np.int64).tolist() for i in inside]
    for j in range(p):
        for stratum, often in zip(inside, ones, strict=True):
            rows.append(stratum[rng.choice(len(stratum), often[j], replace=False, shuffle=False)])
            length[j] += often[j]
    present = sparse.csc_array(
        (
            np.ones(int(length.sum()), np.int64),
            np.concatenate([*rows, np.zeros(0, np.int64)]),
            np.concatenate([[0], np.cumsum(length)]),
        ),
        shape=(n, p),
    ).tocsr()
    present.sort_indices()
    return Columns(columns.names, present, columns.tiers, columns.strata)


def threshold(real: Frequencies, chance: Sequence[Frequencies], share: float) -> Threshold:
    """The smallest frequency at which the expected share of false pairs is at most `share`.

    Args:
        real: of the visits.
        chance: of the shuffled visits, one or more times, as many bootstraps each.
        share: of the kept pairs that may be false.
    """
    times = np.concatenate([null.times for null in chance])
    for least in range(1, real.bootstraps + 1):
        pairs = int((real.times >= least).sum())
        expected = (1 + int((times >= least).sum())) / len(chance)
        if expected <= share * pairs:
            return Threshold(least, pairs, expected)
    return Threshold(real.bootstraps + 1, 0, 0.0)


def lines(facts: dict[str, Any]) -> list[str]:
    """What a discovery's report has to say about stability; nothing if no bootstraps were run."""
    found = facts.get("stability")
    if found is None:
        return []
    told = [
        f"{found['bootstraps']} bootstraps of the patients join {found['pairs']:,} pairs; "
        f"half of the graph's edges are in at least {found['median']:.0%} of them"
    ]
    if "edges_before" not in found:
        return told
    changed = f"{found['edges_before']:,} edges before, {facts['edges']:,} after"
    if found["kept_pairs"] == 0:
        return [
            *told,
            f"no frequency keeps the share of false edges at {found['false_edge_share']:g}: "
            f"{changed}; more bootstraps or a larger causal.false_edge_share would keep some",
        ]
    return [
        *told,
        f"kept: pairs in at least {found['threshold']:.0%} of them, {found['kept_pairs']:,}, of "
        f"which at most {found['expected_false']:g} are expected to be chance; {changed}",
    ]
