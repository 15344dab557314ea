"""What an entry of the zoo is, and what entries are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH, TEXT = 2, 7
FRAMES, HEIGHT, WIDTH = 3, 8, 12
GRID = (FRAMES, HEIGHT // 2, WIDTH // 2)
"""Tokens of a video cut into patches of 1 x 2 x 2."""


@dataclass(frozen=True)
class Sample:
    """A model in eval mode and the keyword arguments of one call."""

    model: Any
    inputs: dict[str, Any]
    time: str = "timestep"
    """The argument with the diffusion time."""
    latents: str = "hidden_states"
    """The argument with the noisy latents."""
    grid: tuple[int, int, int] | None = None
    """The token grid of packed latents, where no graph can show it."""

    def at(self, share: float) -> dict[str, Any]:
        """The call at a share of the trajectory: 0 is pure noise at the highest timestep, 1 the end."""
        seeded = torch.Generator().manual_seed(7)

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(v) for v in value]
            return ((1 - share) * value + share * torch.randn(value.shape, generator=seeded)).to(value.dtype)

        time = self.inputs[self.time]
        later = time * (1 - 0.8 * share)
        return {**self.inputs, self.latents: moved(self.inputs[self.latents]), self.time: later.to(time.dtype)}


Builder = Callable[[], Sample]
ZOO: dict[str, Builder] = {}


def entry(build: Builder) -> Builder:
    ZOO[build.__name__] = build
    return build


def sample(name: str) -> Sample:
    """The seeded sample of that name; all its weights are random, zero-initialised gates and unit norms among them."""
    torch.manual_seed(0)
    built = ZOO[name]()
    with torch.no_grad():
        for parameter in built.model.parameters():
            flat = parameter.flatten()
            if not bool(torch.isfinite(flat).all()) or bool((flat == flat[0]).all()):
                start = flat[0] if bool(torch.isfinite(flat[0])) and parameter.dim() < 2 else torch.zeros(())
                parameter.copy_(start + 0.2 * torch.randn(parameter.shape))
    built.model.eval().requires_grad_(False)
    return built


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def mask(length: int = TEXT, hidden: int = 2, batch: int = BATCH) -> Tensor:
    """[batch, length], 1 but for the last `hidden` tokens of the last element."""
    mask = torch.ones(batch, length)
    mask[-1, length - hidden :] = 0
    return mask


def steps(batch: int = BATCH) -> Tensor:
    return torch.full((batch,), 900)


def shares(batch: int = BATCH) -> Tensor:
    return torch.full((batch,), 0.9)


def ids(tokens: int, columns: int, width: int = 0) -> Tensor:
    """Positions [tokens, columns]: zeros, or rows and columns of an image of that width."""
    ids = torch.zeros(tokens, columns)
    if width:
        ids[:, 1], ids[:, 2] = torch.arange(tokens) // width, torch.arange(tokens) % width
    return ids


def rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    angles = normal(tokens, channels // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
