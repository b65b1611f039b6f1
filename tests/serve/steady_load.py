"""Asks an endpoint at a steady rate from several clients, and holds every answer to its version's.

    python tests/serve/steady_load.py URL REQUESTS.json CLIENTS RATE COUNT

REQUESTS.json: `requests`, each the keyword arguments of Client.recommend; `expected`, by version,
the `recommendations` of each. Prints a line once every client has an answer, then, after COUNT
requests (0: once its standard input is closed), a JSON list with a Sent of each.
"""

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from cafemed.client import Client, ClientError


@dataclasses.dataclass
class Sent:
    """What became of a request.

    Attributes:
        at: when it was sent, as time.monotonic has it.
        seconds: until its answer, or until it was given up.
        attempts: 2 where the first failed.
        first: of the first attempt: the status, or 0 for a connection that broke.
        version: that answered; 0: none did.
        right: whether the answer is that version's, bit for bit.
        error: of the client, after its retry.
    """

    at: float
    seconds: float = 0.0
    attempts: int = 1
    first: int = 0
    version: int = 0
    right: bool = False
    error: str = ""


class Load:
    """The clients."""

    def __init__(self, url: str, content: dict[str, Any], clients: int, rate: float, count: int):
        self._url = url
        self._requests = content["requests"]
        self._expected = content["expected"]
        self._period_s = clients / rate
        self._clients = clients
        self._count = count
        self._stop = threading.Event()
        self._going = threading.Barrier(clients + 1)
        self._sent: list[Sent] = []

    def run(self) -> list[Sent]:
        threads = [threading.Thread(target=self._one, args=(i,)) for i in range(self._clients)]
        for thread in threads:
            thread.start()
        self._going.wait(timeout=60)
        print("going", flush=True)
        if not self._count:
            sys.stdin.read()
            self._stop.set()
        for thread in threads:
            thread.join()
        return sorted(self._sent, key=lambda sent: sent.at)

    def _one(self, place: int) -> None:
        """One client; it never catches up on what it missed while it waited for an answer."""
        attempts: list[int] = []

        def sleep(seconds: float) -> None:
            """What the client does between its attempts."""
            attempts.append(0)
            time.sleep(seconds)

        def received(response: httpx.Response) -> None:
            attempts[-1] = response.status_code

        with Client(self._url, sleep=sleep) as client:
            client._http.event_hooks = {"response": [received]}
            number = place
            attempts[:] = [0]
            try:
                self._ask(client, number % len(self._requests))
            except BaseException:
                self._going.abort()
                raise
            self._going.wait()
            due = time.monotonic() + self._period_s * place / self._clients
            while not self._stop.is_set() and (not self._count or number < self._count):
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(time.monotonic(), due + self._period_s)
                attempts[:] = [0]
                sent = self._ask(client, number % len(self._requests))
                sent.attempts, sent.first = len(attempts), attempts[0]
                self._sent.append(sent)
                number += self._clients

    def _ask(self, client: Client, which: int) -> Sent:
        sent = Sent(time.monotonic())
        try:
            answer = client.recommend(**self._requests[which])
            sent.version = answer["model"]["version"]
            sent.right = answer["recommendations"] == self._expected[str(sent.version)][which]
        except ClientError as err:
            sent.error = str(err)
        sent.seconds = time.monotonic() - sent.at
        return sent


def main() -> None:
    """See the module."""
    url, path, clients, rate, count = sys.argv[1:]
    with Path(path).open() as file:
        content = json.load(file)
    sent = Load(url, content, int(clients), float(rate), int(count)).run()
    print(json.dumps([dataclasses.asdict(each) for each in sent]))


if __name__ == "__main__":
    main()
