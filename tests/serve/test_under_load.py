"""Under a steady load of several clients things die, are replaced, or come and go; answers stay.

Every answer is compared bit for bit with what the version that it names gives. The figures are
printed (`pytest -s`); docs/serving.md has those of a quiet run.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import TypeAdapter

from cafemed import bundle as bundles
from cafemed import paths, registry
from cafemed.bundle import Bundle
from cafemed.errors import ConfigError
from serve import app, haproxy, launch
from serve.answers import Recommendation
from serve.recommender import Recommender
from serve.schema import RecommendRequest
from serve.settings import DeployConfig, HttpConfig, ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 12
RATE = 100.0  # requests a second
#: How long a request waits for others where something dies, so that about ten are in progress then.
WAIT_S = 0.1
MANY = 2500  # where something dies
SOME = 800
#: Of the requests under which a replica or a node died, those whose first attempt may fail.
LARGEST_SHARE = 1 / 1000

_ANSWERS = TypeAdapter(list[Recommendation])


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the clients saw."""

    what: str
    sent: list[dict[str, Any]]

    @property
    def again(self) -> list[dict[str, Any]]:
        """Those whose first attempt failed."""
        return [sent for sent in self.sent if sent["attempts"] > 1 or not sent["version"]]

    @property
    def lost(self) -> list[dict[str, Any]]:
        """Those without an answer after that."""
        return [sent for sent in self.sent if not sent["version"]]

    @property
    def versions(self) -> Counter[int]:
        return Counter(sent["version"] for sent in self.sent if sent["version"])

    @property
    def silence_s(self) -> float:
        """The longest time without an answer to anybody."""
        answered = sorted(sent["at"] + sent["seconds"] for sent in self.sent if sent["version"])
        return max(after - before for before, after in itertools.pairwise(answered))

    def say(self) -> None:
        """Prints the figures."""
        sent = self.sent
        seconds = sent[-1]["at"] - sent[0]["at"]
        firsts = Counter(one["first"] or "broken connection" for one in self.again)
        wrong = sum(not one["right"] for one in sent if one["version"])
        print(
            f"\n{self.what}: {len(sent)} requests in {seconds:.0f} s, {wrong} answers wrong, "
            f"first attempts failed {len(self.again)} {dict(firsts)}, lost "
            f"{len(self.lost)}, slowest {max(one['seconds'] for one in sent):.2f} s, "
            f"versions {dict(self.versions)}"
        )

    def holds(self) -> None:
        """Whatever happens, an answer is right."""
        assert [one for one in self.sent if one["version"] and not one["right"]] == []

    def survived(self) -> None:
        """What a replica's or a node's death may cost."""
        self.holds()
        assert len(self.again) <= LARGEST_SHARE * len(self.sent), self.again
        assert self.lost == []

    def unnoticed(self) -> None:
        """What may cost nothing at all."""
        self.holds()
        assert self.again == []


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An endpoint of this test's own, and the requests that it is asked."""

    url: str
    registry_dir: Path
    requests: Path

    @contextlib.contextmanager
    def asked(
        self, what: str, count: int, clients: int = CLIENTS, rate: float = RATE
    ) -> Iterator[list[Seen]]:
        """Asks while the block runs and until `count` requests were sent (0: the block's end).

        The list has the one thing seen, after the block.
        """
        program = [sys.executable, str(Path(__file__).with_name("steady_load.py"))]
        arguments = [self.url, str(self.requests), str(clients), str(rate), str(count)]
        process = subprocess.Popen(
            program + arguments,
            cwd=paths.PROJECT_DIR,
            env=os.environ | {"PYTHONPATH": str(paths.PROJECT_DIR)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        seen: list[Seen] = []
        try:
            assert process.stdout.readline() == "going\n"
            time.sleep(1)
            yield seen
            assert process.poll() is None, "the load ended too early"
            printed, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            seen.append(Seen(what, json.loads(printed)))
            seen[0].say()
        finally:
            process.kill()
            process.wait()


def write_requests(folder: Path, versions: dict[int, Bundle]) -> Path:
    """Requests of 1 to 3 drawn patients, some with options, and what each version answers."""
    rng = np.random.default_rng(7)
    vocabularies = versions[1].vocabularies

    def codes(kind: str, most: int) -> list[dict[str, str]]:
        found = rng.choice(vocabularies[kind], rng.integers(1, most + 1), replace=False)
        return [dict(zip(("system", "code"), code.split(":"), strict=True)) for code in found]

    def visit() -> dict[str, Any]:
        return {
            "diagnoses": codes("diagnosis", 8),
            "procedures": codes("procedure", 3),
            "medications": codes("medication", 6),
        }

    requests: list[dict[str, Any]] = []
    for number in range(40):
        patients = [
            {"visits": [visit() for _ in range(rng.integers(1, 5))]}
            for _ in range(rng.integers(1, 4))
        ]
        options: list[dict[str, Any]] = [{}, {"max_ddi_rate": 0.1}, {"top_k": 3}, {}]
        requests.append({"patients": patients, **options[number % 4]})
    expected: dict[int, list[Any]] = {}
    for version, bundle in versions.items():
        recommender = Recommender(bundle, version)
        expected[version] = []
        for one in requests:
            body = {"patients": one["patients"], "options": {**one}}
            del body["options"]["patients"]
            answer = recommender.recommend(RecommendRequest.model_validate(body))
            expected[version].append(json.loads(_ANSWERS.dump_json(answer)))
    assert all(a != b for a, b in zip(*expected.values(), strict=True))
    path = folder / "requests.json"
    path.write_text(json.dumps({"requests": requests, "expected": expected}))
    return path


@pytest.fixture(scope="module")
def registry_and_requests(
    root: Path, served: Bundle, other: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A registry with versions 1, in production, and 2; and write_requests."""
    folder = tmp_path_factory.mktemp("load")
    own = folder / "registry"
    shutil.copytree(root / "registry" / "tiny", own)
    bundles.write(folder / "bundle", other)
    registry.publish(own, folder / "bundle", {})
    return own, write_requests(folder, {1: served, 2: other})


def free_port() -> int:
    """One that the system gives to nobody on its own, as it does to Ray's processes meanwhile."""
    for port in random.SystemRandom().sample(range(20000, 30000), 20):
        with contextlib.suppress(ConfigError):
            return launch.usable_port(HttpConfig(port=port))
    raise AssertionError("no free port")


Start = Callable[..., Endpoint]


@pytest.fixture
def start(registry_and_requests: tuple[Path, Path]) -> Iterator[Start]:
    """Starts an endpoint with these settings behind this proxy, on a Ray of its own."""
    own, requests = registry_and_requests
    folder = Path(tempfile.mkdtemp(prefix="ul-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setattr(tempfile, "tempdir", str(folder))

        def run(proxy: str, **settings: Any) -> Endpoint:
            config = ServeConfig(**{"refresh_s": 0.5, "num_cpus": 0.5, **settings})
            http = HttpConfig(port=free_port(), proxy=proxy)  # type: ignore[arg-type]
            deployed = DeployConfig(http=http, serve=config)
            url = ending.enter_context(
                launch.running(app.application(own, config), "tiny", deployed)
            )
            return Endpoint(url, own, requests)

        yield run
    shutil.rmtree(folder, ignore_errors=True)


def below(process: psutil.Process, name: str) -> list[psutil.Process]:
    """The processes under that one whose title has that name."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if name in " ".join(child.cmdline()) or name == child.name():
                found.append(child)
    return found


def replicas() -> list[psutil.Process]:
    """The replicas of this process's own Ray."""
    return below(psutil.Process(), "ServeReplica")


def wait_for(happened: Callable[[], Any], timeout_s: float = 60.0) -> float:
    """Waits; gives how long it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() < began + timeout_s, "it did not happen in time"
        time.sleep(0.1)
    return time.monotonic() - began


def ready(count: int) -> bool:
    """Whether so many replicas answer, as Serve itself says."""
    from ray import serve

    status = serve.status().applications["tiny"].deployments["Endpoint"]
    return status.replica_states == {"RUNNING": count}


@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_a_replica_that_is_killed_costs_at_most_one_request_in_a_thousand(
    start: Start, proxy: str
) -> None:
    endpoint = start(proxy, min_replicas=2, max_replicas=2, batch_wait_s=WAIT_S)
    with endpoint.asked(f"kill -9 of a replica, {proxy}", MANY) as seen:
        first, second = replicas()
        first.kill()
        took = wait_for(lambda: len({*replicas()} - {first}) == 2 and ready(2))
        assert second.is_running()
    print(f"two replicas again after {took:.1f} s")
    seen[0].survived()
    assert seen[0].versions == {1: MANY}


def test_models_and_replicas_come_and_go(start: Start) -> None:
    """Scaled 1→2 by the load, promoted, rolled back, scaled 2→1."""
    endpoint = start(
        "haproxy",
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=0.2,
        look_back_s=10.5,
        upscale_delay_s=0.0,
        downscale_delay_s=1.0,
    )
    with endpoint.asked("scaled up", 0) as seen:
        wait_for(lambda: ready(2))
        time.sleep(3)
    seen[0].unnoticed()
    with endpoint.asked("promoted", SOME) as seen:
        registry.promote(endpoint.registry_dir, 2)
    seen[0].unnoticed()
    assert set(seen[0].versions) == {1, 2}
    with endpoint.asked("rolled back", SOME) as seen:
        registry.rollback(endpoint.registry_dir)
    seen[0].unnoticed()
    assert set(seen[0].versions) == {1, 2}
    with endpoint.asked("scaled down", 0, clients=2, rate=4) as seen:
        wait_for(lambda: ready(1), 90)
        wait_for(lambda: len(replicas()) == 1)
        time.sleep(3)
    seen[0].unnoticed()


@pytest.mark.parametrize(
    ("proxy", "title"),
    [("haproxy", "haproxy"), ("haproxy", "HAProxyManager"), ("default", "ProxyActor")],
)
def test_a_proxy_that_is_killed_is_replaced_and_waited_for(
    start: Start, proxy: str, title: str
) -> None:
    """It, or the process of Ray's that looks after it; what was in progress is asked once more."""
    endpoint = start(proxy, min_replicas=1, max_replicas=1)
    with endpoint.asked(f"kill -9 of {title}", 0) as seen:
        wait_for(lambda: len(below(psutil.Process(), title)) == 1)  # none that is being replaced
        [killed] = below(psutil.Process(), title)
        killed.kill()
        wait_for(lambda: {*below(psutil.Process(), title)} - {killed})
        time.sleep(5)
    assert killed not in below(psutil.Process(), title)
    assert len(below(psutil.Process(), "haproxy")) == (1 if proxy == "haproxy" else 0)
    seen[0].holds()
    assert seen[0].lost == []
    print(f"nobody was answered for {seen[0].silence_s:.1f} s")
    assert seen[0].silence_s < 12  # Ray's own settings take 30


DEPLOY = """
import dataclasses, sys
import ray
from pathlib import Path
from ray import serve
from serve import app, launch
from serve.settings import HttpConfig, ServeConfig
address, port, registry_dir, wait_s = sys.argv[1:]
ray.init(address, logging_level=50, log_to_driver=False)
# One address for both nodes: the second one's proxy would find the port taken.
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
config = ServeConfig(min_replicas=2, max_replicas=2, batch_wait_s=float(wait_s))
application = app.application(Path(registry_dir), config)
print(launch.deploy(application, "tiny", HttpConfig(port=int(port))))
"""


@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_a_node_that_is_lost_costs_at_most_one_request_in_a_thousand(
    registry_and_requests: tuple[Path, Path], ray_nodes: ModuleType, proxy: str
) -> None:
    """Every process of the node ends at once; the clients ask the other node's proxy."""
    own, requests = registry_and_requests
    port = free_port()
    with contextlib.ExitStack() as around:
        if proxy == "haproxy":
            around.enter_context(haproxy.environment(HttpConfig()))
        names = ("RAY_SERVE_", "CAFEMED_HAPROXY")
        more = {name: value for name, value in os.environ.items() if name.startswith(names)}
        more |= haproxy.ON_NODES
        nodes = around.enter_context(ray_nodes.head(cpus=1, more=more))
        nodes.add(cpus=1)
        nodes.wait()
        done = nodes.python(DEPLOY, nodes.address, str(port), str(own), str(WAIT_S))
        assert done.returncode == 0, done.stdout + done.stderr + nodes.log()
        endpoint = Endpoint(done.stdout.split()[-1], own, requests)
        head, lost = (psutil.Process(process.pid) for process in nodes.processes)
        for node in (head, lost):
            assert len(below(node, "ServeReplica")) == 1
        with endpoint.asked(f"loss of a node, {proxy}", MANY) as seen:
            for process in [*lost.children(recursive=True), lost]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    seen[0].survived()
    assert seen[0].versions == {1: MANY}
