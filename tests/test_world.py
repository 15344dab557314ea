"""The procedural world: seeds, exact depth and poses, raymaps and back, latents and back."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from .support.examples import world

camera, latents, render, scenes = (world(name) for name in ("camera", "latents", "render", "scenes"))


def clips(count: int = 8, **still: Any) -> Any:
    return render.render(replace(scenes.sample_scenes(range(count)), **still))


def points(c: Any) -> Tensor:
    """What each pixel sees, in the first camera's axes, [B, F, 3, S, S]."""
    rays = camera.raymap_from_poses(c.poses, c.depth.shape[-1])
    place: Tensor = rays[:, :, 3:] + c.depth[:, :, None] * rays[:, :, :3]
    return place


def test_a_scene_is_its_seed_whatever_the_batch() -> None:
    alone, together = scenes.sample_scenes([7]), scenes.sample_scenes([3, 7, 2**31])
    for of in fields(alone):
        torch.testing.assert_close(getattr(alone, of.name)[0], getattr(together, of.name)[1], rtol=0, atol=0)
    rendered = render.render(together)
    torch.testing.assert_close(render.render(alone).rgb[0], rendered.rgb[1])
    assert (rendered.rgb[1] - rendered.rgb[0]).abs().mean() > 0.02


def test_each_scene_uses_fewer_numbers_than_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    before = scenes.sample_scenes([5])
    monkeypatch.setattr(scenes, "DRAWS", scenes.DRAWS + 8)
    torch.testing.assert_close(before.paint, scenes.sample_scenes([5]).paint)


def test_clips_are_what_they_say() -> None:
    c = clips(32)
    assert c.rgb.shape == (32, 6, 3, 32, 32)
    assert c.depth.shape == c.moving.shape == (32, 6, 32, 32)
    assert c.poses.shape == (32, 6, 4, 4)
    assert 0 <= c.rgb.min() < 0.1
    assert 0.9 < c.rgb.max() <= 1
    assert 0.3 < c.depth.min() < 1
    assert 6 < c.depth.max() <= render.FAR
    assert 0.01 < c.moving.float().mean() < 0.2
    torch.testing.assert_close(c.poses[:, 0], torch.eye(4).expand(32, 4, 4), atol=1e-6, rtol=0)
    last = c.poses[:, -1]
    assert 0.3 < last[:, :3, 3].norm(dim=-1).mean() < 1.5
    torch.testing.assert_close(last[:, :3, :3] @ last[:, :3, :3].mT, torch.eye(3).expand(32, 3, 3), atol=1e-5, rtol=0)


def test_depth_and_pose_agree_between_frames() -> None:
    """A still point seen in frame 0 and, by the poses, in frame 3 lies there at the depth that frame 3 shows."""
    c = clips(16, velocity=torch.zeros(16, 4, 2))
    there = torch.linalg.inv(c.poses[:, 3]) @ torch.cat([points(c)[:, 0].flatten(2), torch.ones(16, 1, 1024)], dim=1)
    z = there[:, 2]
    at = 2 * camera.FOCAL * there[:, :2] / z[:, None]  # [-1, 1] within the image
    inside = (at.abs() < 0.95).all(dim=1)
    # Inverse depth is linear over a plane in the image, so bilinear sampling is exact there; edges of things are not.
    seen = grid_sample(1 / c.depth[:, 3, None], at.mT[:, None], align_corners=False)[:, 0, 0]
    off = (seen * z - 1).abs()[inside]
    assert inside.float().mean() > 0.4
    assert off.median() < 1e-4
    assert (off < 1e-3).float().mean() > 0.75


def test_colours_of_still_points_stay() -> None:
    c = clips(16, velocity=torch.zeros(16, 4, 2))
    there = torch.linalg.inv(c.poses[:, 1]) @ torch.cat([points(c)[:, 0].flatten(2), torch.ones(16, 1, 1024)], dim=1)
    at = 2 * camera.FOCAL * there[:, :2] / there[:, 2:3]
    warped = grid_sample(c.rgb[:, 1], at.mT[:, None], align_corners=False)[:, :, 0].unflatten(2, (32, 32))
    inside = (at.abs() < 0.95).all(dim=1).unflatten(1, (32, 32))
    change, shown = ((x - c.rgb[:, 0]).abs().mean(dim=1)[inside].mean() for x in (warped, c.rgb[:, 1]))
    assert change < 0.6 * shown


