"""The deploy job with keys and a certificate, and without what it takes to listen elsewhere."""

import datetime
import ipaddress
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

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cafemed import paths
from cafemed.bundle import Bundle
from cafemed.client import KEY_VARIABLE, Client, RefusedError, UnreachableError
from cafemed.errors import ConfigError
from serve import keys, tls
from serve.example import example_request
from serve.settings import HttpConfig

JOB = paths.PROJECT_DIR / "jobs" / "deploy.py"
MARKER = "MARKER4711"


def make_certificate(folder: Path, name: str = "own") -> tuple[Path, Path]:
    """A certificate that signs itself, for a public name and the loopback, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "meds.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(private.private_bytes(pem, pkcs8, plain))
    locked = serialization.BestAvailableEncryption(b"secret")
    key.with_suffix(".locked").write_bytes(private.private_bytes(pem, pkcs8, locked))
    return certificate, key


def test_a_certificate_that_is_of_no_use_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    _, other = make_certificate(tmp_path, "other")

    def refused(*pair: object, **more: str) -> str:
        names = [str(one) for one in pair]
        with pytest.raises(ConfigError) as caught:
            tls.usable(
                HttpConfig("127.0.0.1", 0, tls_certificate=names[0], tls_key=names[1], **more)
            )  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "tls_key: expected the absolute path" in refused(certificate, tmp_path / "none")
    assert "tls_certificate: expected the absolute path" in refused("own.crt", key)
    assert "KEY_VALUES_MISMATCH" in refused(certificate, other)
    assert "not a certificate in PEM and its key" in refused(key, key)
    assert "expected a key without a password" in refused(certificate, key.with_suffix(".locked"))
    assert "http.proxy=default" in refused(certificate, key, proxy="haproxy")
    with pytest.raises(ConfigError, match="expected both, or neither"):
        HttpConfig(tls_key=str(key))
    good = HttpConfig(tls_certificate=str(certificate), tls_key=str(key))
    assert tls.usable(good).proxy == "default"
    assert tls.usable(HttpConfig()) == HttpConfig()


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
def test_keys_and_a_certificate_guard_what_is_served(
    root: Path, home: Path, tmp_path: Path, served: Bundle
) -> None:
    """Every interface, HTTPS alone; a revoked key is refused by the running replicas."""
    shutil.copytree(root / "registry", tmp_path / "registry")
    certificate, private = make_certificate(tmp_path)
    path = paths.keys_file(tmp_path, "tiny")
    secret, other = keys.create(path, "ward-3", 600), keys.create(path, "other", 2)
    arguments = ["http.port=0", "http.host=0.0.0.0", "serve.access.auth=keys"]
    arguments += [f"http.tls_certificate={certificate}", f"http.tls_key={private}"]
    job = start(tmp_path, home, *arguments, **{KEY_VARIABLE: secret})
    try:
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
        with Client(url, other, verify=trusting, max_wait_s=0) as often:
            assert [often.model()["version"] for _ in range(2)] == [1, 1]
            with pytest.raises(RefusedError) as too_often:
                often.model()
            assert too_often.value.status == 429
            assert too_often.value.retry_after_s is not None

        keys.revoke(path, "ward-3")
        time.sleep(1.5 * keys.REREAD_S)
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
