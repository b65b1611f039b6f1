"""Screened pairs against loops over pairs; blocks by what they must hold."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import sparse

from cafemed.cohort import Cohort
from causal import blocks, columns
from causal.blocks import BlocksConfig, Pairs
from causal.columns import Columns
from causal.count_scores import CountScores
from causal.scores import Rule


def random_columns(n: int, p: int, seed: int) -> Columns:
    rng = np.random.default_rng(seed)
    dense = rng.random((n, p)) < rng.uniform(0.02, 0.4, p)
    dense[:, 1::2] |= dense[:, ::2][:, : p // 2] & (rng.random((n, p // 2)) < 0.3)
    strata = (rng.random(n) < 0.5).astype(np.int8)
    dense[strata == 0, -3:] = False  # like previous medications at first visits
    return Columns(
        tuple(f"x{i:03}" for i in range(p)),
        sparse.csr_array(dense.astype(np.int64)),
        np.zeros(p, np.int64),
        strata,
    )


def planted_groups(sizes: list[int], seed: int = 0) -> Pairs:
    """Every pair within a group, and a few weak ones between neighbouring groups."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    pairs = []
    for k, size in enumerate(sizes):
        inside = range(starts[k], starts[k] + size)
        pairs += [(a, b, 50 + 10 * rng.random()) for a, b in itertools.combinations(inside, 2)]
        if k:
            pairs.append((starts[k] - 1, starts[k], 20.0))
    pairs.sort()
    return Pairs(
        np.array([a for a, _, _ in pairs], np.int64),
        np.array([b for _, b, _ in pairs], np.int64),
        np.array([g for _, _, g in pairs]),
    )


def costing(penalty: float, rows: int) -> Rule:
    """The Gaussian score in which an edge costs so much."""
    return Rule("gaussian_bic", penalty / (0.5 * math.log(rows)), 0.0, 1)


@pytest.mark.parametrize("name", ["bdeu", "discrete_bic"])
def test_screening_on_counts_is_what_the_score_gains_by_one_parent(name: str) -> None:
    cols = random_columns(400, 14, seed=1)
    rule = Rule(name, 1.0, 0.3, 14)
    score = CountScores.of(cols.present, cols.strata, rule)
    joint = cols.present.T @ cols.present
    expected = {}
    for a, b in itertools.combinations(range(14), 2):
        gain = score.local(b, np.array([a])) - score.local(b, np.array([], np.int64))
        if joint[a, b] >= 3 and gain > 0:
            expected[a, b] = gain + rule.edge_penalty(400)
    found = blocks.screen(columns.count(cols), rule, 3)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == sorted(expected)
    np.testing.assert_allclose(found.gain, [expected[e] for e in sorted(expected)], atol=1e-9)
    assert 5 < len(found) < 80


def test_screening_is_that_of_a_loop_over_pairs() -> None:
    cols = random_columns(400, 14, seed=1)
    dense = cols.present.toarray().astype(float)
    penalty, min_support = 3.0, 4
    expected = {}
    for a, b in itertools.combinations(range(14), 2):
        x, y = dense[:, a].copy(), dense[:, b].copy()
        support = int((x * y).sum())
        for s in (0, 1):
            x[cols.strata == s] -= x[cols.strata == s].mean()
            y[cols.strata == s] -= y[cols.strata == s].mean()
        r = (x @ y) / math.sqrt((x @ x) * (y @ y))
        gain = -200 * math.log(1 - r * r)
        if support >= min_support and gain > penalty:
            expected[a, b] = gain
    found = blocks.screen(columns.count(cols), costing(penalty, 400), min_support)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == sorted(expected)
    np.testing.assert_allclose(found.gain, [expected[e] for e in sorted(expected)], atol=1e-9)
    assert 5 < len(found) < 80


def test_codes_of_later_visits_only_do_not_seem_related() -> None:
    rng = np.random.default_rng(2)
    n = 4000
    strata = np.repeat([0, 1], n // 2).astype(np.int8)
    dense = (rng.random((n, 6)) < 0.3) & (strata[:, None] == 1)
    present = sparse.csr_array(dense.astype(np.int64))
    names = tuple("abcdef")
    cols = Columns(names, present, np.zeros(6, np.int64), strata)
    assert len(blocks.screen(columns.count(cols), costing(6.0, n), 5)) == 0
    one_stratum = Columns(names, present, np.zeros(6, np.int64), np.zeros(n, np.int8))
    assert len(blocks.screen(columns.count(one_stratum), costing(6.0, n), 5)) == 15


def test_equal_and_constant_columns_are_screened_without_a_warning() -> None:
    rng = np.random.default_rng(3)
    x = rng.random(200) < 0.3
    dense = np.column_stack([x, x, np.ones(200), np.zeros(200), rng.random(200) < 0.3])
    cols = Columns(
        tuple("abcde"),
        sparse.csr_array(dense.astype(np.int64)),
        np.zeros(5, np.int64),
        np.zeros(200, np.int8),
    )
    found = blocks.screen(columns.count(cols), costing(5.0, 200), 1)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [1])
    assert np.isfinite(found.gain).all()


