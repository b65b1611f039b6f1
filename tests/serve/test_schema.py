import json
from typing import Any

import pytest
from pydantic import ValidationError

from cafemed.protocols.config import MAX_LABORATORY
from serve import schema
from serve.schema import RecommendRequest, field_path


def code(system: str = "icd9", value: str = "4280") -> dict[str, str]:
    return {"system": system, "code": value}


def request(**visit: Any) -> dict[str, Any]:
    return {"patients": [{"visits": [visit]}]}


def problems(body: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        RecommendRequest.model_validate_json(json.dumps(body))
    return {field_path(error["loc"]): error["msg"] for error in caught.value.errors()}


def test_a_request_may_give_every_laboratory_item_that_a_model_can_know() -> None:
    items = [{"item": str(i), "value": 1} for i in range(MAX_LABORATORY)]
    RecommendRequest.model_validate(request(laboratory=items))


def test_the_documented_example_is_a_request() -> None:
    examples = RecommendRequest.model_json_schema()["examples"]
    parsed = [RecommendRequest.model_validate_json(json.dumps(example)) for example in examples]
    assert parsed
    assert all(request.patients for request in parsed)


def test_dots_blanks_and_case_do_not_matter() -> None:
    written = [code("icd9", "428.0"), code("ICD9", " 4280 "), code(" icd9", "4280")]
    parsed = RecommendRequest.model_validate(request(diagnoses=written))
    names = {c.normalised() for c in parsed.patients[0].visits[0].diagnoses}
    assert names == {"icd9:4280"}


def test_an_empty_visit_and_no_demographics_are_allowed() -> None:
    patient = RecommendRequest.model_validate(request()).patients[0]
    assert (patient.sex, patient.age, patient.visits[0].diagnoses) == ("unknown", None, [])


def patient(**given: Any) -> dict[str, Any]:
    return {"patients": [{"visits": [{}], **given}]}


def options(**given: Any) -> dict[str, Any]:
    return {**request(), "options": given}


def test_allergies_are_atc_codes_or_their_beginnings() -> None:
    written = ["J", "j0", "J01", "J01C", "J01CA", "j01.ca0", " J01CA04 "]
    parsed = RecommendRequest.model_validate(patient(allergies=written)).patients[0]
    assert parsed.allergies == ["J", "J0", "J01", "J01C", "J01CA", "J01CA0", "J01CA04"]


def test_without_options_nothing_is_left_out() -> None:
    asked = RecommendRequest.model_validate(request()).options
    assert (asked.max_ddi_rate, asked.top_k, asked.explain) == (None, None, False)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({}, "patients", "required"),
        ({"patients": []}, "patients", "at least 1"),
        ({"patients": [{"visits": []}]}, "patients[0].visits", "at least 1"),
        ({"patients": [{}]}, "patients[0].visits", "required"),
        ([], "", "object"),
        *(
            (patient(allergies=["J01", wrong]), "patients[0].allergies[1]", "such as J01C")
            for wrong in ("", "01", "J01CA044", "Penicillin", "JJ", "J٠١", "J01C; DROP")
        ),
        (patient(allergies="J01"), "patients[0].allergies", "array"),
        (options(max_ddi_rate=1.1), "options.max_ddi_rate", "less than or equal to 1"),
        (options(max_ddi_rate=-0.1), "options.max_ddi_rate", "greater than or equal to 0"),
        (options(max_ddi_rate="0.1"), "options.max_ddi_rate", "number"),
        (options(max_ddi_rate=float("nan")), "options.max_ddi_rate", "finite"),
        (options(top_k=0), "options.top_k", "greater than or equal to 1"),
        (options(top_k=1.5), "options.top_k", "integer"),
        (options(top_k=True), "options.top_k", "integer"),
        (options(explain=1), "options.explain", "boolean"),
        (options(topk=1), "options.topk", "not permitted"),
        (request(diagnoses=[{"system": "icd9"}]), "patients[0].visits[0].diagnoses[0].code", "req"),
        (request(diagnoses=[code(value="")]), "patients[0].visits[0].diagnoses[0].code", "least 1"),
        (request(diagnoses=[code(value=" . ")]), "patients[0].visits[0].diagnoses[0].code", "only"),
        (request(diagnoses=["4280"]), "patients[0].visits[0].diagnoses[0]", "object"),
        (
            request(diagnoses=[code(value=4280)]),
            "patients[0].visits[0].diagnoses[0].code",
            "string",
        ),
        (request(medication=[]), "patients[0].visits[0].medication", "not permitted"),
        (
            request(laboratory=[{"item": "1", "value": "7"}]),
            "patients[0].visits[0].laboratory[0].value",
            "number",
        ),
        (
            request(laboratory=[{"item": "1", "value": float("inf")}]),
            "patients[0].visits[0].laboratory[0].value",
            "finite",
        ),
        (
            request(laboratory=[{"item": "1"}]),
            "patients[0].visits[0].laboratory[0].value",
            "required",
        ),
        (
            request(laboratory=[{"item": " .", "value": 1}]),
            "patients[0].visits[0].laboratory[0].item",
            "only blanks",
        ),
        (
            request(laboratory=[{"item": "1", "value": 1, "time": "noon"}]),
            "patients[0].visits[0].laboratory[0].time",
            "not permitted",
        ),
        (request(laboratory={"1": 7}), "patients[0].visits[0].laboratory", "array"),
        ({"patients": [{"visits": [{}], "name": "x"}]}, "patients[0].name", "not permitted"),
        ({"patients": [{"visits": [{}]}], "threshold": 1}, "threshold", "not permitted"),
        ({"patients": [{"visits": [{}], "age": -1}]}, "patients[0].age", "greater than or equal"),
        ({"patients": [{"visits": [{}], "age": 131}]}, "patients[0].age", "less than or equal"),
        ({"patients": [{"visits": [{}], "age": "7"}]}, "patients[0].age", "number"),
        ({"patients": [{"visits": [{}], "age": float("nan")}]}, "patients[0].age", "finite"),
        ({"patients": [{"visits": [{}], "sex": "f"}]}, "patients[0].sex", "'female'"),
    ],
)
def test_what_is_wrong_is_named(body: Any, field: str, said: str) -> None:
    found = problems(body)
    assert list(found) == [field]
    assert said in found[field]


