"""What benchmarks/serving.py measures with: its clients, its invented bundle, its shares."""

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.endpoint import clients, invented
from benchmarks.endpoint.clients import Measured
from cafemed import paths, registry
from serve.recommender import Recommender
from serve.schema import RecommendRequest


@pytest.fixture(scope="module")
def program() -> Any:
    path = paths.PROJECT_DIR / "benchmarks" / "serving.py"
    spec = importlib.util.spec_from_file_location("benchmarks_serving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    """Answers each request after a while, in two pieces; keeps connections open."""

    def __init__(self, takes_s: float, statuses: tuple[int, ...] = (200,)) -> None:
        self.takes_s = takes_s
        self.statuses = statuses
        self.bodies: list[bytes] = []
        self.paths: set[bytes] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as incoming:
            number = 0
            while line := incoming.readline():
                self.paths.add(line.split()[1])
                length = 0
                while (header := incoming.readline()) != b"\r\n":
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.bodies.append(incoming.read(length))
                time.sleep(self.takes_s)
                status = self.statuses[number % len(self.statuses)]
                number += 1
                connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 6\r\n\r\nabc" % status)
                time.sleep(0.001)
                connection.sendall(b"def")

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(0.02, (200, 200, 503))
    yield server
    server.close()


def test_clients_count_every_answer_and_its_time(server: Server) -> None:
    seen = clients.measure(server.port, [{"a": 1}, {"b": 2}], 4, 0.1, 0.6, "/x")
    total = sum(seen.statuses.values())
    assert seen.rps == pytest.approx(total / 0.6)
    # Four clients, 21 ms an answer: 4 / 0.021 a second, less on a busy machine.
    assert 20 < seen.rps < 4 / 0.021 * 1.05
    assert seen.statuses[503] == pytest.approx(total / 3, abs=4)
    assert 21 <= seen.p50_ms <= seen.p99_ms
    assert 0 < seen.clients_share < 0.5
    assert total < seen.answers < 2 * total
    assert set(server.bodies) == {b'{"a": 1}', b'{"b": 2}'}
    assert server.paths == {b"/x/v1/recommend"}


def test_a_closed_connection_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def close() -> None:
            listening.accept()[0].close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(OSError, match=r"closed|reset"):
            clients.measure(port, [{}], 1, 0.0, 5.0)
        closing.join()


def test_the_invented_bundle_answers_as_many_medications_as_visits_have() -> None:
    bundle = invented.make_bundle(3)
    assert tuple(len(bundle.vocabularies[k]) for k in ("diagnosis", "procedure", "medication")) == (
        invented.SHAPE.sizes
    )
    recommender = Recommender(bundle, 1)
    requests = [RecommendRequest.model_validate(body) for body in invented.bodies(64, 3)]
    answers = [recommender.recommend(request)[0] for request in requests]
    assert all(answer.unknown_codes == [] for answer in answers)
    mean = np.mean([len(answer.medications) for answer in answers])
    assert mean == pytest.approx(invented.SHAPE.codes[2], rel=0.05)


def test_shares_are_of_answers_a_second(program: Any) -> None:
    seen = {
        "endpoint": Measured(300.0, 10.0, 40.0, {200: 9}),
        "noop": Measured(400.0, 1.0, 2.0, {200: 9}, clients_share=0.4),
        "plain": Measured(200.0, 1.0, 2.0, {200: 9}),
    }
    cpu_ms = {"endpoint": 2.0, "noop": 0.5, "plain": 4.0}
    found = program.compared(seen, cpu_ms)
    assert (found["share_of_noop"], found["share_of_plain"]) == (0.75, 1.5)
    assert found["p99_over_p50"] == 4.0
    assert (found["cpu_ms"], found["noop_cpu_ms"], found["plain_cpu_ms"]) == (2.0, 0.5, 4.0)
    assert found["clients_share"] == 0.4
    assert {*program.COLUMNS, *program.CPU_COLUMNS} == set(found)
    with pytest.raises(SystemExit, match="noop: expected status 200 alone"):
        program.compared(seen | {"noop": Measured(400.0, 1.0, 2.0, {200: 8, 503: 1})}, cpu_ms)


def test_the_median_round_is_taken_whole(program: Any) -> None:
    rounds = [Measured(rps, 1000 / rps, 2.0, {200: 1}) for rps in (300.0, 100.0, 200.0)]
    assert program.median(rounds) == rounds[2]


def test_every_patient_of_the_batch_is_scored(program: Any, tmp_path: Path) -> None:
    registry_dir = invented.write_registry(tmp_path, 3)
    bodies = invented.bodies(8, 3)
    threads = torch.get_num_threads()
    try:
        assert program.batch(registry_dir, bodies, 20, tmp_path) > 0
    finally:
        torch.set_num_threads(threads)
    answers = pq.read_table(tmp_path / "answers.parquet")
    assert answers["patient"].to_pylist() == list(range(20))
    assert answers["unknown_codes"].to_pylist() == [0] * 20
    recommender = Recommender.load(registry.resolve(registry_dir, "production"), 1)
    for i in (0, 7, 19):
        request = RecommendRequest.model_validate(bodies[i % 8])
        expected = [one.code for one in recommender.recommend(request)[0].medications]
        assert [one["code"] for one in answers["medications"][i].as_py()] == expected
