"""What is kept back cannot be had back: tables are attacked as a reader would."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed import suppression


def partition(sizes):
    """Members of cells that no two share a patient of."""
    return np.repeat(np.eye(len(sizes), dtype=np.bool_), sizes, axis=0)


@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        ([50, 60], [0, 0]),
        ([10, 60], [0, 0]),
        ([9, 60], [1, 1]),  # 9 is the total less 60
        ([9, 60, 30], [1, 0, 1]),
        ([9, 30, 30], [1, 1, 0]),
        ([4, 5, 80, 90], [1, 1, 1, 0]),  # 4 and 5 are nine patients together
        ([4, 6, 80, 90], [1, 1, 0, 0]),
        ([0, 60, 30], [0, 0, 0]),
        ([0, 3, 30], [0, 1, 1]),
        ([3], [1]),
        ([30], [0]),
        ([1, 2], [1, 1]),
        ([0, 0], [0, 0]),
    ],
)
def test_small_cells_and_what_would_give_them_away_are_kept_back(sizes, hidden):
    assert suppression.hidden(partition(sizes)).tolist() == [bool(x) for x in hidden]


def test_a_cell_that_nearly_everybody_is_in_gives_the_others_away():
    members = np.ones((40, 2), np.bool_)
    members[:4, 1] = False  # as: all patients have a first visit, four have no later one
    assert suppression.hidden(members).tolist() == [True, True]
    assert suppression.hidden(members, counted=False).tolist() == [False, False]
    members[:20, 1] = False
    assert suppression.hidden(members).tolist() == [False, False]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_no_hidden_number_of_patients_can_be_had_back(sizes):
    """Every table that a reader may think of and that would be published the same is tried."""
    fewest = 3
    hidden = suppression.hidden(partition(sizes), fewest)
    assert not any(0 < size < fewest and not h for size, h in zip(sizes, hidden, strict=True))
    if not hidden.any():
        return
    places = np.flatnonzero(hidden)
    rest = sum(size for size, h in zip(sizes, hidden, strict=True) if h)
    possible = [
        found
        for found in itertools.product(range(1, rest + 1), repeat=len(places))
        if sum(found) == rest
    ]
    if sum(sizes) < fewest or len(places) == 1:
        # The whole population is that small, or there is but one cell: the total itself tells.
        assert hidden.sum() == sum(size > 0 for size in sizes)
        return
    assert rest >= fewest
    for at, place in enumerate(places):
        values = {found[at] for found in possible}
        assert len(values) > 1 or sizes[place] >= fewest or rest == len(places)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
def test_cells_that_share_patients_are_held_to_the_same(seed, patients, cells):
    members = np.random.default_rng(seed).random((patients, cells)) < 0.4
    sizes, total = members.sum(axis=0), members.any(axis=1).sum()
    hidden = suppression.hidden(members)
    assert not hidden[sizes == 0].any()
    visible = ~hidden & (sizes > 0)
    assert (
        (sizes[visible] >= 10) & ((total - sizes[visible] == 0) | (total - sizes[visible] >= 10))
    ).all()
    if hidden.any() and visible.any():
        assert hidden.sum() > 1
        assert members[:, hidden].any(axis=1).sum() >= 10
