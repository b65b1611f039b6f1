"""Who may ask: API keys, or nobody but this machine.

Without keys the endpoint may listen on the loopback alone, which is checked before anything starts
(`require_guarded`), and answers only requests that name the loopback as their host: a page of some
other site that a browser shows could otherwise ask under a name that leads here (DNS rebinding).
"""

import dataclasses
import functools
import ipaddress
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from cafemed import paths
from cafemed.errors import ConfigError
from serve import observing
from serve.asgi import Application, Message, Receive, Send, route_path
from serve.keys import Key, Keys, KeysError, read
from serve.problems import problem
from serve.settings import AccessConfig

#: Answered without a key: they say nothing but whether a replica works, and the page for a browser,
#: which asks for a key itself.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.ico"})
OPEN_FOLDER = "/static/"
#: Where the name of a request's key is told to what is further in.
KEY = "cafemed.key"

_NO_ENTRY = {"WWW-Authenticate": 'Bearer realm="cafemed"'}
_BEARER = b"bearer "
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[^:\[\]]*)(?::[0-9]*)?")  # RFC 9110, section 7.2
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask, and from where.

    Attributes:
        keys: whose requests are answered; None: those that name the loopback as their host.
        cors_origins: see AccessConfig.
        body_timeout_s: see AccessConfig.
    """

    keys: Keys | None = None
    cors_origins: tuple[str, ...] = ()
    body_timeout_s: float = AccessConfig.body_timeout_s

    @classmethod
    def of(cls, config: AccessConfig) -> "Access":
        """Access as configured; its keys are those of the file from now on.

        Raises:
            KeysError: if there has to be a file of keys and it cannot be read.
        """
        keys = None
        if config.auth == "keys":
            assert config.keys_file is not None, "with_keys_file was not called"
            keys = Keys(Path(config.keys_file))
            keys.follow()
        return cls(keys, config.cors_origins, config.body_timeout_s)


def with_keys_file(config: AccessConfig, root: Path, name: str) -> AccessConfig:
    """Fills in where an experiment's keys are, where there have to be keys.

    Raises:
        ConfigError: if a file is configured by a relative path.
    """
    if config.auth == "none":
        return config
    path = Path(config.keys_file).expanduser() if config.keys_file else paths.keys_file(root, name)
    if not path.is_absolute():
        raise ConfigError(f"serve.access.keys_file: expected an absolute path, got {path}")
    return dataclasses.replace(config, keys_file=str(path))


def listening_host() -> str | None:
    """Where the proxies of the connected cluster listen; None where Serve does not run there."""
    options = _http_options()
    return None if options is None else str(options.host or "0.0.0.0")


def listening_certificate() -> str | None:
    """The certificate that Serve on the connected cluster was given, where it was."""
    return getattr(_http_options(), "ssl_certfile", None)


def _http_options() -> Any:
    import ray
    from ray.serve.context import _get_global_client  # Ray tells it in no public way

    if not ray.is_initialized():  # it would start one
        return None
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def require_guarded(host: str, config: AccessConfig) -> None:
    """Refuses to listen where others can ask, unless they need a key; and keys that are none.

    Args:
        host: where the endpoint is to listen.
        config: with a file of keys, where `auth` asks for keys.

    Raises:
        ConfigError: without keys on anything but the loopback.
        KeysError: if the file of keys cannot be read, or has none.
    """
    if config.auth == "none":
        if not is_loopback(host):
            raise ConfigError(
                f"serve.access.auth: 'none' is only for the loopback (http.host=127.0.0.1), but "
                f"http.host is {host!r}; make a key (python jobs/keys.py create=NAME) "
                "and set serve.access.auth=keys"
            )
        return
    assert config.keys_file is not None, "with_keys_file was not called"
    if not read(Path(config.keys_file)):
        raise KeysError(
            f"{config.keys_file}: no API keys; make one: python jobs/keys.py create=NAME"
        )


def document_keys(api: FastAPI) -> None:
    """Adds to the OpenAPI document how a key is sent, on the routes that may need one."""
    write = api.openapi

    def openapi() -> dict[str, Any]:
        document = write()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        schemes["header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
        for path, operations in document["paths"].items():
            for operation in operations.values() if path not in OPEN_PATHS else ():
                # {}: none, where the endpoint serves its own machine alone.
                operation["security"] = [{"bearer": []}, {"header": []}, {}]
        return document

    api.openapi = openapi  # type: ignore[method-assign]


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Says whether a host's name or address is this machine's loopback."""
    name = host.lower().removesuffix(".").strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_open(path: str) -> bool:
    """Whether a path, below the one that the application is mounted at, needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


class Gate:
    """ASGI middleware: lets a request through if it may be answered, before its body is read."""

    def __init__(self, app: Application, access: Access) -> None:
        self._app = app
        self._keys = access.keys

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if scope["type"] != "http" or is_open(route_path(scope)):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = (
            _refuse_foreign_host(scope, headers)
            if self._keys is None
            else _refuse_without_key(scope, headers, self._keys)
        )
        await (refusal or self._app)(scope, receive, send)


def _refuse_foreign_host(scope: Message, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
    if _names_loopback(headers.get(b"host", b"localhost")):
        return None
    message = "without API keys only requests to localhost are answered (see serve.access.auth)"
    return problem(scope, HTTPStatus.FORBIDDEN, message)


@functools.lru_cache(maxsize=256)
def _names_loopback(host: bytes) -> bool:
    named = _HOST.fullmatch(host.decode("latin-1"))
    return named is not None and is_loopback(named[1])


def _refuse_without_key(
    scope: Message, headers: Mapping[bytes, bytes], keys: Keys
) -> JSONResponse | None:
    key = keys.find(_presented(headers))
    if key is None:
        message = "an API key is needed, as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
        return problem(scope, HTTPStatus.UNAUTHORIZED, message, headers=_NO_ENTRY)
    scope[KEY] = key.name
    record = observing.current()
    if record is not None:
        record.key = key.name
    wait_s = keys.wait_s(key)
    return _refuse_often(scope, key, math.ceil(wait_s)) if wait_s else None


def _refuse_often(scope: Message, key: Key, wait_s: int) -> JSONResponse:
    message = f"the key {key.name!r} may ask {key.per_minute} times a minute; retry in {wait_s} s"
    headers = {"Retry-After": str(wait_s)}
    return problem(scope, HTTPStatus.TOO_MANY_REQUESTS, message, headers=headers)


def _presented(headers: Mapping[bytes, bytes]) -> bytes:
    authorization = headers.get(b"authorization", b"")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return headers.get(b"x-api-key", b"").strip()
