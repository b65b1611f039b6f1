"""The endpoint as it runs: behind HAProxy, under load, watched, and while its model changes."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray.serve._private.http_util import set_socket_reuse_port

from cafemed import bundle as bundles
from cafemed import paths, registry
from cafemed.bundle import Bundle
from serve import app, launch
from serve.example import example_request
from serve.metrics import METRICS
from serve.recommender import Recommender
from serve.schema import RecommendRequest
from serve.settings import DeployConfig, HttpConfig, ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MARKER = "MARKER4711"


@dataclasses.dataclass(frozen=True)
class Running:
    """An endpoint of this test's own."""

    url: str
    registry_dir: Path
    ray_folder: Path

    def logs(self) -> dict[Path, str]:
        files = [path for path in self.ray_folder.rglob("*") if path.is_file()]
        return {path: path.read_text(errors="replace") for path in files}

    def scrape(self) -> str:
        """What Prometheus would get from the node."""
        import ray

        [node] = ray.nodes()
        page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
        return page.text


Start = Callable[..., Running]


@pytest.fixture
def start(root: Path, other: Bundle, tmp_path: Path) -> Iterator[Start]:
    """Starts an endpoint with these settings; version 2 is there, version 1 in production."""
    folder = Path(tempfile.mkdtemp(prefix="op-", dir="/tmp"))
    own = tmp_path / "registry"
    shutil.copytree(root / "registry" / "tiny", own)
    bundles.write(tmp_path / "bundle", other)
    registry.publish(own, tmp_path / "bundle", {})
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_METRICS_REPORT_INTERVAL_MS", "1000")
        patch.setattr(tempfile, "tempdir", str(folder))

        def run(proxy: str, **settings: Any) -> Running:
            config = ServeConfig(**{"max_replicas": 1, "refresh_s": 0.2, "drain_s": 2, **settings})
            http = HttpConfig(port=launch.usable_port(HttpConfig(port=0)), proxy=proxy)  # type: ignore[arg-type]
            deployed = DeployConfig(http=http, serve=config)
            application = app.application(own, config)
            url = ending.enter_context(launch.running(application, "tiny", deployed))
            return Running(url, own, folder)

        yield run
    left = [process for process in psutil.process_iter(["name"]) if str(folder) in command(process)]
    assert left == []
    shutil.rmtree(folder)


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


async def load(
    url: str, body: dict[str, Any], clients: int, until: Callable[[], bool]
) -> list[httpx.Response | str]:
    """Several clients, each of which asks again and again; answers, or the errors' names."""
    seen: list[httpx.Response | str] = []

    async def one() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while not until():
                try:
                    seen.append(await client.post(f"{url}/v1/recommend", json=body))
                except httpx.HTTPError as err:
                    seen.append(type(err).__name__)

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen


