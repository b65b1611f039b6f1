"""HTTPS by configuration: the certificate and its key, checked before anything starts."""

import os
import ssl
from pathlib import Path
from typing import Any

from cafemed.errors import ConfigError
from serve import haproxy
from serve.settings import HttpConfig


def require_usable(http: HttpConfig) -> None:
    """Refuses a certificate and key that a server could not use.

    Raises:
        ConfigError: for a relative path, a missing file, or two files that do not belong together.
    """
    if http.tls_certificate is None or http.tls_key is None:
        return
    for key, path in (("tls_certificate", http.tls_certificate), ("tls_key", http.tls_key)):
        if not Path(path).is_absolute() or not Path(path).is_file():
            raise ConfigError(f"http.{key}: expected the absolute path of a PEM file, got {path}")

    def ask_password() -> str:
        raise ConfigError("http.tls_key: expected a key without a password")

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(http.tls_certificate, http.tls_key, ask_password)
    except (ssl.SSLError, OSError) as err:
        reason = getattr(err, "reason", None) or err.strerror or type(err).__name__
        raise ConfigError(
            f"http.tls_certificate, http.tls_key: not a certificate in PEM and its key ({reason})"
        ) from err


def require_spoken(is_asked: bool) -> None:
    """Refuses HTTPS that a cluster's HAProxy would not speak, and HTTP that it would not.

    Ray passes HAProxy no certificate: the nodes' environment does (platform/haproxy/haproxy).

    Args:
        is_asked: whether a certificate is configured.

    Raises:
        ConfigError: if HAProxy is in front and was started for the other.
    """
    if not haproxy.is_switched_on():
        return
    is_spoken = bool(os.environ.get(haproxy.CERTIFICATE))
    if is_asked and not is_spoken:
        raise ConfigError(
            "http.tls_certificate: this cluster's HAProxy was started without one, and takes none "
            f"from Ray; set {haproxy.CERTIFICATE} on every node before Ray starts there"
        )
    if is_spoken and not is_asked:
        raise ConfigError(
            f"http.tls_certificate: this cluster's HAProxy has one ({haproxy.CERTIFICATE}); set "
            "http.tls_certificate and http.tls_key to it"
        )


def require_unused_behind_haproxy() -> None:
    """Refuses a certificate among Serve's own options where HAProxy is in front and speaks HTTP.

    Raises:
        ConfigError: if HAProxy is in front.
    """
    if haproxy.is_switched_on():
        raise ConfigError(
            "http_options.ssl_certfile: HAProxy takes no certificate from Ray; leave it out, and "
            f"set {haproxy.CERTIFICATE} on every node before Ray starts there"
        )


def http_options(http: HttpConfig) -> dict[str, Any]:
    """What `ray.serve.start` takes besides host and port; behind HAProxy Ray speaks HTTP."""
    if http.tls_certificate is None or haproxy.is_switched_on():
        return {}
    # In this order: Ray checks the second against the first.
    return {"ssl_keyfile": http.tls_key, "ssl_certfile": http.tls_certificate}


def trusted(http: HttpConfig) -> ssl.SSLContext | bool:
    """How this machine checks that its own endpoint answers: by that very certificate.

    Its name is not looked at: it is the public one, and the endpoint is asked on the loopback.
    """
    if http.tls_certificate is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(http.tls_certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
