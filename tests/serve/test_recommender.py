import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from cafemed import bundle as bundles
from cafemed import registry
from cafemed.batches import collate, visit_arrays
from cafemed.bundle import Bundle
from cafemed.calibration import Predictions
from cafemed.codes import CodeLists
from cafemed.errors import ArtifactError
from cafemed.laboratory import Laboratory
from models.asked import Codes
from models.tracing import Traced
from serve.encoding import EncodedPatient
from serve.example import example_request
from serve.recommender import Recommender
from serve.schema import RecommendRequest
from tests.serve.conftest import ITEMS, SCALING, make_bundle


@pytest.fixture(scope="module")
def recommender(served: Bundle) -> Recommender:
    return Recommender(served, 7)


def some_codes(names: tuple[str, ...], number: int, rng: np.random.Generator) -> list[Any]:
    chosen = rng.choice(len(names), min(number, len(names)), replace=False)
    return [dict(zip(("system", "code"), names[i].split(":"), strict=True)) for i in chosen]


def some_values(bundle: Bundle, rng: np.random.Generator) -> dict[str, Any]:
    scaling = bundle.preprocessing.scaling
    chosen = np.flatnonzero(rng.random(scaling.num_items) < 0.6).tolist()
    return {
        "laboratory": [
            {
                "item": bundle.vocabularies["laboratory"][i].partition(":")[2],
                "value": rng.normal(scaling.laboratory_mean[i], 2 * scaling.laboratory_sd[i]),
            }
            for i in chosen
        ]
    }


def laboratory_of(patients: Sequence[EncodedPatient]) -> Laboratory:
    visits = [visit for patient in patients for visit in patient.laboratory]
    items = CodeLists.of([[item for item, _ in visit] for visit in visits])
    return Laboratory(items, np.array([x for v in visits for _, x in v], np.float32))


def some_patients(bundle: Bundle, number: int, seed: int = 0) -> RecommendRequest:
    rng = np.random.default_rng(seed)
    vocabularies = bundle.vocabularies
    kinds = (("diagnoses", "diagnosis"), ("procedures", "procedure"), ("medications", "medication"))
    measured = np.random.default_rng((seed, 1))  # of its own: codes are the same without
    patients = [
        {
            "age": float(rng.integers(0, 99)),
            "visits": [
                {
                    field: some_codes(vocabularies[kind], rng.poisson(5), rng)
                    for field, kind in kinds
                }
                | some_values(bundle, measured)
                for _ in range(rng.integers(1, 6))
            ],
        }
        for _ in range(number)
    ]
    return RecommendRequest.model_validate({"patients": patients})


def direct(bundle: Bundle, patient: EncodedPatient) -> np.ndarray:
    """Probabilities of the current visit from the model itself, without filling or batching."""
    visits = patient.num_visits
    d, p, m = (CodeLists.of(lists) for lists in patient.known)
    arrays = visit_arrays(
        (d, p, m),
        None,
        np.array([0, visits]),
        bundle.graph,
        bundle.vocabularies,
        np.array([patient.sex], np.int8),
        np.full(visits, patient.age, np.float32),
        bundle.preprocessing.scaling,
        laboratory_of([patient]),
    )
    model = models.build(bundle.model_name, bundles.inputs(bundle), bundle.model_options)
    model.load_state_dict(dict(bundle.weights))
    model.eval()
    with torch.inference_mode():
        logits = model(collate(arrays, np.array([0])))[0, -1]
    return torch.sigmoid(logits / bundle.preprocessing.temperature).numpy()


def test_probabilities_are_those_of_the_model(served_model: Bundle) -> None:
    recommender = Recommender(served_model, 7)
    patients = recommender.encode(some_patients(served_model, 40))
    expected = np.stack([direct(served_model, patient) for patient in patients])
    assert expected.std() > 0.05  # the weights do tell patients apart
    # float32: products in blocks sum in another order than those of a patient alone
    np.testing.assert_allclose(recommender.probabilities(patients), expected, atol=1e-6)


def test_probabilities_are_those_of_the_recorded_self_check(
    served: Bundle, recommender: Recommender
) -> None:
    request = RecommendRequest.model_validate(example_request(served))
    [probabilities] = recommender.probabilities(recommender.encode(request))
    recorded = torch.tensor(served.reference.self_check.logits[-1])  # its longest patient is last
    np.testing.assert_allclose(probabilities, torch.sigmoid(recorded), atol=1e-6)


def test_the_temperature_divides_the_logits(served: Bundle, recommender: Recommender) -> None:
    warm = dataclasses.replace(served.preprocessing, temperature=2.0)
    patients = recommender.encode(some_patients(served, 3))
    plain = recommender.probabilities(patients).astype(float)
    warmed = Recommender(dataclasses.replace(served, preprocessing=warm), 1).probabilities(patients)
    odds, warmed_odds = plain / (1 - plain), warmed / (1 - warmed)
    np.testing.assert_allclose(np.log(warmed_odds), np.log(odds) / 2, atol=1e-5)


