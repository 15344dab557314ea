"""Requests over a toy, alone and several in one call."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hero_fx

from . import tiny, toys

COUNTS = (6, 7, 4, 5)
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


def together(
    call: Any, sessions: str, steps: Sequence[int], t: Tensor | None = None, lane: str | None = None, **more: Any
) -> Tensor:
    """One call of a request for each letter, on the latents of seed 0, 1, ..."""
    words = [options(step, 9, session, lane=lane) for session, step in zip(sessions, steps, strict=True)]
    latents = torch.cat([toys.latents(1, seed=i) for i in range(len(sessions))])
    times = tiny.timesteps(9)[list(steps)] if t is None else t
    with hero_fx.batch(words, **more):
        result: Tensor = call(latents, times)
    return result


def single(call: Any, session: str, step: int, seed: int, **more: Any) -> Tensor:
    with options(step, 9, session, **more):
        result: Tensor = call(toys.latents(1, seed=seed), tiny.timesteps(9)[[step]])
    return result


class Spoiled(torch.nn.Module):
    """A toy with something in front that a batch must not change."""

    def __init__(self, spoil: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.spoil, self.scale = toys.toy(), spoil, 1.0
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.inner(self.spoil(self, latents), timestep)
        return result
