import socket

import pytest

from cafemed import cluster
from cafemed.errors import ConfigError


def connect(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with cluster.ray_cluster(1):
        pass


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, but nobody listens
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no Ray cluster answers"):
            connect(monkeypatch, address)


def test_the_address_of_the_job_server_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="expected HOST:PORT of a cluster"):
        connect(monkeypatch, "http://127.0.0.1:8265")
