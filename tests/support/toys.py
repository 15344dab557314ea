"""A toy diffusion transformer of our own: packed latents, any form of timestep, and ways to spoil it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hero_fx
from hero_fx.passes.compat import argument_name

from . import tiny
from .tracing import Shared, capture

GRID = (2, 3, 5)
TOKENS = 30
CHANNELS, WIDTH = 6, 16


def sinusoid(time: Tensor) -> Tensor:
    """[...] -> [..., WIDTH]."""
    angles = time[..., None].float() * torch.exp(-torch.arange(WIDTH // 2) * 0.9)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """adaLN with gates, self-attention, FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, N, WIDTH], embedding [B, 1 or N, WIDTH]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, dim=-1)
        normal = F.layer_norm(x, (WIDTH,)) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normal).chunk(3, dim=-1))
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normal = F.layer_norm(x, (WIDTH,)) * (1 + scale2) + shift2
        result: Tensor = x + gate2 * self.down(F.gelu(self.up(normal)))
        return result


class ToyDiT(nn.Module):
    """Latents [B, N, CHANNELS] and a timestep of shape [], [B] or [B, N] -> [B, N, CHANNELS]."""

    def __init__(self, layers: int = 3, scale: float = 1.0, between: Callable[[], object] | None = None) -> None:
        """`scale`: what the timestep is multiplied with; `between`: called between the blocks."""
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.scale, self.between = scale, between

    def forward(self, latents: Tensor, timestep: Any) -> Tensor:
        time = torch.as_tensor(timestep) * self.scale
        time = time.expand(latents.shape[0]) if time.dim() == 0 else time
        embedding = F.silu(self.time(sinusoid(time).to(latents.dtype)))
        x, embedding = self.first(latents), embedding if embedding.dim() == 3 else embedding[:, None]
        for number, block in enumerate(self.blocks):
            if number and self.between is not None:
                self.between()
            x = block(x, embedding)
        result: Tensor = self.last(F.layer_norm(x, (WIDTH,)))
        return result


class Guided(nn.Module):
    """A toy that is told by a text [B, S, WIDTH] what to make."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = ToyDiT(layers)
        self.read = nn.Linear(WIDTH, CHANNELS)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        result: Tensor = self.inner(latents + self.read(text).mean(dim=1, keepdim=True), timestep)
        return result


class Renamed(nn.Module):
    """The same model, its time input under a name that says nothing."""

    def __init__(self, inner: ToyDiT) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, latents: Tensor, when: Tensor) -> Tensor:
        result: Tensor = self.inner(latents, when)
        return result


def torch_compile(model: Any, backend: Any, **options: Any) -> Any:
    """`torch.compile`, for a type checker that does not know what comes back."""
    return torch.compile(model, backend=backend, **options)


def toy(layers: int = 2, **options: Any) -> Any:
    """A seeded `ToyDiT` in eval mode."""
    torch.manual_seed(0)
    return tiny.randomized(ToyDiT(layers, **options))


def latents(batch: int = 2, seed: int = 3, tokens: int = TOKENS) -> Tensor:
    """[batch, tokens, CHANNELS]."""
    return torch.randn(batch, tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


def loop(call: Callable[..., Any], start: Tensor, times: Any) -> list[Tensor]:
    """A closed denoising loop over the toy: every output."""
    x, outputs = start, []
    with torch.no_grad():
        for time in times:
            outputs.append(call(x, time))
            x = x - outputs[-1] / len(times)
    return outputs


def in_turns(calls: list[Callable[..., Any]], starts: list[Tensor], times: list[Any]) -> list[list[Tensor]]:
    """Closed loops that advance together, step by step: every output of each."""
    states = list(starts)
    outputs: list[list[Tensor]] = [[] for _ in starts]
    with torch.no_grad():
        for time in times:
            for i, call in enumerate(calls):
                outputs[i].append(call(states[i], time))
                states[i] = states[i] - outputs[i][-1] / len(times)
    return outputs


def compiled(model: Any = None, **options: Any) -> tuple[Any, hero_fx.Backend]:
    """A toy compiled with HERO: of nine steps five are full."""
    backend = hero_fx.backend(**{"inner": tiny.INNER, "grid": GRID, "warmup": 2, **options})
    return torch_compile(model or toy(), backend=backend, fullgraph=True), backend


class Captured:
    """What Dynamo makes of a model for one example, traced and normalised once for many backends.

    For tests of what a backend does at each call of one shape, in which Dynamo has no part.
    """

    def __init__(self, model: Any, **example: Tensor) -> None:
        gm, self.inputs = capture(model, **example)
        self.shared = Shared(gm, self.inputs)
        names = [argument_name(node) for node in gm.graph.find_nodes(op="placeholder")]
        self.places = [names.index(name) for name in example]

    def compiled(self, backend: hero_fx.Backend) -> Callable[..., Tensor]:
        """Called with the values of `example`, in its order."""
        run = self.shared.compiled(backend)

        def call(*values: Tensor) -> Tensor:
            inputs = list(self.inputs)
            for place, value in zip(self.places, values, strict=True):
                inputs[place] = value
            result: Tensor = run(*inputs)[0]
            return result

        return call


@cache
def captured() -> Captured:
    """A toy of two layers, for two rows."""
    return Captured(toy(), latents=latents(), timestep=times(1)[0])


def made(**options: Any) -> tuple[Callable[..., Tensor], hero_fx.Backend]:
    """As `compiled`, of the captured toy."""
    backend = hero_fx.backend(**{"inner": tiny.INNER, "grid": GRID, "warmup": 2, **options})
    return captured().compiled(backend), backend


def state_bytes(**options: Any) -> int:
    """Of one lane of the captured toy."""
    call, backend = made(**options)
    (graphs,) = backend.graphs
    del call  # a backend forgets what no one holds
    return graphs.state_bytes


def alone(call: Any, backend: hero_fx.Backend, start: Tensor, times: list[Any]) -> list[Tensor]:
    """What a trajectory gives by itself; nothing is compiled for it."""
    backend.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        return loop(call, start, times)


def times(steps: int, batch: int = 2) -> list[Tensor]:
    """Descending timesteps, each of shape [batch]."""
    return [time.expand(batch) for time in tiny.timesteps(steps)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Equal bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def toy_backend(policy: Any = "hero", **options: Any) -> hero_fx.Backend:
    """A backend for a toy."""
    return hero_fx.backend(policy, **{"inner": tiny.INNER, "grid": GRID, **options})


def run_made(backend: hero_fx.Backend, steps: int = 8) -> list[Tensor]:
    """A closed loop over the captured toy."""
    return loop(captured().compiled(backend), latents(), times(steps))


def run_toy(backend: Any, model: Any = None, steps: int = 8, **compile_options: Any) -> list[Tensor]:
    """A closed loop over a toy that is compiled with a backend."""
    call = torch_compile(model or toy(), backend=backend, fullgraph=True, **compile_options)
    return loop(call, latents(), times(steps))
