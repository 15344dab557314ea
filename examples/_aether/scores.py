"""The scores of the paper's tables, by the protocol of Aether's evaluation."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from _metrics import depth_errors, pose_errors

from .load import Missing
from .paper import CAMERA

Array = NDArray[Any]
FARTHEST = 70.0
"""Metres; what is farther in truth is not counted, and no estimate is taken for farther."""


def video_depth(depth: Array, truth: Array) -> tuple[dict[str, float], int]:
    """Abs Rel and deltas of a clip's depth [F, H, W] against the truth [F, h, w], and how many pixels were counted.

    The estimate is brought to the truth's size (bicubic) and multiplied by the one factor that makes the sum of absolute
    errors least; pixels whose truth is not in (0, `FARTHEST`) are left out.
    """
    resized = interpolate(torch.from_numpy(depth)[:, None].double(), truth.shape[1:], mode="bicubic")[:, 0].numpy()
    valid = (truth > 0) & (truth < FARTHEST)
    ours, real = resized[valid].clip(1e-5)[None], truth[valid].astype(np.float64)[None]
    errors = depth_errors(ours, real, align="least_absolute", farthest=FARTHEST)
    return {name: float(value[0]) for name, value in errors.items()}, int(valid.sum())


def camera_path(poses: Array, truth: Array, by: str = "evo") -> dict[str, float]:
    """ATE, RPE of translation and of rotation (degrees) of poses [F, 4, 4] after Sim(3) alignment, root mean squares.

    `by="evo"` asks the package evo, as the paper does; `"own"` takes `_metrics.pose_errors`, the same in plain NumPy.

    Raises:
        Missing: evo is not installed.
    """
    if by == "own":
        return {name: float(value[0]) for name, value in pose_errors(poses[None], truth[None]).items()}
    try:
        ape, rpe = importlib.import_module("evo.main_ape").ape, importlib.import_module("evo.main_rpe").rpe
        metrics = importlib.import_module("evo.core.metrics")
        path = importlib.import_module("evo.core.trajectory").PosePath3D
    except ImportError as error:
        raise Missing(
            f"the package evo cannot be imported ({error}): pip install 'hero-fx[aether]', or take --camera-metrics own"
        ) from error
    moved, turned = metrics.PoseRelation.translation_part, metrics.PoseRelation.rotation_angle_deg
    between = {"delta": 1.0, "delta_unit": metrics.Unit.frames, "all_pairs": True}

    def rms(measure: Any, relation: Any, **more: Any) -> float:
        paths = (path(poses_se3=list(x)) for x in (truth, poses))
        return float(measure(*paths, pose_relation=relation, align=True, correct_scale=True, **more).stats["rmse"])

    return dict(zip(CAMERA, (rms(ape, moved), rms(rpe, moved, **between), rms(rpe, turned, **between)), strict=True))
