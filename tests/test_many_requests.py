"""Ten thousand trajectories of one compiled model, interleaved in a generated order: each is what it is alone."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule

from .support import tiny, toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
AT_ONCE, SEEDS, STEPS = 32, 24, 2
GIVEN_UP = 0.02
"""Of the calls, so many are the last one of a request that is given up."""


class Product(nn.Module):
    """Latents [B, N, CHANNELS] and timesteps [B] -> [B, N, CHANNELS]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(toys.CHANNELS, toys.CHANNELS)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.linear(latents) * (timestep[:, None, None] / 1000)
        return result


@dataclass
class Request:
    """Where one of them stands."""

    session: str
    seed: int
    x: Tensor
    done: int = 0


def test_ten_thousand_requests_do_not_mix_and_leave_nothing() -> None:
    gc.freeze()  # what tests before have made is neither walked nor counted
    call, backend = _compiled()
    alone = []
    for seed in range(SEEDS):
        alone.append(toys.loop(call, toys.latents(batch=1, seed=seed), _times()))
        hero_fx.reset()
    draw = random.Random(0)
    _serve(call, range(1000), alone, draw)
    tensors = _live_tensors()
    _serve(call, range(1000, 10_000), alone, draw)
    assert _live_tensors() <= tensors
    stats = backend.stats()
    assert (stats.sessions, stats.state_bytes, stats.evictions) == (0, 0, 0)
    assert stats.full_calls >= 10_000
    assert stats.cached_calls > 9_700


def _compiled() -> tuple[Any, hero_fx.Backend]:
    """A model of one product, whose cached steps are forecast: next to all of the time is what serving takes."""
    torch.manual_seed(0)
    model = Product().eval().requires_grad_(False)
    rule = OutputRule(index=0, axis=None, history=1)
    line = hero_fx.Timeline(
        schedule=(True, False),
        timesteps=tuple(float(time[0]) for time in _times()),
        coefficients={rule.table: 0.3 * torch.randn(STEPS, 1)},
    )
    plan = hero_fx.Plan(policy="forecast", timelines=(line,), outputs=(rule,))
    backend = hero_fx.backend(plan=plan, inner=tiny.INNER)
    return toys.torch_compile(model, backend, fullgraph=True), backend


def _serve(call: Any, numbers: range, alone: list[list[Tensor]], draw: random.Random) -> None:
    """Starts a request for each number, at most `AT_ONCE` live ones, and advances them in a drawn order to their ends."""
    waiting, live, times = iter(numbers), list[Request](), _times()
    more = True
    while more or live:
        if more and len(live) < AT_ONCE and (not live or draw.random() < 0.5):
            number = next(waiting, None)
            more = number is not None
            if number is not None:
                seed = draw.randrange(SEEDS)
                live.append(Request(f"request {number}", seed, toys.latents(batch=1, seed=seed)))
            continue
        request = draw.choice(live)
        session = hero_fx.session(request.session)
        with torch.no_grad(), session:
            output = call(request.x, times[request.done])
        assert torch.equal(output, alone[request.seed][request.done]), request
        request.x = request.x - output / STEPS
        request.done += 1
        if request.done == STEPS or draw.random() < GIVEN_UP:
            session.drop()
            live.remove(request)


def _times() -> list[Tensor]:
    return [time.clone() for time in toys.times(STEPS, batch=1)]


def _live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())
