"""Draws scenes by intersecting rays with planes, spheres and boxes, all scenes of a batch at once; nothing is approximated.

Depth is exact at pixel centres. Colour is the mean of `SAMPLES` x `SAMPLES` rays per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .camera import FOCAL, pixel_rays
from .scenes import KINDS, Scenes

SAMPLES = 2
FAR = 30.0
"""Depths end here, in metres."""
LIGHT = (-0.42, -0.76, -0.5)
"""Where the light comes from, in the level frame; of length 1."""


@dataclass(frozen=True)
class Clips:
    """Rendered clips with their ground truth, float32."""

    rgb: Tensor
    """[B, F, 3, S, S] in [0, 1]."""
    depth: Tensor
    """[B, F, S, S] along the camera's axis, in metres, at pixel centres."""
    poses: Tensor
    """[B, F, 4, 4] camera-to-first-camera."""
    moving: Tensor
    """[B, F, S, S] true where a moving object is seen."""


def rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Camera-to-level rotations [..., 3, 3]: positive yaw looks right, positive pitch looks down."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    cos, sin = yaw.cos(), yaw.sin()
    turn = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], dim=-1).unflatten(-1, (3, 3))
    cos, sin = pitch.cos(), pitch.sin()
    nod = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], dim=-1).unflatten(-1, (3, 3))
    return turn @ nod


def level_poses(scenes: Scenes, frames: int) -> Tensor:
    """Camera-to-level poses [B, F, 4, 4] along the paths."""
    s = torch.linspace(0, 1, frames, device=scenes.camera.device)[:, None]
    path = s * scenes.camera[:, None, :5] + 4 * s * (1 - s) * scenes.bend[:, None]
    poses = torch.eye(4, device=s.device).repeat(len(path), frames, 1, 1)
    poses[..., :3, :3] = rotation(path[..., 3], path[..., 4] + scenes.camera[:, None, 5])
    poses[..., :3, 3] = path[..., :3]
    return poses


def pattern(a: Tensor, b: Tensor, texture: Tensor, blur: Tensor) -> Tensor:
    """Soft uneven checks in [0, 1] at surface coordinates in metres, fading where a pixel, `blur` metres wide, covers them."""
    ka, kb, pa, pb, sharp = texture[:, None, None].unbind(-1)
    fade = (-0.5 * (blur * torch.maximum(ka, kb)).square()).exp()
    # The slow wave keeps the checks from repeating, so that a large step of the camera can be told from a small one.
    wave = 1.5 * torch.sin(ka * a + pa) * torch.sin(kb * b + pb) + 0.8 * torch.sin(
        0.43 * ka * a + 0.31 * kb * b + 2 * pa
    )
    return 0.5 + 0.5 * fade * torch.tanh(sharp * wave)


