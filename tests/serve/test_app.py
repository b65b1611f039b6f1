"""The endpoint on a real Ray, over HTTP."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cafemed import bundle as bundles
from cafemed import registry
from cafemed.bundle import Bundle
from serve import app, launch
from serve.answers import RecommendResponse
from serve.example import example_request
from serve.recommender import Recommender
from serve.schema import RecommendRequest
from serve.settings import DeployConfig, HttpConfig, ServeConfig

MARKER = "MARKER4711"
SETTINGS = ServeConfig(max_replicas=1, refresh_s=0.2, drain_s=1)


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A short temporary folder; Ray's logs lie in it while it runs."""
    folder = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def registry_dir(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of this module's own."""
    own = tmp_path_factory.mktemp("own") / "registry"
    shutil.copytree(root / "registry" / "tiny", own)
    return own


@pytest.fixture(scope="module")
def url(registry_dir: Path, ray_folder: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setattr(tempfile, "tempdir", str(ray_folder))
        http = HttpConfig(port=launch.usable_port(HttpConfig(port=0)))
        application = app.application(registry_dir, SETTINGS)
        with launch.running(application, "tiny", DeployConfig(http=http, serve=SETTINGS)) as url:
            yield url
    assert list(ray_folder.iterdir()) == []


def bodies(bundle: Bundle) -> list[dict[str, Any]]:
    """Forty requests of one patient each, no two alike."""
    [patient] = example_request(bundle)["patients"]
    names = bundle.vocabularies["diagnosis"]
    requests = []
    for i in range(40):
        system, code = names[i % len(names)].split(":")
        first = {"diagnoses": [{"system": system, "code": code}] * (i // len(names) < 3)}
        visits = [first] * (i // len(names) + 1) + patient["visits"][: i % 4 + 1]
        requests.append({"patients": [{**patient, "visits": visits}]})
    return requests


def replicas() -> list[int]:
    """Process ids of the replicas of this process's own Ray."""
    below = psutil.Process().children(recursive=True)
    return [process.pid for process in below if "ServeReplica" in " ".join(process.cmdline())]


def expected(bundle: Bundle, body: dict[str, Any]) -> Any:
    return Recommender(bundle, 1).recommend(RecommendRequest.model_validate(body))


def test_answers_what_the_recommender_answers(url: str, served: Bundle) -> None:
    body = example_request(served)
    answer = RecommendResponse.model_validate(launch.ask(url, body))
    assert answer.recommendations == expected(served, body)
    assert answer.model.version == 1


def test_requests_answered_together_get_the_answers_of_each_alone(url: str, served: Bundle) -> None:
    async def post_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            posts = [client.post(f"{url}/v1/recommend", json=body) for body in bodies(served)]
            return await asyncio.gather(*posts)

    recommender = Recommender(served, 1)
    for body, answer in zip(bodies(served), asyncio.run(post_all()), strict=True):
        assert answer.status_code == 200
        alone = recommender.recommend(RecommendRequest.model_validate(body))
        assert RecommendResponse.model_validate(answer.json()).recommendations == alone


def test_the_answer_has_the_id_that_the_proxy_logs(url: str, served: Bundle) -> None:
    answer = httpx.post(f"{url}/v1/recommend", json=example_request(served))
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_bad_requests_are_refused_and_codes_never_logged(url: str, ray_folder: Path) -> None:
    code = {"system": "icd9", "code": MARKER}
    known = {"system": "icd9", "code": "4010"}
    unknown = {"patients": [{"visits": [{"diagnoses": [code, known]}]}]}
    assert launch.ask(url, unknown)["recommendations"][0]["unknown_codes"] == [
        {"visit": 0, "kind": "diagnosis", "code": f"icd9:{MARKER}"}
    ]
    code["system"] = MARKER
    answer = httpx.post(f"{url}/v1/recommend", json=unknown)
    assert answer.status_code == 422
    assert answer.json()["problems"][0]["field"] == "patients[0].visits[0].diagnoses[0].system"
    broken = f'{{"{MARKER}": [{MARKER}'.encode()
    json_type = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/recommend", content=broken, headers=json_type)
    assert answer.status_code == 422
    assert httpx.get(f"{url}/v1/codes?query={MARKER}").json() == {"codes": []}
    assert httpx.get(f"{url}/{MARKER}").status_code == 404
    logs = [path for path in ray_folder.rglob("*") if path.is_file()]
    texts = [path.read_text(errors="replace") for path in logs]
    assert any("POST /v1/recommend" in text for text in texts)  # they are the logs
    assert not [path for path, text in zip(logs, texts, strict=True) if MARKER in text]


def test_health_model_and_documentation(url: str) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/v1/model", "/v1/codes?query=401"):
        assert httpx.get(url + path).status_code == 200


def test_a_promoted_version_replaces_the_first_without_a_restart(
    url: str, registry_dir: Path, served: Bundle, other: Bundle, tmp_path: Path
) -> None:
    """Last, because it leaves version 2 behind."""
    before = replicas()
    bundles.write(tmp_path / "bundle", other)
    registry.promote(registry_dir, registry.publish(registry_dir, tmp_path / "bundle", {}))
    body = example_request(served)
    answers = {1: expected(served, body), 2: expected(other, body)}
    assert answers[1] != answers[2]
    deadline = time.monotonic() + 30
    seen: list[int] = []
    while seen[-10:] != [2] * 10 and time.monotonic() < deadline:
        answer = RecommendResponse.model_validate(launch.ask(url, body))
        assert answer.recommendations == answers[answer.model.version]
        seen.append(answer.model.version)
    assert seen == sorted(seen)
    assert seen[-1] == 2
    assert replicas() == before
    assert len(before) == 1
