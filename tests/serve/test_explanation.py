"""Every number of an explanation, worked out again from the request and the bundle's tables."""

import asyncio
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from cafemed import bundle as bundles
from cafemed.bundle import Bundle, Preprocessing
from cafemed.codes import node_name, normalise
from cafemed.graphs import CausalGraph, EffectTable
from serve import explanation
from serve.answers import RecommendResponse
from serve.api import create_api
from serve.batching import positions_of
from serve.encoding import EncodedPatient
from serve.recommender import Recommender
from serve.schema import MAX_EXPLAINED_PATIENTS, RecommendRequest

FIELDS = {"diagnosis": "diagnoses", "procedure": "procedures", "medication": "medications"}

#: Visit, kind and normalised code.
Listed = tuple[int, str, str]


class Direct:
    """A service without Ray, queue or batch."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.calls: list[int] = []
        self.api = create_api(self)

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[Any]:
        self.calls.append(len(patients))
        return list(recommender.probabilities(patients))


def post(service: Direct, body: dict[str, Any]) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.post("/v1/recommend", json=body)

    return asyncio.run(call())


def explained(service: Direct, *patients: dict[str, Any]) -> RecommendResponse:
    got = post(service, {"patients": patients, "options": {"explain": True}})
    assert got.status_code == 200, got.text
    return RecommendResponse.model_validate(got.json())


def some_patient(bundle: Bundle, visits: int = 3, seed: int = 0, codes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def chosen(kind: str) -> list[str]:
        names = bundle.vocabularies.get(kind, ())
        return [names[i] for i in rng.choice(len(names), min(codes, len(names)), replace=False)]

    def visit() -> dict[str, Any]:
        return {
            **{
                field: [
                    dict(zip(("system", "code"), name.split(":"), strict=True))
                    for name in chosen(kind)
                ]
                for kind, field in FIELDS.items()
            },
            "laboratory": [
                {"item": name.partition(":")[2], "value": float(rng.normal(20, 30))}
                for name in chosen("laboratory")
            ],
        }

    return {"age": 60.0, "sex": "male", "visits": [visit() for _ in range(visits)]}


def normalised(kind: str, listed: dict[str, Any]) -> str:
    if kind == "laboratory":
        return normalise("lab", listed["item"])
    name = normalise(listed["system"], listed["code"])
    return name[: len("atc:A01B")] if kind == "medication" else name


def all_codes(patient: dict[str, Any]) -> Iterator[Listed]:
    for v, visit in enumerate(patient["visits"]):
        for kind, field in {**FIELDS, "laboratory": "laboratory"}.items():
            for name in dict.fromkeys(normalised(kind, one) for one in visit.get(field, [])):
                yield v, kind, name


def without(patient: dict[str, Any], listed: Listed) -> dict[str, Any]:
    v, kind, code = listed
    changed = copy.deepcopy(patient)
    field = {**FIELDS, "laboratory": "laboratory"}[kind]
    before = changed["visits"][v][field]
    changed["visits"][v][field] = [one for one in before if normalised(kind, one) != code]
    assert len(changed["visits"][v][field]) < len(before)
    return changed


def scores(recommender: Recommender, patient: dict[str, Any]) -> NDArray[np.float32]:
    request = RecommendRequest.model_validate({"patients": [patient]})
    return recommender.probabilities(recommender.encode(request))[0]


def check_by_hand(bundle: Bundle, patient: dict[str, Any]) -> set[str]:
    """Compares an explained answer with one request for every code; gives the kinds that matter."""
    service = Direct(Recommender(bundle, 1))
    [answer] = explained(service, patient).recommendations
    assert len(service.calls) == 1  # one batched pass
    score = scores(service.recommender, patient)
    reduced = {
        listed: scores(service.recommender, without(patient, listed))
        for listed in all_codes(patient)
    }
    names = bundle.vocabularies["medication"]
    kinds = set()
    for medication in answer.medications:
        m = names.index(f"{medication.system}:{medication.code}")
        assert medication.probability == score[m]
        changes = {c: float(score[m]) - float(row[m]) for c, row in reduced.items()}
        assert medication.explanation is not None
        told = {
            sign: list(getattr(medication.explanation, direction))
            for sign, direction in ((1, "raised"), (-1, "lowered"))
        }
        for sign, influences in told.items():
            got = [i.change for i in influences]
            signed = sorted((c for c in changes.values() if c * sign > 0), key=abs, reverse=True)
            assert got == signed[: explanation.MAX_INFLUENCES]
            for influence in influences:
                listed = (influence.visit, influence.kind, influence.code)
                assert influence.score_without == reduced[listed][m]
                assert influence.change == changes[listed]
                kinds.add(influence.kind)
    return kinds


def test_the_score_without_a_code_is_that_of_asking_without_it(served_model: Bundle) -> None:
    threshold = dataclasses.replace(served_model.preprocessing, threshold=0.3)
    bundle = dataclasses.replace(served_model, preprocessing=threshold)
    kinds = check_by_hand(bundle, some_patient(bundle))
    assert {"diagnosis", "procedure"} <= kinds
    reads_all = "L" in bundle.model_options.get("modalities", "")
    assert ("laboratory" in kinds) == reads_all


def test_the_same_where_only_earlier_visits_are_seen(served_model: Bundle) -> None:
    history = dataclasses.replace(served_model.preprocessing, inputs="history", threshold=0.3)
    bundle = dataclasses.replace(served_model, preprocessing=history)
    patient = some_patient(bundle)
    kinds = check_by_hand(bundle, patient)
    assert {"diagnosis", "procedure"} <= kinds
    assert ("laboratory" in kinds) == ("L" in bundle.model_options.get("modalities", ""))
    [answer] = explained(Direct(Recommender(bundle, 1)), patient).recommendations
    assert answer.explained_codes is not None
    before = [listed for listed in all_codes(patient) if listed[0] < 2]
    assert answer.explained_codes.given == len(before)  # nothing of the current visit


def test_over_http_without_the_code_gives_exactly_that_probability(served: Bundle) -> None:
    service = Direct(Recommender(served, 1))
    patient = some_patient(served, visits=2)
    [answer] = explained(service, patient).recommendations
    compared = 0
    for medication in answer.medications:
        assert medication.explanation is not None
        for influence in [*medication.explanation.raised, *medication.explanation.lowered]:
            asked = without(patient, (influence.visit, influence.kind, influence.code))
            got = post(service, {"patients": [asked]}).json()["recommendations"][0]
            for other in [*got["medications"], *got["near_misses"]]:
                if (other["system"], other["code"]) == (medication.system, medication.code):
                    assert other["probability"] == influence.score_without
                    compared += 1
    assert compared > 20


def test_all_mentions_of_a_code_in_a_visit_are_one_code(served: Bundle) -> None:
    patient = {
        "visits": [
            {
                "diagnoses": [{"system": "icd9", "code": c} for c in ("4010", "40.10", "4011")],
                "medications": [{"system": "atc", "code": c} for c in ("A01BA02", "A01BC07")],
            },
            {"diagnoses": [{"system": "ICD9", "code": "4010"}]},
        ]
    }
    assert len(list(all_codes(patient))) == 4
    bundle = dataclasses.replace(served, preprocessing=Preprocessing(threshold=0.2))
    assert "medication" in check_by_hand(bundle, patient)
    [answer] = explained(Direct(Recommender(bundle, 1)), patient).recommendations
    assert answer.explained_codes is not None
    assert (answer.explained_codes.explained, answer.explained_codes.given) == (4, 4)


def influences_of(bundle: Bundle, patient: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    [answer] = explained(Direct(Recommender(bundle, 1)), patient).recommendations
    for medication in answer.medications:
        assert medication.explanation is not None
        for influence in [*medication.explanation.raised, *medication.explanation.lowered]:
            yield f"{medication.system}:{medication.code}", influence


def drawn_effects(bundle: Bundle) -> EffectTable:
    """The bundle's table, of which some errors are unknown and some pairs without support."""
    rng = np.random.default_rng(5)
    shape = bundle.effects.effect.shape
    error = rng.random(shape).astype(np.float32)
    error[rng.random(shape) < 0.3] = np.nan
    return dataclasses.replace(
        bundle.effects, standard_error=error, supported=rng.random(shape) < 0.7
    )


