"""Every resolution compiles once and owns its state, whatever Dynamo is told of dynamic shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

import hero_fx

from .support import tiny, toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHAPES = [(3, 8, 12), (2, 6, 8)]
"""Frames, height and width of latents, cut into patches of 1 x 2 x 2."""


class Video(nn.Module):
    """A toy on patches of latents [B, 4, frames, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv3d(4, toys.CHANNELS, (1, 2, 2), (1, 2, 2))
        self.inner = toys.ToyDiT(2)
        self.back = nn.Linear(toys.CHANNELS, 4 * 2 * 2)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        patches = self.cut(latents)
        frames, height, width = patches.shape[2:]
        tokens = self.back(self.inner(patches.flatten(2).transpose(1, 2), timestep))
        pixels = tokens.reshape(-1, frames, height, width, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        result: Tensor = pixels.flatten(5).flatten(3, 4)
        return result


@cache
def model() -> Any:
    torch.manual_seed(0)
    return tiny.randomized(Video())


def backend(**options: Any) -> hero_fx.Backend:
    return hero_fx.backend("fora", inner=tiny.INNER, interval=3, warmup=1, **options)


def loop(call: Any, shape: tuple[int, int, int], mark: Callable[[Tensor, int], None] | None = None) -> list[Tensor]:
    """Three steps at one resolution, the second and third cached."""
    x = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(1))
    outputs = []
    for time in tiny.timesteps(3):
        for axis in (2, 3, 4):
            if mark is not None:
                mark(x, axis)
        with torch.no_grad():
            out = call(x, time[None])
        outputs.append(out)
        x = x - out / 3
    return outputs


@cache
def expected() -> list[list[Tensor]]:
    torch._dynamo.reset()
    call = toys.torch_compile(model(), backend=backend(), fullgraph=True, dynamic=False)
    return [loop(call, shape) for shape in SHAPES]


@pytest.mark.parametrize("how", ["dynamic=True", "maybe_mark_dynamic"])
def test_dynamic_shapes_compile_each_resolution_once(how: str) -> None:
    theirs = expected()
    torch._dynamo.reset()
    hero = backend()
    dynamic = True if how == "dynamic=True" else None
    mark = None if dynamic else torch._dynamo.maybe_mark_dynamic
    call = toys.torch_compile(model(), backend=hero, fullgraph=True, dynamic=dynamic)
    for count in (1, 2):  # a second round compiles nothing
        for number, shape in enumerate(SHAPES):
            assert tiny.worst(loop(call, shape, mark), theirs[number]) < 1e-5
        assert hero.stats().graphs == len(SHAPES)
        assert (hero.stats().full_steps, hero.stats().cached_steps) == (2 * count, 4 * count)
    assert [graphs.structure.grid for graphs in hero.graphs] == [(f, h // 2, w // 2) for f, h, w in SHAPES]


def test_shapes_in_turns_own_their_state() -> None:
    hero = hero_fx.backend(inner=tiny.INNER, warmup=2)
    compiled = toys.torch_compile(model(), backend=hero, fullgraph=True, dynamic=False)

    def call(x: Tensor, t: Tensor) -> Any:
        return compiled(x, t.expand(x.shape[0]))

    starts = [torch.randn(batch, 4, *shape) for batch, shape in ((2, (3, 8, 12)), (1, (2, 10, 6)))]
    times = list(tiny.timesteps(9))
    both = toys.in_turns([call, call], starts, times)
    assert [graphs.structure.grid for graphs in hero.graphs] == [(3, 4, 6), (2, 5, 3)]
    for start, outputs in zip(starts, both, strict=True):
        assert toys.same(outputs, toys.alone(call, hero, start, times))


def test_mark_dynamic_names_the_fix() -> None:
    fix = r"axes 2, 3, 4 of latents.*every resolution compiles once.*torch._dynamo.maybe_mark_dynamic"
    call = toys.torch_compile(model(), backend=backend(), fullgraph=True)
    with pytest.raises(BackendCompilerFailed, match=fix):
        loop(call, SHAPES[0], torch._dynamo.mark_dynamic)
    torch._dynamo.reset()
    call = toys.torch_compile(model(), backend=backend(strict=False), fullgraph=True)
    with pytest.warns(UserWarning, match=fix):
        ours = loop(call, SHAPES[0], torch._dynamo.mark_dynamic)
    plain = loop(model(), SHAPES[0])
    assert tiny.worst(ours, plain) < 1e-5


def test_the_last_resolution_that_dynamo_compiles() -> None:
    hero = backend()
    call = toys.torch_compile(model(), backend=hero, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loop(call, SHAPES[0])
        with pytest.warns(UserWarning, match=r"this is number 2, .*config.recompile_limit=2 allows no further one"):
            loop(call, SHAPES[1])
        with pytest.raises(FailOnRecompileLimitHit):
            loop(call, (1, 6, 4))
        loop(call, SHAPES[0])
