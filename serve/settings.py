"""How the endpoint runs: replicas, batching, queues."""

import dataclasses
import re
from typing import Annotated, Literal

from cafemed.config import Range
from cafemed.errors import ConfigError

#: A patient most of whose codes say nothing to the model is not to be answered.
MAX_UNKNOWN_SHARE = 0.5

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")


@dataclasses.dataclass(frozen=True)
class AccessConfig:
    """Who may ask.

    Attributes:
        auth: "none": whoever is on this machine, so that `http.host` must be the loopback; "keys":
            whoever has an API key.
        keys_file: of API keys, absolute; None: ROOT/access/NAME.json. Every node must see it.
        cors_origins: sites whose pages may ask from a browser, "https://ward.example.org".
        body_timeout_s: how long a request's body may take to come.
    """

    auth: Literal["none", "keys"] = "none"
    keys_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    body_timeout_s: Annotated[float, Range(0, 3600, open_low=True)] = 10.0

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins: expected origins like 'https://ward.example.org' or "
                    f"'http://localhost:3000', got {origin!r}"
                )


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of the Ray Serve application; spelled out in platform/conf/serve/default.yaml.

    Attributes:
        alias: which version of the registry is served: "production", "candidate" or a number.
        shadow: a version that sees some requests too, whose answers are only compared; None: none.
        shadow_share: of the requests that the shadow sees.
        shadow_queue: requests that wait for the shadow at a replica; more are not compared.
        shadow_num_cpus: CPUs that Ray sets aside for the shadow.
        min_replicas: replicas that always run; 0: none while nobody asks.
        max_replicas: replicas under load.
        target_ongoing_requests: requests a replica is meant to work on; more adds replicas.
        look_back_s: time that the requests are averaged over; Ray counts them every ten seconds.
        upscale_delay_s: how long there have to be more before replicas are added.
        downscale_delay_s: how long there have to be fewer before replicas are taken away.
        downscale_to_zero_delay_s: the same for the last replica.
        max_admitted_requests: requests a replica works on at once before it answers 503 with
            Retry-After.
        max_ongoing_requests: requests Ray gives to a replica at once, refused ones included; more
            than max_admitted_requests.
        max_queued_requests: requests that wait behind those before Ray itself answers 503.
        max_batch_size: patients that one run of the model takes together, at most.
        batch_wait_s: how long a first patient waits for others while no run is being made.
        num_cpus: CPUs that Ray sets aside for a replica.
        num_gpus: GPUs, or the share of one; the model is on a GPU unless it is 0.
        num_threads: threads of a replica's matrix products.
        refresh_s: how often a replica looks whether the alias has moved.
        drain_s: how long a stopping replica may finish what it has begun.
        max_unknown_share: of a patient's codes; one with more that the model does not know is
            refused.
        log_requests: whether each request is a line of JSON in the replica's log.
        drift_patients: patients whose scores are held against those of the validation visits.
        access: see AccessConfig.
    """

    alias: int | str = "production"
    shadow: int | str | None = None
    shadow_share: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    shadow_queue: Annotated[int, Range(1)] = 8
    shadow_num_cpus: Annotated[float, Range(0)] = 0.5
    min_replicas: Annotated[int, Range(0)] = 1
    max_replicas: Annotated[int, Range(1)] = 2
    target_ongoing_requests: Annotated[float, Range(0, open_low=True)] = 16.0
    look_back_s: Annotated[float, Range(10, open_low=True)] = 30.0
    upscale_delay_s: Annotated[float, Range(0)] = 10.0
    downscale_delay_s: Annotated[float, Range(0)] = 300.0
    downscale_to_zero_delay_s: Annotated[float, Range(0)] = 600.0
    max_admitted_requests: Annotated[int, Range(1)] = 256
    max_ongoing_requests: Annotated[int, Range(2)] = 512
    max_queued_requests: Annotated[int, Range(1)] = 512
    max_batch_size: Annotated[int, Range(1)] = 32
    batch_wait_s: Annotated[float, Range(0, 1)] = 0.0
    num_cpus: Annotated[float, Range(0)] = 1.0
    num_gpus: Annotated[float, Range(0)] = 0.0
    num_threads: Annotated[int, Range(1)] = 1
    refresh_s: Annotated[float, Range(0, open_low=True)] = 5.0
    drain_s: Annotated[float, Range(0)] = 10.0
    max_unknown_share: Annotated[float, Range(0, 1)] = MAX_UNKNOWN_SHARE
    log_requests: bool = True
    drift_patients: Annotated[int, Range(10)] = 1000
    access: AccessConfig = AccessConfig()

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas: expected at least min_replicas ({self.min_replicas}), "
                f"got {self.max_replicas}"
            )
        if self.max_ongoing_requests <= self.max_admitted_requests:
            raise ConfigError(
                "max_ongoing_requests: expected more than max_admitted_requests "
                f"({self.max_admitted_requests}), got {self.max_ongoing_requests}: requests would "
                "wait at Ray, and its refusals do not know for how long"
            )


@dataclasses.dataclass(frozen=True)
class ApplicationArgs:
    """Arguments of `serve.app:build`, as under `args` in serve/config.yaml.

    Attributes:
        name: the experiment whose registry is served.
        root: absolute folder of all inputs and outputs; None: CAFEMED_HOME, else ~/.cafemed. On a
            cluster it must be a folder that every node sees.
        registry: folder or URL that holds the registries; None: in the root.
        serve: see ServeConfig.
    """

    name: str
    root: str | None = None
    registry: str | None = None
    serve: ServeConfig = ServeConfig()


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """Where the endpoint listens.

    Attributes:
        host: the loopback by default; others ("0.0.0.0": all) need `serve.access.auth` "keys".
        port: 0 takes a free one.
        proxy: "haproxy", Ray Serve's own ("default"), or "auto": HAProxy where it is installed.
        stats_host: where HAProxy's pages of figures listen (free ports; on a cluster
            8404 and 9101); they have no access control.
        tls_certificate: PEM file of the certificate and those that sign it; with it and its key
            the endpoint speaks HTTPS alone. On a cluster every node must have both files.
        tls_key: PEM file of its private key, without a password.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    proxy: Literal["auto", "haproxy", "default"] = "auto"
    stats_host: str = "127.0.0.1"
    tls_certificate: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key: expected both, or neither")


@dataclasses.dataclass(frozen=True)
class DeployConfig:
    """Settings of jobs/deploy.py; spelled out in platform/conf/deploy.yaml.

    Attributes:
        once: answer one example request, then shut everything down; on a cluster the application
            stays in any case.
        http: see HttpConfig.
        serve: see ServeConfig.
    """

    once: bool = False
    http: HttpConfig = HttpConfig()
    serve: ServeConfig = ServeConfig()


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """Settings of jobs/keys.py; spelled out in platform/conf/keys.yaml.

    Attributes:
        create: name of a key to make; None: none.
        revoke: name of a key to take away, before one is made; None: none.
        per_minute: requests a minute that every replica answers to the key that is made.
        keys_file: as AccessConfig has it.
    """

    create: int | str | None = None
    revoke: int | str | None = None
    per_minute: Annotated[int, Range(1, 1_000_000)] = 600
    keys_file: str | None = None
