"""Bootstraps against draws by hand, thresholds against counts, planted graphs' false edges."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from distributed import Client
from scipy import sparse

from cafemed import config
from cafemed.cohort import Cohort
from cafemed.errors import ConfigError
from causal import cluster, columns, discovery, learning, stability
from causal.blocks import BlocksConfig
from causal.columns import Columns
from causal.discovery import CausalConfig, Discovery
from causal.learning import LearningConfig
from causal.stability import Frequencies, Resampling
from causal.workers import Alone

MakeCohort = Callable[..., Cohort]

#: Less than the BIC's penalty finds many edges that are chance, which is what a threshold is for.
LOOSE = LearningConfig(score="gaussian_bic", penalty=0.7, min_support=1)


def planted(p: int, n: int, seed: int) -> tuple[Columns, set[tuple[int, int]]]:
    """0/1 columns, the last of every three made of the two before it; the joined pairs."""
    rng = np.random.default_rng(seed)
    rows = rng.random((n, p)) < rng.uniform(0.004, 0.1, p)
    pairs = set()
    for j in range(2, p, 3):
        for parent in (j - 2, j - 1):
            rows[:, j] |= rows[:, parent] & (rng.random(n) < 0.4)
            pairs.add((parent, j))
    names = tuple(f"x{j:03}" for j in range(p))
    present = sparse.csr_array(rows.astype(np.int64))
    strata = (np.arange(n) % 3 > 0).astype(np.int8)
    return Columns(names, present, np.zeros(p, np.int64), strata), pairs


def frequencies(times: list[int], bootstraps: int) -> Frequencies:
    number = np.arange(len(times))
    return Frequencies(number, number + 1000, np.array(times), bootstraps)


def learned_pairs(table: Columns) -> set[tuple[int, int]]:
    screened = learning.screen(table, columns.count(table), LOOSE)
    found, _ = learning.learn(screened, screened.problem.scores(), LOOSE, Alone(screened.problem))
    a, b = screened.active[found.dag.source], screened.active[found.dag.target]
    return {(min(pair), max(pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)}


def test_a_bootstrap_learns_from_whole_patients_drawn_with_replacement() -> None:
    table, _ = planted(12, 200, seed=1)
    patient = np.repeat(np.arange(80), 5)[:200] * 7  # numbers need not be consecutive
    first, second = stability.bootstrap(Resampling(table, patient, LOOSE), 3)
    rows = stability.drawn_visits(patient, LOOSE.seed, 3)
    times = np.bincount(rows, minlength=200)
    of_patient = [set(times[patient == one].tolist()) for one in np.unique(patient)]
    assert all(len(seen) == 1 for seen in of_patient)  # all of a patient's visits as often
    drawn = [seen.pop() for seen in of_patient]
    assert sum(drawn) == len(np.unique(patient))
    assert max(drawn) > 1
    assert min(drawn) == 0
    expected = learned_pairs(table.visits(rows))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    assert expected != learned_pairs(table)


def test_bootstraps_differ_and_are_spread_as_a_multinomial() -> None:
    patient = np.arange(50)
    draws = [np.bincount(stability.drawn_visits(patient, 0, k), minlength=50) for k in range(400)]
    assert len({draw.tobytes() for draw in draws}) == 400
    # Each patient's count is binomial(50, 1/50): mean 1, variance 0.98.
    np.testing.assert_allclose(np.mean(draws, axis=0).mean(), 1)
    assert 0.93 < np.var(draws) < 1.03


def test_shuffling_keeps_each_columns_count_in_each_stratum_and_nothing_else() -> None:
    table, pairs = planted(30, 3000, seed=2)
    mixed = stability.shuffled(table, seed=0, number=0)
    for stratum in (0, 1):
        rows = table.strata == stratum
        before = table.present[rows].sum(axis=0)
        assert mixed.present[rows].sum(axis=0).tolist() == before.tolist()
    assert set(mixed.present.data.tolist()) == {1}
    dense = mixed.present.toarray().astype(float)
    correlation = np.corrcoef(dense.T)
    assert max(abs(correlation[a, b]) for a, b in pairs) < 0.08
    original = np.corrcoef(table.present.toarray().astype(float).T)
    assert np.mean([original[a, b] > 0.08 for a, b in pairs]) > 0.8
    again = stability.shuffled(table, seed=0, number=0)
    assert (again.present != mixed.present).nnz == 0
    assert (stability.shuffled(table, seed=0, number=1).present != mixed.present).nnz > 0


@pytest.mark.parametrize(
    ("real", "chance", "share", "expected"),
    [
        # 6 pairs in all 10 bootstraps, one null pair in 4: (1 + 0) / 7 at 5, (1 + 1) / 8 at 4.
        ([10] * 6 + [5, 4, 1], [[4, 1, 1]], 0.2, (5, 7, 1.0)),
        ([10] * 6 + [5, 4, 1], [[4, 1, 1]], 0.25, (2, 8, 2.0)),
        ([10] * 6 + [5, 4, 1], [[4, 1, 1]], 0.5, (1, 9, 4.0)),
        # Two shufflings: the mean counts, with 1 added once.
        ([10] * 6 + [5, 4, 1], [[4, 1, 1], [1]], 0.2, (2, 8, 1.0)),
        # Too few pairs for so small a share.
        ([10] * 6, [[]], 0.1, (11, 0, 0.0)),
        ([], [[]], 0.5, (11, 0, 0.0)),
    ],
)
def test_the_threshold_is_the_smallest_that_keeps_the_share(
    real: list[int], chance: list[list[int]], share: float, expected: tuple[int, int, float]
) -> None:
    found = stability.threshold(
        frequencies(real, 10), [frequencies(times, 10) for times in chance], share
    )
    assert (found.times, found.pairs, found.expected_false) == expected


def test_frequencies_are_shares_of_the_bootstraps() -> None:
    given = Frequencies(np.array([1, 2]), np.array([5, 3]), np.array([3, 1]), 4)
    shares = given.of(np.array([5, 2, 1]), np.array([1, 3, 2]))
    assert shares.dtype == np.float32
    assert shares.tolist() == [0.75, 0.25, 0.0]


def test_the_asked_share_of_false_edges_is_kept(in_process: Client) -> None:
    """Over several planted graphs the loose search is wrong far more often than asked."""
    before, after, hits = [], [], []
    for seed in range(3):
        table, truth = planted(60, 2000, seed)
        patient = np.arange(2000)
        resampling = Resampling(table, patient, LOOSE)
        real = stability.run(resampling, 15, in_process, "bootstraps")
        mixed = dataclasses.replace(resampling, columns=stability.shuffled(table, 0, 0))
        chance = stability.run(mixed, 15, in_process, "shuffled")
        least = stability.threshold(real, [chance], 0.1)
        often = real.times >= least.times
        kept = set(zip(real.first[often].tolist(), real.second[often].tolist(), strict=True))
        found = learned_pairs(table)
        before.append(len(found - truth) / len(found))
        after.append(len(kept - truth) / len(kept))
        hits.append(len(kept & truth) / len(truth))
    assert np.mean(before) > 0.3
    assert np.mean(after) <= 0.12
    assert np.mean(hits) > 0.85


def test_discovery_keeps_stable_edges_the_same_on_every_cluster(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=300, sizes=(18, 10, 6), seed=7)
    small = BlocksConfig(max_size=4, max_boundary=2)
    settings = CausalConfig(
        score="gaussian_bic",
        min_support=1,
        blocks=small,
        compare_direct=False,
        bootstraps=5,
        false_edge_share=0.3,
    )

    def bits(found: Discovery) -> tuple[bytes, ...]:
        graph = found.graph
        arrays = (graph.source, graph.target, graph.directed, graph.stability, graph.strength)
        return (*(a.tobytes() for a in arrays), repr(found.report["stability"]).encode())

    stable = discovery.discover(people, settings, in_process)
    with cluster.connect("local", 2) as client:
        assert bits(discovery.discover(people, settings, client)) == bits(stable)
    plain = dataclasses.replace(settings, false_edge_share=None)
    every = discovery.discover(people, plain, in_process)
    told = stable.report["stability"]
    assert told["edges_before"] == every.graph.num_edges > stable.graph.num_edges > 3
    assert told["threshold"] > 0
    assert (stable.graph.stability >= np.float32(told["threshold"])).all()
    assert told["kept_pairs"] >= stable.graph.num_edges
    assert np.isfinite(every.graph.stability).all()
    assert every.graph.stability.min() < told["threshold"]
    assert len(stability.lines(stable.report)) == 2
    assert f"{every.graph.num_edges:,} edges before" in stability.lines(stable.report)[1]
    assert len(stability.lines(every.report)) == 1
    assert stability.lines({}) == []


def test_a_share_needs_bootstraps() -> None:
    with pytest.raises(ConfigError, match=r"false_edge_share: 0.1 needs causal.bootstraps"):
        config.from_mapping(CausalConfig, {"false_edge_share": 0.1}, "causal")


def test_a_share_that_nothing_keeps_leaves_no_edge(
    make_cohort: MakeCohort, in_process: Client
) -> None:
    people = make_cohort(num_patients=200, seed=3)
    settings = CausalConfig(bootstraps=3, false_edge_share=0.001, compare_direct=False)
    found = discovery.discover(people, settings, in_process)
    assert found.graph.num_edges == 0
    assert "no frequency keeps" in stability.lines(found.report)[1]
