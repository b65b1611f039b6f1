"""The Ray Serve application: replicas that hold the model, batching, autoscaling.

`serve.app:build` is the import path in serve/config.yaml; jobs/deploy.py uses it too.
"""

import asyncio
import dataclasses
import gc
import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle

from cafemed import paths, registry
from cafemed.config import from_mapping
from serve import access as accesses
from serve import observing, shadow, tls
from serve.access import Access
from serve.admission import Admission
from serve.api import create_api
from serve.asking import Asked, packed
from serve.encoding import EncodedPatient
from serve.following import FollowingModel
from serve.lines import GatheredLines
from serve.metrics import Meters
from serve.observing import Observer
from serve.problems import going_on
from serve.recommender import Recommender
from serve.runs import Runs
from serve.settings import ApplicationArgs, HttpConfig, ServeConfig
from serve.shadow import Answered, Sampling, ShadowModel

APPLICATION = "cafemed"

#: Ray's logger in a replica, which writes to the replica's own file.
_LOGGER = "ray.serve"
#: How often states, and what has been counted, are put into the metrics.
_REPORT_S = 1.0
#: Ray's own refusals come after ours, when even refusing has a queue.
_RAY_RETRY_S = 5.0
#: A replica that ended is missed at the next check, and only then replaced.
_HEALTH_CHECK_S = 2.0
#: One that lives and says nothing may be busy, or its machine: it is replaced only after three
#: checks that each waited this long. What has ended would not be missed sooner with less.
_HEALTH_TIMEOUT_S = 30.0
#: How soon the thread of a run and the event loop give way to each other: with Python's own 5 ms a
#: run that has ended waits so long for the loop, and a fifth fewer requests are answered.
_SWITCH_S = 0.0002
#: New objects until Python looks for cycles among them: with its own 700 it looks at the same ones
#: again and again while their requests wait, a twentieth of a request's processor time.
_YOUNG_OBJECTS = 10_000
#: Of every replica.
LOGGING = {"encoding": "JSON", "enable_access_log": False}  # our own line a request says more

_Row = NDArray[np.float32]


# The ASGI application is made in the replica (__serve_build_asgi_app__), so none is ever pickled.
@serve.deployment(name="Endpoint")
@serve.ingress()
class Endpoint:
    """One replica: the routes, and the model behind them."""

    # A coroutine, which Ray Serve awaits: it runs in the replica's event loop.
    async def __init__(  # type: ignore[misc]
        self, registry_dir: str, config: ServeConfig, compared: DeploymentHandle[Any] | None = None
    ) -> None:
        torch.set_num_threads(config.num_threads)
        sys.setswitchinterval(_SWITCH_S)
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        logger = _log_with_ray()
        self._access = config.access
        self._max_unknown_share = config.max_unknown_share
        meters = self._meters = Meters()
        sampling: Sampling[Asked] | None = None
        if compared is not None:
            compare = compared.compare.remote

            async def ask(asked: Asked, answered: Answered) -> str:
                # Bytes: Ray pickles in this event loop, where objects would hold other answers up.
                return str(await compare(packed(asked.patients), answered))

            sampling = Sampling(ask, meters, config.shadow_share, config.shadow_queue)
        self._lines = GatheredLines(logger) if config.log_requests else None
        self._observer = Observer(meters, self._lines, config.drift_patients, sampling)
        self._admission = Admission(config.max_admitted_requests)
        self._runs = Runs(config.max_batch_size, config.batch_wait_s, self._observer.ran)
        device = "cuda" if config.num_gpus else "cpu"
        self._model = FollowingModel(
            registry.location(registry_dir), config.alias, device, config.refresh_s
        )
        self._tell_model()
        if self._model.refused is not None:
            self._observer.refused_version()
        # Kept, because the event loop holds tasks weakly.
        self._tasks = [
            asyncio.create_task(self._follow(config.refresh_s)),
            asyncio.create_task(self._report()),
        ]

    def __del__(self) -> None:
        """Hands on what was counted and logged last; Ray Serve calls it when a replica ends."""
        self._meters.flush()
        if self._lines is not None:
            self._lines.write()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(
            self,
            access=Access.of(self._access),
            admission=self._admission,
            observer=self._observer,
            max_unknown_share=self._max_unknown_share,
        )

    async def _follow(self, refresh_s: float) -> None:
        while True:
            await asyncio.sleep(refresh_s)
            with going_on("following the registry"):
                refused = self._model.refused
                # In a thread: the old version answers until the new one is ready.
                if await asyncio.to_thread(self._model.refresh):
                    self._tell_model()
                elif self._model.refused not in (None, refused):
                    self._observer.refused_version()

    def _tell_model(self) -> None:
        recommender = self._model.recommender
        self._observer.serves(recommender.name.version, recommender.bundle.reference.scores)

    async def _report(self) -> None:
        while True:
            with going_on("reporting metrics"):
                self._observer.report(self._admission.in_progress, self._runs.waiting)
                self._meters.flush()
            await asyncio.sleep(_REPORT_S)

    @property
    def recommender(self) -> Recommender:
        """See serve.api.Service."""
        return self._model.recommender

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[_Row]:
        """See serve.api.Service."""
        rows, run = await self._runs.probabilities(recommender, patients)
        record = observing.current()
        if record is not None and not record.run:
            record.run = run
        return rows


