"""Poisson arrivals, and what is measured of their requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

__all__ = ["Measured", "Outcome", "arrivals", "open_loop", "summary"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request."""

    begun: float
    """Seconds from the start of the run to its arrival."""
    seconds: float
    """From its arrival to the last line of its reply."""
    status: str
    """`"same"` as the request alone, `"differs"`, or what went wrong."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run at one rate."""

    requests: int
    p50: float
    """Seconds, over the requests that were answered with a result."""
    p95: float
    per_minute: float
    """Results by the minute, from the first arrival to the last reply."""
    statuses: Counter[str]

    def held(self, bound: float) -> bool:
        """Whether every request had the result it has alone, and 95 % had it within `bound` seconds."""
        return set(self.statuses) == {"same"} and self.p95 <= bound


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests arrive, `rate` by the minute: gaps are drawn from an exponential distribution.

    The same seed gives the same gaps at every rate, but for their scale.
    """
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += draw.expovariate(1.0) * 60 / rate
    return times


async def open_loop(times: Sequence[float], send: Callable[[int], Awaitable[str]]) -> list[Outcome]:
    """Sends request i at `times[i]`, whether or not those before it have been answered; `send` returns its status."""
    start = time.perf_counter()

    async def one(i: int, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - start)))
        status = await send(i)
        return Outcome(at, time.perf_counter() - start - at, status)  # a late start counts as waiting

    return list(await asyncio.gather(*(one(i, at) for i, at in enumerate(times))))


def summary(outcomes: Sequence[Outcome]) -> Measured:
    """What a run was like. Latencies are infinite where no request had a result."""
    seconds = sorted(of.seconds for of in outcomes if of.status in ("same", "differs"))
    last = max(of.begun + of.seconds for of in outcomes)
    first = min(of.begun for of in outcomes)
    cuts = (
        quantiles(seconds * (2 if len(seconds) == 1 else 1), n=20, method="inclusive")
        if seconds
        else [float("inf")] * 19
    )
    return Measured(
        requests=len(outcomes),
        p50=cuts[9],
        p95=cuts[18],
        per_minute=60 * len(seconds) / (last - first),
        statuses=Counter(of.status for of in outcomes),
    )
