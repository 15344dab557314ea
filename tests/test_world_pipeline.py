"""`WorldModelPipeline`: diffusers' conventions, and hero_fx under it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny
from .support.examples import world
from .support.tiny import randomized

model, pipeline, latents = (world(name) for name in ("model", "pipeline", "latents"))
SHAPE = (2, 6, 3, 12, 12)


def pipe() -> Any:
    """Two layers of width 32 on 6 x 3 x 3 tokens, with weights that are not zero anywhere."""
    torch.manual_seed(0)
    made = pipeline.WorldModelPipeline(randomized(model.world_transformer(2, 1)), model.world_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def video() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_types() -> None:
    world_pipe = pipe()

    def call(**options: Any) -> Any:
        return world_pipe(video(), "reconstruction", 3, generator=seeded(), **options)

    out = call()
    assert out.rgb.shape == SHAPE
    assert out.depth.shape == (2, 6, 12, 12)
    assert out.raymap.shape == (2, 6, 6, 6, 6)
    assert out.poses.shape == (2, 6, 4, 4)
    torch.testing.assert_close(out.depth, latents.decode(out.latents).depth)
    arrays = call(output_type="np")
    np.testing.assert_array_equal(arrays.rgb, out.rgb.numpy())
    images = call(output_type="pil").rgb
    assert (len(images), len(images[0]), images[0][0].size) == (2, 6, (12, 12))
    tuple_of = call(return_dict=False)
    torch.testing.assert_close(tuple_of[4], out.latents)
    alone = call(output_type="latent")
    assert alone.rgb is None
    torch.testing.assert_close(alone.latents, out.latents)


def test_default_steps_and_guidance_are_the_papers() -> None:
    world_pipe, batches = pipe(), []
    world_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    world_pipe(video(), "planning")
    assert (world_pipe.guidance_scale, world_pipe.num_timesteps, batches) == (3.0, 50, [4] * 50)
    batches.clear()
    world_pipe(video(), "reconstruction")
    assert (world_pipe.guidance_scale, world_pipe.num_timesteps, batches) == (1.0, 30, [2] * 30)


def test_planning_looks_at_the_ends_and_reconstruction_at_all() -> None:
    world_pipe, changed = pipe(), video()
    changed[:, 2] = 1 - changed[:, 2]

    def differ(task: str) -> bool:
        first, second = (world_pipe(x, task, 2, generator=seeded()).latents for x in (video(), changed))
        return not torch.equal(first, second)

    assert not differ("planning")
    assert differ("reconstruction")
    changed = video()
    changed[:, -1] = 1 - changed[:, -1]
    assert differ("planning")


def test_guidance_is_batched_and_mixes_both_halves() -> None:
    world_pipe, calls = pipe(), []
    forward = world_pipe.transformer.forward

    def spy(**inputs: Any) -> Any:
        calls.append((inputs, forward(**inputs)[0]))
        return (calls[-1][1],)

    world_pipe.transformer.forward = spy
    out = world_pipe(video(), "planning", 1, 3.0, use_dynamic_cfg=False, generator=seeded()).latents
    (inputs, velocity), noise = calls[0], torch.randn(2, 6, 22, 6, 6, generator=seeded())
    assert len(inputs["timestep"]) == 4
    torch.testing.assert_close(inputs["hidden_states"][:, :, :22], torch.cat([noise, noise]))
    assert (
        inputs["hidden_states"][:2, :, [*range(22, 35), *range(38, 50)]] == 0
    ).all()  # nothing is told: neither frames nor mask
    assert (inputs["hidden_states"][2:, [0, -1], 34] == 1).all()
    assert not torch.equal(inputs["encoder_hidden_states"][0], inputs["encoder_hidden_states"][2])
    without, told = velocity.chunk(2)
    # At the first timestep there is no signal, so that one step to the end gives minus the velocity.
    torch.testing.assert_close(out, -(without + 3 * (told - without)), atol=1e-4, rtol=1e-4)


def test_dynamic_guidance_rises_to_its_scale() -> None:
    world_pipe, scales = pipe(), []

    def callback(of: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scales.append(of.guidance_scale)
        return tensors

    world_pipe(video(), "planning", 11, callback_on_step_end=callback)
    assert scales == sorted(scales)
    assert (scales[0], scales[-1]) == (1.0, 3.0)
    assert scales[5] < 1.1
    scales.clear()
    world_pipe(video(), "planning", 2, 2.5, use_dynamic_cfg=False, callback_on_step_end=callback)
    assert scales == [2.5, 2.5]


def test_generator_and_latents() -> None:
    world_pipe = pipe()
    noise = torch.randn(2, 6, 22, 6, 6, generator=seeded())
    given = world_pipe(video(), num_inference_steps=2, latents=noise).latents
    torch.testing.assert_close(given, world_pipe(video(), num_inference_steps=2, generator=seeded()).latents)
    each = world_pipe(video(), num_inference_steps=2, generator=[seeded(3), seeded(2)]).latents
    assert not torch.equal(each[0], given[0])


def test_callback_sees_and_replaces_latents_and_can_stop() -> None:
    world_pipe, seen = pipe(), []

    def callback(of: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(t), tensors["latents"].shape))
        if step == 1:
            of._interrupt = True
            return {"latents": torch.full_like(tensors["latents"], 0.25)}
        return tensors

    out = world_pipe(video(), num_inference_steps=4, callback_on_step_end=callback).latents
    assert seen == [(0, 999, (2, 6, 22, 6, 6)), (1, 749, (2, 6, 22, 6, 6))]
    assert (out == 0.25).all()


def test_transformer_runs_in_its_cache_context(monkeypatch: pytest.MonkeyPatch) -> None:
    world_pipe, names, enter = pipe(), [], type(pipe().transformer).cache_context

    def spy(self: Any, name: str) -> AbstractContextManager[None]:
        names.append(name)
        context: AbstractContextManager[None] = enter(self, name)
        return context

    monkeypatch.setattr(type(world_pipe.transformer), "cache_context", spy)
    world_pipe(video(), num_inference_steps=3)
    assert names == ["cond_uncond"] * 3


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    world_pipe = pipe()
    world_pipe.set_progress_bar_config(disable=False)
    world_pipe(video(), num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    world_pipe = pipe()
    world_pipe.save_pretrained(tmp_path)
    loaded = pipeline.WorldModelPipeline.from_pretrained(tmp_path)
    assert dict(loaded.scheduler.config) | {"_use_default_values": None} == dict(world_pipe.scheduler.config) | {
        "_use_default_values": None
    }
    loaded.set_progress_bar_config(disable=True)
    first, second = (p(video(), num_inference_steps=3, generator=seeded()).latents for p in (world_pipe, loaded))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "dreaming"}, "task='dreaming': must be one of 'planning', 'reconstruction'"),
        (
            {"video": torch.zeros(2, 6, 3, 10, 10)},
            r"shape \(2, 6, 3, 10, 10\): must be \[batch, frames, 3, side, side\]",
        ),
        ({"latents": torch.zeros(2, 6, 10, 8, 8)}, r"must be \(2, 6, 22, 6, 6\)"),
        ({"output_type": "mp4"}, "output_type='mp4': must be 'pt', 'np', 'pil' or 'latent'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]: choose from \['latents'\]"),
    ],
)
def test_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe()(**{"video": video(), **options})


@pytest.mark.parametrize(
    ("task", "steps", "counts"),
    [
        pytest.param("planning", 10, (7, 3), marks=pytest.mark.exhaustive),  # as in `test_quickstart`
        ("reconstruction", 12, (8, 4)),
    ],
)
def test_compiled_with_hero_fx(task: str, steps: int, counts: tuple[int, int]) -> None:
    world_pipe, plain_pipe = pipe(), pipe()
    backend = hero_fx.backend(interval=2, num_steps=steps, inner=tiny.INNER)
    world_pipe.transformer = torch.compile(world_pipe.transformer, backend=backend, fullgraph=True)
    plain = plain_pipe(video(), task, steps, generator=seeded()).latents
    first, second = (world_pipe(video(), task, steps, generator=seeded()).latents for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # a second trajectory starts over
    stats = backend.stats()
    assert (stats.full_steps, stats.cached_steps) == (2 * counts[0], 2 * counts[1])
    assert 0 < (first - plain).norm() / plain.norm() < 0.3


@pytest.mark.exhaustive  # as in `test_aether_run`
def test_compiled_with_policy_full_equals_plain() -> None:
    world_pipe, plain_pipe = pipe(), pipe()
    backend = hero_fx.backend(policy="full", inner="eager")
    world_pipe.transformer = torch.compile(world_pipe.transformer, backend=backend, fullgraph=True)
    first, second = (p(video(), num_inference_steps=6, generator=seeded()).latents for p in (world_pipe, plain_pipe))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
