import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafemed.bundle import Preprocessing
from serve.encoding import AllergyError, EncodedPatient, Encoder, UnknownSystemError
from serve.schema import RecommendRequest

VOCABULARIES = {
    "diagnosis": ("icd9:4280", "icd9:4019", "icd10:I10", "icd9:E849"),
    "procedure": ("icd9:9961", "local:MRI"),
    "medication": ("atc:A02B", "atc:B01A", "atc:C03C"),
}


def codes(*names: str) -> list[dict[str, str]]:
    return [dict(zip(("system", "code"), name.split(":"), strict=True)) for name in names]


def encode(*visits: dict[str, Any], inputs: Any = "current", **patient: Any) -> EncodedPatient:
    body = {"patients": [{"visits": list(visits), **patient}]}
    vocabularies = {**VOCABULARIES, "laboratory": ("lab:50912", "lab:HB")}
    encoder = Encoder(vocabularies, Preprocessing(inputs=inputs))
    return encoder.encode(RecommendRequest.model_validate(body))[0]


HISTORY = (
    {
        "diagnoses": codes("icd9:401.9", "ICD9:428.0"),
        "procedures": codes("local:mri"),
        "medications": codes("atc:B01AC06", "atc:a02b"),
    },
    {"diagnoses": codes("icd10:i10"), "procedures": codes("icd9:99.61")},
)


def test_codes_are_found_however_they_are_written_and_keep_their_order() -> None:
    diagnoses, procedures, previous = encode(*HISTORY).known
    assert diagnoses == ((1, 0), (2,))
    assert procedures == ((1,), (0,))
    assert previous == ((), (1, 0))


def test_with_history_inputs_a_visit_sees_only_the_visit_before() -> None:
    diagnoses, procedures, previous = encode(*HISTORY, inputs="history").known
    assert diagnoses == ((), (1, 0))
    assert procedures == ((), (1,))
    assert previous == ((), (1, 0))


def test_the_current_visits_medications_are_no_input_but_are_taken() -> None:
    encoded = encode(*HISTORY[:1])
    assert encoded.known[2] == ((),)
    assert encoded.taken == (1, 0)


def test_taken_is_the_visit_before_where_the_current_one_lists_nothing() -> None:
    assert encode(*HISTORY).taken == (1, 0)
    current = {**HISTORY[1], "medications": codes("atc:C03CA01")}
    assert encode(HISTORY[0], current).taken == (2,)


def test_taken_is_nothing_where_all_that_is_listed_is_unknown() -> None:
    current = {**HISTORY[1], "medications": codes("atc:Z99Z")}
    assert encode(HISTORY[0], current).taken == ()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["icd9", "ICD9", " icd9 ", "icd10"]),
    st.text("0I14289eE. ", min_size=1, max_size=7)
    | st.sampled_from(["428.0", "42.80", "4.2.8.0", "i1.0", "280", "10", "42", "4280 ", "E84.9"]),
)
def test_a_code_is_found_as_if_it_were_normalised_first(system: str, written: str) -> None:
    if not written.strip(". "):
        return
    name = f"{system.strip().lower()}:{written.strip().replace('.', '').upper()}"
    encoded = encode({"diagnoses": [{"system": system, "code": written}]})
    known = VOCABULARIES["diagnosis"]
    assert encoded.known[0] == (((known.index(name),) if name in known else ()),)
    assert [one.code for one in encoded.unknown] == ([] if name in known else [name])


def test_a_code_counts_once_a_visit() -> None:
    visit = {
        "diagnoses": codes("icd9:4019", "icd9:4280", "icd9:401.9"),
        "medications": codes("atc:A02BC01", "atc:A02BC02", "atc:A02B"),
    }
    encoded = encode(visit, {})
    assert encoded.known[0] == ((1, 0), ())
    assert encoded.known[2] == ((), (0,))


def test_unknown_codes_are_listed_as_looked_up_and_left_out() -> None:
    encoded = encode(
        {"medications": codes("atc:Z99ZZ99", "atc:A02B")},
        {"diagnoses": codes("icd9:E849", "icd10:E849"), "procedures": codes("icd9:1.1")},
    )
    found = [(u.visit, u.kind, u.code) for u in encoded.unknown]
    assert found == [
        (0, "medication", "atc:Z99Z"),
        (1, "diagnosis", "icd10:E849"),
        (1, "procedure", "icd9:11"),
    ]
    assert encoded.known[0] == ((), (3,))
    assert encoded.known[2] == ((), (0,))


