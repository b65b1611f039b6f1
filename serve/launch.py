"""Runs the application on a cluster or on a Ray of our own, asks it, and takes it down again."""

import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from cafemed import cluster, console
from cafemed.client import KEY_VARIABLE, Client, UnreachableError
from cafemed.errors import ConfigError, UserError
from serve import access, again, haproxy, tls
from serve.settings import AccessConfig, DeployConfig, HttpConfig


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


@contextlib.contextmanager
def _held(http: HttpConfig) -> Iterator[None]:
    """No other endpoint of this machine starts at this port during the block.

    Ray's proxies listen seconds after the port was looked at, and beside each other where they are
    of one user: each would then answer some of what the other is asked.

    Raises:
        ConfigError: if another endpoint is there, or just starting.
    """
    # A name of the system's alone: no file is left, whatever becomes of this process.
    with socket.socket(socket.AF_UNIX) as holder:
        try:
            if sys.platform == "linux":  # elsewhere there are no such names
                holder.bind(f"\0cafemed/{http.host}:{http.port}")
        except OSError as err:
            raise ConfigError(
                f"http.port: another endpoint has {http.host}:{http.port}, or is about to; choose "
                "another, or 0 for a free one"
            ) from err
        yield


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
            options = {"host": http.host, "port": http.port, **tls.http_options(http)}
            # Nor do Ray's own processes log requests: a path may hold what was searched for.
            logs = {"encoding": "JSON", "enable_access_log": False}
            serve.start(proxy_location="EveryNode", http_options=options, logging_config=logs)
            serve.run(application, name=name, route_prefix="/")
    except RuntimeError as err:
        reason = _said_by_a_replica(name) or str(err).strip().splitlines()[-1]
        raise EndpointError(f"the application {name!r} did not start: {reason}") from err
    scheme = "http" if http.tls_certificate is None else "https"
    return f"{scheme}://{_reachable(http.host)}:{http.port}"


def _said_by_a_replica(name: str) -> str | None:
    """The last line of what a replica of the application ended with, if one did."""
    from ray import serve

    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    messages = [deployment.message.strip() for deployment in deployments]
    return next((message.splitlines()[-1] for message in messages if message), None)


def can_ask(config: AccessConfig) -> bool:
    """Says whether this process may ask: nobody needs a key, or the environment holds one."""
    return config.auth == "none" or bool(os.environ.get(KEY_VARIABLE))


def ask(
    url: str,
    body: Mapping[str, Any],
    timeout_s: float = 60.0,
    verify: ssl.SSLContext | bool = True,
) -> dict[str, Any]:
    """Asks the endpoint about the patients of a request's body and gives its answer.

    Raises:
        EndpointError: if it does not answer.
        ClientError: if it refuses.
    """
    try:
        with Client(url, timeout_s=timeout_s, verify=verify) as client:
            return client.recommend(body["patients"])
    except UnreachableError as err:
        raise EndpointError(
            f"{err}; where Serve runs on the cluster already, http.host and http.port must be "
            "those it was started with"
        ) from err


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
    cpus += config.serve.shadow_num_cpus if config.serve.shadow is not None else 0.0
    with contextlib.ExitStack() as ending, _ray(config.http, cpus, gpus) as where:
        console.say("deploy", where)
        reserved = {
            "CPU": ("serve.num_cpus", config.serve.num_cpus),
            "GPU": ("serve.num_gpus", config.serve.num_gpus),
        }
        cluster.require_resources("a replica", reserved)
        # Where Serve runs already, it listens where it was told to then.
        access.require_guarded(access.listening_host() or config.http.host, config.serve.access)
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
def _ray(http: HttpConfig, cpus: float, gpus: float) -> Iterator[str]:
    """As cluster.ray_cluster, with HAProxy where the settings say so."""
    with contextlib.ExitStack() as around:
        with_haproxy = haproxy.is_on(http, on_cluster())
        if not on_cluster():
            around.enter_context(_held(http))
            if with_haproxy:
                around.enter_context(haproxy.environment(http))
            else:
                around.enter_context(haproxy.without())
                around.enter_context(again.environment())
        tls.require_spoken(http.tls_certificate is not None)
        where = around.enter_context(cluster.ray_cluster(cpus, gpus))
        yield f"{where}; {'HAProxy' if with_haproxy else 'Ray Serve itself'} in front"


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
