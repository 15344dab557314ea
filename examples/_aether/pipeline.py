"""Aether's pipeline, written from its behaviour: RGB, disparity and camera rays of a clip, denoised together.

It is called as the authors' own (`AetherV1PipelineCogVideoX`) is, draws its random numbers in the same order, and stands in
where theirs is not installed. Latents have 56 channels: RGB 16, disparity 16, rays 24 (4 frames of 6); 40 channels of condition
(RGB 16, rays 24) go in beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from .raymaps import pack, unpack

TASKS = ("planning", "prediction", "reconstruction")
STEPS = {"planning": 50, "prediction": 50, "reconstruction": 4}
"""Default steps of the authors' pipeline; the HERO paper takes 30 for reconstruction."""
GUIDANCE = {"planning": 3.0, "prediction": 3.0, "reconstruction": 1.0}
"""Default guidance scales."""
BASE_FPS = 12
"""Frames per second at which positions in time are those of CogVideoX."""
RAYS = 6


@dataclass
class AetherOutput(BaseOutput):  # type: ignore[misc]
    """What `AetherPipeline` returns; arrays are float32."""

    rgb: NDArray[Any]
    """[F, H, W, 3] in [0, 1]."""
    disparity: NDArray[Any]
    """[F, H, W], relative: up to an unknown scale."""
    raymap: NDArray[Any]
    """[F, 6, H / 8, W / 8], origins coded as in `raymaps.py`."""