@pytest.mark.parametrize(
    ("visit", "field", "expected"),
    [
        ({"diagnoses": codes("icd9:1", "icd11:1")}, "diagnoses[1]", "icd10, icd9"),
        ({"procedures": codes("cpt:1")}, "procedures[0]", "icd10, icd9, local"),
        ({"medications": codes("ndc:1")}, "medications[0]", "atc"),
        ({"diagnoses": codes("atc:A02B")}, "diagnoses[0]", "icd10, icd9"),
    ],
)
def test_an_unknown_system_is_refused_by_field(visit: Any, field: str, expected: str) -> None:
    with pytest.raises(UnknownSystemError) as caught:
        encode({}, visit)
    assert caught.value.field == f"patients[0].visits[1].{field}.system"
    assert str(caught.value) == f"unknown code system; expected one of {expected}"


def test_the_share_of_unknown_codes_is_of_distinct_inputs() -> None:
    known, unknown = codes("icd9:4019"), codes("icd9:V99", "icd9:v9.9")
    visit = {"diagnoses": known, "procedures": codes("icd9:1.1")}
    # Three: what is taken now is no input.
    current = {"diagnoses": unknown, "medications": codes("atc:A02B", "atc:Z99Z")}
    assert encode(visit, current).unknown_share == pytest.approx(2 / 3)
    assert encode({}).unknown_share == 0
    assert encode({"diagnoses": unknown}).unknown_share == 1
    repeated = known * 10 + codes(*(f"icd9:Z{i}" for i in range(9)))
    assert encode({"diagnoses": repeated}).unknown_share == 0.9
    # At two visits a code is two inputs; earlier medications are inputs.
    assert encode({"diagnoses": known + unknown}, {"diagnoses": unknown}).unknown_share == 2 / 3
    assert encode({"medications": codes("atc:Z99Z")}, {"diagnoses": known}).unknown_share == 0.5
    # A model may use no laboratory values; to send them is no fault.
    assert encode({"diagnoses": known, "laboratory": MEASURED[0]["laboratory"]}).unknown_share == 0


def test_what_is_taken_now_does_not_make_up_for_unknown_codes() -> None:
    unknown = codes(*(f"icd9:Z{i}" for i in range(5)))
    visit = {"diagnoses": unknown, "medications": codes("atc:A02B")}
    assert encode(visit).unknown_share == 1


def test_allergies_are_kept_to_only_where_medications_are_in_atc() -> None:
    assert encode({}, allergies=["j01.c"]).allergies == ("J01C",)
    assert encode({}).allergies == ()
    encoder = Encoder({**VOCABULARIES, "medication": ("atc:A02B", "local:1")}, Preprocessing())
    body = {"patients": [{"visits": [{}]}, {"visits": [{}], "allergies": ["J01"]}]}
    with pytest.raises(AllergyError, match="are not in ATC") as caught:
        encoder.encode(RecommendRequest.model_validate(body))
    assert caught.value.field == "patients[1].allergies"


def test_sex_and_age() -> None:
    assert (encode({}, sex="male", age=50).sex, encode({}, sex="male", age=50).age) == (2, 50)
    assert encode({}).sex == 0
    assert math.isnan(encode({}).age)


@pytest.mark.parametrize(("level", "kept"), [("atc3", "atc:A02B"), ("atc5", "atc:A02BC01")])
def test_medications_are_cut_to_the_bundles_level(level: str, kept: str) -> None:
    encoder = Encoder(
        {**VOCABULARIES, "medication": (kept,)}, Preprocessing(medication_level=level)
    )
    body = {"patients": [{"visits": [{"medications": codes("atc:A02BC01")}, {}]}]}
    encoded = encoder.encode(RecommendRequest.model_validate(body))[0]
    assert encoded.known[2] == ((), (0,))
    assert encoded.unknown == ()


MEASURED = (
    {
        "laboratory": [
            {"item": " h.b", "value": 11.5},
            {"item": "50912", "value": 1.4},
            {"item": "HB", "value": 9},
            {"item": "ph", "value": 7.4},
        ]
    },
    {"laboratory": [{"item": "50912", "value": 0}]},
    {},
)


def test_laboratory_items_are_found_however_written_and_the_first_value_counts() -> None:
    encoded = encode(*MEASURED)
    assert encoded.laboratory == (((0, 1.4), (1, 11.5)), ((0, 0.0),), ())
    assert [(u.visit, u.kind, u.code) for u in encoded.unknown] == [(0, "laboratory", "lab:PH")]


def test_with_history_inputs_the_laboratory_values_are_those_of_the_visit_before() -> None:
    encoded = encode(*MEASURED, inputs="history")
    assert encoded.laboratory == ((), ((0, 1.4), (1, 11.5)), ((0, 0.0),))


def test_a_model_without_laboratory_knows_no_item() -> None:
    body = {"patients": [{"visits": [{"laboratory": [{"item": "hb", "value": 1}]}]}]}
    encoder = Encoder(VOCABULARIES, Preprocessing())
    [encoded] = encoder.encode(RecommendRequest.model_validate(body))
    assert encoded.laboratory == ((),)
    assert [u.code for u in encoded.unknown] == ["lab:HB"]
