"""Latents: clips as the 22 channels that the transformer denoises, and back; and the channels it is conditioned on.

There is no learned autoencoder: 2 x 2 pixels are folded into channels and every channel gets a fixed shift and scale, so
that it has about zero mean and unit variance over the training scenes.

| channels | what | size |
|---|---|---|
| 0..11 | RGB: 3 colours x 2 x 2 pixels | half the image's |
| 12..15 | square root of disparity (1 / depth): 2 x 2 pixels | |
| 16..18 | ray directions, less those of the first frame | |
| 19..21 | ray origins | |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .camera import pixel_rays, poses_from_raymap, raymap_from_poses
from .render import FAR, Clips

FOLD = 2
"""Pixels along a side that make one latent pixel."""
RGB, DISPARITY, RAYMAP = slice(0, 12), slice(12, 16), slice(16, 22)
MODALITIES = {"rgb": RGB, "disparity": DISPARITY, "raymap": RAYMAP}
LATENT = 22
CONDITION = 40
"""RGB latents of the frames that are given (12), a mask of them (1), where a pixel is (time, y, x: 3), and of each frame the
given ones that are next to it in time, before and after (2 x 12)."""
RGB_SHIFT, RGB_SCALE = 0.49, 0.165
DISPARITY_SHIFT, DISPARITY_SCALE = 0.505, 0.17
RAY_SCALE = (0.128, 0.036, 0.063, 0.35, 0.099, 0.303)
RAY_SHIFT = (0.0, 0.0, 0.0, 0.0, 0.0, 0.11)


@dataclass(frozen=True)
class World:
    """What latents stand for."""

    rgb: Tensor
    """[B, F, 3, S, S] in [0, 1]."""
    depth: Tensor
    """[B, F, S, S] in metres."""
    raymap: Tensor
    """[B, F, 6, S / 2, S / 2] directions and origins."""
    poses: Tensor
    """[B, F, 4, 4] camera-to-first-camera, fitted to the raymap."""


def rgb_latents(rgb: Tensor) -> Tensor:
    """[..., 3, S, S] in [0, 1] to [..., 12, S / 2, S / 2]."""
    return pixel_unshuffle((rgb - RGB_SHIFT) / RGB_SCALE, FOLD)


def encode(clips: Clips) -> Tensor:
    """Latents [B, F, 22, S / 2, S / 2] of rendered clips."""
    size = clips.rgb.shape[-1] // FOLD
    disparity = (clips.depth[:, :, None].rsqrt() - DISPARITY_SHIFT) / DISPARITY_SCALE
    raymap = raymap_from_poses(clips.poses, size)
    return torch.cat([rgb_latents(clips.rgb), pixel_unshuffle(disparity, FOLD), normalise_rays(raymap)], dim=2)


def decode(latents: Tensor) -> World:
    """The inverse of `encode`: colours are clamped to [0, 1], depths to at most `FAR`."""
    rgb = pixel_shuffle(latents[:, :, RGB], FOLD) * RGB_SCALE + RGB_SHIFT
    root = pixel_shuffle(latents[:, :, DISPARITY], FOLD)[:, :, 0] * DISPARITY_SCALE + DISPARITY_SHIFT
    raymap = restore_rays(latents[:, :, RAYMAP])
    return World(rgb.clamp(0, 1), root.clamp(min=FAR**-0.5) ** -2, raymap, poses_from_raymap(raymap))


def normalise_rays(raymap: Tensor) -> Tensor:
    """Raymaps [..., 6, S, S] as latents: less the first camera's rays, scaled to about unit variance."""
    shift, scale = _rays(raymap)
    return (raymap - shift) / scale


def restore_rays(latents: Tensor) -> Tensor:
    """The inverse of `normalise_rays`."""
    shift, scale = _rays(latents)
    return latents * scale + shift


def _rays(like: Tensor) -> tuple[Tensor, Tensor]:
    size = like.shape[-1]
    shift = torch.tensor(RAY_SHIFT)[:, None, None] + torch.cat([pixel_rays(size), torch.zeros(3, size, size)])
    return shift.to(like), torch.tensor(RAY_SCALE)[:, None, None].to(like)


def condition(rgb: Tensor, given: Tensor) -> Tensor:
    """Condition channels [B, F, 40, S / 2, S / 2] for frames [B, F, 3, S, S] of which those in `given` [B, F] are told."""
    latents = rgb_latents(rgb)
    batch, frames, _, height, width = latents.shape
    mask = given.to(latents)[:, :, None, None, None].expand(-1, -1, 1, height, width)
    places = torch.meshgrid(
        *(1.7 * torch.linspace(-1, 1, n, device=rgb.device) for n in (frames, height, width)), indexing="ij"
    )
    where = torch.stack(places, dim=1).to(latents).expand(batch, -1, -1, -1, -1)
    # A frame that is not told may hold anything, also what is not a number.
    told = torch.where(mask > 0, latents, 0)
    # In planning every frame between the ends gets both ends, and need not search for them; 0 where there is none.
    before, after = torch.zeros_like(told), torch.zeros_like(told)
    for f in range(1, frames):
        before[:, f] = torch.where(mask[:, f - 1] > 0, told[:, f - 1], before[:, f - 1])
        after[:, -f - 1] = torch.where(mask[:, -f] > 0, told[:, -f], after[:, -f])
    return torch.cat([told, mask, where, before, after], dim=2)
