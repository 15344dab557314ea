"""Small transformers, each of which shows one defect that step caching can have; `hero_fx.verify` has to find it.

All take latents [B, N, CHANNELS] and a timestep [B], and are sound: only a rewrite that is too bold makes them wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import tiny
from .toys import CHANNELS, TOKENS, WIDTH, sinusoid


class Attention(nn.Module):
    """Two heads over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    """One hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Small(nn.Module):
    """Two layers of attention and `mlps` MLPs; the timestep is added to the tokens."""

    def __init__(self, mlps: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.mlps = nn.ModuleList(nn.ModuleList(MLP() for _ in range(mlps)) for _ in range(2))

    def enter(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The residual stream in front of the layers."""
        result: Tensor = self.first(latents) + self.time(sinusoid(timestep).to(latents.dtype))[:, None]
        return result

    def attend(self, layer: int, x: Tensor) -> Tensor:
        """What attention adds to the stream."""
        result: Tensor = self.attention[layer](F.layer_norm(x, (WIDTH,)))
        return result

    def mlp(self, layer: int, x: Tensor, number: int = 0) -> Tensor:
        """What an MLP adds to the stream."""
        mlps: Any = self.mlps[layer]
        result: Tensor = mlps[number](F.layer_norm(x, (WIDTH,)))
        return result

    def leave(self, x: Tensor) -> Tensor:
        """The output of the model."""
        result: Tensor = self.last(F.layer_norm(x, (WIDTH,)))
        return result

    def forward(self, latents: Tensor, timestep: Tensor) -> Any:
        x = self.enter(latents, timestep)
        for layer, mlps in enumerate(self.mlps):
            x = x + self.attend(layer, x)
            for number in range(len(mlps)):  # type: ignore[arg-type]
                x = x + self.mlp(layer, x, number)
        return self.leave(x)


class ManyMLPs(Small):
    """One attention and ten MLPs in a layer: labels that are told apart among a few neighbours alone repeat."""

    def __init__(self) -> None:
        super().__init__(mlps=10)
        second = self.mlps[1]
        assert isinstance(second, nn.ModuleList)
        del second[1:]  # one such layer will do


class WritesBetweenReads(Small):
    """Reads a buffer, writes a part of it through a view, and reads it again."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.linspace(1, 2, WIDTH))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(latents, timestep)
        for layer in range(2):
            x = x + self.attend(layer, x) * self.memory.sin()
            self.memory[: WIDTH // 2].mul_(1.5)
            x = x + self.mlp(layer, x) * self.memory.sin()
        return self.leave(x)


class GathersBackwards(Small):
    """Scatters and gathers along a negative axis with indices of its own; a table lies along the tokens."""

    order: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("table", torch.linspace(-1, 1, TOKENS)[:, None].expand(TOKENS, WIDTH).contiguous())

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(latents, timestep)
        for layer in range(2):
            x = x + self.attend(layer, x)
            x = x + self.mlp(layer, x)
        return self.leave(torch.zeros_like(x).index_copy(-2, self.order, x) * self.table)


class GathersRepeats(Small):
    """Scatters rows to places that repeat, and gathers from there: the last row that was written comes back."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(TOKENS) // 2)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(latents, timestep)
        for layer in range(2):
            x = x + self.attend(layer, x)
            x = x + self.mlp(layer, x)
        x = torch.zeros_like(x).index_copy(1, self.places, x)
        return self.leave(x.index_select(1, self.places))


class ReturnsUpdate(Small):
    """Returns, beside its output, the very update of its last layer."""

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(latents, timestep)
        x = x + self.attend(0, x)
        x = x + self.mlp(0, x)
        x = x + self.attend(1, x)
        update = self.mlp(1, x)
        return self.leave(x + update), update


class AutocastInside(Small):
    """Each branch runs in bfloat16 by autocast, the sums do not; weights are of whatever dtype."""

    def attend(self, layer: int, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().attend(layer, x)

    def mlp(self, layer: int, x: Tensor, number: int = 0) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().mlp(layer, x, number)


class AutocastAround(Small):
    """All layers run in one region of autocast."""

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(latents, timestep)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16):
            for layer in range(2):
                x = x + self.attend(layer, x)
                x = x + self.mlp(layer, x)
        return self.leave(x)


def seeded(kind: type[Small]) -> Any:
    """A model in eval mode with seeded weights."""
    torch.manual_seed(0)
    return tiny.randomized(kind())
