"""Data sets in their own layouts: MPI Sintel (depth and cameras), RealEstate10K (clips with cameras)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .load import Missing
from .media import IMAGES, image_files, read_frames

Array = NDArray[Any]

SINTEL_PAGE = "sintel.is.tue.mpg.de (MPI-Sintel-complete, with the depth and camera data of the training set)"
REALESTATE_PAGE = "google.github.io/realestate10k (camera files; the frames are cut from the videos they name)"
TAG = 202021.25
"""What each of Sintel's binary files begins with."""
WITH_CAMERAS = (
    "alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6", "shaman_3",
    "sleeping_1", "sleeping_2", "temple_2", "temple_3",
)  # fmt: skip
"""Sequences whose cameras are compared: those that move, the usual choice."""


@dataclass(frozen=True)
class Clip:
    """Frames as files, and the true cameras."""

    name: str
    frames: tuple[Path, ...]
    poses: Array
    """[F, 4, 4] camera-to-world."""
    depths: tuple[Path, ...] = ()
    """Sintel's depth files, where there are any."""

    def read(self, size: tuple[int, int], *, crop: bool) -> Array:
        """Frames [F, H, W, 3] in [0, 1] that cover `size` (height, width), or are cropped to it."""
        return np.concatenate([read_frames(path, size, crop=crop) for path in self.frames])

    def depth(self) -> Array:
        """True depth [F, H, W] in Sintel's metres."""
        return np.stack([read_depth(path) for path in self.depths])


def read_depth(path: Path) -> Array:
    """Depth [H, W], float32, of a `.dpt` file of Sintel: tag, width, height, values.

    Raises:
        ValueError: the file is none.
    """
    data = path.read_bytes()
    width, height = (int(x) for x in np.frombuffer(data, "<i4", 2, 4)) if len(data) > 12 else (0, 0)
    if len(data) != 12 + 4 * width * height or np.frombuffer(data, "<f4", 1)[0] != np.float32(TAG):
        raise ValueError(f"{path} is no depth file of Sintel: get it again from {SINTEL_PAGE}")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width)


def read_camera(path: Path) -> tuple[Array, Array]:
    """Intrinsics [3, 3] and the camera-to-world pose [4, 4] of a `.cam` file of Sintel: tag, K, world-to-camera.

    Raises:
        ValueError: the file is none.
    """
    data = path.read_bytes()
    if len(data) != 4 + 8 * 21 or np.frombuffer(data, "<f4", 1)[0] != np.float32(TAG):
        raise ValueError(f"{path} is no camera file of Sintel: get it again from {SINTEL_PAGE}")
    numbers = np.frombuffer(data, "<f8", offset=4)
    return numbers[:9].reshape(3, 3), _inverse(numbers[9:].reshape(3, 4))


def sintel(root: Path, names: Sequence[str] | None = None) -> list[Clip]:
    """Sequences of `root/training/`: `final/NAME/*.png`, `depth/NAME/*.dpt`, `camdata_left/NAME/*.cam`; all if not named.

    Raises:
        Missing: a folder is not there, or lacks files.
    """
    training = root / "training"
    kinds = {"final": ".png", "depth": ".dpt", "camdata_left": ".cam"}
    for folder in kinds:
        if not (training / folder).is_dir():
            raise Missing(f"{training / folder} is not there: get Sintel from {SINTEL_PAGE}")
    clips = []
    for name in names or sorted(path.name for path in (training / "final").iterdir() if path.is_dir()):
        files = {kind: tuple(sorted((training / kind / name).glob(f"*{end}"))) for kind, end in kinds.items()}
        if not files["final"] or len({len(found) for found in files.values()}) != 1:
            counts = ", ".join(f"{len(found)} in {kind}/" for kind, found in files.items())
            raise Missing(f"sequence {name} of {training} is not complete ({counts}): get Sintel from {SINTEL_PAGE}")
        poses = np.stack([read_camera(path)[1] for path in files["camdata_left"]])
        clips.append(Clip(name, files["final"], poses, files["depth"]))
    return clips


def realestate(root: Path, count: int | None, frames: int, stride: int, split: str = "test") -> list[Clip]:
    """The first clips, by name, of RealEstate10K with enough frames: every `stride`-th, from the first on.

    Camera files are `root/SPLIT/ID.txt`: an address, then a line for each frame: timestamp in microseconds, four intrinsics,
    two zeros, world-to-camera (3 x 4). Frames are `root/frames/SPLIT/ID/TIMESTAMP.png` (or `.jpg`).

    Raises:
        Missing: folders are not there, or no clip is long enough.
    """
    lists, images = root / split, root / "frames" / split
    for folder in (lists, images):
        if not folder.is_dir():
            raise Missing(f"{folder} is not there: get RealEstate10K from {REALESTATE_PAGE}")
    clips: list[Clip] = []
    for path in sorted(lists.glob("*.txt")):
        if count is not None and len(clips) == count:
            break
        if not (images / path.stem).is_dir():
            continue
        table = np.loadtxt(path, skiprows=1, ndmin=2)
        files = {file.stem: file for file in image_files(images / path.stem) if file.suffix.lower() in IMAGES}
        there = [line for line in table if str(int(line[0])) in files][::stride][:frames]
        if len(there) == frames:
            poses = np.stack([_inverse(line[7:].reshape(3, 4)) for line in there])
            clips.append(Clip(path.stem, tuple(files[str(int(line[0]))] for line in there), poses))
    if not clips:
        raise Missing(
            f"no clip of {lists} has {frames} frames in {images} (every {stride}th, by timestamp): get RealEstate10K from "
            f"{REALESTATE_PAGE}"
        )
    return clips


def _inverse(world_to_camera: Array) -> Array:
    """Camera-to-world [4, 4] of world-to-camera [3, 4]."""
    return np.linalg.inv(np.concatenate([world_to_camera, [[0.0, 0.0, 0.0, 1.0]]]))