def test_what_is_recommended_is_what_is_evaluated(served_model: Bundle) -> None:
    encoder, request = Recommender(served_model, 1), some_patients(served_model, 60)
    patients = encoder.encode(request)
    lists = [[codes for p in patients for codes in p.known[k]] for k in range(3)]
    d, p, m = (CodeLists.of(codes) for codes in lists)
    counts = [patient.num_visits for patient in patients]
    arrays = visit_arrays(
        (d, p, m),
        None,
        np.concatenate([[0], np.cumsum(counts)]),
        served_model.graph,
        served_model.vocabularies,
        np.array([patient.sex for patient in patients], np.int8),
        np.repeat(np.array([patient.age for patient in patients], np.float32), counts),
        served_model.preprocessing.scaling,
        laboratory_of(patients),
    )
    model = bundles.restore_model(served_model, models.build)
    found = Predictions.of(model, arrays, np.arange(len(patients)))
    current = found.probabilities(2.2)[found.patient_offsets[1:] - 1]
    values = np.sort(current.ravel())[200:500]
    widest = int(np.argmax(np.diff(values)))  # so that no rounding decides
    threshold = float(values[widest : widest + 2].mean())
    decided = dataclasses.replace(served_model.preprocessing, temperature=2.2, threshold=threshold)
    answers = Recommender(dataclasses.replace(served_model, preprocessing=decided), 1)
    names = served_model.vocabularies["medication"]
    for answer, row in zip(answers.recommend(request), current, strict=True):
        codes = {f"{one.system}:{one.code}" for one in answer.medications}
        assert codes == {names[i] for i in np.flatnonzero(row >= threshold)}


def test_an_answer_does_not_depend_on_the_others_bit_for_bit(served_model: Bundle) -> None:
    recommender = Recommender(served_model, 7)
    patients = recommender.encode(some_patients(served_model, 250))
    alone = np.concatenate([recommender.probabilities([patient]) for patient in patients])
    together = recommender.probabilities(patients)
    np.testing.assert_array_equal(together, alone)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(patients))
        shuffled = [patients[i] for i in order]
        np.testing.assert_array_equal(recommender.probabilities(shuffled), alone[order])


def test_an_answer_is_the_same_in_every_position_bit_for_bit(served_model: Bundle) -> None:
    recommender = Recommender(served_model, 7)
    assert recommender.is_exact
    patients = recommender.encode(some_patients(served_model, 60, seed=2))
    alone = recommender.probabilities(patients[:1])[0]
    for position in range(len(patients)):
        run = [*patients[1 : position + 1], patients[0], *patients[position + 1 :]]
        np.testing.assert_array_equal(recommender.run(run, 1)[position], alone)


def test_an_answer_is_the_same_in_random_companies_bit_for_bit(served_model: Bundle) -> None:
    """Of few and many, of short and long: other numbers of blocks of everything."""
    recommender = Recommender(served_model, 7)
    patients = recommender.encode(some_patients(served_model, 80, seed=9))
    alone = np.concatenate([recommender.probabilities([patient]) for patient in patients])
    rng = np.random.default_rng(9)
    for number in (2, 3, 5, 8, 20) * 5:
        chosen = rng.choice(len(patients), number, replace=False)
        rows = recommender.run([patients[i] for i in chosen], 1)
        np.testing.assert_array_equal(rows, alone[chosen])


