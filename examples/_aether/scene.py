"""What a run gives: a scene put together from windows, with depth and camera; and how far two runs are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from _metrics import psnr, relative_l2

from .raymaps import poses_of, smoothed
from .windows import blend, blend_poses, spread, starts

Array = NDArray[Any]
Call = Callable[[Array], Any]
"""From frames [F, H, W, 3] to the pipeline's output for them."""
FARTHEST = 100.0
"""Depth where disparity is 0 or nearly so, as in the authors' evaluation."""
OVERLAP = 1 / 8
"""Least share of a window that overlaps with the next one beside or below it."""


@dataclass(frozen=True)
class Scene:
    """A clip of F frames; depth and places share an unknown scale per window."""

    rgb: Array
    """[F, H, W, 3] in [0, 1]."""
    disparity: Array
    """[F, H, W]."""
    poses: Array
    """[F, 4, 4] camera-to-world."""
    focals: Array
    """[F] in widths of the image."""

    @property
    def depth(self) -> Array:
        """[F, H, W] along the camera's axis, at most `FARTHEST`."""
        return depth_of(self.disparity)


def depth_of(disparity: Array) -> Array:
    """1 / disparity, at most `FARTHEST`."""
    return 1 / disparity.clip(1 / FARTHEST)


def assemble(outputs: Sequence[Any], begin: Sequence[int], *, smooth: bool = False) -> Scene:
    """The scene of windows of a clip that begin at the given frames; `smooth` takes jitter out of the cameras."""
    fitted = [poses_of(output.raymap) for output in outputs]
    poses = blend_poses([smoothed(poses) if smooth else poses for poses, _ in fitted], begin)
    focals = blend([focals / out.raymap.shape[-1] for (_, focals), out in zip(fitted, outputs, strict=True)], begin, 0,
                   rescale=False)  # fmt: skip
    return Scene(
        rgb=blend([output.rgb for output in outputs], begin, 0, rescale=False),
        disparity=blend([output.disparity for output in outputs], begin, 0, rescale=True),
        poses=smoothed(poses) if smooth and len(begin) > 1 else poses,
        focals=focals,
    )


def by_time(call: Call, video: Array, frames: int, stride: int) -> tuple[list[Any], list[int]]:
    """The outputs of windows of `frames` frames along a clip, and where they begin."""
    begin = starts(len(video), frames, stride)
    return [call(video[start : start + frames]) for start in tqdm(begin, desc="windows", leave=False)], begin


def slide_disparity(call: Call, video: Array, frames: int, stride: int, size: tuple[int, int]) -> Array:
    """Disparity [F, H, W] of a clip [F, H, W, 3] larger than the model's `size` (height, width), by windows in space and time.

    Raises:
        ValueError: the clip is smaller than the model's size.
    """
    if video.shape[1] < size[0] or video.shape[2] < size[1]:
        raise ValueError(
            f"frames of {video.shape[1]} x {video.shape[2]} are smaller than {size[0]} x {size[1]}: enlarge them"
        )
    down, along = (spread(whole, part, int(part * OVERLAP)) for whole, part in zip(video.shape[1:3], size, strict=True))
    begin = starts(len(video), frames, stride)
    clips = []
    with tqdm(total=len(begin) * len(down) * len(along), desc="windows", leave=False) as bar:
        for start in begin:
            rows = []
            for y in down:
                row = []
                for x in along:
                    row.append(call(video[start : start + frames, y : y + size[0], x : x + size[1]]).disparity)
                    bar.update()
                rows.append(blend(row, along, 2, rescale=True))
            clips.append(blend(rows, down, 1, rescale=True))
    return blend(clips, begin, 0, rescale=True)


def distances(ours: Sequence[Any], full: Sequence[Any]) -> dict[str, float]:
    """How far outputs are from those of full compute: relative L2 of each part, and PSNR of RGB; means over windows."""
    pairs = list(zip(ours, full, strict=True))
    found = {
        f"{part}: relative L2 to full compute": [
            relative_l2(getattr(a, part)[None], getattr(b, part)[None]) for a, b in pairs
        ]
        for part in ("rgb", "disparity", "raymap")
    }
    found["rgb: PSNR to full compute, dB"] = [psnr(a.rgb[None], b.rgb[None], 1.0) for a, b in pairs]
    return {name: float(np.mean(values)) for name, values in found.items()}
