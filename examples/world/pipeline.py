"""The pipeline: a clip, its depth and its camera from the frames that are given, by diffusers' conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .latents import FOLD, LATENT, condition, decode
from .model import rotary, task_text
from .settings import GUIDANCE, STEPS, TASKS, WEIGHTS

__all__ = ["GUIDANCE", "STEPS", "WEIGHTS", "WorldModelOutput", "WorldModelPipeline"]


@dataclass
class WorldModelOutput(BaseOutput):  # type: ignore[misc]
    """What `WorldModelPipeline` returns."""

    rgb: Any
    """[B, F, 3, S, S] in [0, 1]; with `output_type="np"` an array, with `"pil"` lists of lists of images."""
    depth: Any
    """[B, F, S, S] along the camera's axis, in metres."""
    raymap: Any
    """[B, F, 6, S / 2, S / 2] ray directions and origins, told relative to the first camera."""
    poses: Any
    """[B, F, 4, 4] camera-to-first-camera, fitted to the raymap."""
    latents: Any
    """[B, F, 22, S / 2, S / 2] as denoised; see `latents.py` for the channels."""


class WorldModelPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Denoises RGB, disparity and camera rays of a clip together.

    Two tasks: `"planning"` is given the first and the last frame and imagines those between; `"reconstruction"` is given
    all frames and finds depth and camera. Components: a `CogVideoXTransformer3DModel` and a `CogVideoXDDIMScheduler`.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, transformer: CogVideoXTransformer3DModel, scheduler: CogVideoXDDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Of the step that runs, or ran last."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a second half of the batch runs without conditions."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to skip the steps that are left."""
        return self._interrupt

    def check_inputs(
        self, video: Tensor, task: str, latents: Tensor | None, names: list[str], output_type: str
    ) -> None:
        """Raises ValueError for inputs that do not fit."""
        if task not in TASKS:
            raise ValueError(f"task={task!r}: must be one of {', '.join(map(repr, TASKS))}.")
        side = FOLD * self.transformer.config.patch_size
        if video.ndim != 5 or video.shape[2] != 3 or video.shape[3] % side or video.shape[4] != video.shape[3]:
            raise ValueError(
                f"video has shape {tuple(video.shape)}: must be [batch, frames, 3, side, side], side a multiple of {side}."
            )
        if latents is not None and tuple(latents.shape) != self._latents_shape(video):
            raise ValueError(f"latents have shape {tuple(latents.shape)}: must be {self._latents_shape(video)}.")
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={names}: choose from {list(self._callback_tensor_inputs)}."
            )
        if output_type not in ("pt", "np", "pil", "latent"):
            raise ValueError(f"output_type={output_type!r}: must be 'pt', 'np', 'pil' or 'latent'.")

    def _latents_shape(self, video: Tensor) -> tuple[int, ...]:
        batch, frames, _, height, width = video.shape
        return batch, frames, LATENT, height // FOLD, width // FOLD

    def prepare_latents(
        self, video: Tensor, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """The noise to start from, [B, F, 22, S / 2, S / 2]."""
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            latents = randn_tensor(self._latents_shape(video), generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        video: Tensor,
        task: str = "planning",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> WorldModelOutput | tuple[Any, ...]:
        """Denoises.

        Args:
            video: [B, F, 3, S, S] in [0, 1]. Planning looks at the first and last frame alone; the others may hold anything.
            task: `"planning"` or `"reconstruction"`.
            num_inference_steps: 50 for planning, 30 for reconstruction, if not given.
            guidance_scale: 3.0 for planning, 1.0 (none, and half the work) for reconstruction, if not given.
            use_dynamic_cfg: True lets the guidance rise from 1 to its full scale along the steps, as CogVideoX does,
                by `(1 - cos(π p**5)) / 2` of the share p of steps done; False applies it in full from the first step, which
                overdoes contrast.
            generator: of the noise; one, or one per clip.
            latents: the noise itself, [B, F, 22, S / 2, S / 2], drawn anew if not given.
            output_type: `"pt"` tensors, `"np"` arrays, `"pil"` images for RGB and arrays for the rest, `"latent"` only latents.
            return_dict: False returns the tuple (rgb, depth, raymap, poses, latents).
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)`; may return tensors to go on with.
            callback_on_step_end_tensor_inputs: which tensors it gets; `["latents"]` if not given.

        Raises:
            ValueError: for an unknown task, shapes that do not fit, or an unknown name of a tensor or output type.
        """
        names = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        self.check_inputs(video, task, latents, names, output_type)
        scale = self._guidance_scale = GUIDANCE[task] if guidance_scale is None else guidance_scale
        self._interrupt = False
        device, dtype = self._execution_device, self.transformer.dtype
        video = video.to(device=device, dtype=dtype)
        batch, frames = video.shape[:2]
        given = torch.ones(batch, frames, dtype=torch.bool, device=device)
        if task == "planning":
            given[:, 1:-1] = False
        guided = self.do_classifier_free_guidance
        told, text = condition(video, given), task_text([task] * batch)
        if guided:
            told = torch.cat([condition(video, torch.zeros_like(given)), told])
            text = torch.cat([task_text([None] * batch), text])
        text = text.to(device=device, dtype=dtype)
        latents = self.prepare_latents(video, generator, latents)
        positions = rotary(self.transformer, frames, *latents.shape[-2:])
        self.scheduler.set_timesteps(STEPS[task] if num_inference_steps is None else num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for step, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                repeated = torch.cat([latents] * 2) if guided else latents
                with self.transformer.cache_context("cond_uncond"):
                    velocity = self.transformer(
                        hidden_states=torch.cat([repeated, told], dim=2),
                        encoder_hidden_states=text,
                        timestep=t.expand(len(told)),
                        image_rotary_emb=positions,
                        return_dict=False,
                    )[0]
                if guided:
                    if use_dynamic_cfg:
                        progress = step / max(1, len(timesteps) - 1)
                        self._guidance_scale = 1 + (scale - 1) * (1 - math.cos(math.pi * progress**5)) / 2
                    without, having = velocity.chunk(2)
                    velocity = without + self.guidance_scale * (having - without)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0].to(dtype)
                if callback_on_step_end is not None:
                    kept = callback_on_step_end(self, step, t, {name: {"latents": latents}[name] for name in names})
                    latents = (kept or {}).get("latents", latents)
                bar.update()
        self.maybe_free_model_hooks()
        return self._output(latents, output_type, return_dict)

    def _output(self, latents: Tensor, output_type: str, return_dict: bool) -> WorldModelOutput | tuple[Any, ...]:
        parts: tuple[Any, ...] = (None,) * 4
        if output_type != "latent":
            world = decode(latents.float())
            parts = (world.rgb, world.depth, world.raymap, world.poses)
            if output_type != "pt":
                parts = tuple(part.cpu().numpy() for part in parts)
            if output_type == "pil":
                parts = ([self.numpy_to_pil(clip.transpose(0, 2, 3, 1)) for clip in parts[0]], *parts[1:])
        if not return_dict:
            return *parts, latents
        return WorldModelOutput(*parts, latents=latents)