def test_effects_are_those_of_the_table_at_the_current_visit_only(served: Bundle) -> None:
    table = drawn_effects(served)
    preprocessing = dataclasses.replace(served.preprocessing, threshold=0.1)
    bundle = dataclasses.replace(served, effects=table, preprocessing=preprocessing)
    seen = set()
    # Codes of the last of the three visits, and medications of the one before it.
    known_at = {"diagnosis": 2, "procedure": 2, "medication": 1}
    told = [*influences_of(bundle, some_patient(bundle))]
    for medication, influence in told:
        kind = influence.kind
        got = (influence.effect, influence.standard_error)
        if influence.visit < known_at[kind]:
            assert got == (None, None)
            seen.add((kind, "earlier"))
            continue
        assert influence.visit == known_at[kind]
        node = "previous_medication" if kind == "medication" else kind
        row = table.codes.index(node_name(node, influence.code))
        column = table.medications.index(node_name("medication", medication))
        if not table.supported[row, column]:
            assert got == (None, None)
            seen.add((kind, "unsupported"))
            continue
        assert influence.effect == float(table.effect[row, column])
        if np.isnan(table.standard_error[row, column]):
            assert influence.standard_error is None
            seen.add((kind, "no error"))
        else:
            assert influence.standard_error == float(table.standard_error[row, column])
            seen.add((kind, "all"))
    kinds, cases = known_at, ("earlier", "unsupported", "no error", "all")
    assert seen == {(kind, case) for kind in kinds for case in cases}


