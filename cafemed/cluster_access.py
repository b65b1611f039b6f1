"""Whether a cluster answers at an address, and takes this process's token: asked once, at once.

Ray itself goes on asking for 20 seconds where a token is missing or wrong, and for minutes where
something else listens, and then does not say which of them it was.
"""

import os
import socket
from pathlib import Path

from cafemed.errors import ConfigError

_ANSWER_S = 10.0


def require_answer(address: str) -> None:
    """Refuses an address at which no Ray cluster takes this process's token.

    Args:
        address: HOST:PORT of a cluster, as in `RAY_ADDRESS`; a word of Ray's, as "auto", passes.

    Raises:
        ConfigError: if nothing listens, something else does, the cluster runs another version of
            Ray, or the token is missing or wrong; says what to do.
    """
    asked = f"RAY_ADDRESS={address}"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{asked}: expected HOST:PORT of a cluster, as ray start prints it; this is the "
            "address that jobs are submitted to"
        )
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as err:
        raise ConfigError(f"{asked}: no Ray cluster answers: {err}") from err
    _greet(address, asked)


def _greet(address: str, asked: str) -> None:
    """Asks the head for its version, as Ray's own processes do."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    try:
        with init_grpc_channel(address) as channel:
            head = NodeInfoGcsServiceStub(channel)
            found = head.CheckAlive(CheckAliveRequest(), timeout=_ANSWER_S).ray_version
    except ray.exceptions.AuthenticationError as err:
        raise ConfigError(f"{asked}: {_no_token()}") from err
    except grpc.RpcError as err:
        if err.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(f"{asked}: {_refused()}") from err
        raise ConfigError(
            f"{asked}: no Ray cluster answers: what listens there is not a cluster's head "
            f"({err.code().name.lower()})"
        ) from err
    if found != ray.__version__:
        raise ConfigError(
            f"{asked}: the cluster runs Ray {found} and this process {ray.__version__}; install "
            "requirements.lock on both"
        )


def _no_token() -> str:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return f"RAY_AUTH_TOKEN_PATH={path}: no token can be read; write the cluster's into it"
    return (
        "RAY_AUTH_MODE=token, but there is no token; write the cluster's into ~/.ray/auth_token or "
        "set RAY_AUTH_TOKEN"
    )


def _refused() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return (
            "the cluster asks for a token and none was sent; export RAY_AUTH_MODE=token, with the "
            "cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    return (
        f"the cluster refused the token of {_source()}; it has to be the one that its nodes were "
        "started with"
    )


def _source() -> str:
    """Where Ray takes the token from, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return f"RAY_AUTH_TOKEN_PATH={path}" if path else str(Path("~/.ray/auth_token").expanduser())
