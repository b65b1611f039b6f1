"""What is told about requests, through the application itself."""

import asyncio
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from ray._common.formatters import JSONFormatter  # as in a replica
from ray.serve._private.logging_utils import ServeContextFilter
from ray.serve.context import _RequestContext, _serve_request_context

from cafemed import paths
from cafemed.bundle import Bundle
from serve.admission import Admission
from serve.api import create_api
from serve.encoding import EncodedPatient
from serve.example import example_request
from serve.metrics import METRICS
from serve.observing import Observer, OwnId
from serve.recommender import Recommender
from serve.schema import RecommendRequest

MARKER = "MARKER4711"


class Noted:
    """Numbers as they come; refuses what serve.metrics does not define."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[str, float] = {}
        self.values: dict[str, list[float]] = {}

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        assert METRICS[name].kind == "counter"
        assert set(labels) == set(METRICS[name].labels)
        self.counts[(name, *labels.values())] += number  # type: ignore[assignment]

    def set(self, name: str, value: float) -> None:
        assert METRICS[name].kind == "gauge"
        self.gauges[name] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        assert METRICS[name].kind == "histogram"
        assert set(labels) == set(METRICS[name].labels)
        self.values.setdefault(name, []).append(value)


class Client:
    """Calls the application in this process."""

    def __init__(self, api: FastAPI) -> None:
        self._api = api

    def get(self, path: str, **content: Any) -> httpx.Response:
        return self.request("GET", path, **content)

    def post(self, path: str, **content: Any) -> httpx.Response:
        return self.request("POST", path, **content)

    def request(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                return await client.request(method, path, **content)

        return asyncio.run(call())


class Service:
    def __init__(self, bundle: Bundle) -> None:
        self.recommender = Recommender(bundle, 7)

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[NDArray[np.float32]]:
        return list(recommender.probabilities(patients))


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def admission() -> Admission:
    return Admission(4)


@pytest.fixture
def observer(noted: Noted, written: io.StringIO, served: Bundle) -> Observer:
    handler = logging.StreamHandler(written)
    handler.setFormatter(JSONFormatter())
    handler.addFilter(ServeContextFilter())  # as in a replica
    handler.addFilter(OwnId())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    observer = Observer(noted, logger, drift_patients=10)
    observer.serves(7, served.reference.scores)
    return observer


@pytest.fixture
def client(served: Bundle, observer: Observer, admission: Admission) -> Client:
    api = create_api(Service(served), admission=admission, observer=observer)
    return Client(api)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_recommendation_is_a_line_and_counted(
    client: Client, noted: Noted, written: io.StringIO, served: Bundle
) -> None:
    body = example_request(served)
    body["patients"] *= 2  # the same one twice
    body["patients"][0]["visits"][0]["diagnoses"][:0] = [{"system": "icd9", "code": MARKER}]
    answer = client.post("/v1/recommend", json=body, headers={"X-Request-ID": "id-1"}).json()
    [line] = lines(written)
    told = {k: line[k] for k in ("request_id", "method", "route", "status", "patients", "key")}
    assert told == {
        "request_id": "id-1",
        "method": "POST",
        "route": "/v1/recommend",
        "status": 200,
        "patients": 2,
        "key": None,
    }
    assert line["model_version"] == 7
    assert line["ms"] > 0
    visits = [v for patient in body["patients"] for v in patient["visits"]]
    codes = sum(len(v.get(f, [])) for v in visits for f in ("diagnoses", "procedures"))
    codes += sum(len(v.get(f, [])) for v in visits for f in ("medications", "laboratory"))
    sizes = [len(r["medications"]) for r in answer["recommendations"]]
    assert noted.counts == {
        ("cafemed_requests", "/v1/recommend", "200"): 1,
        ("cafemed_patients",): 2,
        ("cafemed_codes",): codes,
        ("cafemed_unknown_codes",): 2,
        ("cafemed_medications",): sum(sizes),
        ("cafemed_pairs",): sum(n * (n - 1) // 2 for n in sizes),
        ("cafemed_interacting_pairs",): sum(
            len(r["interactions"]) for r in answer["recommendations"]
        ),
    }
    assert len(noted.values["cafemed_request_latency_ms"]) == 1
    assert noted.gauges["cafemed_model_version"] == 7


@pytest.mark.parametrize("header", [f"{MARKER} john smith", "mine-1"])
def test_the_log_has_the_id_of_the_answer_and_not_the_header(
    client: Client, written: io.StringIO, served: Bundle, header: str
) -> None:
    """Ray gives every line of a request its header as it came."""
    token = _serve_request_context.set(_RequestContext(request_id=header))
    try:
        headers = {"X-Request-ID": header}
        answer = client.post("/v1/recommend", json=example_request(served), headers=headers)
        [line] = lines(written)
        assert line["request_id"] == answer.json()["request_id"]
        assert MARKER not in written.getvalue()
        # What is logged before and after the request is ours has no id at all.
        record = logging.makeLogRecord({"msg": "x"})
        assert ServeContextFilter().filter(record)
        assert vars(record)["request_id"] == header
        assert OwnId().filter(record)
        assert "request_id" not in vars(record)
    finally:
        _serve_request_context.reset(token)


def test_nothing_of_a_request_is_told(client: Client, noted: Noted, written: io.StringIO) -> None:
    """A marked code, system, field, path, query, header and request id."""
    code = {"system": "icd9", "code": MARKER}
    posts: list[Any] = [
        {"patients": [{"visits": [{"diagnoses": [code]}]}]},
        {"patients": [{"visits": [{"diagnoses": [{**code, "system": MARKER}]}]}]},
        {"patients": [{MARKER: 1}], "age": 71.25},
    ]
    for body in posts:
        client.post("/v1/recommend", json=body, headers={"X-Request-ID": f"{MARKER} x"})
    client.post("/v1/recommend", content=f"{{{MARKER}".encode())
    client.get(f"/{MARKER}?{MARKER}=1", headers={"X-Name": MARKER})
    client.get(f"/v1/codes?query={MARKER}")
    client.request("DELETE", "/v1/recommend")
    assert len(lines(written)) == 7
    assert MARKER not in written.getvalue()
    assert "71.25" not in written.getvalue()
    assert MARKER not in str(noted.counts)
    routes = {labels[0] for name, *labels in noted.counts if name == "cafemed_requests"}
    assert routes == {"/v1/recommend", "/v1/codes", "other"}


def test_health_is_counted_and_not_a_line(
    client: Client, noted: Noted, written: io.StringIO
) -> None:
    assert client.get("/healthz").status_code == 200
    assert noted.counts[("cafemed_requests", "/healthz", "200")] == 1
    assert lines(written) == []


def test_a_refusal_says_when_to_come_back(
    client: Client,
    noted: Noted,
    written: io.StringIO,
    admission: Admission,
    served: Bundle,
) -> None:
    body = example_request(served)
    started = [admission.enter() for _ in range(4)]
    refused = client.post("/v1/recommend", json=body)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "retry in 1 s" in refused.json()["message"]
    assert refused.json()["request_id"] == lines(written)[0]["request_id"]
    assert noted.counts[("cafemed_refused_requests",)] == 1
    assert noted.counts[("cafemed_requests", "/v1/recommend", "503")] == 1
    assert client.get("/readyz").status_code == 200
    assert started[0] is not None
    admission.leave(started[0])
    assert client.post("/v1/recommend", json=body).status_code == 200


def test_a_fault_is_told_without_its_message(
    client: Client, written: io.StringIO, served: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError(MARKER)

    monkeypatch.setattr(Recommender, "probabilities", fail)
    assert client.post("/v1/recommend", json=example_request(served)).status_code == 500
    assert lines(written)[-1]["status"] == 500
    assert MARKER not in written.getvalue()


def test_drift_is_of_the_models_own_scores(
    client: Client, observer: Observer, noted: Noted, served: Bundle
) -> None:
    """Against numpy's histogram and the formula written out."""
    observer.report(3, 5)
    assert "cafemed_score_drift_psi" not in noted.gauges
    assert noted.gauges["cafemed_requests_in_progress"] == 3
    assert noted.gauges["cafemed_waiting_patients"] == 5
    body = example_request(served)
    client.post("/v1/recommend", json={**body, "options": {"max_ddi_rate": 0.0}})
    observer.report(0, 0)
    recommender = Recommender(served, 7)
    patients = recommender.encode(RecommendRequest.model_validate(body))
    counts, _ = np.histogram(recommender.probabilities(patients), served.reference.scores.edges)
    o = np.maximum(counts / counts.sum(), 1e-4)
    e = np.maximum(served.reference.scores.shares, 1e-4)
    by_hand = sum((o[i] - e[i]) * np.log(o[i] / e[i]) for i in range(len(o)))
    assert noted.gauges["cafemed_score_drift_psi"] == pytest.approx(by_hand)
    observer.serves(8, served.reference.scores)  # another model: measured anew
    assert math.isnan(noted.gauges["cafemed_score_drift_psi"])
    noted.gauges.clear()
    observer.report(0, 0)
    assert "cafemed_score_drift_psi" not in noted.gauges


