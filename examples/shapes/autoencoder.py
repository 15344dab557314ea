"""The autoencoder: principal components of space-time patches, so that latents are not pixels.

A patch of 2 frames x 4 x 4 pixels (96 numbers) becomes 16 channels: its projections on the principal components of the
patches of training clips. Components are orthogonal. Each channel is divided by the square root of its standard deviation,
half-way to equal variances: with all of it the last components, which are texture of edges, would weigh as much as the first,
which are colours; with none of it they would drown in noise.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .clips import FRAMES, SIZE, TRAINING, make_clips

__all__ = ["CHANNELS", "LATENT_SHAPE", "PATCH", "PatchAutoencoder", "fit_autoencoder"]

PATCH = (2, 4, 4)
"""Frames, height and width of what becomes one latent pixel."""
CHANNELS = 16
LATENT_SHAPE = (CHANNELS, FRAMES // PATCH[0], SIZE // PATCH[1], SIZE // PATCH[2])


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Linear, orthogonal but for one scale per channel."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS, patch: tuple[int, int, int] = PATCH) -> None:
        super().__init__()
        width = 3 * patch[0] * patch[1] * patch[2]
        self.mean = torch.nn.Parameter(torch.zeros(width), requires_grad=False)
        self.components = torch.nn.Parameter(torch.eye(width)[:channels].clone(), requires_grad=False)
        """[channels, width], orthonormal rows."""
        self.shift = torch.nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.ones(channels), requires_grad=False)

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] to latents [B, channels, F / 2, H / 4, W / 4]."""
        latents = (patches(video, self.config.patch) - self.mean) @ self.components.mT
        return ((latents - self.shift) / self.scale).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to [B, 3, F, H, W], clamped to [0, 1]."""
        flat = (latents.movedim(1, -1) * self.scale + self.shift) @ self.components + self.mean
        t, h, w = self.config.patch
        video = flat.unflatten(-1, (3, t, h, w)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return video.flatten(6, 7).flatten(4, 5).flatten(2, 3).clamp(0, 1)


def patches(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, 3, F, H, W] as [B, F / t, H / h, W / w, 3 t h w]."""
    t, h, w = patch
    cut = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # [B, 3, F, t, H, h, W, w]
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def fit_autoencoder(clips: int = 512) -> PatchAutoencoder:
    """Fitted to the first training clips, in a second or two."""
    found = PatchAutoencoder()
    flat = patches(make_clips(range(TRAINING, TRAINING + clips)).video, PATCH).flatten(0, 3).double()
    mean = flat.mean(dim=0)
    _, vectors = torch.linalg.eigh((flat - mean).mT @ (flat - mean) / len(flat))
    components = vectors.flip(1)[:, :CHANNELS].mT
    # An eigenvector has no sign of its own: the largest entry is positive.
    components = components * components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
    latents = (flat - mean) @ components.mT
    scale = latents.std(dim=0).sqrt()
    scale = scale * (latents / scale).square().mean().sqrt()
    state = {"mean": mean, "components": components, "shift": latents.mean(dim=0), "scale": scale}
    found.load_state_dict({name: value.float() for name, value in state.items()})
    return found