def wait_for(happened: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = happened()
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError("it did not happen in time")


@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_under_overload_every_refusal_says_when_to_come_back(
    start: Start, proxy: str, served: Bundle
) -> None:
    running = start(proxy, max_admitted_requests=2, batch_wait_s=0.05)
    body = example_request(served)
    expected = Recommender(served, 1).recommend(RecommendRequest.model_validate(body))
    codes = [m.code for m in expected[0].medications]
    ends = time.monotonic() + 3
    answers = asyncio.run(load(running.url, body, 40, lambda: time.monotonic() > ends))
    counted = Counter(a if isinstance(a, str) else a.status_code for a in answers)
    assert set(counted) == {200, 503}
    assert counted[503] > counted[200] > 10
    for answer in answers:
        assert not isinstance(answer, str)
        if answer.status_code == 503:
            assert 1 <= int(answer.headers["Retry-After"]) <= 30
            assert "too many requests" in answer.json()["message"]  # ours, not Ray's
        else:
            [recommendation] = answer.json()["recommendations"]
            assert [m["code"] for m in recommendation["medications"]] == codes
        assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_behind_haproxy_ports_are_closed_requests_drained_and_nothing_is_left(
    start: Start, served: Bundle
) -> None:
    running = start("haproxy", batch_wait_s=1.0)
    below = psutil.Process().children(recursive=True)
    haproxies = [process for process in below if process.name() == "haproxy"]
    listening = [
        connection.laddr
        for process in haproxies
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len({address.port for address in listening}) == 3
    assert {address.ip for address in listening} == {"127.0.0.1"}
    answer = httpx.post(
        f"{running.url}/v1/recommend",
        json=example_request(served),
        headers={"X-Request-ID": "mine-1"},
        timeout=30,
    )
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"

    async def stop_while_asked() -> httpx.Response:
        """Deletes the application while its only replica works on a request, for a second."""
        async with httpx.AsyncClient(timeout=30) as client:
            asked = asyncio.create_task(
                client.post(f"{running.url}/v1/recommend", json=example_request(served))
            )
            await asyncio.sleep(0.3)
            await asyncio.to_thread(launch.drain, "tiny")
            return await asked

    last = asyncio.run(stop_while_asked())
    assert last.status_code == 200
    # And the replica told of it before it ended.
    told = [text for path, text in running.logs().items() if "replica_tiny_Endpoint" in path.name]
    assert any(f'"{last.json()["request_id"]}"' in text for text in told)
    name = "ray_cafemed_requests_total"
    wait_for(lambda: value(running.scrape(), name, route="/v1/recommend", status="200") == 2)


def test_promoted_and_rolled_back_under_load_every_answer_is_one_versions(
    start: Start, served: Bundle, other: Bundle, tmp_path: Path
) -> None:
    """In turn: promote, roll back, promote a bundle with an edited weight, roll that back."""
    running = start("haproxy")
    own = running.registry_dir
    shutil.copytree(registry.resolve(own, 2), tmp_path / "edited")
    body = example_request(served)
    asked = RecommendRequest.model_validate(body)
    expected = {
        number: [
            (m.code, m.probability)
            for m in Recommender(bundle, number).recommend(asked)[0].medications
        ]
        for number, bundle in ((1, served), (2, other))
    }
    assert expected[1] != expected[2]
    published = registry.publish(own, tmp_path / "edited", {})
    weights = registry.resolve(own, published) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40
    weights.write_bytes(bytes(content))
    done = False

    def answering() -> int:
        number: int = httpx.get(f"{running.url}/readyz", timeout=60).json()["model"]["version"]
        return number

    def refusals() -> list[str]:
        return [text for text in running.logs().values() if "staying with version 1" in text]

    async def change() -> None:
        nonlocal done
        await asyncio.sleep(1)
        for move, seen in (
            (lambda: registry.promote(own, 2), lambda: answering() == 2),
            (lambda: registry.rollback(own), lambda: answering() == 1),
            (lambda: registry.promote(own, published), refusals),
            (lambda: registry.rollback(own), lambda: answering() == 1),
            (lambda: registry.promote(own, 2), lambda: answering() == 2),
        ):
            await asyncio.to_thread(move)
            await asyncio.to_thread(wait_for, seen)
            await asyncio.sleep(0.5)
        done = True

    async def both() -> list[httpx.Response | str]:
        answers, _ = await asyncio.gather(load(running.url, body, 8, lambda: done), change())
        return answers

    answers = asyncio.run(both())
    versions: list[int] = []
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer.status_code == 200
        content_of = answer.json()
        number = content_of["model"]["version"]
        medications = content_of["recommendations"][0]["medications"]
        assert [(m["code"], m["probability"]) for m in medications] == expected[number]
        versions.append(number)
    assert len(versions) > 50
    assert set(versions) == {1, 2}  # the edited one never
    assert (versions[0], versions[-1]) == (1, 2)
    # To 2, back, to 2 again; requests in flight around a change may add some.
    assert sum(a != b for a, b in itertools.pairwise(versions)) >= 3
    assert any("model.safetensors: expected SHA-256" in text for text in refusals())

    def told(before: Collection[str] = ()) -> set[str]:
        """Samples of a replica that refused one version and serves 2, none of them from before."""
        page, found = running.scrape(), set[str]()
        for name, wanted in (("refused_versions_total", 1), ("model_version", 2)):
            # One that was killed is told of for some time.
            own = samples(page, f"ray_cafemed_{name}").items()
            new = {labels: number for labels, number in own if labels not in before}
            if set(new.values()) != {wanted}:
                return set()
            found |= set(new)
        return found

    before = wait_for(told)
    # A replica that starts while the promoted version does not work.
    registry.promote(own, published)
    [replica] = [
        p for p in psutil.Process().children(recursive=True) if "ServeReplica" in command(p)
    ]
    replica.kill()
    replica.wait(10)

    def version() -> int:
        try:
            answer = httpx.post(f"{running.url}/v1/recommend", json=body, timeout=5)
        except httpx.HTTPError:
            return 0
        return int(answer.json()["model"]["version"]) if answer.status_code == 200 else 0

    assert wait_for(version) == 2
    wait_for(lambda: told(before))


def samples(page: str, name: str) -> dict[str, float]:
    """Labels, as they are written, and value of the samples with that name."""
    lines = (line for line in page.splitlines() if line.startswith(f"{name}{{"))
    pairs = (line.removeprefix(name).rsplit(" ", 1) for line in lines)
    return {labels: float(number) for labels, number in pairs}


def value(page: str, name: str, **labels: str) -> float:
    """The sum of the samples with that name and these labels."""
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    found = samples(page, name).items()
    return sum(number for written, number in found if all(w in written for w in wanted))


def test_every_metric_is_on_the_nodes_port_and_nothing_of_a_patient_anywhere(
    start: Start, served: Bundle
) -> None:
    """With a shadow, whose answers change nothing; metrics and all logs are looked through."""
    running = start(
        "default", shadow=2, shadow_share=1.0, shadow_num_cpus=0.1, drift_patients=10, num_cpus=0.5
    )
    body = example_request(served)
    marked = json.loads(json.dumps(body))
    marked["patients"][0]["visits"][0]["diagnoses"].append({"system": "icd9", "code": MARKER})
    expected = Recommender(served, 1).recommend(RecommendRequest.model_validate(body))

    def ask(content: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{running.url}/v1/recommend", json=content, timeout=30)

    for _ in range(20):
        answer = ask(marked)
        [recommendation] = answer.json()["recommendations"]
        codes = [m["code"] for m in recommendation["medications"]]
        assert codes == [m.code for m in expected[0].medications]
    assert ask({"patients": [{"visits": [{"diagnoses": [{"code": MARKER}]}]}]}).status_code == 422
    unfit = {"patients": [{"visits": [{"diagnoses": [{"system": MARKER, "code": MARKER}]}]}]}
    assert ask(unfit).status_code == 422

    assert httpx.get(f"{running.url}/v1/codes?query={MARKER}").json() == {"codes": []}
    assert httpx.get(f"{running.url}/{MARKER}").status_code == 404

    def complete() -> str:
        page = running.scrape()
        # Not all of them are exported at the same moment.
        compared = value(page, "ray_cafemed_shadow_requests_total", result="compared")
        measured = value(page, "ray_cafemed_shadow_jaccard_count")
        asked = value(page, "ray_cafemed_request_latency_ms_count", route="/v1/recommend")
        refused = value(page, "ray_cafemed_requests_total", status="422")
        there = compared >= 18 and measured >= 18 and asked == 22 and refused == 2
        return page if there and value(page, "ray_cafemed_score_drift_psi") > 0 else ""

    page = wait_for(complete)
    unseen = {"cafemed_refused_requests", "cafemed_refused_versions"}  # nothing was refused
    for metric in METRICS.values():
        for name in metric.exported if metric.name not in unseen else ():
            assert f"\n{name}{{" in page, name
    shown_by_the_dashboard(page, unseen)
    assert value(page, "ray_cafemed_requests_total", route="/v1/recommend", status="200") == 20
    assert value(page, "ray_cafemed_patients_total") == 20
    assert value(page, "ray_cafemed_unknown_codes_total") == 20
    assert value(page, "ray_cafemed_request_latency_ms_count", route="/v1/recommend") == 22
    assert value(page, "ray_cafemed_shadow_version") == 2
    assert value(page, "ray_cafemed_shadow_jaccard_count") >= 18
    assert value(page, "ray_cafemed_score_drift_psi") > 0
    assert MARKER not in page
    logs = running.logs()
    lines = [
        json.loads(line)
        for path, text in logs.items()
        if "replica_tiny_Endpoint" in path.name
        for line in text.splitlines()
    ]
    told = [line for line in lines if line.get("route") == "/v1/recommend" and "ms" in line]
    assert Counter(line["status"] for line in told) == {200: 20, 422: 2}
    assert {"request_id", "run_patients", "model_version", "patients", "key"} <= set(told[0])
    assert not [path for path, text in logs.items() if MARKER in text]


def shown_by_the_dashboard(page: str, unseen: set[str]) -> None:
    """Every selector of the dashboard finds something, for the application as it is called."""
    text = (paths.PROJECT_DIR / "platform" / "dashboards" / "serving.json").read_text()
    selectors = re.findall(r'(ray_\w+)\{((?:[^}\\]|\\")*)\}', text)
    assert len(selectors) > 20
    for name, selected in selectors:
        if name.removeprefix("ray_").removesuffix("_total") in unseen:
            continue
        wanted = dict(re.findall(r'(\w+)=~?\\"([^"]*)\\"', selected))
        if wanted.get("status") == "5..":  # nothing went wrong
            continue
        application = wanted.pop("application")
        assert application == "$application"
        found = [dict(re.findall(r'(\w+)="([^"]*)"', written)) for written in samples(page, name)]
        assert any(
            labels["application"] == "tiny"
            and all(re.fullmatch(value, labels[label]) for label, value in wanted.items())
            for labels in found
        ), (name, selected)


def test_replicas_go_to_none_and_come_back(start: Start, served: Bundle) -> None:
    running = start(
        "haproxy",
        min_replicas=0,
        look_back_s=10.5,
        upscale_delay_s=0.0,
        downscale_delay_s=1.0,
        downscale_to_zero_delay_s=1.0,
    )

    def replicas() -> int:
        below = psutil.Process().children(recursive=True)
        return sum("ServeReplica" in command(process) for process in below)

    def ask() -> int:
        body = example_request(served)
        answer = httpx.post(f"{running.url}/v1/recommend", json=body, timeout=60)
        assert "recommendations" in answer.json()
        return answer.status_code

    with another_on(8500) as strangers:
        assert ask() == 200
        assert replicas() == 1
        wait_for(lambda: replicas() == 0, 90)
        started = time.monotonic()
        assert ask() == 200  # the first one waits for a replica
        assert time.monotonic() - started < 30
        assert replicas() == 1
    assert strangers == []


@contextlib.contextmanager
def another_on(port: int) -> Iterator[list[bytes]]:
    """Another endpoint's proxy on Ray's usual port, as Ray listens there; what it was asked."""
    asked: list[bytes] = []
    with socket.socket() as listening:
        set_socket_reuse_port(listening)
        listening.bind(("127.0.0.1", port))
        listening.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        asked.append(connection.recv(1000))
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
