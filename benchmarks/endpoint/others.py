"""What the endpoint is measured against: a no-op on Ray Serve, and plain FastAPI with the model."""

from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cafemed import registry
from serve.app import LOGGING
from serve.recommender import Recommender
from serve.schema import RecommendRequest

_noop = FastAPI()


@_noop.post("/v1/recommend")
async def _constant(body: RecommendRequest) -> dict[str, str]:
    """Parses and validates the body, as FastAPI does, and answers a constant."""
    del body
    return {"status": "ok"}


@_noop.get("/readyz")
async def _ready() -> dict[str, str]:
    return {"status": "ok"}


@serve.deployment(
    name="Noop",
    max_ongoing_requests=512,
    ray_actor_options={"num_cpus": 0.3},
    logging_config=LOGGING,
)
@serve.ingress(_noop)
class Noop:
    """The least that an endpoint on Ray Serve can do with the same requests."""


def noop() -> Application:
    """The no-op as an application of one replica."""
    return Noop.bind()  # type: ignore[attr-defined,no-any-return]


def run_plain(registry_dir: Path, port: int) -> None:
    """Serves the production model by uvicorn and FastAPI alone: a request at a time, no batches."""
    torch.set_num_threads(1)
    recommender = Recommender.load(registry.resolve(registry_dir, "production"), 1)
    api = FastAPI()

    @api.post("/v1/recommend")
    async def recommend(body: RecommendRequest) -> dict[str, Any]:
        return {"recommendations": recommender.recommend(body)}

    @api.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="error", access_log=False)