OPTIONS = [
    ("cafemed", {"layout": "width", "norm_affine": True, "unshuffle": True}),
    ("cafemed", {"cwg_context": "visit", "gate": "position", "cwg_shared": False}),
    (
        "cafemed",
        {"gate_place": "input", "homogeneous_input": "modulated", "duplicate_state": False},
    ),
    ("cafemed", {"use_cwg": False, "direct": "additive"}),
    ("cafemed", {"use_charm": False, "direct": "none", "first_visit_slot": False}),
    ("cafemed", {"dimension": 7, "reduction_ratio": 3, "shuffle_groups": 1}),
    ("causalmed", {"dimension": 5, "first_visit_slot": False, "virtual_edges": "first"}),
    ("graphdiffmed", {"dimension": 5, "heads": 1, "direct": "additive", "review": False}),
    ("graphdiffmed", {"dimension": 3, "heads": 3, "direct": "none", "duplicate_state": False}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_answers_are_the_models_and_nobody_elses_whatever_its_options(
    name: str, options: dict[str, Any]
) -> None:
    bundle = make_bundle(model_name=name, options=options)
    recommender = Recommender(bundle, 1)
    assert recommender.is_exact
    assert (recommender.traced is not None) == (name == "cafemed")
    patients = recommender.encode(some_patients(bundle, 40, seed=4))
    alone = np.concatenate([recommender.probabilities([patient]) for patient in patients])
    np.testing.assert_array_equal(recommender.probabilities(patients), alone)
    np.testing.assert_array_equal(recommender.probabilities(patients[::-1]), alone[::-1])
    expected = np.stack([direct(bundle, patient) for patient in patients])
    np.testing.assert_allclose(alone, expected, atol=1e-6)


def test_where_bits_depend_on_the_company_all_runs_are_of_one_size(
    served_model: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of torch whose products round by the number of blocks."""
    real = torch.bmm

    def rounding(rows: torch.Tensor, matrix: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        return real(rows, matrix, **out).mul_(1 + rows.shape[0] * 2.0**-23)

    expected = Recommender(served_model, 7)
    patients = expected.encode(some_patients(served_model, 60, seed=5))
    monkeypatch.setattr(torch, "bmm", rounding)
    recommender = Recommender(served_model, 7)
    assert not recommender.is_exact
    alone = np.concatenate([recommender.probabilities([patient]) for patient in patients])
    np.testing.assert_array_equal(recommender.probabilities(patients), alone)
    np.testing.assert_array_equal(recommender.probabilities(patients[::-1]), alone[::-1])
    np.testing.assert_allclose(alone, expected.probabilities(patients), atol=1e-3)


def test_a_recording_gives_the_models_bits(served: Bundle) -> None:
    """For other patients and numbers of blocks than it was made and tried with."""
    recommender = Recommender(served, 7)
    assert recommender.traced is not None
    patients = recommender.encode(some_patients(served, 200, seed=6))
    companies = [patients, patients[:3], patients[7:8], patients[20:140], patients * 3]
    recorded = [recommender.run(company, 1) for company in companies]
    recommender.traced = None
    for company, rows in zip(companies, recorded, strict=True):
        np.testing.assert_array_equal(recommender.run(company, 1), rows)


def test_a_model_of_a_cohort_with_laboratory_values_is_recorded_too(served: Bundle) -> None:
    """Its bundle has items that the model does not read."""
    bundle = dataclasses.replace(
        served,
        preprocessing=dataclasses.replace(served.preprocessing, scaling=SCALING),
        vocabularies={**served.vocabularies, "laboratory": ITEMS},
    )
    recommender = Recommender(bundle, 7)
    assert recommender.traced is not None
    patients = recommender.encode(some_patients(bundle, 20))
    assert any(visit for one in patients for visit in one.laboratory)
    recorded = recommender.probabilities(patients)
    recommender.traced = None
    np.testing.assert_array_equal(recommender.probabilities(patients), recorded)


def test_a_recording_is_tried_with_few_visits_and_many(
    served: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one that always takes as many steps as its example would be used."""
    real = Traced.__call__

    def wrong_for_others(traced: Traced, codes: Codes) -> Callable[[], torch.Tensor]:
        replay = real(traced, codes)
        return lambda: replay() * (1 if codes.lengths.max() == 5 else 2)

    monkeypatch.setattr(Traced, "__call__", wrong_for_others)
    assert Recommender(served, 7).traced is None


def test_a_recording_with_other_bits_is_not_used(
    served: Bundle, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Traced.__call__

    def imprecise(traced: Traced, codes: Codes) -> Callable[[], torch.Tensor]:
        replay = real(traced, codes)
        return lambda: replay() * (1 + 2.0**-23)

    monkeypatch.setattr(Traced, "__call__", imprecise)
    other = Recommender(served, 7)
    assert other.traced is None
    patients = recommender.encode(some_patients(served, 20))
    monkeypatch.undo()
    np.testing.assert_array_equal(
        other.probabilities(patients), recommender.probabilities(patients)
    )


def test_with_several_threads_all_runs_are_of_one_size(served: Bundle) -> None:
    """They divide elementwise work by its amount."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not Recommender(served, 1).is_exact
    finally:
        torch.set_num_threads(before)


def test_a_cohort_may_have_no_codes_of_a_kind(served_without: Bundle) -> None:
    bundle = served_without
    recommender = Recommender(bundle, 1)
    patients = recommender.encode(some_patients(bundle, 30))
    alone = np.concatenate([recommender.probabilities([patient]) for patient in patients])
    np.testing.assert_array_equal(recommender.probabilities(patients), alone)
    expected = np.stack([direct(bundle, patient) for patient in patients])
    np.testing.assert_allclose(alone, expected, atol=1e-6)


def test_recommended_is_what_reaches_the_threshold_most_probable_first(
    served: Bundle, recommender: Recommender
) -> None:
    request = some_patients(served, 5)
    rows = recommender.probabilities(recommender.encode(request))
    names = served.vocabularies["medication"]
    for recommendation, row in zip(recommender.recommend(request), rows, strict=True):
        got = {f"{m.system}:{m.code}": m.probability for m in recommendation.medications}
        expected = {names[m]: float(p) for m, p in enumerate(row) if p >= 0.5}
        assert got == expected
        assert list(got.values()) == sorted(got.values(), reverse=True)


def test_interactions_are_every_pair_and_each_once(
    served: Bundle, recommender: Recommender
) -> None:
    [patient] = recommender.encode(some_patients(served, 1))
    size = len(served.vocabularies["medication"])
    names = np.array(served.vocabularies["medication"])
    probabilities = np.linspace(0.99, 0.2, size, dtype=np.float32)
    chosen = np.flatnonzero(probabilities >= 0.5)
    taken = (0, size - 1, size - 2)
    answer = recommender.answer(patient._replace(taken=taken), probabilities)
    pairs = [(a, b) for a in chosen for b in chosen if a < b and served.ddi[a, b]]
    assert pairs
    assert [(i.first, i.second) for i in answer.interactions] == [
        (names[a], names[b]) for a, b in pairs
    ]
    # Medication 0 is recommended again: its pairs are among the recommended already.
    with_taken = {(names[a], names[b]) for a in chosen for b in taken[1:] if served.ddi[a, b]}
    assert with_taken
    assert {(i.recommended, i.taken) for i in answer.interactions_with_taken} == with_taken
    assert len(answer.interactions_with_taken) == len(with_taken)


def test_nothing_known_still_gets_a_finite_answer(recommender: Recommender) -> None:
    request = {"patients": [{"visits": [{}]}, {"visits": [{}] * 256}]}
    rows = recommender.probabilities(recommender.encode(RecommendRequest.model_validate(request)))
    assert np.isfinite(rows).all()


def test_unknown_codes_are_listed_and_change_nothing(recommender: Recommender) -> None:
    visit = {"diagnoses": [{"system": "icd9", "code": "4010"}]}
    odd = {"diagnoses": [*visit["diagnoses"], {"system": "ICD9", "code": "v99.9"}]}
    request = RecommendRequest.model_validate(
        {"patients": [{"visits": [visit]}, {"visits": [odd]}]}
    )
    plain, with_unknown = recommender.recommend(request)
    assert [u.code for u in with_unknown.unknown_codes] == ["icd9:V999"]
    assert plain.unknown_codes == []
    assert plain.medications == with_unknown.medications


def test_the_card_says_what_is_served(recommender: Recommender) -> None:
    card = recommender.card
    assert (card.name, card.version) == ("cafemed", 7)
    assert (card.num_diagnoses, card.num_procedures, card.num_medications) == (13, 6, 12)
    assert card.code_systems["diagnosis"] == ["icd10", "icd9"]
    assert card.laboratory_items == []
    assert "Not a medical device" in card.intended_use
    assert card.sources == {"cohort": "0" * 64}
    assert card.card is None
    assert any("allergies" in limit for limit in card.limits)


def test_a_registrys_bundle_loads_and_an_edited_one_does_not(root: Path, tmp_path: Path) -> None:
    folder = registry.resolve(root / "registry" / "tiny", "production")
    assert Recommender.load(folder, 1).name.version == 1
    broken = tmp_path / "bundle"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    vocabulary = broken / "vocabulary.json"
    vocabulary.write_text(vocabulary.read_text().replace("4010", "4999"))
    with pytest.raises(ArtifactError, match=r"vocabulary\.json: expected SHA-256"):
        Recommender.load(broken, 1)


def test_a_bundle_that_cannot_answer_is_not_loaded(
    served: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.write(tmp_path / "bundle", served)
    Recommender.load(tmp_path / "bundle", 1)

    def fails(*_: object) -> None:
        raise RuntimeError("details")

    monkeypatch.setattr(Recommender, "answer", fails)
    with pytest.raises(ArtifactError, match=r"bundle: cannot answer \(RuntimeError\)$"):
        Recommender.load(tmp_path / "bundle", 1)


def test_a_recorded_run_hardly_waits_for_the_interpreter(served: Bundle) -> None:
    """It took a turn for each tensor that it was given, two dozen, while others read and answer."""
    recommender = Recommender(served, 7)
    end = recommender.begun(recommender.encode(some_patients(served, 9)), 1)
    end()
    turn_s = 0.05
    took: list[float] = []

    def run() -> None:
        started = time.perf_counter()
        end()
        took.append(time.perf_counter() - started)

    before = sys.getswitchinterval()
    sys.setswitchinterval(turn_s)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():  # keeps the interpreter until it has to give it away
            sum(range(100))
    finally:
        sys.setswitchinterval(before)
    assert took[0] < 8 * turn_s
