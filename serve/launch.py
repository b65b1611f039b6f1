"""Runs the application on a cluster or on a Ray of our own, asks it, and takes it down again."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import httpx

from cafemed import cluster, console
from cafemed.errors import ConfigError, UserError
from serve.settings import DeployConfig, HttpConfig


class EndpointError(UserError):
    """The endpoint could not be started, or does not answer."""


def on_cluster() -> bool:
    """Says whether this process belongs to a running cluster, as a submitted job does."""
    return bool(os.environ.get("RAY_ADDRESS"))


def usable_port(http: HttpConfig) -> int:
    """Gives the configured port, or a free one for 0.

    Raises:
        ConfigError: if the port is taken or the host is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            # As a server does: a port whose last connections are still closing is not taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            port: int = probe.getsockname()[1]
    except OSError as err:
        raise ConfigError(
            f"http.port: cannot listen on {http.host}:{http.port} ({err.strerror}); choose "
            "another, or 0 for a free one"
        ) from err
    return port


def deploy(application: Any, name: str, http: HttpConfig) -> str:
    """Starts the application on the connected Ray and gives its URL once it can answer.

    Args:
        application: what serve.app builds.
        name: of the application.
        http: address and port of the HTTP proxies; where Serve runs on the cluster already, they
            must be those it was started with.

    Raises:
        EndpointError: if the application does not start.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # Every node that has a replica; on a Ray of our own that is one.
    try:
        with console.waiting("starting the endpoint"):
            serve.start(
                proxy_location="EveryNode", http_options={"host": http.host, "port": http.port}
            )
            serve.run(application, name=name, route_prefix="/")
    except RuntimeError as err:
        reason = str(err).strip().splitlines()[-1]
        raise EndpointError(f"the application {name!r} did not start: {reason}") from err
    return f"http://{_reachable(http.host)}:{http.port}"


def ask(url: str, body: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
    """Posts a request to the endpoint and gives its answer.

    Raises:
        EndpointError: if it does not answer, or refuses.
    """
    try:
        response = httpx.post(f"{url}/v1/recommend", json=body, timeout=timeout_s)
    except httpx.HTTPError as err:
        raise EndpointError(
            f"{url}: no answer ({type(err).__name__}); where Serve runs on the cluster already, "
            "http.host and http.port must be those it was started with"
        ) from err
    if response.status_code != httpx.codes.OK:
        raise EndpointError(f"{url}: expected status 200, got {response.status_code}")
    answer: dict[str, Any] = response.json()
    return answer


def drain(name: str) -> None:
    """Takes the application down after its replicas have finished what they have begun."""
    from ray import serve

    # Not serve.shutdown(): the rest of Serve ends with the Ray that we end next, and killing its
    # controller first makes the raylet complain on the terminal.
    serve.delete(name)


def wait_for_stop() -> None:
    """Waits until the process is asked to stop: returns on SIGTERM.

    Raises:
        KeyboardInterrupt: on SIGINT (Ctrl-C).
    """
    stop = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        stop.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(application: Any, name: str, config: DeployConfig) -> Iterator[str]:
    """Runs the application and yields its URL; on a Ray of our own, for the block alone.

    Args:
        application: what serve.app builds.
        name: of the application.
        config: where and how; `http.port` must be a real one.

    Raises:
        EndpointError: if the application does not start.
        ConfigError: if no cluster answers at RAY_ADDRESS, or this machine has less than a replica
            reserves.
    """
    replicas = config.serve.max_replicas
    cpus, gpus = replicas * config.serve.num_cpus, replicas * config.serve.num_gpus
    with contextlib.ExitStack() as ending, cluster.ray_cluster(cpus, gpus) as where:
        console.say("deploy", where)
        reserved = {
            "CPU": ("serve.num_cpus", config.serve.num_cpus),
            "GPU": ("serve.num_gpus", config.serve.num_gpus),
        }
        cluster.require_resources("a replica", reserved)
        to_drain = False
        try:
            url = deploy(application, name, config.http)
            # A cluster keeps the application; with `once` nobody else can be waiting.
            to_drain = not on_cluster() and not config.once
            yield url
        finally:
            ending.enter_context(uninterrupted())
            if to_drain:
                drain(name)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps a second Ctrl-C from cutting a shutdown short, which would leave processes behind."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reachable(host: str) -> str:
    """The address to ask at, for one to listen on."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