def test_what_another_version_answers_is_no_drift_of_the_served_one(
    client: Client, observer: Observer, noted: Noted, served: Bundle
) -> None:
    """As a request does that was begun before a change of version."""
    observer.serves(8, served.reference.scores)
    client.post("/v1/recommend", json=example_request(served))  # version 7
    observer.report(0, 0)
    assert math.isnan(noted.gauges.get("cafemed_score_drift_psi", math.nan))
    observer.serves(7, served.reference.scores)
    client.post("/v1/recommend", json=example_request(served))
    observer.report(0, 0)
    assert not math.isnan(noted.gauges["cafemed_score_drift_psi"])


OPTIONS = [{"explain": True}, {"max_ddi_rate": 0.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("unusual", [False, True])
def test_options_that_make_much_work_take_more_places(
    served: Bundle, observer: Observer, noted: Noted, options: dict[str, Any], unusual: bool
) -> None:
    """Refused where others have them, whichever way a request is read."""
    body = example_request(served)
    [patient] = body["patients"]
    patient["visits"] = patient["visits"][:1] * 12
    if unusual:
        patient["visits"][0]["diagnoses"][0]["code"] += "\t"  # is escaped, and left to the schema
    body["patients"] *= 8
    admission = Admission(3)
    client = Client(create_api(Service(served), admission=admission, observer=observer))
    other = admission.enter(2)
    assert other is not None
    assert client.post("/v1/recommend", json=body).status_code == 200
    refused = client.post("/v1/recommend", json={**body, "options": options})
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) == admission.retry_after_s
    assert "too many requests" in refused.json()["message"]
    assert (admission.refused, admission.in_progress) == (1, 1)
    assert noted.counts[("cafemed_refused_requests",)] == 1
    admission.leave(other)
    assert client.post("/v1/recommend", json={**body, "options": options}).status_code == 200
    three = admission.enter(3)
    assert three is not None  # all places have been given back
    assert admission.in_progress == 1


def dashboard() -> dict[str, Any]:
    path = paths.PROJECT_DIR / "platform" / "dashboards" / "serving.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    exported = {name for metric in METRICS.values() for name in metric.exported}
    shown = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names, panel["title"]
            assert names <= exported, panel["title"]
            shown |= names
    own = {name for name in exported if not name.endswith(("_sum", "_count"))}
    assert own - shown == set()  # and it shows all of them


def test_the_dashboard_asks_by_labels_that_the_metrics_have() -> None:
    """Those of the metric, those that Ray adds, and of a histogram's buckets their edge."""
    own = {name: metric.labels for metric in METRICS.values() for name in metric.exported}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            asked = target["expr"]
            for name, selected in re.findall(r"\b(ray_\w+)\{([^}]*)\}", asked):
                labels = {*own[name], "application", "deployment", "replica"}
                labels |= {"le"} if name.endswith("_bucket") else set()
                wanted = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selected))
                assert "application" in wanted <= labels, asked
                grouped = [w for by in re.findall(r"by \(([^)]*)\)", asked) for w in by.split(", ")]
                assert set(grouped) <= labels, asked
                told = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                assert told <= set(grouped), asked
                assert ("histogram_quantile" in asked) == (grouped == ["le"]), asked
            # The variables are Grafana's own, and the one that is listed.
            variables = set(re.findall(r"\$(\w+)", asked))
            assert variables <= {"application", "__rate_interval", "__range"}, asked


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    content = dashboard()
    variables = [variable["name"] for variable in content["templating"]["list"]]
    assert variables == ["datasource", "application"]
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)
        assert (panel["type"] == "row") == (not references)
        assert panel["type"] in ("row", "stat", "timeseries")
    assert content["title"]
    assert content["schemaVersion"] >= 36
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in content["panels"]:
        assert set(panel["gridPos"]) == {"h", "w", "x", "y"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
