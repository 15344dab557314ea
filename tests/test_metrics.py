"""The metrics of the fidelity bench against values worked out by hand or by other means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .support.examples import example


@pytest.fixture(scope="module")
def metrics() -> Any:
    return example("_metrics")


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def turn(degrees: float, axis: int = 2) -> Any:
    """A rotation [3, 3] about an axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.roll(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), (0, 1))


def path(random: np.random.Generator, scenes: int = 2, frames: int = 6) -> Any:
    """Poses [scenes, frames, 4, 4] of a camera that moves and turns."""
    poses = np.tile(np.eye(4), (scenes, frames, 1, 1))
    poses[..., :3, 3] = random.standard_normal((scenes, frames, 3)).cumsum(axis=1)
    for pose in poses.reshape(-1, 4, 4):
        pose[:3, :3] = turn(20 * random.standard_normal(), 0) @ turn(20 * random.standard_normal(), 1)
    return poses


def test_relative_l2_and_psnr(metrics: Any) -> None:
    reference = np.full((2, 3, 4), 2.0)
    ours = reference.copy()
    ours[1, 0, :2] += 1.0
    assert metrics.relative_l2(ours, reference).tolist() == pytest.approx([0.0, (2 / (12 * 4)) ** 0.5])
    found = metrics.psnr(ours, reference, np.array([1.0, 4.0]))
    assert found[0] == np.inf
    assert found[1] == pytest.approx(10 * np.log10(16 / (2 / 12)))


def test_ssim_is_that_of_every_window(metrics: Any, random: np.random.Generator) -> None:
    a = random.random((2, 2, 9, 11, 3))
    b = a + 0.1 * random.standard_normal(a.shape)
    spans = np.array([1.0, 2.0])
    expected = []
    for scene in range(2):
        c1, c2 = (0.01 * spans[scene]) ** 2, (0.03 * spans[scene]) ** 2
        values = []
        for frame in range(2):
            for channel in range(3):
                for y in range(3):
                    for x in range(5):
                        p, q = (z[scene, frame, y : y + 7, x : x + 7, channel].ravel() for z in (a, b))
                        cov = np.cov(p, q)
                        top = (2 * p.mean() * q.mean() + c1) * (2 * cov[0, 1] + c2)
                        values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
        expected.append(np.mean(values))
    assert metrics.ssim(a, b, spans).tolist() == pytest.approx(expected)
    assert metrics.ssim(a, a, 1.0).tolist() == [1.0, 1.0]


def test_depth_errors_do_not_see_scale(metrics: Any) -> None:
    truth = np.array([[1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.0, 1.0]]).reshape(2, 1, 2, 2)
    ours = np.array([[3.0, 6.0, 12.0, 24.0], [2.0, 2.0, 2.8, 3.8]]).reshape(2, 1, 2, 2)
    found = metrics.depth_errors(ours, truth)
    # The second scene's ratios are 1/2, 1/2, 1/2.8, 1/3.8; their median scales by (1/2 + 1/2.8) / 2 = 3/7.
    aligned = np.array([6 / 7, 6 / 7, 1.2, 11.4 / 7])
    assert found["abs_rel"].tolist() == pytest.approx([0.0, np.abs(aligned - 1).mean()])
    assert found["delta_1"].tolist() == [1.0, 0.75]
    assert found["delta_2"].tolist() == [1.0, 0.75]
    flat = metrics.depth_errors(np.array([1.0, 1.0, 1.5, 1.0]).reshape(1, 4), np.ones((1, 4)))
    assert (flat["delta_1"].item(), flat["delta_2"].item()) == (0.75, 1.0)


def test_pose_errors_do_not_see_sim3(metrics: Any, random: np.random.Generator) -> None:
    truth = path(random)
    moved = truth.copy()
    rotation = turn(70, 1) @ turn(-30, 0)
    moved[..., :3, :3] = rotation @ truth[..., :3, :3]
    moved[..., :3, 3] = 3.0 * truth[..., :3, 3] @ rotation.T + np.array([4.0, -2.0, 1.0])
    found = metrics.pose_errors(moved, truth)
    assert list(found) == ["ate", "rpe_trans", "rpe_rot"]
    for values in found.values():
        assert values.shape == (2,)
        assert np.abs(values).max() < 1e-5


def test_one_wrong_rotation_is_two_wrong_motions(metrics: Any, random: np.random.Generator) -> None:
    truth = path(random)
    wrong = truth.copy()
    wrong[0, 2, :3, :3] = truth[0, 2, :3, :3] @ turn(10)
    found = metrics.pose_errors(wrong, truth)
    assert found["rpe_rot"].tolist() == pytest.approx([(2 * 10**2 / 5) ** 0.5, 0.0], abs=1e-5)
    assert found["ate"].max() < 1e-12  # positions are right
    # The motion out of the turned frame is seen from it: its translation is off by what 10 degrees do to it.
    step = (np.linalg.inv(truth[0, 2]) @ truth[0, 3])[:3, 3]
    assert found["rpe_trans"].tolist() == pytest.approx(
        [(np.sum((turn(-10) @ step - step) ** 2) / 5) ** 0.5, 0.0], abs=1e-9
    )


def test_no_alignment_is_closer(metrics: Any, random: np.random.Generator) -> None:
    positions, truth = random.standard_normal((2, 6, 3))
    scale, rotation, shift = metrics.align(positions, truth)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    assert rotation @ rotation.T == pytest.approx(np.eye(3))

    def error(s: float, r: Any, t: Any) -> float:
        return float(np.square(s * positions @ r.T + t - truth).sum())

    best = error(scale, rotation, shift)
    for _ in range(200):
        near = rotation @ turn(random.normal(), 0) @ turn(random.normal(), 1) @ turn(random.normal(), 2)
        assert error(scale * (1 + 0.01 * random.normal()), near, shift + 0.01 * random.standard_normal(3)) > best


def test_positions_that_are_all_alike_go_to_the_middle(metrics: Any, random: np.random.Generator) -> None:
    truth = path(random, scenes=1)
    still = np.tile(np.eye(4), (1, 6, 1, 1))
    spread = truth[0, :, :3, 3] - truth[0, :, :3, 3].mean(axis=0)
    assert metrics.pose_errors(still, truth)["ate"].item() == pytest.approx(
        np.sqrt(np.square(spread).sum(axis=1).mean())
    )


def test_intervals_hold_the_mean_as_often_as_they_say(metrics: Any, random: np.random.Generator) -> None:
    samples = random.standard_normal((3000, 64)) + 5.0
    low, high = metrics.intervals(samples, resamples=400)
    assert (high - low).mean() == pytest.approx(2 * 1.96 / 8, rel=0.06)
    assert 0.91 < ((low < 5) & (high > 5)).mean() < 0.97
    assert metrics.intervals(samples, resamples=400)[0].tolist() == low.tolist(), "seeded"
    assert metrics.intervals(np.array([3.0])).tolist() == [3.0, 3.0]
