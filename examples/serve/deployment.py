"""The two Ray deployments: `Front` speaks HTTP and checks requests, `World` has the model."""

# `serve.ingress` copies the routes by value as they stand there: what they use is imported, and annotations are no strings
# (no `from __future__ import annotations`), for names that come later in this module are not found in the copy.

import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fastapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.answers import RETRY_AFTER, body_of, refused_for, reply
from serve.engine import Engine
from serve.messages import Limits, Refused, Request, parse
from serve.metrics import text
from serve.models import Settings, make

__all__ = ["application", "environment"]

api = fastapi.FastAPI(title="World model")


@serve.deployment
class World:
    """One replica: the models of all tasks."""

    def __init__(self, settings: Settings) -> None:
        models, limits = make(settings)
        self._engine = Engine(models, limits, settings.live)
        self._replica = serve.get_replica_context().replica_id.unique_id

    async def denoise(self, request: Request) -> AsyncIterator[str]:
        """The lines of the reply."""
        lines = self._engine.denoise(request)
        try:
            async for text in lines:
                yield text
        finally:
            await lines.aclose()

    async def limits(self) -> Limits:
        """What it takes."""
        return self._engine.limits

    async def stats(self) -> dict[str, Any]:
        """What it has run."""
        return {"replica": self._replica, "process": os.getpid(), **self._engine.stats()}


@serve.deployment
@serve.ingress(api)
class Front:
    """Checks requests, hands them to a replica of `World`, and streams what it says."""

    def __init__(self, world: DeploymentHandle) -> None:
        self._world = world
        self._limits: Limits | None = None
        self._answers: Counter[int] = Counter()

    @api.post("/trajectories")
    async def trajectories(self, http: fastapi.Request) -> Response:
        """Denoises; see `messages.py`. The reply begins with the first step: what fails before has a status of its own."""
        answer = await self._answer(http)
        self._answers[answer.status_code] += 1
        return answer

    async def _answer(self, http: fastapi.Request) -> Response:
        try:
            limits = await self._known_limits()
            request = parse(await body_of(http, limits), uuid4().hex, limits)
            lines = self._world.options(stream=True).denoise.remote(request)
            try:
                first = await anext(lines)
            except BaseException as error:
                refused = refused_for(error)
                if refused is not None:
                    raise refused from error
                lines.cancel()  # the client went away
                raise
        except Refused as refused:
            headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
            return JSONResponse({"error": str(refused)}, refused.status, headers)
        return StreamingResponse(reply(first, lines), media_type="application/x-ndjson")

    @api.get("/stats")
    async def stats(self) -> dict[str, Any]:
        """What each replica has run, and the answers by status."""
        return {"replicas": await self._replicas(), "answers": self._answers}

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """The same for Prometheus."""
        return PlainTextResponse(text(await self._replicas(), self._answers), media_type=CONTENT_TYPE_LATEST)

    async def _replicas(self) -> list[dict[str, Any]]:
        said = await self._world.broadcast("stats").results_async(timeout_s=10, return_exceptions=True)
        return [of for of in said if not isinstance(of, BaseException)]  # the others have just died

    async def _known_limits(self) -> Limits:
        if self._limits is None:
            said = await self._world.broadcast("limits").results_async(timeout_s=10, return_exceptions=True)
            limits = next((of for of in said if isinstance(of, Limits)), None)
            if limits is None:
                raise Refused(503, "no replica is up: try again", retry_after=RETRY_AFTER)
            self._limits = limits
        return self._limits


def environment() -> dict[str, Any]:
    """What `ray.init(runtime_env=...)` needs so that workers find the examples."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}


def application(settings: Settings, *, replicas: int = 1, threads: int = 1, queued: int = 16) -> serve.Application:
    """The two deployments.

    Args:
        settings: what each replica runs.
        replicas: processes with a model each.
        threads: processors of each; Ray sets `OMP_NUM_THREADS` to it.
        queued: requests that may wait for a replica; more are turned away.
    """
    world = World.options(
        num_replicas=replicas,
        max_ongoing_requests=settings.live,
        max_queued_requests=queued,
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=2,
        health_check_period_s=2,
    ).bind(settings)
    most = replicas * settings.live + queued
    return Front.options(max_ongoing_requests=2 * most + 16, ray_actor_options={"num_cpus": 0}).bind(world)
