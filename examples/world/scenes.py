"""Procedural scenes: what is drawn at random, from one seed per scene.

A scene is a textured ground, a textured wall behind it, up to two spheres and two boxes that stand on the ground, some of
them moving along it, and a camera on a smooth path. Scenes live in the *level* frame: the first camera's position is the
origin, x right, y down along gravity, z forward. `render.py` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

HELD_OUT, TRAINING, SEEDS = 0, 2**31, 2**32
"""Held-out scene i has the seed `HELD_OUT + i` and is never trained on; training scene i has `TRAINING + i`. Seeds end at
`SEEDS`, for torch's generator looks at their last 32 bits alone: larger ones would give scenes that exist already."""
KINDS = 2
"""Objects of each kind."""
DRAWS = 96
"""Uniform numbers that one scene is made from."""


@dataclass(frozen=True)
class Scenes:
    """Parameters of a batch of scenes, float32; lengths in metres, angles in radians, velocities per clip."""

    camera: Tensor
    """[B, 6] right, down, forward, yaw, pitch at the end of the clip, and the pitch at its start."""
    bend: Tensor
    """[B, 5] how far the path bows from a straight line half-way: right, down, forward, yaw, pitch."""
    ground: Tensor
    """[B] depth of the ground below the first camera."""
    wall: Tensor
    """[B, 2] distance and yaw of the wall."""
    texture: Tensor
    """[B, 2, 5] of ground and wall: two wave numbers per metre, two phases, sharpness."""
    colours: Tensor
    """[B, 4, 3] two of the ground, two of the wall, in [0, 1]."""
    position: Tensor
    """[B, 2 * KINDS, 2] x and z of the spheres, then of the boxes, at the start."""
    velocity: Tensor
    """[B, 2 * KINDS, 2] their way over the clip, 0 for those that stand still."""
    extent: Tensor
    """[B, 2 * KINDS, 3] half sizes in x, y, z; the spheres' are equal."""
    turn: Tensor
    """[B, 2 * KINDS] yaw of each object."""
    present: Tensor
    """[B, 2 * KINDS] 1.0 where there is such an object."""
    paint: Tensor
    """[B, 2 * KINDS, 3] colours of the objects."""

    def to(self, device: Any) -> Scenes:
        """On another device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))


def hue(h: Tensor, saturation: Tensor | float, value: Tensor | float) -> Tensor:
    """RGB [..., 3] of hues in turns."""
    k = (h[..., None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1.0
    pure = (6 * (k - 0.5).abs() - 1).clamp(0, 1)
    saturation, value = (torch.as_tensor(x)[..., None] for x in (saturation, value))
    return value * (1 - saturation * (1 - pure))


def sample_scenes(seeds: Sequence[int]) -> Scenes:
    """One scene per seed; the same seed gives the same scene in whatever batch.

    Raises:
        ValueError: for a seed that is not a number of a scene.
    """
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed={seed}: scenes have the seeds 0 to 2**32 - 1; choose one of them.")
    rows = [torch.rand(DRAWS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draws = torch.stack(rows)
    batch, used = len(rows), 0

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        nonlocal used
        count = math.prod(shape)
        taken = draws[:, used : used + count].reshape(batch, *shape)
        used += count
        return low + (high - low) * taken

    def between(low: Sequence[float], high: Sequence[float]) -> Tensor:
        return torch.tensor(low) + uniform(0, 1, len(low)) * (torch.tensor(high) - torch.tensor(low))

    objects = 2 * KINDS
    camera = between([-1.0, -0.25, -0.6, -0.38, -0.09, -0.05], [1.0, 0.25, 1.0, 0.38, 0.09, 0.25])
    bend = between([-0.06, -0.025, -0.06, -0.025, -0.01], [0.06, 0.025, 0.06, 0.025, 0.01])
    waves = torch.stack([uniform(1.4, 2.8, 2), uniform(0.7, 1.5, 2)], dim=1)
    texture = torch.cat([waves, uniform(0, 2 * math.pi, 2, 2), uniform(1.0, 3.0, 2, 1)], dim=2)
    base = uniform(0, 1, 2)
    tints = torch.stack([base, base + uniform(0.1, 0.5, 2)], dim=2).flatten(1)
    colours = hue(tints, uniform(0.15, 0.6, 4), torch.tensor([0.9, 0.45, 0.95, 0.5]).expand(batch, 4))
    depth = uniform(2.6, 5.5, objects)
    position = torch.stack([uniform(-0.75, 0.75, objects) * depth, depth], dim=2)
    velocity = uniform(-1.0, 1.0, objects, 2) * torch.tensor([1.4, 0.7])
    velocity = velocity * (uniform(0, 1, objects, 1) < 0.5)
    extent = uniform(0.3, 0.65, objects, 3)
    extent = torch.cat([extent[:, :KINDS, :1].expand(-1, -1, 3), extent[:, KINDS:]], dim=1)
    return Scenes(
        camera=camera,
        bend=bend,
        ground=uniform(1.0, 1.6, 1)[:, 0],
        wall=between([6.0, -0.25], [9.0, 0.25]),
        texture=texture,
        colours=colours,
        position=position,
        velocity=velocity,
        extent=extent,
        turn=uniform(0, math.pi / 2, objects),
        present=(uniform(0, 1, objects) < 0.75).float(),
        paint=hue(uniform(0, 1, objects), uniform(0.7, 1.0, objects), uniform(0.7, 1.0, objects)),
    )


def straightened(scenes: Scenes, which: Tensor | None = None) -> Scenes:
    """The same scenes, those in `which` [B] or all, with paths that do not bow between the end frames."""
    bend = torch.zeros_like(scenes.bend)
    return replace(scenes, bend=bend if which is None else torch.where(which[:, None], bend, scenes.bend))
