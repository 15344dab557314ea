"""Raymaps as Aether codes them: packed into latent channels, and turned into camera poses.

A raymap [frames, 6, h, w] has a ray for each latent pixel: its direction `R K^-1 (x, y, 1)`, then its origin. Origins are
coded: ten times the camera's place, by `sign(x) log(1 + |x|)`. Axes are OpenCV's, poses are camera-to-world, and the world is
the first frame's camera.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation
from torch import Tensor, cat

Array = NDArray[Any]

ORIGIN_SCALE = 10.0
"""What the model multiplies camera places by before it takes the logarithm."""


def pack(raymap: Tensor, ratio: int = 4) -> Tensor:
    """[B, F, 6, h, w] as latent frames [B, ceil(F / ratio), 6 ratio, h, w].

    The first frames are repeated in front until `ratio` divides their number; latent frame t of T then holds the frames t,
    T + t, 2 T + t, ... one after the other in its channels, which is the order that the model was trained with.
    """
    if missing := -raymap.shape[1] % ratio:
        raymap = cat([raymap[:, :missing], raymap], dim=1)
    return raymap.unflatten(1, (ratio, -1)).transpose(1, 2).flatten(2, 3)


def unpack(latents: Tensor, frames: int, ratio: int = 4) -> Tensor:
    """The inverse of `pack`: [B, T, 6 ratio, h, w] to the last `frames` frames, [B, frames, 6, h, w]."""
    return latents.unflatten(2, (ratio, -1)).transpose(1, 2).flatten(1, 2)[:, -frames:]


def code_origins(places: Array) -> Array:
    """Camera places to what a raymap holds."""
    scaled = np.asarray(places) * ORIGIN_SCALE
    return np.sign(scaled) * np.log1p(np.abs(scaled))


def decode_origins(coded: Array) -> Array:
    """The inverse of `code_origins`."""
    return np.sign(coded) * np.expm1(np.abs(coded)) / ORIGIN_SCALE


def raymap_of(poses: Array, focal: float, height: int, width: int) -> Array:
    """The raymap [F, 6, height, width] of poses [F, 4, 4]; `focal` in pixels of the raymap, the same both ways."""
    rays = _pixels(height, width) / np.array([focal, focal, 1.0])
    directions = np.einsum("fij,hwj->fihw", poses[:, :3, :3], rays)
    origins = code_origins(poses[:, :3, 3])[:, :, None, None]
    return np.concatenate([directions, np.broadcast_to(origins, directions.shape)], axis=1)


def poses_of(raymap: Array) -> tuple[Array, Array]:
    """Poses [F, 4, 4] and focal lengths [F] (in pixels of the raymap) that fit a raymap [F, 6, h, w].

    Directions are fitted by least squares with `A (x, y, 1)`. A is `R K^-1`, so that its columns are those of the rotation,
    two of them divided by the focal length: the rotation is the nearest to the columns brought to one length (the orthogonal
    Procrustes problem). The place is the mean origin.
    """
    raymap = raymap.astype(np.float64)
    frames, _, height, width = raymap.shape
    pixels = _pixels(height, width).reshape(-1, 3)
    directions = raymap[:, :3].reshape(frames, 3, -1)
    fit = directions @ np.linalg.pinv(pixels).T  # [F, 3, 3]
    lengths = np.linalg.norm(fit, axis=1).clip(1e-12)
    u, _, vt = np.linalg.svd(fit / lengths[:, None])
    u[:, :, 2] *= np.linalg.det(u @ vt)[:, None]
    poses = np.broadcast_to(np.eye(4), (frames, 4, 4)).copy()
    poses[:, :3, :3] = u @ vt
    poses[:, :3, 3] = decode_origins(raymap[:, 3:]).mean(axis=(2, 3))
    return poses, 2 * lengths[:, 2] / (lengths[:, 0] + lengths[:, 1])


def smoothed(poses: Array) -> Array:
    """Poses with the jitter taken out as in Aether's evaluation.

    Places go through a Gaussian (sigma 5/6 frames) and a Kalman filter for steady motion (process and measurement noise 0.1);
    a rotation becomes the mean of its neighbourhood of 5 frames, weighted by a Gaussian (sigma 1).
    """
    result = poses.copy()
    result[:, :3, 3] = _kalman(gaussian_filter1d(poses[:, :3, 3], 5 / 6, axis=0, mode="nearest"))
    frames = np.arange(len(poses))
    for i in frames:
        near = frames[max(0, i - 2) : i + 3]
        weights = np.exp(-0.5 * (near - i) ** 2.0)
        result[i, :3, :3] = Rotation.from_matrix(poses[near, :3, :3]).mean(weights).as_matrix()
    return result


def _kalman(places: Array, noise: float = 0.1) -> Array:
    """Places [F, 3] filtered forward in time; the state is place and velocity, at rest at first."""
    forward = np.array([[1.0, 1.0], [0.0, 1.0]])  # the three axes do not mix: one 2 x 2 covariance serves all
    state, covariance = np.stack([places[0], np.zeros(3)]), np.eye(2)
    result = [places[0]]
    for measured in places[1:]:
        state = forward @ state
        covariance = forward @ covariance @ forward.T + noise * np.eye(2)
        gain = covariance[:, 0] / (covariance[0, 0] + noise)
        state = state + gain[:, None] * (measured - state[0])
        covariance = covariance - np.outer(gain, covariance[0])
        result.append(state[0])
    return np.stack(result)


def _pixels(height: int, width: int) -> Array:
    """(x, y, 1) of the pixel centres, counted from the middle of the image, [height, width, 3]."""
    y, x = np.meshgrid(np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2, indexing="ij")
    return np.stack([x, y, np.ones_like(x)], axis=-1)