class AetherPipeline(CogVideoXImageToVideoPipeline):  # type: ignore[misc]
    """Three tasks, each with an empty prompt: `"planning"` is given the first and the last frame, `"prediction"` the first
    alone (and, in both, camera rays if one likes), `"reconstruction"` all frames."""

    empty_prompt_embeds: Tensor | None = None
    """[1, tokens, width]; made by the first call, if not before."""

    @torch.no_grad()
    def __call__(
        self,
        task: str,
        image: NDArray[Any] | None = None,
        video: NDArray[Any] | None = None,
        goal: NDArray[Any] | None = None,
        raymap: NDArray[Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool | None = None,
        generator: torch.Generator | None = None,
        fps: int = BASE_FPS,
    ) -> AetherOutput:
        """Denoises.

        Args:
            task: `"planning"`, `"prediction"` or `"reconstruction"`.
            image: first frame, [H, W, 3] in [0, 1].
            video: all frames, [F, H, W, 3] in [0, 1].
            goal: last frame, [H, W, 3] in [0, 1].
            raymap: camera rays to follow, [F, 6, H / 8, W / 8]; unknown if not given.
            height: H in pixels, a multiple of 16; 480 if not given (what the transformer was made for).
            width: W in pixels, a multiple of 16; 720 if not given.
            num_frames: F, 1 more than a multiple of 4; 41 if not given.
            num_inference_steps: 50, or 4 for reconstruction, if not given.
            guidance_scale: 3.0, or 1.0 for reconstruction, if not given; above 1 a second half of the batch runs without RGB.
            use_dynamic_cfg: guidance `1 + scale (1 - cos(π ((n - t) / n)^5)) / 2` of n steps at timestep t, as in
                CogVideoX: t is the timestep (0 .. 999), not the number of the step. On, but for reconstruction, if not given.
            generator: of posteriors and noise.
            fps: frames per second of the clip; positions in time are scaled by 12 / fps.

        Raises:
            ValueError: for an unknown task, inputs that it does not take or lacks, and shapes that do not fit.
        """
        config = self.transformer.config
        height = height or config.sample_height * self.vae_scale_factor_spatial
        width = width or config.sample_width * self.vae_scale_factor_spatial
        frames = num_frames or config.sample_frames
        self._check(task, {"image": image, "goal": goal, "video": video, "raymap": raymap}, frames, height, width)
        steps = STEPS[task] if num_inference_steps is None else num_inference_steps
        scale = GUIDANCE[task] if guidance_scale is None else guidance_scale
        dynamic = task != "reconstruction" if use_dynamic_cfg is None else use_dynamic_cfg
        device, text = self._execution_device, self._text()
        given = [self._encode(x, generator) for x in (video, *(_one(x) for x in (image, goal))) if x is not None]
        condition = self._condition(given, raymap, frames, height, width)
        shape = (1, condition.shape[1], config.out_channels, *condition.shape[-2:])
        noise = randn_tensor(shape, generator=generator, device=device, dtype=text.dtype)
        self.scheduler.set_timesteps(steps, device=device)
        latents = self._denoise(
            noise * self.scheduler.init_noise_sigma, condition, text, scale, dynamic, generator, BASE_FPS / fps
        )
        result = self._output(latents, frames)
        self.maybe_free_model_hooks()
        return result

    def _check(self, task: str, inputs: dict[str, Any], frames: int, height: int, width: int) -> None:
        if task not in TASKS:
            raise ValueError(f"task={task!r}: must be one of {', '.join(map(repr, TASKS))}.")
        needed = {"planning": ("image", "goal"), "prediction": ("image",), "reconstruction": ("video",)}[task]
        for name in ("image", "goal", "video"):
            if (inputs[name] is not None) != (name in needed):
                raise ValueError(f"task={task!r} takes {' and '.join(needed)}: {name} is {_given(inputs[name])}.")
        side = self.vae_scale_factor_spatial * self.transformer.config.patch_size
        if height % side or width % side:
            raise ValueError(f"height={height}, width={width}: must be multiples of {side}.")
        if frames < 5 or frames % self.vae_scale_factor_temporal != 1:
            raise ValueError(
                f"num_frames={frames}: must be 1 more than a multiple of {self.vae_scale_factor_temporal}."
            )
        size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        shapes = dict.fromkeys(("image", "goal"), (height, width, 3))
        shapes |= {"video": (frames, height, width, 3), "raymap": (frames, RAYS, *size)}
        for name, value in inputs.items():
            if value is not None and value.shape != shapes[name]:
                raise ValueError(f"{name} has shape {value.shape}: must be {shapes[name]}.")

    def encode_empty_prompt(self) -> Tensor:
        """Keeps the embedding of the empty prompt; the text encoder is not needed again."""
        tokens = self.transformer.config.max_text_seq_length
        text, _ = self.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=tokens)
        self.empty_prompt_embeds = text.to(self.transformer.dtype)
        return self.empty_prompt_embeds

    def _text(self) -> Tensor:
        text = self.encode_empty_prompt() if self.empty_prompt_embeds is None else self.empty_prompt_embeds
        return text.to(self._execution_device)

    def _encode(self, frames: NDArray[Any], generator: torch.Generator | None) -> Tensor:
        """Latents [1, T, 16, h, w] of frames [F, H, W, 3]."""
        pixels = 2 * torch.from_numpy(np.asarray(frames, np.float32)).permute(3, 0, 1, 2)[None] - 1
        posterior = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist
        factor = self.vae_scaling_factor_image
        if self.vae.config.invert_scale_latents:  # what CogVideoX's image conditions were trained with
            factor = 1 / factor
        return factor * posterior.sample(generator).to(self.transformer.dtype).transpose(1, 2)

    def _condition(
        self, given: list[Tensor], raymap: NDArray[Any] | None, frames: int, height: int, width: int
    ) -> Tensor:
        """[1, T, 40, h, w]: latents of the given frames where they are given, and rays; zeros elsewhere."""
        length = (frames - 1) // self.vae_scale_factor_temporal + 1
        first, *last = given
        between = first.new_zeros(1, length - sum(x.shape[1] for x in given), *first.shape[2:])
        rgb = torch.cat([first, between, *last], dim=1)
        ratio = self.vae_scale_factor_temporal
        if raymap is None:
            rays = rgb.new_zeros(1, length, RAYS * ratio, *rgb.shape[3:])
        else:
            rays = pack(torch.from_numpy(np.asarray(raymap))[None].to(rgb), ratio)
        return torch.cat([rgb, rays], dim=2)

    def _denoise(
        self, latents: Tensor, condition: Tensor, text: Tensor, scale: float, dynamic: bool,
        generator: torch.Generator | None, pace: float,
    ) -> Tensor:  # fmt: skip
        guided = scale > 1
        if guided:
            without = condition.clone()
            without[:, :, : self.vae.config.latent_channels] = 0
            condition = torch.cat([without, condition])
        text = text.repeat(len(condition), 1, 1)
        positions = self._rotary(latents.shape[1], *latents.shape[-2:], pace)
        extra = self.prepare_extra_step_kwargs(generator, 0.0)
        timesteps, predicted = self.scheduler.timesteps, None
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                repeated = self.scheduler.scale_model_input(torch.cat([latents] * len(condition)), t)
                velocity = self.transformer(
                    hidden_states=torch.cat([repeated, condition], dim=2),
                    encoder_hidden_states=text,
                    timestep=t.expand(len(condition)),
                    image_rotary_emb=positions,
                    return_dict=False,
                )[0].float()
                if guided:
                    phase = ((len(timesteps) - t.item()) / len(timesteps)) ** 5
                    weight = 1 + scale * (1 - math.cos(math.pi * phase)) / 2 if dynamic else scale
                    base, having = velocity.chunk(2)
                    velocity = base + weight * (having - base)
                if isinstance(self.scheduler, CogVideoXDPMScheduler):
                    before = timesteps[i - 1] if i else None
                    stepped, predicted = self.scheduler.step(
                        velocity, predicted, t, before, latents, **extra, return_dict=False
                    )
                else:
                    stepped = self.scheduler.step(velocity, t, latents, **extra, return_dict=False)[0]
                latents = stepped.to(text.dtype)
                bar.update()
        return latents

    def _rotary(self, frames: int, height: int, width: int, pace: float) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [tokens, head] of latents of that size: CogVideoX's, with time running `pace` times as fast."""
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        patch, head = config.patch_size, config.attention_head_dim
        grid = (height // patch, width // patch)
        crop = get_resize_crop_region_for_grid(grid, config.sample_width // patch, config.sample_height // patch)
        tables = get_3d_rotary_pos_embed(head, crop, grid, temporal_size=frames)
        of_time = get_1d_rotary_pos_embed(head // 4, pace * torch.arange(frames, dtype=torch.float32), use_real=True)
        for table, times in zip(tables, of_time, strict=True):
            table[:, : head // 4] = times.repeat_interleave(grid[0] * grid[1], dim=0)
        device = self._execution_device
        return tables[0].to(device), tables[1].to(device)

    def _output(self, latents: Tensor, frames: int) -> AetherOutput:
        channels = self.vae.config.latent_channels
        colour, disparity, rays = latents.split([channels, channels, latents.shape[2] - 2 * channels], dim=2)
        rgb = self.video_processor.postprocess_video(self.decode_latents(colour), output_type="np")[0]
        root = self.decode_latents(disparity).mean(dim=1)[0] * 0.5 + 0.5  # the model is trained on square roots
        raymap = unpack(rays, frames, self.vae_scale_factor_temporal)[0]
        return AetherOutput(rgb, root.square().float().cpu().numpy(), raymap.float().cpu().numpy())


def _one(image: NDArray[Any] | None) -> NDArray[Any] | None:
    return None if image is None else image[None]


def _given(value: Any) -> str:
    return "missing" if value is None else "given"
