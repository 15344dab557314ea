"""A small diffusion transformer, for the examples of these pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (2, 3, 4)
"""(frames, height, width) of the image tokens."""
TOKENS, CHANNELS, WIDTH = 24, 4, 16


class Block(nn.Module):
    """Attention and an FFN, each behind an adaLN gate."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.modulation, self.qkv, self.out = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.activation, self.attend = activation, attend

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, N, WIDTH], embedding [B, 1, WIDTH]."""
        gate, other_gate = self.modulation(embedding).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(norm(x)).chunk(3, dim=-1))
        x = x + gate * self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + other_gate * self.down(self.activation(self.up(norm(x))))
        return result


class Toy(nn.Module):
    """Latents [B, N, CHANNELS] and a timestep [B] -> the noise in them [B, N, CHANNELS]."""

    def __init__(
        self,
        layers: int = 4,
        activation: Callable[[Tensor], Tensor] = F.silu,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    ) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(Block(activation, attend) for _ in range(layers))
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """One call of the denoising loop."""
        angles = timestep[:, None, None].float() / 1000 * torch.exp(-torch.arange(WIDTH // 2) * 0.4)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        x = self.first(latents)
        for block in self.blocks:
            x = block(x, embedding)
        result: Tensor = self.last(norm(x))
        return result


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, (WIDTH,))


def noise(seed: int = 0, batch: int = 1) -> Tensor:
    """What a trajectory starts from."""
    return torch.randn(batch, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def timesteps(steps: int) -> Tensor:
    """Descending, as a scheduler makes them."""
    return torch.linspace(999, 19, steps).round()


def denoise(model: Callable[..., Any], latents: Tensor, steps: int) -> Tensor:
    """A denoising loop: the model is called once a step."""
    with torch.no_grad():
        for t in timesteps(steps):
            latents = latents - model(latents, t.expand(latents.shape[0])) / steps
    return latents