def test_a_table_without_earlier_medications_explains_as_it_did(
    served: Bundle, tmp_path: Path
) -> None:
    preprocessing = dataclasses.replace(served.preprocessing, threshold=0.1)
    newer = dataclasses.replace(served, effects=drawn_effects(served), preprocessing=preprocessing)
    old = dataclasses.replace(newer, effects=newer.effects.of_kinds("diagnosis", "procedure"))
    assert len(old.effects.codes) == len(newer.effects.codes) - len(newer.effects.medications)
    bundles.write(tmp_path / "old", old)
    loaded = bundles.load(tmp_path / "old")
    assert loaded.effects.codes == old.effects.codes
    patient = some_patient(newer)
    told = [*influences_of(loaded, patient)]
    expected = [*influences_of(newer, patient)]
    compared = 0
    for (medication, influence), (other, wanted) in zip(told, expected, strict=True):
        assert medication == other
        if influence.kind == "medication":
            compared += wanted.effect is not None
            wanted = dataclasses.replace(wanted, effect=None, standard_error=None)
        assert influence == wanted
    assert compared > 10


def test_paths_start_at_what_is_known_at_the_current_visit(served: Bundle) -> None:
    vocabularies = served.vocabularies
    diagnosis, procedure = vocabularies["diagnosis"][0], vocabularies["procedure"][0]
    first, second = vocabularies["medication"][:2]
    start, middle = node_name("diagnosis", diagnosis), node_name("procedure", procedure)
    before = node_name("previous_medication", first)
    ends = [node_name("medication", m) for m in vocabularies["medication"]]
    nodes = tuple(sorted([start, middle, before, *ends]))
    at = nodes.index
    pairs = [(at(before), at(end)) for end in ends]
    pairs += [(at(start), at(middle)), *((at(middle), at(end)) for end in ends)]
    number = len(pairs)
    graph = CausalGraph(
        nodes=nodes,
        source=np.array([a for a, _ in pairs], np.int32),
        target=np.array([b for _, b in pairs], np.int32),
        directed=np.array([a != at(start) for a, _ in pairs]),
        stability=np.linspace(0.5, 1, number, dtype=np.float32),
        support=np.ones(number, np.int64),
        strength=np.full(number, np.nan, np.float32),
    )
    bundle = dataclasses.replace(
        served,
        graph=graph,
        preprocessing=Preprocessing(threshold=0.1),
        reference=served.reference,
    )
    code = dict(zip(("system", "code"), diagnosis.split(":"), strict=True))
    taken = [dict(zip(("system", "code"), m.split(":"), strict=True)) for m in (first, second)]
    patient = {"visits": [{"diagnoses": [code], "medications": taken}, {"diagnoses": [code]}]}
    stability = {(nodes[a], nodes[b]): float(graph.stability[e]) for e, (a, b) in enumerate(pairs)}
    explainer = explanation.Explainer(bundle, {"diagnosis": {diagnosis: "a name"}})
    [encoded] = Recommender(served, 1).encode(
        RecommendRequest.model_validate({"patients": [patient]})
    )
    plan = explainer.plan(encoded)
    got = {
        (g.visit, g.kind, g.index): explainer.influence(g, 4, 0.5, 0.4, g.at == 1)
        for g in plan.codes
    }
    direct = got[1, "diagnosis", 0]
    assert direct.name == "a name"
    assert direct.path is not None
    assert direct.path.nodes == [start, middle, ends[4]]
    assert not direct.path.directed
    assert direct.path.stability == min(stability[start, middle], stability[middle, ends[4]])
    earlier = got[0, "medication", 0]
    assert earlier.path is not None
    assert earlier.path.nodes == [before, ends[4]]
    assert earlier.path.directed
    assert earlier.name is None
    assert got[0, "medication", 1].path is None
    assert got[0, "diagnosis", 0].path is None  # of the visit before: no node of the graph