def test_objects_stand_where_they_are_said_to() -> None:
    """Ground, wall and spheres: every point seen satisfies the equation of its surface."""
    s = scenes.sample_scenes(range(12))
    level = render.level_poses(s, 6)
    depth, index, _ = render.cast(s, level, 32, colour=False)
    rays = torch.einsum("bfij,jp->bfip", level[..., :3, :3], camera.pixel_rays(32).flatten(1))
    at = level[..., :3, 3, None] + depth[:, :, None] * rays
    x, y, z = at.unbind(2)
    time = torch.linspace(0, 1, 6)[:, None]
    ground, wall = s.ground[:, None, None], s.wall[:, :, None, None]
    errors = [y - ground, wall[:, 1].sin() * x + wall[:, 1].cos() * z - wall[:, 0]]
    for k in range(2):
        way = s.position[:, k, None, None] + time[..., None] * s.velocity[:, k, None, None]
        radius = s.extent[:, k, :1, None]
        errors.append(((x - way[..., 0]) ** 2 + (y - ground + radius) ** 2 + (z - way[..., 1]) ** 2).sqrt() - radius)
    for k, error in enumerate(errors):
        assert (index == k).sum() > 50
        assert error[index == k].abs().max() < 2e-4
    assert y.max() <= s.ground.max() + 2e-4


def test_boxes_are_met_on_their_faces() -> None:
    origin = [torch.tensor([value]) for value in (0.2, -0.1, -3.0)]
    ray = [torch.tensor([value]) for value in (0.0, 0.05, 1.0)]
    half = [torch.tensor([value]) for value in (0.5, 0.6, 0.7)]
    hit, normal = render.box(origin, ray, half)
    torch.testing.assert_close(hit, torch.tensor([2.3]))
    assert [float(n) for n in normal] == [0, 0, -1]
    miss, _ = render.box([torch.tensor([2.0]), *origin[1:]], ray, half)
    assert float(miss) == render.FAR


def test_poses_from_raymap_are_exact_on_ground_truth() -> None:
    c = clips(16)
    fitted = camera.poses_from_raymap(camera.raymap_from_poses(c.poses, 16))
    torch.testing.assert_close(fitted, c.poses, atol=2e-6, rtol=0)


def test_poses_from_raymap_average_noise_and_stay_rotations() -> None:
    c = clips(16)
    rays = camera.raymap_from_poses(c.poses, 16)
    noisy = rays + 0.05 * torch.randn(rays.shape, generator=torch.Generator().manual_seed(0))
    fitted = camera.poses_from_raymap(noisy)
    assert (fitted - c.poses).abs().max() < 0.03
    turns = fitted[..., :3, :3]
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand_as(turns), atol=1e-5, rtol=0)
    assert (torch.linalg.det(turns) > 0).all()
    mirrored = torch.cat([rays[:, :, :3] * torch.tensor([-1.0, 1, 1])[:, None, None], rays[:, :, 3:]], dim=2)
    assert (torch.linalg.det(camera.poses_from_raymap(mirrored)[..., :3, :3]) > 0).all()


def test_latents_and_back() -> None:
    c = clips()
    encoded = latents.encode(c)
    assert encoded.shape == (8, 6, latents.LATENT, 16, 16)
    decoded = latents.decode(encoded)
    torch.testing.assert_close(decoded.rgb, c.rgb)
    torch.testing.assert_close(decoded.depth, c.depth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded.poses, c.poses, atol=5e-6, rtol=0)
    torch.testing.assert_close(decoded.raymap, camera.raymap_from_poses(c.poses, 16), atol=1e-6, rtol=0)


def test_latents_have_zero_mean_and_unit_variance() -> None:
    encoded = latents.encode(clips(64))
    spread, mean = torch.std_mean(encoded, dim=(0, 1, 3, 4))
    assert mean.abs().max() < 0.25
    assert 0.85 < spread.min() < spread.max() < 1.15


def test_condition_shows_the_given_frames_alone() -> None:
    rgb = clips(2).rgb
    given = torch.tensor([[True, False, False, False, False, True], [True] * 6])
    hidden = rgb.clone()
    hidden[0, 1:5] = float("nan")
    told = latents.condition(hidden, given)
    assert told.shape == (2, 6, latents.CONDITION, 16, 16)
    torch.testing.assert_close(told, latents.condition(rgb, given))
    torch.testing.assert_close(told[1, :, :12], latents.encode(clips(2))[1, :, latents.RGB])
    assert (told[0, 1:5, :13] == 0).all()
    assert (told[:, :, 12] == given[:, :, None, None]).all()
    time, y, x = (told[0, :, k] for k in (13, 14, 15))
    assert (time[1:] > time[:-1]).all()
    assert (y[:, 1:] > y[:, :-1]).all()
    assert (x[..., 1:] > x[..., :-1]).all()
    frames, before, after = told[:, :, :12], told[:, :, 16:28], told[:, :, 28:]
    nothing = torch.zeros_like(frames[0, :1])
    # Each frame has the nearest given ones on both sides: the ends, where they alone are given.
    assert torch.equal(before[0], torch.cat([nothing, frames[0, :1].expand(5, -1, -1, -1)]))
    assert torch.equal(after[0], torch.cat([frames[0, 5:].expand(5, -1, -1, -1), nothing]))
    assert torch.equal(before[1], torch.cat([nothing, frames[1, :-1]]))
    assert torch.equal(after[1], torch.cat([frames[1, 1:], nothing]))
