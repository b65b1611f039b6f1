"""The Ray Serve application: replicas that hold the model, batching, autoscaling.

`serve.app:build` is the import path in serve/config.yaml; jobs/deploy.py uses it too.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application, Deployment

from cafemed import paths, registry
from cafemed.config import from_mapping
from serve.api import create_api
from serve.encoding import EncodedPatient
from serve.following import FollowingModel
from serve.recommender import Recommender
from serve.settings import ApplicationArgs, ServeConfig

APPLICATION = "cafemed"

_Row = NDArray[np.float32]


# The ASGI application is made in the replica (__serve_build_asgi_app__), so none is ever pickled.
@serve.deployment(name="Endpoint")
@serve.ingress()
class Endpoint:
    """One replica: the routes, and the model behind them."""

    # A coroutine, which Ray Serve awaits: it runs in the replica's event loop.
    async def __init__(  # type: ignore[misc]
        self, registry_dir: str, config: ServeConfig
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self._batched.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]
        self._model = FollowingModel(Path(registry_dir), config.alias)
        # Kept, because the event loop holds tasks weakly.
        self._following = asyncio.create_task(self._follow(config.refresh_s))

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self)

    async def _follow(self, refresh_s: float) -> None:
        while True:
            await asyncio.sleep(refresh_s)
            # In a thread: the old version answers until the new one is ready.
            await asyncio.to_thread(self._model.refresh)

    @property
    def recommender(self) -> Recommender:
        """See serve.api.Service."""
        return self._model.recommender

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[_Row]:
        """See serve.api.Service."""
        return list(await asyncio.gather(*(self._batched((recommender, p)) for p in patients)))

    @serve.batch
    async def _batched(self, asked: list[tuple[Recommender, EncodedPatient]]) -> list[_Row]:
        # In a thread: while the model runs, the event loop takes and checks other requests.
        return await asyncio.to_thread(_probabilities, asked)


def build(args: dict[str, Any]) -> Application:
    """Builds the application from plain arguments.

    Args:
        args: see ApplicationArgs.

    Raises:
        ConfigError: if an argument is unknown or out of range.
        ArtifactError: if nothing is promoted.
    """
    values = from_mapping(ApplicationArgs, args, "args")
    registry_dir = paths.registry_dir(paths.resolve_root(values.root), values.name)
    registry.resolve(registry_dir, values.serve.alias)  # here rather than in every replica
    return application(registry_dir, values.serve)


def application(registry_dir: Path, config: ServeConfig) -> Application:
    """Builds the application that serves a registry's alias; every node must see the folder."""
    # Ray's annotations hide that the decorators make a Deployment of the class.
    endpoint: Deployment = Endpoint.options(  # type: ignore[attr-defined]
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_s,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    )
    return endpoint.bind(str(registry_dir), config)


def _probabilities(asked: list[tuple[Recommender, EncodedPatient]]) -> list[_Row]:
    """Rows in the order asked; around a change of version two recommenders may share a batch."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, (recommender, _) in enumerate(asked):
        members[id(recommender)].append(i)
    rows: dict[int, _Row] = {}
    for group in members.values():
        scores = asked[group[0]][0].probabilities([asked[i][1] for i in group])
        rows.update(zip(group, scores, strict=True))
    return [rows[i] for i in range(len(asked))]
