"""What `examples/_aether` is made of, without a model: raymaps and cameras, windows, scenes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from .support.examples import package

raymaps, windows, scene = (package(f"_aether.{name}") for name in ("raymaps", "windows", "scene"))


def path(frames: int, seed: int = 0) -> Any:
    """Poses [frames, 4, 4] of a camera that wanders and turns, the first one the identity."""
    drawn = np.random.default_rng(seed)
    poses = np.broadcast_to(np.eye(4), (frames, 4, 4)).copy()
    turns, steps = drawn.normal(0, 0.05, (2, frames, 3)).cumsum(axis=1)
    poses[:, :3, :3] = Rotation.from_rotvec(turns - turns[0]).as_matrix()
    poses[:, :3, 3] = steps - steps[0]
    return poses


def test_rays_are_packed_frame_by_frame_into_channels() -> None:
    rays = torch.arange(9.0)[None, :, None, None, None].expand(1, 9, 6, 2, 3)
    packed = raymaps.pack(rays)
    # 9 frames become 12: the first three come twice. Latent frame t of 3 holds t, 3 + t, 6 + t and 9 + t of these.
    assert packed.shape == (1, 3, 24, 2, 3)
    assert packed[0, :, ::6, 0, 0].tolist() == [[0, 0, 3, 6], [1, 1, 4, 7], [2, 2, 5, 8]]
    assert torch.equal(raymaps.unpack(packed, 9), rays)


def test_cameras_are_found_again_in_their_rays() -> None:
    true = path(5)
    poses, focals = raymaps.poses_of(raymaps.raymap_of(true, 7.0, 4, 6))
    np.testing.assert_allclose(poses, true, atol=1e-9)
    np.testing.assert_allclose(focals, 7.0)


def test_smoothing_leaves_a_still_camera_and_calms_a_shaking_one() -> None:
    still = np.repeat(path(2)[1:], 8, axis=0)
    np.testing.assert_allclose(raymaps.smoothed(still), still, atol=1e-12)
    rough = path(40)
    rough[:, :3, 3] += np.random.default_rng(1).normal(0, 0.05, (40, 3))
    calm = raymaps.smoothed(rough)
    assert (
        np.square(np.diff(calm[:, :3, 3], n=2, axis=0)).sum()
        < 0.1 * np.square(np.diff(rough[:, :3, 3], n=2, axis=0)).sum()
    )
    np.testing.assert_allclose(np.linalg.det(calm[:, :3, :3]), 1)


def test_the_filter_is_the_textbooks() -> None:
    """Predict and update with the full matrices of a state of three places and three velocities."""
    measured = path(12)[:, :3, 3]
    forward, seen = np.eye(6) + np.eye(6, k=3), np.eye(3, 6)
    state, spread, expected = np.concatenate([measured[0], np.zeros(3)]), np.eye(6), [measured[0]]
    for z in measured[1:]:
        state, spread = forward @ state, forward @ spread @ forward.T + 0.1 * np.eye(6)
        gain = spread @ seen.T @ np.linalg.inv(seen @ spread @ seen.T + 0.1 * np.eye(3))
        state, spread = state + gain @ (z - seen @ state), (np.eye(6) - gain @ seen) @ spread
        expected.append(state[:3])
    np.testing.assert_allclose(raymaps._kalman(measured), expected)


def test_windows_cover_a_clip() -> None:
    assert windows.starts(50, 41, 8) == [0, 8, 9]
    assert windows.starts(41, 41, 24) == [0]
    assert [windows.window_frames(frames) for frames in (50, 41, 40, 20, 9)] == [41, 41, 33, 17, 9]
    assert windows.spread(1127, 720, 90) == [0, 407]
    assert windows.spread(720, 720, 90) == [0]
    assert windows.spread(1400, 720, 90) == [0, 340, 680]
    for wrong in ((8, 9, 4), (20, 9, 0), (20, 9, 10)):
        with pytest.raises(ValueError, match="need frames >= window >= stride"):
            windows.starts(*wrong)
    with pytest.raises(ValueError, match="a clip of 8 frames is too short: at least 9"):
        windows.window_frames(8)


def test_pieces_of_other_scales_become_one_again() -> None:
    whole = np.random.default_rng(0).uniform(1, 2, (3, 20))
    pieces = [whole[:, :9], 3 * whole[:, 5:14], 0.2 * whole[:, 11:20]]
    np.testing.assert_allclose(windows.blend(pieces, [0, 5, 11], 1, rescale=True), whole)
    faded = windows.blend([np.zeros(4), np.ones(4)], [0, 2], 0, rescale=False)
    assert faded.tolist() == [0, 0, 0, 1, 1, 1]


def test_paths_in_other_worlds_become_one_again() -> None:
    true, moved = path(20), []
    for k, start in enumerate((0, 6, 11)):
        piece = true[start : start + 9].copy()
        if k:
            turn = Rotation.random(random_state=k).as_matrix()
            piece[:, :3, :3] = turn @ piece[:, :3, :3]
            piece[:, :3, 3] = 2.0 * k * piece[:, :3, 3] @ turn.T + k
        moved.append(piece)
    np.testing.assert_allclose(windows.blend_poses(moved, [0, 6, 11]), true, atol=1e-9)


def test_larger_clips_are_put_together_from_windows() -> None:
    """Each window tells the true disparity, cropped, on a scale of its own."""
    true = np.random.default_rng(0).uniform(0.1, 1, (13, 24, 40))
    video, scales = np.repeat(true[..., None], 3, axis=-1), iter(np.linspace(0.5, 2, 99))
    found = scene.slide_disparity(lambda x: SimpleNamespace(disparity=next(scales) * x[..., 0]), video, 9, 3, (16, 24))
    np.testing.assert_allclose(found / found[0, 0, 0], true / true[0, 0, 0])
    with pytest.raises(ValueError, match="frames of 24 x 40 are smaller than 32 x 24"):
        scene.slide_disparity(lambda x: x, video, 9, 3, (32, 24))


def test_distances_are_zero_to_itself() -> None:
    drawn = np.random.default_rng(0)
    one = SimpleNamespace(**{name: drawn.uniform(size=(2, 3, 4)) for name in ("rgb", "disparity", "raymap")})
    other = SimpleNamespace(rgb=one.rgb + 0.1, disparity=2 * one.disparity, raymap=one.raymap)
    same, far = scene.distances([one], [one]), scene.distances([other], [one])
    assert [value for name, value in same.items() if "L2" in name] == [0, 0, 0]
    assert far["disparity: relative L2 to full compute"] == pytest.approx(1)
    assert far["rgb: PSNR to full compute, dB"] == pytest.approx(20)
