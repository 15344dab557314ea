"""A guided toy, and denoising loops over it that are advanced call by call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

import hero_fx

from . import tiny, toys

STEPS = 9
OPTIONS: dict[str, Any] = {"policy": "taylorseer", "interval": 3, "warmup": 1, "grid": None, "inner": tiny.INNER}


class Told(toys.Guided, CacheMixin):
    """A guided toy that a pipeline can name its calls to."""


def text(seed: int) -> Tensor:
    return torch.randn(2, 4, toys.WIDTH, generator=torch.Generator().manual_seed(seed))


def guided(**options: Any) -> tuple[Any, hero_fx.Backend]:
    """A toy that is called with (latents, timestep, text)."""
    torch.manual_seed(0)
    backend = hero_fx.backend(**{**OPTIONS, **options})
    return toys.torch_compile(tiny.randomized(toys.Guided()), backend, fullgraph=True), backend


@cache
def captured() -> toys.Captured:
    """A guided toy, for two rows."""
    torch.manual_seed(0)
    return toys.Captured(
        tiny.randomized(toys.Guided()), latents=toys.latents(), timestep=toys.times(1)[0], text=text(1)
    )


def made(**options: Any) -> tuple[Any, hero_fx.Backend]:
    """As `guided`, where Dynamo has no part in what is tested."""
    backend = hero_fx.backend(**{**OPTIONS, **options})
    return captured().compiled(backend), backend


def lone(call: Any, start: Tensor, times: list[Tensor], words: Tensor) -> list[Tensor]:
    """What a trajectory gives by itself: with a word said of every call, and nothing to be told."""
    outputs = []
    hero_fx.reset()
    with torch.no_grad():
        x = start
        for step, t in enumerate(times):
            with hero_fx.calling(session="alone", step_index=step):
                outputs.append(call(x, t.clone(), words.clone()))
            x = x - outputs[-1] / STEPS
    hero_fx.reset()
    return outputs


def plain_times(steps: int = STEPS) -> list[Tensor]:
    """Timesteps that are no views of a table."""
    return [time.clone() for time in toys.times(steps)]


class Loop:
    """A denoising loop that is advanced call by call."""

    def __init__(self, call: Any, seed: int, words: Tensor | None) -> None:
        self.call, self.x, self.words = call, toys.latents(seed=seed), words
        self.start, self.outputs = self.x, list[Tensor]()

    def step(self, t: Tensor) -> None:
        with torch.no_grad():
            out = self.call(self.x, t) if self.words is None else self.call(self.x, t, self.words)
        self.outputs.append(out)
        self.x = self.x - out / STEPS
