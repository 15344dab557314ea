"""Clips that are longer or larger than the model: cut into overlapping windows, whose results are put together again.

Each window's disparity has a scale of its own, and its cameras a world of their own. Both are fitted to what is there already
where the two overlap; there the old fades into the new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

Array = NDArray[Any]


def starts(total: int, window: int, stride: int) -> list[int]:
    """Where windows begin, each `stride` after the one before; the last one ends where the clip ends.

    Raises:
        ValueError: the clip is shorter than a window, or the stride is not in 1 .. window.
    """
    if total < window or not 0 < stride <= window:
        raise ValueError(f"{total} frames, window={window}, stride={stride}: need frames >= window >= stride >= 1")
    return [*range(0, total - window, stride), total - window]


def window_frames(frames: int, most: int = 41, step: int = 8) -> int:
    """The longest window that a clip fills: `most` frames less a multiple of `step`.

    Raises:
        ValueError: the clip is too short for any.
    """
    fitting = [length for length in range(most, step, -step) if length <= frames]
    if not fitting:
        raise ValueError(f"a clip of {frames} frames is too short: at least {step + 1}")
    return fitting[0]


def spread(total: int, window: int, overlap: int) -> list[int]:
    """The fewest windows that cover `total` and overlap by at least `overlap`, evenly spread: where they begin."""
    if total <= window:
        return [0]
    count = -(-(total - window) // (window - overlap))
    return [k * (total - window) // count for k in range(count + 1)]


def blend(pieces: Sequence[Array], begin: Sequence[int], axis: int, *, rescale: bool) -> Array:
    """Pieces of one array along an axis, put together; where a piece overlaps with those before, these fade into it.

    `rescale` first multiplies each piece by the factor that brings it nearest (least squares) to what it overlaps with.
    """
    whole = np.moveaxis(pieces[0], axis, 0)
    for piece, start in zip(pieces[1:], begin[1:], strict=True):
        new = np.moveaxis(piece, axis, 0)
        overlap = len(whole) - start
        old, common = whole[start:], new[:overlap]
        if rescale and (power := np.square(common, dtype=np.float64).sum()) > 0:
            factor = float((old * common).sum(dtype=np.float64) / power)
            new, common = factor * new, factor * common
        fade = np.linspace(1, 0, overlap, dtype=whole.dtype).reshape(-1, *[1] * (whole.ndim - 1))
        whole = np.concatenate([whole[:start], fade * old + (1 - fade) * common, new[overlap:]])
    return np.moveaxis(whole, 0, axis)


def blend_poses(pieces: Sequence[Array], begin: Sequence[int]) -> Array:
    """Camera-to-world poses [frames, 4, 4] of windows, each in a world of its own, as one path in the first one's world."""
    whole = pieces[0]
    for piece, start in zip(pieces[1:], begin[1:], strict=True):
        overlap = len(whole) - start
        moved = _to_world_of(piece, whole[start:])
        shares = np.linspace(0, 1, overlap)
        between = [_between(old, new, share) for old, new, share in zip(whole[start:], moved, shares, strict=False)]
        whole = np.concatenate([whole[:start], np.stack(between), moved[overlap:]])
    return whole


def _to_world_of(poses: Array, target: Array) -> Array:
    """Poses moved, turned and scaled so that the first ones come nearest to `target`.

    The turn is the mean of those between the cameras, so that a straight path, or none, leaves no doubt about it.
    """
    first = poses[: len(target)]
    turn = Rotation.from_matrix(target[:, :3, :3] @ first[:, :3, :3].mT).mean().as_matrix()
    places = first[:, :3, 3] @ turn.T
    middle, aim = places.mean(axis=0), target[:, :3, 3].mean(axis=0)
    power = np.square(places - middle).sum()
    scale = float(((places - middle) * (target[:, :3, 3] - aim)).sum() / power) if power > 1e-12 else 1.0
    result = poses.copy()
    result[:, :3, :3] = turn @ poses[:, :3, :3]
    result[:, :3, 3] = scale * (poses[:, :3, 3] @ turn.T - middle) + aim
    return result


def _between(old: Array, new: Array, share: float) -> Array:
    """The pose that lies `share` of the way from one to another."""
    result = (1 - share) * old + share * new
    result[:3, :3] = Slerp([0, 1], Rotation.from_matrix(np.stack([old, new])[:, :3, :3]))(share).as_matrix()
    return result
