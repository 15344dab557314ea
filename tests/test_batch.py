"""Several requests in one call: each row is what its request is alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

COUNTS = (7, 9, 5, 8, 6)
"""Steps of each request."""


def options(step: int, num_steps: int, session: str, **more: Any) -> hero_fx.Calling:
    return hero_fx.calling(session=session, step_index=step, num_steps=num_steps, **more)


class Requests:
    """Requests over a toy, each with its own latents, number of steps and timesteps."""

    def __init__(self, call: Callable[..., Any], rows: int = 1) -> None:
        self.call, self.rows = call, rows
        self.starts = [toys.latents(rows, seed=i) for i in range(len(COUNTS))]
        self.times = [tiny.timesteps(count) for count in COUNTS]

    def alone(self, name: str = "alone") -> list[list[Tensor]]:
        """Every output of each request, one after the other."""
        outputs: list[list[Tensor]] = []
        for i, (x, count) in enumerate(zip(self.starts, COUNTS, strict=True)):
            outputs.append([])
            for step, t in enumerate(self.times[i]):
                with options(step, count, f"{name}-{i}"):
                    outputs[i].append(self.call(x, t.repeat(self.rows)))
                x = x - outputs[i][-1] / count
        return outputs

    def mixed(self, seed: int, most: int = len(COUNTS), **more: Any) -> list[list[Tensor]]:
        """The same, in batches of requests drawn at random: they join and leave at any step."""
        draw, states = random.Random(seed), list(self.starts)
        outputs: list[list[Tensor]] = [[] for _ in COUNTS]
        while live := [i for i, count in enumerate(COUNTS) if len(outputs[i]) < count]:
            chosen = draw.sample(live, draw.randint(1, min(most, len(live))))
            calls = [options(len(outputs[i]), COUNTS[i], f"mixed{seed}-{i}") for i in chosen]
            t = torch.stack([self.times[i][len(outputs[i])] for i in chosen]).repeat_interleave(self.rows)
            with hero_fx.batch(calls, **more):
                found = self.call(torch.cat([states[i] for i in chosen]), t)
            for i, output in zip(chosen, found.split(self.rows), strict=True):
                outputs[i].append(output)
                states[i] = states[i] - output / COUNTS[i]
        return outputs


def apart(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """Largest relative error of any output of any request."""
    return max(tiny.worst(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


POLICIES: dict[str, dict[str, Any]] = {
    "hero": {},
    "taylorseer": {"policy": "taylorseer", "grid": None},
    "int8": {"state_dtype": torch.int8, "selection": "per_layer"},
    "toca": {"policy": "toca"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_row_is_its_request_alone(policy: str) -> None:
    """Float64, where rounding is far below any fault; full rows stand beside cached ones, selections and gaps differ."""
    call, backend = toys.compiled(toys.toy().double(), warmup=1, cooldown=0, **POLICIES[policy])
    requests = Requests(call)
    requests.starts = [x.double() for x in requests.starts]
    alone = requests.alone()
    before = backend.stats()
    assert apart(requests.mixed(seed=0), alone) < (1e-6 if policy == "int8" else 1e-13)
    after = backend.stats()
    assert after.graphs == 1
    assert after.full_calls - before.full_calls == before.full_calls
    assert after.cached_calls - before.cached_calls == before.cached_calls
    assert after.batched_graphs <= 6  # full and cached, of 2, 4 and 8


def test_compiled_step_graphs_are_as_many_as_buckets() -> None:
    call, backend = toys.compiled(inner="aot_eager", warmup=1, cooldown=0)
    requests = Requests(call)
    alone = requests.alone()
    assert apart(requests.mixed(seed=0, buckets=(3,)), alone) < 1e-6
    assert backend.stats().batched_graphs == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert apart(requests.mixed(seed=1, buckets=(3,)), alone) < 1e-6
    assert backend.stats().batched_graphs == 2
    assert backend.stats().graphs == 1
