"""How good a clip is: image metrics, depth and camera errors, and what is certain of their means.

Arrays are numpy; the first axis counts scenes, and every metric gives one number per scene. Images are
[scenes, frames, height, width, channels], depths [scenes, frames, height, width], poses [scenes, frames, 4, 4] camera-to-world.
SSIM and the Sim(3) alignment are scikit-image's, angles and the bootstrap scipy's.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.transform import Rotation
from skimage.metrics import structural_similarity
from skimage.transform import SimilarityTransform

Array = NDArray[Any]


def relative_l2(ours: Array, reference: Array) -> Array:
    """|ours - reference| / |reference| over all but the first axis."""
    axes = tuple(range(1, ours.ndim))
    return np.sqrt(np.square(ours - reference).sum(axis=axes) / np.square(reference).sum(axis=axes))


def psnr(ours: Array, reference: Array, span: Array | float) -> Array:
    """Peak signal-to-noise ratio in dB for values that span `span` (a number, or one per scene); inf where equal."""
    error = np.square(ours - reference).mean(axis=tuple(range(1, ours.ndim)))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.square(span) / error)


def ssim(ours: Array, reference: Array, span: Array | float) -> Array:
    """Structural similarity (Wang et al. 2004, windows of 7 x 7), mean over frames and channels."""
    spans = np.broadcast_to(np.asarray(span, dtype=float), len(ours))
    result = []
    for a, b, data_range in zip(ours, reference, spans, strict=True):
        # Frames and channels are all planes of their own: one axis of channels to scikit-image.
        a, b = (np.moveaxis(x, 0, -1).reshape(*x.shape[1:3], -1) for x in (a, b))
        result.append(structural_similarity(a, b, data_range=data_range, channel_axis=-1))
    return np.array(result)


def depth_errors(
    ours: Array, truth: Array, align: Literal["median", "least_absolute"] = "median", farthest: float | None = None
) -> dict[str, Array]:
    """Abs Rel and the shares of pixels with max(d / t, t / d) below 1.25 and 1.25^2.

    After the usual alignment, one scale per clip: depth is multiplied by median(truth / ours), or by the factor that makes the
    sum of |scale ours - truth| least. `farthest`: what depth is clipped to after that.
    """
    axes = tuple(range(1, ours.ndim))
    aligned = ours * (np.median(truth / ours, axis=axes, keepdims=True) if align == "median" else _scale(ours, truth))
    if farthest is not None:
        aligned = np.minimum(aligned, farthest)
    ratio = np.maximum(aligned / truth, truth / aligned)
    return {
        "abs_rel": (np.abs(aligned - truth) / truth).mean(axis=axes),
        "delta_1": (ratio < 1.25).mean(axis=axes),
        "delta_2": (ratio < 1.25**2).mean(axis=axes),
    }


def _scale(ours: Array, truth: Array) -> Array:
    """What makes each clip's sum of |scale ours - truth| least: the median of truth / ours, weighted by ours."""
    weights = ours.reshape(len(ours), -1)
    ratios = truth.reshape(weights.shape) / weights
    order = ratios.argsort(axis=1)
    mass = np.take_along_axis(weights, order, axis=1).cumsum(axis=1)
    middle = (mass < mass[:, -1:] / 2).sum(axis=1, keepdims=True)
    found = np.take_along_axis(ratios, np.take_along_axis(order, middle, axis=1), axis=1)
    return found.reshape(-1, *[1] * (ours.ndim - 1))


def align(positions: Array, truth: Array) -> tuple[float, Array, Array]:
    """Scale, rotation [3, 3] and shift [3] that bring positions [frames, 3] closest to `truth` (Umeyama 1991).

    Positions that are all alike have no scale: they go to the middle of `truth`, which is the closest.
    """
    found = SimilarityTransform.from_estimate(positions, truth)
    if not found:
        return 0.0, np.eye(3), truth.mean(axis=0)
    scale = float(found.scale)
    return scale, found.params[:3, :3] / scale, found.params[:3, 3]


def pose_errors(ours: Array, truth: Array) -> dict[str, Array]:
    """ATE and RPE of camera trajectories after Sim(3) alignment, root mean square over the frames of a clip.

    ATE: distance of the positions. RPE: error of the motion from each frame to the next, its translation (in the unit of
    `truth`) and its rotation (degrees). As in evo and in the protocol of Aether and CUT3R.
    """
    result: dict[str, list[float]] = {"ate": [], "rpe_trans": [], "rpe_rot": []}
    for estimate, real in zip(ours, truth, strict=True):
        scale, rotation, shift = align(estimate[:, :3, 3], real[:, :3, 3])
        aligned = np.broadcast_to(np.eye(4), estimate.shape).copy()
        aligned[:, :3, :3] = rotation @ estimate[:, :3, :3]
        aligned[:, :3, 3] = scale * estimate[:, :3, 3] @ rotation.T + shift
        error = np.linalg.inv(_motions(real)) @ _motions(aligned)
        angles = Rotation.from_matrix(error[:, :3, :3]).magnitude()
        result["ate"].append(_rms(np.linalg.norm(aligned[:, :3, 3] - real[:, :3, 3], axis=1)))
        result["rpe_trans"].append(_rms(np.linalg.norm(error[:, :3, 3], axis=1)))
        result["rpe_rot"].append(_rms(np.degrees(angles)))
    return {name: np.array(values) for name, values in result.items()}


def _motions(poses: Array) -> Array:
    """From each frame's camera to the next one's."""
    return np.linalg.inv(poses[:-1]) @ poses[1:]


def _rms(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def intervals(values: Array, resamples: int = 2000) -> Array:
    """95 % confidence intervals [2, ...] of the means over the last axis: percentile bootstrap over scenes, seeded."""
    if values.shape[-1] < 2:
        return np.stack([values.mean(axis=-1)] * 2)
    found = stats.bootstrap(
        (values,), np.mean, axis=-1, n_resamples=resamples, method="percentile", batch=200, rng=np.random.default_rng(0)
    )
    return np.stack([found.confidence_interval.low, found.confidence_interval.high])
