"""How the endpoint runs: replicas, batching, queues."""

import dataclasses
from typing import Annotated

from cafemed.config import Range
from cafemed.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of the Ray Serve application; spelled out in platform/conf/serve/default.yaml.

    Attributes:
        alias: which version of the registry is served: "production", "candidate" or a number.
        min_replicas: replicas that always run.
        max_replicas: replicas under load.
        target_ongoing_requests: requests a replica is meant to work on; more adds replicas.
        max_ongoing_requests: requests given to a replica at once; at least max_batch_size.
        max_queued_requests: requests that wait at a proxy before it answers 503.
        max_batch_size: patients that one call of the model takes together.
        batch_wait_s: how long a call waits for more patients.
        num_cpus: CPUs that Ray sets aside for a replica.
        num_gpus: GPUs, or the share of one.
        num_threads: threads of a replica's matrix products.
        refresh_s: how often a replica looks whether the alias has moved.
        drain_s: how long a stopping replica may finish what it has begun.
    """

    alias: int | str = "production"
    min_replicas: Annotated[int, Range(1)] = 1
    max_replicas: Annotated[int, Range(1)] = 2
    target_ongoing_requests: Annotated[float, Range(0, open_low=True)] = 16.0
    max_ongoing_requests: Annotated[int, Range(1)] = 64
    max_queued_requests: Annotated[int, Range(1)] = 256
    max_batch_size: Annotated[int, Range(1)] = 32
    batch_wait_s: Annotated[float, Range(0, 1)] = 0.005
    num_cpus: Annotated[float, Range(0)] = 1.0
    num_gpus: Annotated[float, Range(0)] = 0.0
    num_threads: Annotated[int, Range(1)] = 1
    refresh_s: Annotated[float, Range(0, open_low=True)] = 5.0
    drain_s: Annotated[float, Range(0)] = 10.0

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas: expected at least min_replicas ({self.min_replicas}), "
                f"got {self.max_replicas}"
            )
        if self.max_ongoing_requests < self.max_batch_size:
            raise ConfigError(
                f"max_ongoing_requests: expected at least max_batch_size ({self.max_batch_size}), "
                f"got {self.max_ongoing_requests}: batches would never fill"
            )


@dataclasses.dataclass(frozen=True)
class ApplicationArgs:
    """Arguments of `serve.app:build`, as under `args` in serve/config.yaml.

    Attributes:
        name: the experiment whose registry is served.
        root: absolute folder of all inputs and outputs; None: CAFEMED_HOME, else ~/.cafemed. On a
            cluster it must be a folder that every node sees.
        serve: see ServeConfig.
    """

    name: str
    root: str | None = None
    serve: ServeConfig = ServeConfig()


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """Where the endpoint listens.

    Attributes:
        host: the loopback by default, because there is no access control yet; "0.0.0.0": all.
        port: 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000


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
