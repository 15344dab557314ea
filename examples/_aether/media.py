"""Reading frames, and writing what a run gives: videos, pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from vbench_adapter import write_videos

from .load import Missing
from .scene import Scene

Array = NDArray[Any]
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
SHOWN = 6
"""Frames in a picture."""


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name.

    Raises:
        Missing: there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not found:
        raise Missing(f"{folder} is no folder of images ({', '.join(sorted(IMAGES))})")
    return found


def read_frames(path: Path, size: tuple[int, int], *, crop: bool = True) -> Array:
    """Frames [F, H, W, 3], float32 in [0, 1], of an image, a video, or a folder of images.

    They are scaled so that they just cover `size` (height, width), then cropped to it in the middle, or left as they are.

    Raises:
        Missing: there is no such file.
    """
    if path.is_dir():
        frames = [iio.imread(file) for file in image_files(path)]
    elif not path.is_file():
        raise Missing(f"{path}: no such file or folder")
    else:
        frames = [iio.imread(path)] if path.suffix.lower() in IMAGES else list(iio.imread(path, plugin="pyav"))
    return np.stack([fitted(frame, size, crop=crop) for frame in frames])


def fitted(frame: Array, size: tuple[int, int], *, crop: bool) -> Array:
    """A frame of bytes scaled to cover `size`, and cropped to it in the middle if told to; float32 in [0, 1]."""
    image = Image.fromarray(frame).convert("RGB")
    height, width = size
    scale = max(height / image.height, width / image.width)
    covered = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(covered, Image.Resampling.LANCZOS)
    if crop:
        left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.float32) / 255


def middle_of(video: Array, size: tuple[int, int]) -> Array:
    """The middle of frames [F, H, W, 3], cropped to `size` (height, width)."""
    top, left = ((whole - part) // 2 for whole, part in zip(video.shape[1:3], size, strict=True))
    return video[:, top : top + size[0], left : left + size[1]]


def write_scene(scene: Scene, folder: Path, fps: int) -> list[Path]:
    """Writes RGB and disparity as videos, depth and cameras as numbers, and a picture of all; returns the files.

    `depth.npz`: `disparity` [F, H, W] and `focals` [F] (in widths of the image). `trajectory.txt`: a line for each frame, in
    the TUM format: its number, place (x y z), and rotation as a quaternion (x y z w), camera-to-world.
    """
    folder.mkdir(parents=True, exist_ok=True)
    videos = write_videos(scene.rgb[None], folder, fps, ["rgb"])
    videos += write_videos(coloured(scene.disparity)[None], folder, fps, ["disparity"])
    numbers, path, shown = folder / "depth.npz", folder / "trajectory.txt", folder / "picture.png"
    np.savez_compressed(numbers, disparity=scene.disparity.astype(np.float32), focals=scene.focals)
    quaternions = Rotation.from_matrix(scene.poses[:, :3, :3]).as_quat()
    lines = np.concatenate([np.arange(len(scene.poses))[:, None], scene.poses[:, :3, 3], quaternions], axis=1)
    np.savetxt(path, lines, fmt=["%d", *["%.8f"] * 7], header="frame tx ty tz qx qy qz qw")
    _picture(scene, shown)
    return [*videos, numbers, path, shown]


def coloured(disparity: Array) -> Array:
    """[F, H, W] as colours [F, H, W, 3], bright where near; one scale for the clip."""
    import matplotlib

    return np.asarray(matplotlib.colormaps["magma"](disparity / max(float(disparity.max()), 1e-12))[..., :3])


def _picture(scene: Scene, path: Path) -> None:
    """Some frames, their disparity, and the camera's path from above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    which = np.unique(np.linspace(0, len(scene.rgb) - 1, SHOWN).round().astype(int))
    figure, axes = plt.subplot_mosaic(
        [[*(f"rgb {k}" for k in which), "path"], [*(f"disparity {k}" for k in which), "path"]],
        figsize=(2 * len(which) + 4, 3.2), layout="compressed", width_ratios=[*[1.0] * len(which), 1.6],
    )  # fmt: skip
    for k, colours in zip(which, coloured(scene.disparity[which]), strict=True):
        axes[f"rgb {k}"].imshow(scene.rgb[k].clip(0, 1))
        axes[f"rgb {k}"].set_title(f"frame {k}", fontsize=8)
        axes[f"disparity {k}"].imshow(colours)
    for name, axis in axes.items():
        if name != "path":
            axis.set_axis_off()
    places, ahead = scene.poses[:, :3, 3], scene.poses[which, :3, 2]
    axes["path"].plot(places[:, 0], places[:, 2], marker=".")
    axes["path"].quiver(places[which, 0], places[which, 2], ahead[:, 0], ahead[:, 2], angles="xy", width=0.006)
    axes["path"].set(
        xlabel="x, right", ylabel="z, forward", title="camera, from above", aspect="equal", adjustable="datalim"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