@serve.deployment(name="Shadow")
class Shadow:
    """The process of the version that is only compared."""

    async def __init__(self, registry_dir: str, config: ServeConfig) -> None:  # type: ignore[misc]
        torch.set_num_threads(config.num_threads)
        _log_with_ray()
        self._meters = Meters(
            "cafemed_shadow_jaccard", "cafemed_shadow_difference", "cafemed_shadow_version"
        )
        assert config.shadow is not None
        self._model = ShadowModel(registry.location(registry_dir), config.shadow)
        self._following = asyncio.create_task(self._follow(config.refresh_s))

    async def _follow(self, refresh_s: float) -> None:
        while True:
            with going_on("telling the shadow's version"):
                self._meters.set("cafemed_shadow_version", self._model.version or 0)
            await asyncio.sleep(refresh_s)
            with going_on("following the registry"):
                await asyncio.to_thread(self._model.refresh)

    async def compare(self, patients: bytes, answered: Answered) -> str:
        """Compares on a request's patients; gives the result for `cafemed_shadow_requests`."""
        try:
            found = await asyncio.to_thread(self._model.compare, patients, answered)
        except Exception:  # noqa: BLE001 - Ray would log the message, which may quote the request
            return "failed"
        if found is None:
            return "no_other_version"
        shadow.report(self._meters, found)
        self._meters.flush()
        return "compared"


def build(args: dict[str, Any]) -> Application:
    """Builds the application from plain arguments.

    Args:
        args: see ApplicationArgs.

    Raises:
        ConfigError: if an argument is unknown or out of range, others than this machine could ask
            without a key, or a certificate would not be used.
        KeysError: if there have to be keys and there are none.
        ArtifactError: if nothing is promoted.
    """
    values = from_mapping(ApplicationArgs, args, "args")
    root = paths.resolve_root(values.root)
    registry_dir = paths.registry_of(root, values.name, values.registry)
    registry.resolve(registry_dir, values.serve.alias)  # here rather than in every replica
    access = accesses.with_keys_file(values.serve.access, root, values.name)
    accesses.require_guarded(accesses.listening_host() or HttpConfig.host, access)
    if accesses.listening_certificate() is not None:
        tls.require_unused_behind_haproxy()
    return application(registry_dir, dataclasses.replace(values.serve, access=access))


def application(registry_dir: registry.Location, config: ServeConfig) -> Application:
    """Builds the application that serves a registry's alias; every node must see the registry."""
    # Ray's annotations hide that the decorators make a Deployment of the class.
    endpoint: Deployment = Endpoint.options(  # type: ignore[attr-defined]
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"retry_after_s": _RAY_RETRY_S},
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=_HEALTH_CHECK_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "look_back_period_s": config.look_back_s,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "downscale_to_zero_delay_s": config.downscale_to_zero_delay_s,
        },
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        logging_config=LOGGING,
    )
    if config.shadow is None:
        return endpoint.bind(str(registry_dir), config)
    compared: Deployment = Shadow.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=config.shadow_queue,
        ray_actor_options={"num_cpus": config.shadow_num_cpus},
        logging_config=LOGGING,
    )
    return endpoint.bind(str(registry_dir), config, compared.bind(str(registry_dir), config))


def _log_with_ray() -> logging.Logger:
    """Sends this package's log lines to the replica's file; gives its logger."""
    logger = logging.getLogger(_LOGGER)
    for handler in logger.handlers:
        handler.addFilter(observing.OwnId())
    own = logging.getLogger("serve")
    own.handlers = list(logger.handlers)
    own.setLevel(logging.INFO)
    own.propagate = False
    return logger