@pytest.mark.parametrize(
    ("at_limit", "over", "field"),
    [
        (
            {"patients": [{"visits": [{}]}] * schema.MAX_PATIENTS},
            {"patients": [{"visits": [{}]}] * (schema.MAX_PATIENTS + 1)},
            "patients",
        ),
        (
            {"patients": [{"visits": [{}] * schema.MAX_VISITS}]},
            {"patients": [{"visits": [{}] * (schema.MAX_VISITS + 1)}]},
            "patients[0].visits",
        ),
        (
            {"patients": [{"visits": [{}] * 128}] * 32},
            {"patients": [{"visits": [{}] * 128}] * 32 + [{"visits": [{}]}]},
            "patients",
        ),
        (
            request(medications=[code()] * schema.MAX_CODES),
            request(medications=[code()] * (schema.MAX_CODES + 1)),
            "patients[0].visits[0].medications",
        ),
        (
            request(diagnoses=[code(value="1" * schema.MAX_CODE_LENGTH)]),
            request(diagnoses=[code(value="1" * (schema.MAX_CODE_LENGTH + 1))]),
            "patients[0].visits[0].diagnoses[0].code",
        ),
        (
            request(laboratory=[{"item": "1", "value": 1}] * schema.MAX_CODES),
            request(laboratory=[{"item": "1", "value": 1}] * (schema.MAX_CODES + 1)),
            "patients[0].visits[0].laboratory",
        ),
        (
            request(laboratory=[{"item": "1" * schema.MAX_CODE_LENGTH, "value": 1}]),
            request(laboratory=[{"item": "1" * (schema.MAX_CODE_LENGTH + 1), "value": 1}]),
            "patients[0].visits[0].laboratory[0].item",
        ),
        (
            request(laboratory=[{"item": "1", "value": -schema.MAX_VALUE}]),
            request(laboratory=[{"item": "1", "value": -2 * schema.MAX_VALUE}]),
            "patients[0].visits[0].laboratory[0].value",
        ),
        (
            patient(allergies=["J01"] * schema.MAX_ALLERGIES),
            patient(allergies=["J01"] * (schema.MAX_ALLERGIES + 1)),
            "patients[0].allergies",
        ),
        (
            patient(allergies=["J01" + " " * (schema.MAX_ALLERGY_LENGTH - 3)]),
            patient(allergies=["J01" + " " * (schema.MAX_ALLERGY_LENGTH - 2)]),
            "patients[0].allergies[0]",
        ),
        (
            request(diagnoses=[code(system="s" * schema.MAX_SYSTEM_LENGTH)]),
            request(diagnoses=[code(system="s" * (schema.MAX_SYSTEM_LENGTH + 1))]),
            "patients[0].visits[0].diagnoses[0].system",
        ),
    ],
)
def test_limits_hold_exactly(at_limit: Any, over: Any, field: str) -> None:
    RecommendRequest.model_validate_json(json.dumps(at_limit))
    assert list(problems(over)) == [field]
