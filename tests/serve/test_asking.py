"""Requests as they are read from their bytes, held against the schema that documents them."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from pydantic import ValidationError

from serve import schema
from serve.asking import (
    Asked,
    AskedCode,
    AskedValue,
    AskedVisit,
    of_request,
    packed,
    read,
    unpacked,
)
from serve.limits import UnreadableError, parse
from serve.schema import RecommendRequest

CODE: dict[str, Any] = {"system": "icd9", "code": "428.0"}
WHOLE: dict[str, Any] = {
    "patients": [
        {
            "sex": "female",
            "age": 71,
            "allergies": ["J01C", " a01b. "],
            "visits": [
                {
                    "diagnoses": [CODE, {"system": " ICD9", "code": "v 10.1"}],
                    "medications": [{"system": "atc", "code": "C03CA01"}],
                    "laboratory": [{"item": "50912", "value": 1.4}, {"item": "5", "value": -2}],
                },
                {"diagnoses": [CODE, CODE], "procedures": [{"code": "99.61", "system": "icd9"}]},
                {},
            ],
        },
        {"visits": [{"laboratory": []}]},
        {"visits": [{}], "age": None, "sex": "unknown"},
    ],
    "options": {"max_ddi_rate": 0, "top_k": 3, "explain": True},
}


def by_the_schema(body: bytes) -> Asked | None:
    """As FastAPI and serve/limits.py read it; None: it is refused."""
    try:
        return of_request(RecommendRequest.model_validate(parse(body)))
    except (UnreadableError, ValidationError):
        return None


def told(asked: Asked) -> str:
    """All of it as text, so that 1 and 1.0, and 0.0 and -0.0, are told apart.

    What was not given is what the schema takes it for.
    """
    patients = [
        (
            [
                (
                    *(visit.diagnoses or [], visit.procedures or [], visit.medications or []),
                    visit.laboratory or [],
                )
                for visit in patient.visits
            ],
            patient.sex or "unknown",
            None if patient.age is UNSET else patient.age,
            patient.allergies or [],
        )
        for patient in asked.patients
    ]
    return repr((patients, asked.options, asked.options.model_fields_set, asked.num_codes))


def assert_alike(body: bytes) -> bool:
    """Whatever is read is what the schema has; says whether it is read."""
    found = read(body)
    if found is None:
        return False
    expected = by_the_schema(body)
    assert expected is not None, "read, and refused by the schema"
    assert told(found) == told(expected)
    assert told(found._replace(patients=unpacked(packed(found.patients)))) == told(found)
    assert told(found._replace(patients=unpacked(packed(expected.patients)))) == told(found)
    return True


def test_a_whole_request_is_read() -> None:
    for separators in ((",", ":"), (", ", ": "), (" ,\n", "\t:\r ")):
        assert assert_alike(json.dumps(WHOLE, separators=separators).encode())
    asked = read(json.dumps(WHOLE).encode())
    assert asked is not None
    assert asked.num_codes == 8
    [visit, *_] = asked.patients[0].visits
    assert visit == AskedVisit(
        diagnoses=[AskedCode("icd9", "428.0"), AskedCode(" ICD9", "v 10.1")],
        medications=[AskedCode("atc", "C03CA01")],
        laboratory=[AskedValue("50912", 1.4), AskedValue("5", -2.0)],
    )
    assert asked.patients[0].allergies == ["J01C", "A01B"]


def patient(**fields: Any) -> dict[str, Any]:
    return {"visits": [{}], **fields}


def of_visit(**lists: Any) -> dict[str, Any]:
    return {"patients": [{"visits": [lists]}]}


def of_code(code: Any) -> dict[str, Any]:
    return of_visit(diagnoses=[code])


def request_of(*patients: Any, **options: Any) -> dict[str, Any]:
    return {"patients": list(patients), "options": options}


FULL = {"diagnoses": [CODE] * 128}


@pytest.mark.parametrize(
    ("content", "is_read"),
    [
        (of_visit(diagnoses=[CODE] * 128), True),
        (of_visit(procedures=[CODE] * 129), False),
        (of_visit(laboratory=[{"item": "x", "value": 1e12}] * 128), True),
        (of_visit(laboratory=[{"item": "x", "value": 1.1e12}]), False),
        (of_visit(laboratory=[{"item": "x", "value": True}]), False),
        (of_visit(laboratory=[{"item": "x", "value": "1"}]), False),
        (of_visit(laboratory=[{"item": "x"}]), False),
        (of_visit(diagnoses=None), False),
        (of_visit(other=[]), False),
        (of_code({"system": "s" * 32, "code": "c" * 64}), True),
        (of_code({"system": "s" * 33, "code": "1"}), False),
        (of_code({"system": "s", "code": "c" * 65}), False),
        (of_code({"system": "s", "code": ""}), False),
        (of_code({"system": "s", "code": " . \t\r\n"}), False),
        (of_code({"system": ".", "code": "1"}), False),
        (of_code({"system": " .a", "code": "1. "}), True),
        (of_code({"system": "\u00e9", "code": "\U0001f600"}), True),
        (of_code({"system": "s", "code": 1}), False),
        (of_code({"system": "s"}), False),
        (of_code({"system": "s", "code": "1", "name": "x"}), False),
        (of_code(["s", "1"]), False),
        (request_of(*[patient()] * 256), True),
        (request_of(*[patient()] * 257), False),
        (request_of(), False),
        (request_of({"visits": []}), False),
        (request_of({"visits": [{}] * 256}), True),
        (request_of({"visits": [{}] * 257}), False),
        (request_of(*[{"visits": [{}] * 256}] * 16), True),
        (request_of(*[{"visits": [{}] * 256}] * 16, patient()), False),
        (request_of(*[{"visits": [FULL] * 128}] * 2), True),
        (request_of(*[{"visits": [FULL] * 128}] * 2, {"visits": [{"diagnoses": [CODE]}]}), False),
        (request_of({}), False),
        (request_of(patient(age=130)), True),
        (request_of(patient(age=130.5)), False),
        (request_of(patient(age=-1)), False),
        (request_of(patient(age="71")), False),
        (request_of(patient(age=False)), False),
        (request_of(patient(age=float("nan"))), False),
        (request_of(patient(age=10**400)), False),
        (request_of(patient(sex="other")), False),
        (request_of(patient(sex=None)), False),
        (request_of(patient(name="x")), False),
        (request_of(patient(allergies=["A"] * 64)), True),
        (request_of(patient(allergies=["A"] * 65)), False),
        (request_of(patient(allergies=["J01C" + " " * 13])), False),
        (request_of(patient(allergies=["1"])), False),
        (request_of(patient(allergies="A")), False),
        (request_of(patient(), max_ddi_rate=1, top_k=None), True),
        (request_of(patient(), max_ddi_rate=1.5), False),
        (request_of(patient(), max_ddi_rate="0"), False),
        (request_of(patient(), top_k=0), False),
        (request_of(patient(), top_k=2.0), False),
        (request_of(patient(), top_k=10**30), True),
        (request_of(patient(), explain=1), False),
        (request_of(patient(), other=1), False),
        (request_of(*[patient()] * 8, explain=True), True),
        (request_of(*[patient()] * 9, explain=True), False),
        ({"patients": [patient()], "options": None}, False),
        ({"patients": [patient()], "other": 1}, False),
        ({"options": {}}, False),
        ([], False),
        (None, False),
    ],
)
def test_the_limits_are_those_of_the_schema(content: Any, is_read: bool) -> None:
    body = json.dumps(content, ensure_ascii=False).encode()
    assert assert_alike(body) == is_read
    assert (by_the_schema(body) is not None) == is_read


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}x",
        b'{"patients":[{"visits":[{}]}]} x',
        b'{"patients":[{"visits":[{}]}],"patients":[{"visits":[{}]}]}',
        b'{"patients":[{"visits":[{}],"age":1,"age":2}]}',
        b'{"patients":[{"visits":[{}],"\\u0061ge":1,"age":2}]}',
        b'{"patients":[{"visits":[{"diagnoses":[],"diagnoses":[]}]}]}',
        b'{"patients":[{"visits":[{"diagnoses":[{"system":"a","system":"b","code":"c"}]}]}]}',
        b'{"patients":[{"visits":[{"laboratory":[{"item":"a","item":"a","value":1}]}]}]}',
        b'{"patients":[{"visits":[{}]}],"options":{"top_k":1,"top_k":2}}',
        b'{"patients":[{"visits":[{}]}],"options":{"top_k":1%s}}' % (b"0" * 5000),
        b'{"patients":[{"visits":[{}],"age":1%s}]}' % (b"0" * 5000),
        b'{"patients":[{"visits":[{}],"age":1e999}]}',
        b'{"patients":[{"visits":[{}],"age":NaN}]}',
        b'{"patients":[{"visits":[{}],"age":01}]}',
        b'{"patients":[{"visits":[{"diagnoses":[{"system":"a","code":"\\ud800"}]}]}]}',
        b'{"patients":[{"visits":[{"diagnoses":[{"system":"a","code":"\xff"}]}]}]}',
        b'{"patients":[{"visits":[{"diagnoses":[{"system":"a","code":"\n b"}]}]}]}',
        b'{"patients":[{"visits":[{},]}]}',
        b'{"patients":' + b"[" * 5000,
        b"{" * (schema.MAX_OBJECTS + 1),
    ],
)
def test_what_the_schema_refuses_is_not_read(body: bytes) -> None:
    assert by_the_schema(body) is None
    assert read(body) is None


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(WHOLE).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(WHOLE).encode(),
        json.dumps(of_code({"system": "icd9", "code": "icd9:428"})).encode(),
        json.dumps(of_code({"system": "\x0b", "code": "\x00"})).encode(),
        json.dumps(of_code({"system": "\u00e9", "code": "1"})).encode(),
    ],
)
def test_what_is_merely_unusual_is_left_to_the_schema(body: bytes) -> None:
    asked = by_the_schema(body)
    assert asked is not None
    assert read(body) is None
    assert told(asked._replace(patients=unpacked(packed(asked.patients)))) == told(asked)


PIECES = [
    *(b'"age":1,', b'"system":"icd9",', b'"visits":[{}],', b"{},", b'{"system":"a","code":"b"},'),
    *(b":", b'"', b",", b"{", b"}", b"[", b"]", b"\\", b" ", b"\n", b"\\u0041", b"\\ud83d"),
    *(b"0", b"-", b".", b"e9", b"-0", b"-0.0", b"1e-400", b"NaN", b"true", b"null", b"\xc3", b"\0"),
]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10_000),
            st.integers(0, 12),
            st.sampled_from(PIECES) | st.binary(max_size=3),
        ),
        max_size=3,
    )
)
@example([])
def test_a_damaged_request_is_read_as_the_schema_reads_it(
    damages: list[tuple[int, int, bytes]],
) -> None:
    body = json.dumps(WHOLE).encode()
    for place, length, piece in damages:
        at = place % len(body)
        body = body[:at] + piece + body[at + length :]
    assert_alike(body)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e12, 1e12) | st.integers(-(10**12), 10**12))
@example(-0.0)
@example(5e-324)
def test_values_are_read_to_the_bit(value: float) -> None:
    assert assert_alike(json.dumps(of_visit(laboratory=[{"item": "x", "value": value}])).encode())


def test_a_long_body_that_is_refused_takes_little_time() -> None:
    """Of four megabytes; what the schema then says takes about as long."""
    wrong = {"diagnoses": [1] * 128, "medications": [1] * 128, "laboratory": [1] * 128}
    bodies = [
        json.dumps({"patients": [{"visits": [wrong] * 7, "allergies": [1] * 64}] * 256}).encode(),
        b'{"patients":[%s]}' % b",".join([b"[]"] * 1_000_000),
        b'{"patients":[{"visits":[{}],"age":%s}]}' % (b"1" * 4_000_000),
        b'{"patients":[{"visits":[{}],"%s":1}]}' % (b"\\u0041" * 600_000),
        b'{"a":%s' % (b"[" * 4_000_000),
        b'{"patients":[{"visits":[{}],%s}]}' % b",".join(b'"k%d":1' % i for i in range(330_000)),
    ]
    for body in bodies:
        started = time.process_time()
        assert read(body) is None
        assert time.process_time() - started < 0.5
