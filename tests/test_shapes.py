"""The model of moving shapes: its clips, autoencoder, training, shipped weights, calls and plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .reference_forecast import forecast_trajectory
from .support.examples import package

autoencoder, clips, pipelines, train = (package(f"shapes.{n}") for n in ("autoencoder", "clips", "pipeline", "train"))
STEPS = 6


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Any]:
    """The shipped one."""
    torch._dynamo.reset()
    yield quiet(pipelines.ShapesPipeline.from_pretrained(pipelines.WEIGHTS))
    torch._dynamo.reset()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, numbers: list[int], steps: int = STEPS) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in numbers]
    text = clips.make_clips(numbers).text
    latents: Tensor = pipeline(text, num_inference_steps=steps, generator=generators, output_type="latent").latents
    return latents


def test_a_clip_is_its_number() -> None:
    alone, together = clips.make_clips([7]), clips.make_clips([3, 7, clips.TRAINING])
    torch.testing.assert_close(alone.video[0], together.video[1], rtol=0, atol=0)
    torch.testing.assert_close(alone.text[0], together.text[1], rtol=0, atol=0)
    assert len({tuple(row.flatten().tolist()) for row in together.video}) == 3
    assert 0 <= together.video.min() < together.video.max() <= 1
    assert (together.text.sum(dim=-1) == 2).all()
    with pytest.raises(ValueError, match="number=-1: clips have the numbers 0 to"):
        clips.make_clips([-1])


def test_shapes_move_as_their_words_say_until_they_bounce() -> None:
    made = clips.make_clips(range(64))
    difference = (made.video - made.video[:, :, :, :1, :1]).abs().sum(dim=1)  # to the ground, in a corner
    mass = difference / difference.sum(dim=(-2, -1), keepdim=True)
    pixel = torch.arange(clips.SIZE) + 0.5
    places = torch.stack([(mass.sum(dim=-2) * pixel).sum(-1), (mass.sum(dim=-1) * pixel).sum(-1)], dim=-1)
    words = made.text[:, 2, clips.WORDS :].argmax(-1) - len(clips.SHAPES) - len(clips.COLOURS)
    angle = words * (2 * torch.pi / clips.HEADINGS)
    along = ((places[:, 1] - places[:, 0]) * torch.stack([angle.cos(), angle.sin()], dim=-1)).sum(-1)
    assert (along > 0.9).sum() >= 48  # pixels per frame; some bounce at once
    assert (places.diff(dim=1).norm(dim=-1) < 2.3).all()


def test_the_autoencoder_keeps_held_out_clips(pipeline: Any) -> None:
    video = clips.make_clips(range(clips.HELD_OUT, clips.HELD_OUT + 16)).video
    latents = pipeline.vae.encode(video)
    assert latents.shape == (16, *autoencoder.LATENT_SHAPE)
    assert latents.numel() * 6 == video.numel()
    assert 0.8 < latents.std() < 1.2
    assert (pipeline.vae.decode(latents) - video).norm() / video.norm() < 0.12
    components = pipeline.vae.components
    torch.testing.assert_close(components @ components.mT, torch.eye(len(components)), atol=2e-3, rtol=0)


def test_training_resumes_and_exports_the_moving_average(tmp_path: Path) -> None:
    def options(folder: str, steps: str) -> list[str]:
        sizes = ["--layers", "1", "--heads", "1", "--batch", "2", "--warmup", "2", "--decay", "2"]
        return ["--run", str(tmp_path / folder), "--steps", steps, *sizes, "--export", str(tmp_path / folder / "w")]

    whole = train.main(options("whole", "4"))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(train.Training, "rate", lambda self: min(1.0, (self.step + 1) / 2))
        train.main(options("parts", "2"))
    parts = train.main(options("parts", "4"))
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(value, parts.average.state_dict()[name], rtol=0, atol=0, msg=name)
    loaded = pipelines.ShapesPipeline.from_pretrained(tmp_path / "whole" / "w")
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(loaded.transformer.state_dict()[name], value.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(loaded.vae.components, whole.vae.components, rtol=0, atol=0)


def test_it_makes_what_the_words_say(pipeline: Any) -> None:
    """The middle of the shape has the colour that was asked for, of six, and the ground is flat."""
    numbers = list(range(clips.HELD_OUT, clips.HELD_OUT + 8))
    text = clips.make_clips(numbers).text
    generators = [torch.Generator().manual_seed(i) for i in numbers]
    made = pipeline(text, num_inference_steps=8, generator=generators).frames
    assert made.shape == (8, 3, clips.FRAMES, clips.SIZE, clips.SIZE)
    right = sum(told == seen for told, seen in zip(colours(text), map(colour, made), strict=True))
    assert right >= 6


def colours(text: Tensor) -> list[int]:
    found: list[int] = (text[:, 1, clips.WORDS :].argmax(-1) - len(clips.SHAPES)).tolist()
    return found


def colour(video: Tensor) -> int:
    """The nearest one to the pixels that stand out most from the ground."""
    pixels = video.flatten(1)
    ground = pixels.median(dim=1, keepdim=True).values
    shape = pixels[:, (pixels - ground).norm(dim=0).topk(100).indices].mean(dim=1)
    return int((torch.tensor(list(clips.COLOURS.values())) - shape).norm(dim=1).argmin())


def test_the_two_calls_of_a_step_are_told_apart_and_follow_a_plan(pipeline: Any, tmp_path: Path) -> None:
    """A small plan, saved and loaded, gives what the reference's equations give for each call; on the first two layers."""
    plain = deepcopy(pipeline.transformer)
    plain.blocks = plain.blocks[:2]
    pipeline = quiet(pipelines.ShapesPipeline(plain, pipeline.scheduler, pipeline.vae))

    def run(model: Any, i: int) -> Tensor:
        pipeline.transformer = model
        return sample(pipeline, [clips.TRAINING + i])

    found = hero_fx.calibrate(plain, run, num_steps=STEPS, budget=3, scenes=2, holdout=1, search=1, inner="eager")
    found.plan.save(tmp_path / "plan.safetensors")
    backend = hero_fx.backend(plan=tmp_path / "plan.safetensors", inner="aot_eager")
    pipeline.transformer = torch.compile(plain, backend=backend, fullgraph=True)
    ours, stats = sample(pipeline, [5]), backend.stats()
    assert found.plan.lanes == 2
    assert (stats.full_steps, stats.cached_steps) == (3, STEPS - 3)
    assert (stats.full_calls, stats.cached_calls) == (6, 2 * STEPS - 6)
    pipeline.transformer = plain
    full = sample(pipeline, [5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "forward", by_reference(plain.forward, found.plan))
        theirs = sample(pipeline, [5])
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert 1e-3 < (ours - full).norm() / full.norm() < 0.5


def by_reference(forward: Callable[..., Any], plan: hero_fx.Plan) -> Callable[..., tuple[Tensor]]:
    """The forward of a model that follows a plan: calls are the conditional and the unconditional one in turns."""
    line, table, now = plan.timelines[0], plan.outputs[0].table, dict[str, Any]()
    lanes = [
        forecast_trajectory(
            lambda step: forward(**now)[0], line.coefficients[name], line.schedule, lambda step: now["hidden_states"]
        )
        for name in (table, f"{table}@1")
    ]
    turns = cycle(lanes)

    def call(**inputs: Any) -> tuple[Tensor]:
        now.update(inputs)
        return (next(next(turns)),)

    return call
