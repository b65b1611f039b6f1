"""The deploy job with keys and a certificate, and without what it takes to listen elsewhere."""

import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from cafemed import paths
from cafemed.bundle import Bundle
from cafemed.client import KEY_VARIABLE, Client, RefusedError, UnreachableError
from cafemed.errors import ConfigError
from serve import haproxy, keys, tls
from serve.example import example_request
from serve.settings import HttpConfig

JOB = paths.PROJECT_DIR / "jobs" / "deploy.py"
MARKER = "MARKER4711"


def test_a_certificate_that_is_of_no_use_is_refused(
    certificates: ModuleType, tmp_path: Path
) -> None:
    certificate, key = certificates.make(tmp_path)
    _, other = certificates.make(tmp_path, "other")

    def refused(*pair: object) -> str:
        names = [str(one) for one in pair]
        with pytest.raises(ConfigError) as caught:
            tls.require_usable(HttpConfig(tls_certificate=names[0], tls_key=names[1]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "tls_key: expected the absolute path" in refused(certificate, tmp_path / "none")
    assert "tls_certificate: expected the absolute path" in refused("own.crt", key)
    assert "KEY_VALUES_MISMATCH" in refused(certificate, other)
    assert "not a certificate in PEM and its key" in refused(key, key)
    assert "expected a key without a password" in refused(certificate, key.with_suffix(".locked"))
    with pytest.raises(ConfigError, match="expected both, or neither"):
        HttpConfig(tls_key=str(key))
    tls.require_usable(HttpConfig(tls_certificate=str(certificate), tls_key=str(key)))
    tls.require_usable(HttpConfig())


def test_a_clusters_haproxy_has_to_speak_what_is_asked_of_the_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes its certificate from the nodes' environment, and none from Ray."""
    monkeypatch.delenv(haproxy.CERTIFICATE, raising=False)
    asked = HttpConfig(tls_certificate="/a.crt", tls_key="/a.key")
    given = {"ssl_keyfile": "/a.key", "ssl_certfile": "/a.crt"}
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    tls.require_spoken(is_asked=True)
    tls.require_unused_behind_haproxy()
    assert tls.http_options(asked) == given
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert tls.http_options(asked) == {}
    tls.require_spoken(is_asked=False)
    with pytest.raises(ConfigError, match=r"started without one.* set CAFEMED_HAPROXY_CERTIFICATE"):
        tls.require_spoken(is_asked=True)
    with pytest.raises(ConfigError, match=r"http_options\.ssl_certfile: HAProxy takes no"):
        tls.require_unused_behind_haproxy()
    monkeypatch.setenv(haproxy.CERTIFICATE, "/a.pem")
    tls.require_spoken(is_asked=True)
    with pytest.raises(ConfigError, match=r"set http\.tls_certificate and http\.tls_key to it"):
        tls.require_spoken(is_asked=False)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short folder for the job's home and temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="cm", dir="/tmp"))
    (folder / "tmp").mkdir()
    yield folder
    shutil.rmtree(folder)


def start(root: Path, home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, str(JOB), f"paths.root={root}", "name=tiny", *arguments],
        env=own,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http.host=0.0.0.0"], "'none' is only for the loopback (http.host=127.0.0.1)"),
        pytest.param(["serve.access.auth=keys"], "no API keys", marks=pytest.mark.slow),
    ],
)
def test_without_keys_nothing_is_started(
    root: Path, home: Path, arguments: list[str], said: str
) -> None:
    job = start(root, home, "once=true", *arguments)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    [line] = errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert list((home / "tmp").iterdir()) == []


@pytest.mark.slow
def test_once_needs_a_key_to_ask_with(root: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "registry", tmp_path / "registry")
    keys.create(paths.keys_file(tmp_path, "tiny"), "ward-3", 600)
    job = start(tmp_path, home, "once=true", "serve.access.auth=keys")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 2
    assert f"set {KEY_VARIABLE} to one of the API keys" in errors


def wait_for(job: subprocess.Popen[str], text: str) -> str:
    assert job.stdout is not None
    for line in job.stdout:
        if text in line:
            return line
    pytest.fail(f"ended without {text!r}: {job.stderr.read() if job.stderr else ''}")


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_keys_and_a_certificate_guard_what_is_served(
    root: Path,
    home: Path,
    tmp_path: Path,
    served: Bundle,
    certificates: ModuleType,
    proxy: str,
) -> None:
    """Every interface, HTTPS alone; a revoked key is refused by the running replicas."""
    shutil.copytree(root / "registry", tmp_path / "registry")
    certificate, private = certificates.make(tmp_path)
    path = paths.keys_file(tmp_path, "tiny")
    secret, other = keys.create(path, "ward-3", 600), keys.create(path, "other", 2)
    arguments = ["http.port=0", "http.host=0.0.0.0", "serve.access.auth=keys"]
    arguments += [
        f"http.proxy={proxy}",
        f"http.tls_certificate={certificate}",
        f"http.tls_key={private}",
    ]
    job = start(tmp_path, home, *arguments, **{KEY_VARIABLE: secret})
    try:
        assert ("HAProxy in front" in wait_for(job, " in front")) is (proxy == "haproxy")
        url = wait_for(job, "answers at").split()[3]
        wait_for(job, "serving until Ctrl-C")
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificate))
        patients = example_request(served)["patients"]
        marked = {"diagnoses": [{"system": "icd9", "code": MARKER}]}
        with Client(url, secret, verify=trusting) as client:
            assert client.recommend(patients)["model"]["version"] == 1
            assert client.codes("401")
            with pytest.raises(RefusedError) as unknown:
                client.recommend([{"visits": [marked, {MARKER: 1}]}])
            assert unknown.value.status == 422
        with Client(url, MARKER, verify=trusting) as nobody, pytest.raises(RefusedError) as shut:
            nobody.model()
        assert shut.value.status == 401
        with pytest.raises(UnreachableError):  # nothing but this certificate is trusted
            Client(url, secret, retries=0).model()
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http") + "/healthz")
        with httpx.Client(base_url=url, verify=trusting) as stranger:
            told = stranger.get("/healthz")
            assert told.status_code == 200
            stays = told.headers.get_list("strict-transport-security")
            assert stays == ["max-age=31536000"]
            # Of Ray's own: which applications there are, for whoever asks.
            listing = stranger.get("/-/routes")
            assert (listing.status_code, listing.text) == (404, "not found")
        with Client(url, other, verify=trusting, max_wait_s=0) as often:
            assert [often.model()["version"] for _ in range(2)] == [1, 1]
            with pytest.raises(RefusedError) as too_often:
                often.model()
            assert too_often.value.status == 429
            assert too_often.value.retry_after_s is not None

        keys.revoke(path, "ward-3")
        time.sleep(3 * keys.REREAD_S)
        with Client(url, secret, verify=trusting) as client, pytest.raises(RefusedError) as gone:
            client.model()
        assert gone.value.status == 401

        time.sleep(1)
        logs = [one for one in (home / "tmp").rglob("*") if one.is_file() and one.suffix != ".sock"]
        text = b"".join(one.read_bytes() for one in logs)
        assert b"ward-3" in text  # who asked
        assert MARKER.encode() not in text
        assert secret.encode() not in text
    finally:
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=90)
    assert job.returncode == 130
