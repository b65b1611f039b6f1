"""HTTPS by configuration: the certificate and its key, checked before anything starts."""

import dataclasses
import ssl
from pathlib import Path
from typing import Any

from cafemed.errors import ConfigError
from serve.settings import HttpConfig


def usable(http: HttpConfig) -> HttpConfig:
    """Refuses a certificate and key that a server could not use; else gives the settings to use.

    Ray configures HAProxy without a certificate, so that it takes Ray Serve's own proxy to use one.

    Raises:
        ConfigError: for HAProxy, a relative path, a missing file, or two files that do not belong
            together.
    """
    if http.tls_certificate is None or http.tls_key is None:
        return http
    if http.proxy == "haproxy":
        raise ConfigError("http.tls_certificate: expected http.proxy=default, got 'haproxy'")
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
    return dataclasses.replace(http, proxy="default")


def http_options(http: HttpConfig) -> dict[str, Any]:
    """What `ray.serve.start` takes besides host and port."""
    if http.tls_certificate is None:
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
