"""Evaluation: what a planner is held against, and the table as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from .support.examples import world

evaluate, render, scenes, train = (world(name) for name in ("evaluate", "render", "scenes", "train"))
PSNR, SHARPNESS = "RGB of frames 1 to 4, PSNR dB", "their gradient energy over the truth's"
TURN = "camera turn error, degrees"


def held_out(count: int) -> Any:
    return scenes.sample_scenes(range(scenes.HELD_OUT, scenes.HELD_OUT + count))


def test_the_truth_is_as_sharp_as_itself_and_blur_is_not() -> None:
    rgb = render.render(held_out(4)).rgb
    blurred = avg_pool2d(rgb.flatten(0, 1), 5, 1, 2, count_include_pad=False).unflatten(0, (4, 6))
    assert evaluate.image_errors(rgb, rgb)[SHARPNESS] == 1
    assert evaluate.image_errors(blurred, rgb)[SHARPNESS] < 0.6
    noisy = rgb + 0.1 * torch.randn(rgb.shape, generator=torch.Generator().manual_seed(0))
    found = evaluate.image_errors(noisy, rgb)
    assert abs(found[PSNR] - 20) < 0.1
    assert found[SHARPNESS] > 2


def test_given_frames_do_not_count() -> None:
    rgb = render.render(held_out(2)).rgb
    spoilt = rgb.clone()
    spoilt[:, [0, -1]] = 0
    assert evaluate.image_errors(spoilt, rgb)[PSNR] == float("inf")
    assert evaluate.image_errors(spoilt, rgb)[SHARPNESS] == 1


def test_a_cross_fade_starts_and_ends_at_the_given_frames() -> None:
    rgb = render.render(held_out(2)).rgb
    fade = evaluate.cross_fade(rgb)
    torch.testing.assert_close(fade[:, [0, -1]], rgb[:, [0, -1]])
    torch.testing.assert_close(fade[:, 2], 0.6 * rgb[:, 0] + 0.4 * rgb[:, -1])


def test_straightened_paths_keep_their_ends() -> None:
    bowed = held_out(3)
    which = torch.tensor([True, False, True])
    straight = scenes.straightened(bowed, which)
    one, other = render.render(bowed), render.render(straight)
    torch.testing.assert_close(one.rgb[:, [0, -1]], other.rgb[:, [0, -1]])
    assert torch.equal(one.rgb[1], other.rgb[1])
    assert (one.rgb - other.rgb)[which].abs().amax(dim=(1, 2, 3, 4)).min() > 0.1
    places = render.level_poses(scenes.straightened(bowed), 6)[..., :3, 3]
    torch.testing.assert_close(places.diff(n=2, dim=1), torch.zeros(3, 4, 3), atol=1e-6, rtol=0)


def test_ends_do_not_tell_the_path_so_its_middle_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw of the path misses the truth by more than the middle of all paths, and both look as sharp as the truth."""
    some = held_out(16)
    clips = render.render(some)
    monkeypatch.setattr(evaluate, "GUESSED_FROM", 1)  # a guess that is not looked at here
    found = evaluate.references(some, clips)
    assert found["straight path"][PSNR] > found["other path"][PSNR] + 0.5
    assert found["straight path"][TURN] < found["other path"][TURN] - 0.06
    assert min(found[name][SHARPNESS] for name in ("straight path", "other path")) > 0.95
    assert found["cross-fade"][SHARPNESS] < 0.8
    straight = scenes.straightened(some)
    again = render.render(scenes.straightened(straight))
    assert evaluate.image_errors(again.rgb, render.render(straight).rgb)[PSNR] == float("inf")


def test_the_table_names_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "GUESSED_FROM", 4)
    train.main(["--run", str(tmp_path), "--steps", "1", "--layers", "1", "--heads", "1", "--batch", "2"])
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "checkpoint.pt"), "--scenes", "2", "--steps", "1", "--straight"])
    lines = capsys.readouterr().out.splitlines()
    heading = ["planning", "reconstruction", "guess", "cross-fade", "other path", "straight path"]
    assert [name for name in heading if name in lines[0]] == heading
    assert sum(PSNR in line or SHARPNESS in line or TURN in line for line in lines) == 3