def test_planted_groups_become_blocks() -> None:
    sizes = [8, 12, 5, 9]
    found = blocks.split(planted_groups(sizes), BlocksConfig(), seed=0)
    assert [len(block.members) for block in found] == sizes
    assert found[1].members.tolist() == list(range(8, 20))
    assert found[1].boundary.tolist() == [7, 20]
    assert found[1].columns.tolist() == list(range(7, 21))


def test_every_column_is_a_member_once_and_no_block_is_too_large() -> None:
    rng = np.random.default_rng(4)
    edges = sorted({tuple(sorted(rng.choice(150, 2, False).tolist())) for _ in range(900)})
    pairs = Pairs(
        np.array([a for a, _ in edges]),
        np.array([b for _, b in edges]),
        rng.uniform(10, 500, len(edges)),
    )
    config = BlocksConfig(max_size=12, max_boundary=5)
    found = blocks.split(pairs, config, seed=3)
    members = np.concatenate([block.members for block in found])
    np.testing.assert_array_equal(np.sort(members), np.union1d(pairs.first, pairs.second))
    assert max(len(block.members) for block in found) <= 12
    assert max(len(block.boundary) for block in found) <= 5
    for block in found:
        outside = {
            (b if a in block.members else a): 0.0
            for a, b in edges
            if (a in block.members) != (b in block.members)
        }
        for (a, b), gain in zip(edges, pairs.gain, strict=True):
            if (a in block.members) != (b in block.members):
                other = b if a in block.members else a
                outside[other] = max(outside[other], gain)
        strongest = sorted(outside, key=lambda c: (-outside[c], c))[:5]
        assert block.boundary.tolist() == sorted(strongest)


def test_a_community_that_cannot_be_split_is_cut() -> None:
    found = blocks.split(planted_groups([25]), BlocksConfig(max_size=10), seed=0)
    assert [len(block.members) for block in found] == [9, 8, 8]


def test_the_same_seed_gives_the_same_blocks() -> None:
    pairs = planted_groups([6] * 12, seed=5)
    a, b = (blocks.split(pairs, BlocksConfig(max_size=7), seed=1) for _ in range(2))
    assert [x.members.tolist() for x in a] == [x.members.tolist() for x in b]


def test_no_pairs_give_no_blocks() -> None:
    none = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    assert blocks.split(none, BlocksConfig(), seed=0) == []


def test_compact_numbers_the_columns_that_have_a_pair() -> None:
    active, pairs = Pairs(np.array([2, 5]), np.array([9, 9]), np.array([1.0, 2.0])).compact()
    assert active.tolist() == [2, 5, 9]
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0, 1], [2, 2])


@pytest.mark.parametrize("inputs", ["current", "history"])
def test_columns_are_sorted_and_say_what_was_known(
    make_cohort: Callable[..., Cohort], inputs: str
) -> None:
    cohort = make_cohort(num_patients=40, seed=7, inputs=inputs)
    cols = columns.of_cohort(cohort)
    assert list(cols.names) == sorted(cols.names)
    visits = columns.training_visits(cohort)
    known = dict(
        zip(("diagnosis", "procedure", "previous_medication"), cohort.known_inputs(), strict=True)
    )
    dense = cols.present.toarray()
    for j, name in enumerate(cols.names):
        kind, code = name.split("/", 1)
        vocabulary = cohort.vocabularies[kind.removeprefix("previous_")]
        index = vocabulary.index(code)
        assert dense[:, j].tolist() == [int(index in known[kind][v]) for v in visits]
        earlier = kind == "previous_medication"
        assert cols.tiers[j] == (int(earlier) if inputs == "history" else int(not earlier))
    train = set(cohort.visits_of(cohort.patients_of("train")).tolist())
    first = set(cohort.patient_offsets[:-1].tolist())
    assert set(visits.tolist()) == (train if inputs == "current" else train - first)
    assert cols.strata.tolist() == [int(v not in first) for v in visits]


def test_counts_do_not_depend_on_the_order_of_rows() -> None:
    cols = random_columns(300, 10, seed=8)
    order = np.random.default_rng(9).permutation(300)
    shuffled = Columns(cols.names, cols.present[order], cols.tiers, cols.strata[order])
    a, b = columns.count(cols), columns.count(shuffled)
    np.testing.assert_array_equal(a.rows, b.rows)
    for x, y in zip(a.strata, b.strata, strict=True):
        np.testing.assert_array_equal(x.toarray(), y.toarray())
    dense = cols.present.toarray()
    np.testing.assert_array_equal(a.total.toarray(), dense.T @ dense)
