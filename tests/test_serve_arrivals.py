"""The loader of the serving example: when requests arrive, and what is said of a run."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from .support.examples import package

arrivals = package("serve.arrivals")


def test_arrivals_are_poisson() -> None:
    times = arrivals.arrivals(rate=30, count=4000, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(2, rel=0.05)
    assert gaps.std() == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(arrivals.arrivals(rate=60, count=9, seed=1), np.array(times[:9]) / 2)
    assert arrivals.arrivals(30, 9, seed=2)[1] != times[1]


def test_the_loader_waits_for_nobody() -> None:
    running, most = 0, 0

    async def send(i: int) -> str:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.05)
        running -= 1
        return "same"

    outcomes = asyncio.run(arrivals.open_loop([0, 0.01, 0.02], send))
    assert most == 3
    assert [of.begun for of in outcomes] == [0, 0.01, 0.02]
    assert all(0.05 <= of.seconds < 1 for of in outcomes)


def test_a_run_is_summed_up() -> None:
    outcomes = [arrivals.Outcome(begun=float(i), seconds=1.0 + i, status="same") for i in range(21)]
    measured = arrivals.summary(outcomes)
    assert (measured.requests, measured.p50, measured.p95) == (21, 11.0, 20.0)
    assert measured.per_minute == pytest.approx(60 * 21 / 41)
    assert measured.held(20.0)
    assert not measured.held(19.9)
    refused = arrivals.summary([*outcomes, arrivals.Outcome(0.0, 0.1, "503: busy")])
    assert (refused.requests, refused.p95) == (22, 20.0)
    assert not refused.held(60.0)
    assert arrivals.summary(outcomes[:1]).p95 == 1.0
    assert arrivals.summary([arrivals.Outcome(0.0, 0.1, "503: busy")]).p50 == math.inf
