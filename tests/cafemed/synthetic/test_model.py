"""The closed forms and the draws against plain enumeration of every configuration."""

import itertools

import numpy as np
import pytest
from scipy import sparse

from cafemed.synthetic.model import (
    draft_log_miss,
    draw_codes,
    draw_medications,
    medication_probabilities,
)

NUM_DRAWS = 200_000
#: Frequencies of so many draws leave their probability by more than this once in 10^6 cases.
TOLERANCE = 5 * 0.5 / np.sqrt(NUM_DRAWS)


def log_miss_of(model, codes, previous):
    return draft_log_miss(model, sparse.csr_array(np.array(codes, float)), np.array(previous))


@pytest.mark.parametrize("previous", list(itertools.product((0, 1), repeat=4))[::3])
def test_medication_probabilities_equal_enumeration(tiny, enumeration, previous):
    everything = list(itertools.product((0, 1), repeat=5))
    log_miss = log_miss_of(tiny, everything, [previous] * len(everything))
    expected = [
        enumeration.marginals(enumeration.medication_distribution(tiny, codes, previous))
        for codes in everything
    ]
    np.testing.assert_allclose(medication_probabilities(tiny, log_miss), expected, atol=1e-12)


def test_drawn_sets_of_medications_have_their_joint_probabilities(tiny, enumeration):
    codes, previous = (1, 0, 1, 1, 0), (0, 1, 0, 0)
    log_miss = np.repeat(log_miss_of(tiny, [codes], [previous]), NUM_DRAWS, axis=0)
    drawn = draw_medications(tiny, log_miss, np.random.default_rng(0))
    assert drawn.any(axis=1).all()
    found = np.bincount(drawn @ (1 << np.arange(4)), minlength=16) / NUM_DRAWS
    expected = np.zeros(16)
    for kept, probability in enumeration.medication_distribution(tiny, codes, previous).items():
        expected[np.array(kept) @ (1 << np.arange(4))] = probability
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "persistent"])
def test_drawn_codes_have_their_joint_probabilities(name, request, enumeration):
    model = request.getfixturevalue(name)
    previous = (1, 0, 1, 0, 1)
    before = np.repeat(np.array(previous, np.bool_)[:, None], NUM_DRAWS, axis=1)
    drawn = draw_codes(model, NUM_DRAWS, before, np.random.default_rng(1))
    found = np.bincount((1 << np.arange(5)) @ drawn, minlength=32) / NUM_DRAWS
    expected = np.zeros(32)
    for codes, probability in enumeration.code_distribution(model, previous).items():
        expected[np.array(codes) @ (1 << np.arange(5))] = probability
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