def cast(scenes: Scenes, poses: Tensor, size: int, *, colour: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Depth [B, F, P], index of the thing seen (0 ground, 1 wall, then objects) and, if wanted, colour [B, F, P, 3]."""
    frames = poses.shape[1]
    d = torch.einsum("bfij,jp->bfip", poses[..., :3, :3], pixel_rays(size).flatten(1).to(poses))
    dx, dy, dz = d.unbind(2)
    ox, oy, oz = poses[..., :3, 3, None].unbind(2)
    time = torch.linspace(0, 1, frames, device=d.device)[:, None]

    def per_scene(x: Tensor) -> Tensor:
        return x[:, None, None]

    normal = torch.stack([scenes.wall[:, 1].sin(), scenes.wall[:, 1].cos()], dim=-1)
    wx, wz = per_scene(normal[:, 0]), per_scene(normal[:, 1])
    ground = (per_scene(scenes.ground) - oy) / dy
    wall = (per_scene(scenes.wall[:, 0]) - wx * ox - wz * oz) / (wx * dx + wz * dz)
    hits = [torch.where(x > 0, x, FAR) for x in (ground, wall)]
    normals: list[tuple[Tensor, Tensor, Tensor]] = []
    for k in range(2 * KINDS):
        half, velocity = scenes.extent[:, k], scenes.velocity[:, k]
        # The ray in the object's own frame, where it is centred and upright.
        px = ox - (per_scene(scenes.position[:, k, 0]) + time * per_scene(velocity[:, 0]))
        py = oy - per_scene(scenes.ground - half[:, 1])
        pz = oz - (per_scene(scenes.position[:, k, 1]) + time * per_scene(velocity[:, 1]))
        if k < KINDS:
            hit, n = sphere((px, py, pz), (dx, dy, dz), per_scene(half[:, 0]))
        else:
            cos, sin = per_scene(scenes.turn[:, k].cos()), per_scene(scenes.turn[:, k].sin())
            ray = (cos * px - sin * pz, py, sin * px + cos * pz), (cos * dx - sin * dz, dy, sin * dx + cos * dz)
            hit, (nx, ny, nz) = box(*ray, per_scene(half).unbind(-1))
            n = cos * nx + sin * nz, ny, cos * nz - sin * nx
        hits.append(torch.where(per_scene(scenes.present[:, k]) > 0, hit, FAR))
        normals.append(n)
    depth, index = torch.stack(hits).min(dim=0)
    if not colour:
        return depth, index, None
    x, z = ox + depth * dx, oz + depth * dz
    y = oy + depth * dy
    pixel = depth / (FOCAL * size)
    slope = dy.abs().clamp(min=0.05)
    checks = pattern(x, z, scenes.texture[:, 0], pixel / slope)
    panels = pattern(wz * x - wx * z, y, scenes.texture[:, 1], pixel)
    colours = scenes.colours[:, None, None]
    light = torch.tensor(LIGHT, device=d.device)
    seen = [
        torch.lerp(colours[..., 0, :], colours[..., 1, :], checks[..., None]),
        torch.lerp(colours[..., 2, :], colours[..., 3, :], panels[..., None]) * 0.8,
    ]
    for k, (nx, ny, nz) in enumerate(normals):
        shade = 0.35 + 0.65 * (nx * light[0] + ny * light[1] + nz * light[2]).clamp(min=0)
        seen.append(shade[..., None] * scenes.paint[:, None, None, k])
    rgb = seen[0]
    for k, paint in enumerate(seen[1:], 1):
        rgb = torch.where((index == k)[..., None], paint, rgb)
    return depth, index, rgb


Vector = tuple[Tensor, Tensor, Tensor]


def sphere(p: Vector, d: Vector, radius: Tensor) -> tuple[Tensor, Vector]:
    """Where rays `p + s d` first meet a sphere about 0 (`FAR` if they miss), and its normals there."""
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = p[0] * d[0] + p[1] * d[1] + p[2] * d[2]
    c = p[0] * p[0] + p[1] * p[1] + p[2] * p[2] - radius * radius
    root = b * b - a * c
    s = (-b - root.clamp(min=0).sqrt()) / a
    hit = torch.where((root > 0) & (s > 0), s, FAR)
    return hit, ((p[0] + hit * d[0]) / radius, (p[1] + hit * d[1]) / radius, (p[2] + hit * d[2]) / radius)


def box(p: Vector, d: Vector, half: Vector) -> tuple[Tensor, Vector]:
    """Where rays `p + s d` first meet an upright box about 0 (`FAR` if they miss), and its normals there."""
    inverse = [1 / torch.where(x.abs() < 1e-6, 1e-6, x) for x in d]
    middle = [-x * i for x, i in zip(p, inverse, strict=True)]
    reach = [h * i.abs() for h, i in zip(half, inverse, strict=True)]
    enter = [m - r for m, r in zip(middle, reach, strict=True)]
    leave = [m + r for m, r in zip(middle, reach, strict=True)]
    first = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    last = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    hit = torch.where((first < last) & (first > 0), first, FAR)
    x, y, z = (-torch.sign(i) * (e == first) for e, i in zip(enter, inverse, strict=True))
    return hit, (x, y, z)


def render(scenes: Scenes, frames: int = 6, size: int = 32) -> Clips:
    """Clips of `frames` frames of `size` x `size` pixels."""
    level = level_poses(scenes, frames)
    depth, index, _ = cast(scenes, level, size, colour=False)
    rgb = cast(scenes, level, SAMPLES * size, colour=True)[2]
    assert rgb is not None
    rgb = rgb.unflatten(2, (size, SAMPLES, size, SAMPLES)).mean(dim=(3, 5)).permute(0, 1, 4, 2, 3)
    moves = (scenes.velocity != 0).any(dim=-1)
    moves = torch.cat([torch.zeros_like(moves[:, :2]), moves], dim=1)
    moving = moves[:, None].expand(-1, frames, -1).gather(2, index)
    # Rigid inverse of the first pose: everything is told relative to the first camera.
    first = torch.linalg.inv(level[:, :1])
    shape = (size, size)
    return Clips(rgb, depth.clamp(max=FAR).unflatten(2, shape), first @ level, moving.unflatten(2, shape))