def test_explaining_changes_nothing_else_and_is_not_done_unasked(served: Bundle) -> None:
    service = Direct(Recommender(served, 1))
    patient = some_patient(served)
    plain = post(service, {"patients": [patient]}).json()["recommendations"][0]
    assert all(one["explanation"] is None for one in plain["medications"])
    assert plain["explained_codes"] is None
    with_reasons = post(service, {"patients": [patient], "options": {"explain": True}}).json()
    [answer] = with_reasons["recommendations"]
    assert answer["explained_codes"] == {"explained": 24, "given": 24, "effect_estimator": "raw"}
    for one in answer["medications"]:
        assert set(one.pop("explanation")) == {"raised", "lowered"}
    for one in plain["medications"]:
        one.pop("explanation")
    answer["explained_codes"] = None
    assert answer == plain


def test_an_explanation_does_not_depend_on_the_others_bit_for_bit(served: Bundle) -> None:
    service = Direct(Recommender(served, 1))
    patients = [some_patient(served, visits=1 + seed % 3, seed=seed) for seed in range(6)]
    alone = [explained(service, patient).recommendations[0] for patient in patients]
    together = explained(service, *patients).recommendations
    assert together == alone
    assert explained(service, *patients[::-1]).recommendations == alone[::-1]


def test_the_latest_codes_go_first_and_the_answer_says_how_many(
    served: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanation, "MAX_EXPLAINED_CODES", 8)
    service = Direct(Recommender(served, 1))
    patient = some_patient(served, visits=3)
    [answer] = explained(service, patient).recommendations
    assert answer.explained_codes is not None
    assert (answer.explained_codes.explained, answer.explained_codes.given) == (8, 24)
    assert service.calls == [9]
    told = {
        (i.visit, i.kind)
        for one in answer.medications
        if one.explanation is not None
        for i in [*one.explanation.raised, *one.explanation.lowered]
    }
    # The current visit has six codes, then come the medications that were taken before it.
    assert told <= {(2, "diagnosis"), (2, "procedure"), (1, "medication")}
    assert (2, "diagnosis") in told


def test_the_work_for_a_very_long_patient_is_bounded(served: Bundle) -> None:
    recommender = Recommender(served, 1)
    patient = some_patient(served, visits=256, codes=12)
    [encoded] = recommender.encode(RecommendRequest.model_validate({"patients": [patient]}))
    plan = recommender.explainer.plan(encoded)
    assert plan.given == 256 * (12 + 6) + 255 * 12
    positions = positions_of(encoded)
    assert len(plan.codes) == explanation.MAX_EXPLAINED_POSITIONS // positions > 0
    assert {code.visit for code in plan.codes} == {255}


def test_more_patients_than_can_be_explained_are_refused(served: Bundle) -> None:
    service = Direct(Recommender(served, 1))
    patients = [{"visits": [{}]}] * (MAX_EXPLAINED_PATIENTS + 1)
    got = post(service, {"patients": patients, "options": {"explain": True}})
    assert got.status_code == 422
    [problem] = got.json()["problems"]
    assert problem["field"] == "options"
    assert "explain" in problem["message"]
    assert f"at most {MAX_EXPLAINED_PATIENTS}" in problem["message"]
    assert post(service, {"patients": patients}).status_code == 200
    assert service.calls == [MAX_EXPLAINED_PATIENTS + 1]


def test_a_patient_without_codes_has_nothing_to_explain(served: Bundle) -> None:
    bundle = dataclasses.replace(served, preprocessing=Preprocessing(threshold=0.01))
    [answer] = explained(Direct(Recommender(bundle, 1)), {"visits": [{}]}).recommendations
    assert answer.medications
    for medication in answer.medications:
        assert medication.explanation is not None
        assert medication.explanation.raised == medication.explanation.lowered == []
    assert answer.explained_codes is not None
    assert answer.explained_codes.given == 0
