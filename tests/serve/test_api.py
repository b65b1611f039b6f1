import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cafemed.bundle import Bundle
from serve import schema
from serve.answers import RecommendResponse
from serve.api import create_api
from serve.encoding import EncodedPatient
from serve.example import example_request
from serve.recommender import Recommender
from serve.schema import RecommendRequest

MARKER = "MARKER4711"


class Direct:
    """A service without Ray, queue or batch."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.failure: Exception | None = None

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        return list(recommender.probabilities(patients))


@pytest.fixture(scope="module")
def service(served: Bundle) -> Direct:
    return Direct(Recommender(served, 3))


class Client:
    """Calls an ASGI application in this process."""

    def __init__(self, api: FastAPI) -> None:
        self.transport = httpx.ASGITransport(app=api)

    def get(self, path: str) -> httpx.Response:
        return self.send("GET", path)

    def post(self, path: str, **content: Any) -> httpx.Response:
        return self.send("POST", path, **content)

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://t") as client:
                return await client.request(method, path, **content)

        return asyncio.run(call())


@pytest.fixture
def client(service: Direct) -> Iterator[Client]:
    yield Client(create_api(service))
    service.failure = None


def body(*diagnoses: tuple[str, str]) -> dict[str, Any]:
    codes = [{"system": system, "code": code} for system, code in diagnoses]
    return {"patients": [{"visits": [{"diagnoses": codes}]}]}


def test_answers_what_the_recommender_answers(
    client: Client, service: Direct, served: Bundle
) -> None:
    request = example_request(served)
    got = client.post("/v1/recommend", json=request)
    assert got.status_code == 200
    response = RecommendResponse.model_validate(got.json())
    expected = service.recommender.recommend(RecommendRequest.model_validate(request))
    assert response.recommendations == expected
    assert (response.model.name, response.model.version) == ("cafemed", 3)


def test_answers_come_in_the_order_asked(client: Client, served: Bundle) -> None:
    [known] = example_request(served)["patients"]
    [unknown] = body(("icd9", MARKER), ("icd9", "4010"))["patients"]
    got = client.post("/v1/recommend", json={"patients": [unknown, known, unknown]}).json()
    numbers = [len(r["unknown_codes"]) for r in got["recommendations"]]
    assert numbers == [1, 0, 1]


def test_the_request_id_is_the_callers_where_it_is_harmless(client: Client) -> None:
    def answered(header: str) -> str:
        got = client.post("/v1/recommend", json=body(), headers={"X-Request-ID": header}).json()
        return str(got["request_id"])

    assert answered("abc-1") == "abc-1"
    assert answered("a b\tc") != "a b\tc"
    assert answered("") != answered("")


def test_model_card_health_and_documentation(client: Client) -> None:
    assert client.get("/v1/model").json()["num_medications"] == 12
    assert client.get("/healthz").json() == {"status": "ok"}
    model = {"name": "cafemed", "version": 3}
    assert client.get("/readyz").json() == {"status": "ok", "model": model}
    assert client.get("/docs").status_code == 404  # Swagger UI would come from another host
    documented = client.get("/openapi.json").json()
    schemas = documented["components"]["schemas"]
    value = schemas["LaboratoryValue"]
    assert schemas["Visit"]["properties"]["laboratory"]["items"]["$ref"].endswith("LaboratoryValue")
    assert set(value["required"]) == {"item", "value"}
    assert value["properties"]["value"]["type"] == "number"
    assert "laboratory" in schemas["UnknownCode"]["properties"]["kind"]["enum"]
    paths = documented["paths"]
    assert {"/v1/recommend", "/v1/codes", "/v1/model", "/healthz", "/readyz"} <= set(paths)
    statuses = ["200", "400", "401", "403", "408", "413", "415", "422", "429", "431", "500", "503"]
    assert sorted(paths["/v1/recommend"]["post"]["responses"]) == statuses


@pytest.mark.parametrize(
    ("sent", "field", "said"),
    [
        (b"{", "body", "not JSON"),
        (b"", "body", "required"),
        (b"[1]", "body", "object"),
        (b"\xff\xfe", "body", "not JSON"),
        (b"[" * 100_000, "body", "nested too deeply"),
        (b'{"patients": %s}' % (b'[{"visits":' * 20_000), "body", "nested too deeply"),
        (b'{"patients": [], "patients": [1]}', "body", "a field is given twice in one object"),
        (b'{"a": 1, "a": 1, "patients": [{"visits": [{}]}]}', "body", "given twice"),
        (b'{"patients": [{"visits": [{}], "age": 1%s}]}' % (b"0" * 5000), "body", "many digits"),
        (b'{"patients": [{"visits": [{}], "age": 1%s}]}' % (b"0" * 4000), "patients[0].age", ""),
        (b'{"patients": [{"visits": [{}], "age": 1e999}]}', "patients[0].age", "finite"),
        (b'{"patients": [{"visits": [{}], "age": -1}]}', "patients[0].age", "greater than"),
        (b'{"patients": [%s{}]}' % (b"{}," * 200_000), "body", "objects"),
        (b"{%s}" % b",".join(b'"k%d":1' % i for i in range(40)), "body", "more than 32 fields"),
        (b'{"patients": "\xff"}', "body", "not JSON"),
        (b'{"patients": [{"visits": [{}], "age": NaN}]}', "patients[0].age", "finite"),
        (b'{"patients": [{"visits": [{"diagnoses": 1}]}]}', "patients[0].visits[0].dia", "list"),
        (
            b'{"patients": [{"visits": [{"diagnoses": [{"system": "x", "code": "1"}]}]}]}',
            "patients[0].visits[0].diagnoses[0].system",
            "expected one of icd10, icd9",
        ),
        (
            b'{"patients": [{"visits": [{"diagnoses": [{"system": "icd9", "code": "\\ud800"}]}]}]}',
            "patients[0].visits[0].diagnoses[0].code",
            "unicode",
        ),
    ],
)
def test_a_bad_request_gets_422_with_the_field(
    client: Client, sent: bytes, field: str, said: str
) -> None:
    got = client.post("/v1/recommend", content=sent, headers={"Content-Type": "application/json"})
    assert got.status_code == 422
    [problem] = got.json()["problems"]
    assert problem["field"].startswith(field)
    assert said in problem["message"]


def test_other_routes_and_methods_are_refused_alike(client: Client) -> None:
    assert client.get("/v2").status_code == 404
    assert client.get("/v1/recommend").status_code == 405
    assert client.get("/v2").json()["message"] == "Not Found"
    assert client.get("/v1/recommend").headers["allow"] == "POST"


def test_a_request_wrong_throughout_gets_a_bounded_answer(client: Client) -> None:
    wrong = {"x" * 10_000: 1, "patients": [{"visits": [{}], "age": -1}] * 256}
    got = client.post("/v1/recommend", json=wrong)
    assert got.status_code == 422
    fields = [problem["field"] for problem in got.json()["problems"]]
    assert fields == ["patients[0].age", "x" * 200]  # of a list, the first wrong one
    assert len(got.content) < 10_000


def test_a_flood_of_mistakes_is_no_work(client: Client) -> None:
    """Each list tells of its first wrong entry: all of this body's would take many seconds."""
    wrong = {"diagnoses": [1] * 128, "medications": [1] * 128, "laboratory": [1] * 128}
    request = {"patients": [{"visits": [wrong] * 7, "allergies": [1] * 64}] * 256}
    started = time.process_time()
    got = client.post("/v1/recommend", json=request)
    assert time.process_time() - started < 2.0
    fields = [problem["field"] for problem in got.json()["problems"]]
    lists = ("visits[0].diagnoses", "visits[0].medications", "visits[0].laboratory", "allergies")
    assert sorted(fields) == sorted(f"patients[0].{one}[0]" for one in lists)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused(client: Client, announced: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(schema.MAX_BODY_BYTES // 65536 + 1):
            yield b" " * 65536

    content = b" " * (schema.MAX_BODY_BYTES + 1) if announced else chunks()
    headers = {"Content-Type": "application/json"}
    got = client.post("/v1/recommend", content=content, headers=headers)
    assert got.status_code == 413
    assert str(schema.MAX_BODY_BYTES) in got.json()["message"]


def test_a_failure_says_and_logs_nothing_of_the_request(
    client: Client, service: Direct, caplog: pytest.LogCaptureFixture
) -> None:
    service.failure = KeyError(MARKER)
    with caplog.at_level(logging.DEBUG):
        got = client.post("/v1/recommend", json=body(("icd9", MARKER), ("icd9", "4010")))
    assert got.status_code == 500
    assert MARKER not in got.text
    assert "Traceback" not in got.text
    assert MARKER not in caplog.text
    assert f"request {got.json()['request_id']} failed: KeyError at " in caplog.text


def test_no_log_line_holds_a_code(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        known = body(("icd9", MARKER), ("icd9", "4010"))
        assert client.post("/v1/recommend", json=known).status_code == 200
        client.post("/v1/recommend", json=body(("icd9", MARKER)))
        client.post("/v1/recommend", json=body(("icd9", MARKER), (MARKER, "1")))
        client.post("/v1/recommend", json={MARKER: [MARKER]})
    assert MARKER not in caplog.text


def several(served: Bundle, number: int) -> list[dict[str, Any]]:
    """Patients with visits, some of them with allergies."""
    rng = np.random.default_rng(0)
    patients = []
    for p in range(number):
        visits = [
            {
                "diagnoses": [
                    dict(zip(("system", "code"), name.split(":"), strict=True))
                    for name in rng.choice(served.vocabularies["diagnosis"], 3, replace=False)
                ],
                "medications": [
                    dict(zip(("system", "code"), name.split(":"), strict=True))
                    for name in rng.choice(served.vocabularies["medication"], p % 4, replace=False)
                ],
            }
            for _ in range(1 + p % 3)
        ]
        allergies = [str(rng.choice(["A01BC", "B", "C02"]))] if p % 2 else []
        patients.append({"visits": visits, "age": 20.0 + p, "allergies": allergies})
    return patients


@pytest.mark.parametrize(
    "options",
    [{}, {"max_ddi_rate": 0.1}, {"max_ddi_rate": 0.2, "top_k": 3}, {"top_k": 2, "explain": True}],
)
def test_a_whole_answer_is_the_same_alone_and_in_every_position(
    client: Client, served: Bundle, options: dict[str, Any]
) -> None:
    patients = several(served, 7)

    def ask(asked: list[dict[str, Any]]) -> list[Any]:
        got = client.post("/v1/recommend", json={"patients": asked, "options": options})
        assert got.status_code == 200
        return [json.dumps(one) for one in got.json()["recommendations"]]

    alone = [ask([patient])[0] for patient in patients]
    assert len(set(alone)) == 7
    for turn in range(7):
        assert ask([*patients[turn:], *patients[:turn]]) == [*alone[turn:], *alone[:turn]]
    assert ask(patients[:1] * 8) == alone[:1] * 8


@pytest.mark.parametrize(
    ("number", "options", "elsewhere"),
    [(1, {}, False), (1, {"max_ddi_rate": 0.1}, True), (1, {"explain": True}, True), (9, {}, True)],
)
def test_what_takes_long_is_kept_off_the_event_loop(
    service: Direct,
    served: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    options: dict[str, Any],
    elsewhere: bool,
) -> None:
    threads: set[int] = set()
    answer = service.recommender.answer

    def watched(*args: Any) -> Any:
        threads.add(threading.get_ident())
        return answer(*args)

    monkeypatch.setattr(service.recommender, "answer", watched)
    asked = {"patients": several(served, number), "options": options}
    assert Client(create_api(service)).post("/v1/recommend", json=asked).status_code == 200
    assert (threads != {threading.get_ident()}) == elsewhere


def test_a_patient_mostly_unknown_is_refused_and_no_code_named(
    client: Client, service: Direct
) -> None:
    known, unknown = ("icd9", "4010"), ("icd9", MARKER)
    [half], [more] = (
        body(known, unknown)["patients"],
        body(known, unknown, (" ICD9", MARKER.lower()), ("icd9", "4321"))["patients"],
    )
    assert client.post("/v1/recommend", json={"patients": [half]}).status_code == 200
    got = client.post("/v1/recommend", json={"patients": [half, more]})
    assert got.status_code == 422
    [problem] = got.json()["problems"]
    assert problem["field"] == "patients[1]"
    assert problem["message"] == "67% of the codes are unknown to the model, at most 50% may be"
    assert MARKER not in got.text
    lenient = Client(create_api(service, max_unknown_share=0.7))
    assert lenient.post("/v1/recommend", json={"patients": [more]}).status_code == 200
    strict = Client(create_api(service, max_unknown_share=0.0))
    assert strict.post("/v1/recommend", json={"patients": [half]}).status_code == 422
    assert strict.post("/v1/recommend", json=body()).status_code == 200


def test_codes_are_searched(client: Client) -> None:
    def found(**query: Any) -> list[str]:
        got = client.send("GET", "/v1/codes", params=query)
        assert got.status_code == 200
        return [f"{c['kind']} {c['system']}:{c['code']}" for c in got.json()["codes"]]

    assert found(query="401.0") == ["diagnosis icd9:4010"]
    assert found(query="99", kind="procedure", limit=2) == [
        "procedure icd9:990",
        "procedure icd9:991",
    ]
    assert len(found()) == 20
    for wrong, field in (
        ({"limit": 0}, "limit"),
        ({"limit": schema.MAX_CODES_FOUND + 1}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"kind": "drug"}, "kind"),
        ({"query": "x" * (schema.MAX_QUERY_LENGTH + 1)}, "query"),
    ):
        got = client.send("GET", "/v1/codes", params=wrong)
        assert got.status_code == 422
        assert [problem["field"] for problem in got.json()["problems"]] == [field]


def test_probabilities_survive_json_to_the_bit(
    client: Client, service: Direct, served: Bundle
) -> None:
    request = example_request(served)
    got = client.post("/v1/recommend", json=request).json()["recommendations"][0]
    encoded = service.recommender.encode(RecommendRequest.model_validate(request))
    [row] = service.recommender.probabilities(encoded)
    sent = np.array([m["probability"] for m in got["medications"]], np.float32)
    np.testing.assert_array_equal(sent, np.sort(row[row >= 0.5])[::-1])


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=4,
)


def mostly(*usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*usual, *usual, *usual, ANYTHING)


KNOWN = [
    ("icd9", "401.0"),
    ("ICD9 ", "4011"),
    ("icd10", "i10"),
    (" atc", "A01BC02"),
    ("icd9", "99.1"),
]
CODE = st.sampled_from(KNOWN).map(lambda c: {"system": c[0], "code": c[1]}) | st.fixed_dictionaries(
    {"system": mostly(st.sampled_from(["icd9", "x", ""])), "code": mostly(st.text(max_size=70))},
    optional={"odd": ANYTHING},
)
CODES = mostly(st.lists(CODE, max_size=6))
LABORATORY = st.fixed_dictionaries(
    {"item": mostly(st.sampled_from(["50801", "x"])), "value": mostly(st.floats(-1e13, 1e13))}
)
VISIT = st.fixed_dictionaries(
    {},
    optional={
        "diagnoses": CODES,
        "procedures": CODES,
        "medications": CODES,
        "laboratory": mostly(st.lists(LABORATORY, max_size=3)),
        "odd": ANYTHING,
    },
)
PATIENT = st.fixed_dictionaries(
    {"visits": mostly(st.lists(mostly(VISIT), max_size=4))},
    optional={
        "age": mostly(st.floats(-10, 140), st.integers(-10, 140)),
        "sex": mostly(st.sampled_from(["female", "male", "unknown"])),
        "allergies": mostly(
            st.lists(mostly(st.sampled_from(["A01", "C", "", " a01b. "])), max_size=3)
        ),
        "odd": ANYTHING,
    },
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_ddi_rate": mostly(st.floats(-0.1, 1.1)),
        "top_k": mostly(st.integers(-1, 5)),
        "explain": mostly(st.booleans()),
        "odd": ANYTHING,
    },
)
BODY = st.fixed_dictionaries(
    {"patients": mostly(st.lists(mostly(PATIENT), max_size=3))},
    optional={"options": mostly(OPTIONS), "odd": ANYTHING},
)
MANY = [{"system": "icd9", "code": "401.0"}] * 10_000


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mostly(BODY))
@example({"patients": [{"visits": [{"diagnoses": MANY}]}]})
@example({"patients": [{"visits": [{}] * 10_000}]})
@example({"patients": [{"visits": [{"diagnoses": MANY[:2]}], "allergies": ["A"] * 10_000}]})
@example({"patients": [{"visits": [{}], "age": float("nan")}], "options": {"top_k": 10**400}})
@example({"patients": [{"visits": [{}]}] * 10_000, "options": {"max_ddi_rate": float("inf")}})
def test_odd_requests_get_an_answer_or_a_field(client: Client, sent: Any) -> None:
    """Never a 5xx, whatever is sent; what is refused is named, and quoted nowhere."""
    content = json.dumps(sent).encode()
    got = client.post(
        "/v1/recommend", content=content, headers={"Content-Type": "application/json"}
    )
    if got.status_code == 200:
        assert len(got.json()["recommendations"]) == len(sent["patients"])
        for recommendation in got.json()["recommendations"]:
            assert all(0.5 <= m["probability"] <= 1 for m in recommendation["medications"])
    else:
        assert got.status_code == 422, got.text
        problems = got.json()["problems"]
        assert problems
        assert all(problem["field"] and problem["message"] for problem in problems)
        known = ("patients", "options", "body")
        names = (*known, *sent) if isinstance(sent, dict) else known
        for problem in problems:
            assert problem["field"].startswith(tuple(name[:200] for name in names))
    assert len(got.content) < 1_000_000
