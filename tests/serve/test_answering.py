import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from cafemed.bundle import Bundle, Preprocessing
from serve import selection
from serve.answers import MAX_NEAR_MISSES, Interaction, Recommendation
from serve.encoding import EncodedPatient
from serve.recommender import Recommender
from serve.schema import Options

NOBODY = EncodedPatient(((), (), ()), (), 0, math.nan, (), ())


@pytest.fixture(scope="module")
def recommender(served: Bundle) -> Recommender:
    names = {"medication": {"atc:A01B": "A first class"}, "diagnosis": {"icd9:4010": "A disease"}}
    return Recommender(dataclasses.replace(served, names=names), 1)


def draw(bundle: Bundle, seed: int) -> np.ndarray:
    """Probabilities of every medication, some below the threshold of 0.5."""
    size = len(bundle.vocabularies["medication"])
    return np.random.default_rng(seed).uniform(0.3, 1, size).astype(np.float32)


def codes(found: Any) -> list[str]:
    return [f"{one.system}:{one.code}" for one in found]


def pairs_among(bundle: Bundle, chosen: list[str]) -> list[Interaction]:
    index = {code: i for i, code in enumerate(bundle.vocabularies["medication"])}
    return [
        Interaction(a, b)
        for a, b in itertools.combinations(chosen, 2)
        if bundle.ddi[index[a], index[b]]
    ]


def answer(recommender: Recommender, row: np.ndarray, **options: Any) -> Recommendation:
    return recommender.answer(NOBODY, row, Options(**options))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_rate", [0.0, 0.1, 0.25])
def test_the_set_keeps_to_the_rate_and_names_what_is_left_out(
    served: Bundle, recommender: Recommender, seed: int, max_rate: float
) -> None:
    row = draw(served, seed)
    free, capped = answer(recommender, row), answer(recommender, row, max_ddi_rate=max_rate)
    kept, probable = codes(capped.medications), codes(free.medications)
    assert (free.optimal, capped.optimal, free.left_out) == (None, True, [])
    assert capped.ddi_rate <= max_rate
    assert capped.interactions == pairs_among(served, kept)
    assert capped.ddi_rate == selection.rate(len(capped.interactions), len(kept))
    # Whatever is left out is named, most probable first, with pairs that are one too many.
    assert kept == [code for code in probable if code in kept]
    assert codes(capped.left_out) == [code for code in probable if code not in kept]
    for one in capped.left_out:
        code = f"{one.system}:{one.code}"
        assert (one.reason, one.allergy) == ("max_ddi_rate", None)
        assert one.pairs
        assert one.pairs == [
            pair for pair in pairs_among(served, [*kept, code]) if code == pair.second
        ]
        more = len(capped.interactions) + len(one.pairs)
        assert selection.rate(more, len(kept) + 1) > max_rate
    # Of all subsets none has more log-odds above the threshold's.
    weight = {
        f"{one.system}:{one.code}": math.log(one.probability / (1 - one.probability))
        for one in free.medications
    }
    best = max(
        sum(weight[code] for code in subset)
        for size in range(len(probable) + 1)
        for subset in itertools.combinations(probable, size)
        if selection.rate(len(pairs_among(served, list(subset))), size) <= max_rate
    )
    assert math.isclose(sum(weight[code] for code in kept), best, abs_tol=1e-6)


def test_the_weights_are_counted_from_the_threshold(served: Bundle) -> None:
    # The first interacts with the two others. From even odds these have more together (1.39 and
    # 2 x 0.94); from a threshold of 0.7 they have little (0.54 and 2 x 0.10).
    ddi = np.zeros_like(served.ddi)
    ddi[0, [1, 2]] = ddi[[1, 2], 0] = True
    probabilities = np.zeros(len(ddi), np.float32)
    probabilities[:3] = (0.8, 0.72, 0.72)
    for threshold, kept in ((0.5, {1, 2}), (0.7, {0})):
        decided = dataclasses.replace(
            served, ddi=ddi, preprocessing=Preprocessing(threshold=threshold)
        )
        got = answer(Recommender(decided, 1), probabilities, max_ddi_rate=0.0)
        names = served.vocabularies["medication"]
        assert set(codes(got.medications)) == {names[i] for i in kept}


def test_probabilities_of_one_are_taken_too(served: Bundle, recommender: Recommender) -> None:
    row = np.ones(len(served.vocabularies["medication"]), np.float32)
    got = answer(recommender, row, max_ddi_rate=0.05)
    assert got.optimal
    assert got.ddi_rate <= 0.05


