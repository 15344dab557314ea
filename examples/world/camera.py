"""Cameras and raymaps: poses to rays and back.

Axes are OpenCV's: x right, y down, z forward. A pose is camera-to-world, the world being the first frame's camera, so the
first pose of every clip is the identity. A raymap holds for each pixel the ray's direction `R K^-1 (x, y, 1)`, whose depth
along the camera's axis is 1, and its origin `t`: a point at depth z is `origin + z * direction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOCAL = 0.62
"""Focal length in widths of the image; the same for every clip."""


def pixel_rays(size: int) -> Tensor:
    """`K^-1 (x, y, 1)` of the pixel centres of a square image: float32 [3, size, size], in the camera's axes."""
    at = (torch.arange(size) + 0.5) / size - 0.5
    y, x = torch.meshgrid(at / FOCAL, at / FOCAL, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


def raymap_from_poses(poses: Tensor, size: int) -> Tensor:
    """Directions (3) and origins (3) [..., 6, size, size] of the rays of poses [..., 4, 4]."""
    directions = torch.einsum("...ij,jhw->...ihw", poses[..., :3, :3], pixel_rays(size).to(poses))
    origins = poses[..., :3, 3, None, None].expand_as(directions)
    return torch.cat([directions, origins], dim=-3)


def poses_from_raymap(raymap: Tensor) -> Tensor:
    """Camera-to-world poses [..., 4, 4] that fit a raymap [..., 6, size, size] best, in the raymap's dtype.

    The translation is the mean origin. The rotation is the least-squares fit of the directions, `min |R P - D|` over
    rotations (the orthogonal Procrustes problem; Kabsch 1976), with the known intrinsics.
    """
    wide = raymap.double()
    directions, origins = wide.split(3, dim=-3)
    rays = pixel_rays(raymap.shape[-1]).to(wide)
    u, _, v = torch.linalg.svd(torch.einsum("...ihw,jhw->...ij", directions, rays))
    flip = torch.ones_like(u[..., 0])
    flip[..., 2] = torch.linalg.det(u @ v)
    poses = torch.eye(4).to(wide).expand(*raymap.shape[:-3], 4, 4).clone()
    poses[..., :3, :3] = (u * flip[..., None, :]) @ v
    poses[..., :3, 3] = origins.mean(dim=(-2, -1))
    return poses.to(raymap.dtype)
