"""From a request over HTTP to its answer: the body, the lines, and the status of each failure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import fastapi
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

import hero_fx

from .messages import Limits, Refused, line, too_large

__all__ = ["RETRY_AFTER", "body_of", "refused_for", "reply"]

RETRY_AFTER = 5
"""Seconds after which a client that was turned away may try again."""
DIED = "the replica that ran this request has died, and its features with it: send the request again"


async def body_of(http: fastapi.Request, limits: Limits) -> bytes:
    """The body of a request. No more of it is kept than a request may have.

    Raises:
        Refused: it is too large.
    """
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limits.most_bytes:
            raise too_large(limits)
    return bytes(body)


async def reply(first: str, lines: Any) -> AsyncIterator[str]:
    """The lines of a reply. A client that goes away closes this, and the replica is told."""
    try:
        yield first
        async for text in lines:
            yield text
    except Exception as error:
        refused = refused_for(error)
        yield line("error", error=str(error) if refused is None else str(refused))
    finally:
        with suppress(Exception):
            lines.cancel()


def refused_for(error: BaseException) -> Refused | None:
    """The answer to a failure; None for what is none of a request's failures, such as a client that went away."""
    if isinstance(error, BackPressureError):
        return Refused(
            503,
            "all replicas are busy and the queue is full: try again later, or serve with more replicas or a longer queue",
            retry_after=RETRY_AFTER,
        )
    if isinstance(error, RayActorError):
        return Refused(503, DIED, retry_after=RETRY_AFTER)
    if isinstance(error, RayTaskError):
        cause = error.cause
        busy = isinstance(cause, hero_fx.OverBudget)
        return Refused(
            503 if busy else 500, f"{type(cause).__name__}: {cause}", retry_after=RETRY_AFTER if busy else None
        )
    return None
