"""Clients that ask and ask again, each as soon as it has its answer; bare asyncio, one process.

A client library would cost more than the endpoint: this one writes prepared bytes and looks for the
end of each answer, 0.1 ms a request.
"""

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length:"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a number of clients saw.

    Attributes:
        rps: answers a second.
        p50_ms, p99_ms: of an answer's time.
        statuses: of all answers.
        clients_share: processor time that the clients took, in shares of a core: near 1 it is they
            who are measured.
        answers: all of them, those before it counted too.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    statuses: dict[int, int]
    clients_share: float = 0.0
    answers: int = 0


class _Client(asyncio.Protocol):
    def __init__(
        self,
        requests: Sequence[bytes],
        first: int,
        stop: float,
        seen: list[tuple[float, float, int]],
    ) -> None:
        self._requests = requests
        self._next = first
        self._stop = stop
        self._seen = seen
        self._buffer = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(_END_OF_HEAD)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        length = head[head.index(_LENGTH) + len(_LENGTH) :].split(b"\r\n")[0]
        if len(self._buffer) < end + len(_END_OF_HEAD) + int(length):
            return
        now = time.perf_counter()
        self._seen.append((now, now - self._started, int(head.split(b" ", 2)[1])))
        self._buffer = b""
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the endpoint closed the connection"))

    def _ask(self) -> None:
        self._started = time.perf_counter()
        if self._started > self._stop:
            self.done.set_result(None)
            self._transport.close()
            return
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1


def ready() -> None:
    """Nothing: called to have the process started, which takes a second."""


def measure(
    port: int,
    bodies: Sequence[dict[str, Any]],
    clients: int,
    warm_s: float,
    measured_s: float,
    prefix: str = "",
) -> Measured:
    """Asks POST <prefix>/v1/recommend at this machine's port.

    Args:
        port: of the endpoint.
        bodies: asked in turn; each client begins elsewhere.
        clients: at once.
        warm_s: asked before it counts.
        measured_s: that counts.
        prefix: of the path.

    Raises:
        ConnectionError: if a connection is closed.
    """
    requests = [_request(prefix, json.dumps(body).encode()) for body in bodies]
    return asyncio.run(_measure(port, requests, clients, warm_s, measured_s))


async def _measure(
    port: int, requests: Sequence[bytes], clients: int, warm_s: float, measured_s: float
) -> Measured:
    seen: list[tuple[float, float, int]] = []
    taken_s: list[float] = []
    asyncio.get_running_loop().call_later(warm_s, lambda: taken_s.append(time.process_time()))
    start = time.perf_counter() + warm_s
    stop = start + measured_s
    waiting = []
    for i in range(clients):
        first = i * len(requests) // clients
        _, client = await asyncio.get_running_loop().create_connection(
            lambda first=first: _Client(requests, first, stop, seen),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        waiting.append(client.done)
    await asyncio.gather(*waiting)
    taken_s.append(time.process_time())
    counted = [(took, status) for at, took, status in seen if start <= at <= stop]
    times = 1000 * np.array([took for took, _ in counted])
    return Measured(
        rps=len(counted) / measured_s,
        p50_ms=float(np.percentile(times, 50)),
        p99_ms=float(np.percentile(times, 99)),
        statuses=dict(Counter(status for _, status in counted)),
        clients_share=(taken_s[-1] - taken_s[0]) / measured_s,
        answers=len(seen),
    )


def _request(prefix: str, body: bytes) -> bytes:
    head = (
        f"POST {prefix}/v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