def test_top_k_are_the_most_probable(served: Bundle, recommender: Recommender) -> None:
    row = draw(served, 1)
    free, few = answer(recommender, row), answer(recommender, row, top_k=3)
    assert few.medications == free.medications[:3]
    assert codes(few.left_out) == codes(free.medications[3:])
    assert {one.reason for one in few.left_out} == {"top_k"}
    assert not [one for one in few.left_out if one.pairs or one.allergy]
    assert few.optimal is None
    assert answer(recommender, row, top_k=99) == free


@pytest.mark.parametrize("seed", range(5))
def test_top_k_and_a_rate_hold_together(
    served: Bundle, recommender: Recommender, seed: int
) -> None:
    row = draw(served, seed)
    got = answer(recommender, row, top_k=4, max_ddi_rate=0.2)
    kept = codes(got.medications)
    assert len(kept) <= 4
    assert got.ddi_rate <= 0.2
    for one in got.left_out:
        code = f"{one.system}:{one.code}"
        breaks = len(pairs_among(served, [*kept, code])) / math.comb(len(kept) + 1, 2) > 0.2
        assert one.reason == ("max_ddi_rate" if breaks else "top_k")
        assert bool(one.pairs) == breaks


@pytest.mark.parametrize(
    ("allergy", "hit"),
    [
        ("A", ["atc:A01B", "atc:A02B", "atc:A03B"]),
        ("A01", ["atc:A01B"]),
        ("A01B", ["atc:A01B"]),
        ("A01BC03", ["atc:A01B"]),  # finer than the model's classes
        ("A01C", []),
        ("Z", []),
    ],
)
def test_an_allergy_is_never_recommended(
    served: Bundle, recommender: Recommender, allergy: str, hit: list[str]
) -> None:
    row = draw(served, 2)
    row[:3] = 0.999
    allergic = NOBODY._replace(allergies=(allergy,))
    got = recommender.answer(allergic, row)
    free = answer(recommender, row)
    assert codes(got.medications) == [c for c in codes(free.medications) if c not in hit]
    assert sorted(codes(got.left_out)) == hit
    assert {(one.reason, one.allergy) for one in got.left_out} == {("allergy", allergy)} - (
        set() if hit else {("allergy", allergy)}
    )
    # Nor is it named as nearly recommended.
    row[:3] = 0.4999
    assert not set(codes(recommender.answer(allergic, row).near_misses)) & set(hit)


def test_allergies_come_before_the_rate(served: Bundle) -> None:
    # What is left out anyway makes nobody give way.
    ddi = np.zeros_like(served.ddi)
    ddi[0, 1] = ddi[1, 0] = True
    decided = Recommender(dataclasses.replace(served, ddi=ddi), 1)
    row = np.full(len(ddi), 0.1, np.float32)
    row[:2] = (0.9, 0.6)
    allergic = NOBODY._replace(allergies=("A01",))
    got = decided.answer(allergic, row, Options(max_ddi_rate=0.0))
    assert codes(got.medications) == ["atc:A02B"]
    assert [one.reason for one in got.left_out] == ["allergy"]


def test_near_misses_are_the_next_below_the_threshold(
    served: Bundle, recommender: Recommender
) -> None:
    names = served.vocabularies["medication"]
    row = np.linspace(0.7, 0.26, len(names), dtype=np.float32)
    got = answer(recommender, row)
    number = len(got.medications)
    assert number == 6
    assert codes(got.near_misses) == list(names[number : number + MAX_NEAR_MISSES])
    assert [one.probability for one in got.near_misses] == row[number:][:MAX_NEAR_MISSES].tolist()
    assert answer(recommender, np.ones_like(row)).near_misses == []
    # What has less than half of the threshold is not near.
    row[number + 2 :] -= 0.2
    assert codes(answer(recommender, row).near_misses) == list(names[number : number + 2])


def test_medications_have_the_names_that_the_user_gave(
    served: Bundle, recommender: Recommender
) -> None:
    row = draw(served, 3)
    row[:2] = (0.9, 0.45)
    names = {one.code: one.name for one in answer(recommender, row).medications}
    assert names.pop("A01B") == "A first class"
    assert set(names.values()) == {None}
    row[0] = 0.49
    assert answer(recommender, row).near_misses[0].name == "A first class"
    row[0] = 0.99
    left_out = recommender.answer(NOBODY._replace(allergies=("A01",)), row).left_out
    assert left_out[0].name == "A first class"
