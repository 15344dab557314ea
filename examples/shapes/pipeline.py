"""The pipeline: a clip from words, by diffusers' conventions; guidance is two calls of the transformer a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .autoencoder import LATENT_SHAPE, PatchAutoencoder
from .clips import TEXT, WORDS, no_text

__all__ = ["GUIDANCE", "STEPS", "WEIGHTS", "ShapesOutput", "ShapesPipeline"]

WEIGHTS = Path(__file__).parent / "weights"
"""Where the trained weights lie."""
STEPS, GUIDANCE = 30, 3.0
"""Default steps and guidance scale."""


@dataclass
class ShapesOutput(BaseOutput):  # type: ignore[misc]
    """What `ShapesPipeline` returns."""

    frames: Any
    """[B, 3, F, H, W] in [0, 1]; with `output_type="np"` an array [B, F, H, W, 3]; None with `"latent"`."""
    latents: Tensor
    """[B, 16, 4, 8, 8] as denoised."""


class ShapesPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Denoises clips of moving shapes. Components: a `WanTransformer3DModel`, a flow-matching scheduler and an autoencoder."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self, transformer: WanTransformer3DModel, scheduler: FlowMatchEulerDiscreteScheduler, vae: PatchAutoencoder
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        text: Tensor,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ShapesOutput:
        """Denoises.

        Args:
            text: [B, WORDS, TEXT] of `clips.make_clips`.
            num_inference_steps: T.
            guidance_scale: above 1.0 each step calls the transformer a second time, without the words.
            generator: of the noise; one, or one per clip.
            latents: the noise itself, [B, 16, 4, 8, 8], drawn anew if not given.
            output_type: `"pt"` tensors, `"np"` arrays, `"latent"` only latents.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": latents})`; may return latents to
                go on with.

        Raises:
            ValueError: shapes that do not fit, or an unknown output type.
        """
        if text.shape[1:] != (WORDS, TEXT):
            raise ValueError(f"text has shape {tuple(text.shape)}: must be [batch, {WORDS}, {TEXT}], of `make_clips`.")
        if output_type not in ("pt", "np", "latent"):
            raise ValueError(f"output_type={output_type!r}: must be 'pt', 'np' or 'latent'.")
        device, dtype = self._execution_device, self.transformer.dtype
        shape = (len(text), *LATENT_SHAPE)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: must be {shape}.")
        told, untold = (x.to(device=device, dtype=dtype) for x in (text, no_text(len(text))))
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for step, t in enumerate(self.scheduler.timesteps):
                velocity = self._velocity("cond", latents, t, told)
                if guidance_scale > 1.0:
                    without = self._velocity("uncond", latents, t, untold)
                    velocity = without + guidance_scale * (velocity - without)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0].to(dtype)
                if callback_on_step_end is not None:
                    kept = callback_on_step_end(self, step, t, {"latents": latents})
                    latents = (kept or {}).get("latents", latents)
                bar.update()
        self.maybe_free_model_hooks()
        if output_type == "latent":
            return ShapesOutput(None, latents)
        frames = self.vae.decode(latents.float())
        return ShapesOutput(frames if output_type == "pt" else frames.movedim(1, -1).cpu().numpy(), latents)

    def _velocity(self, name: str, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with self.transformer.cache_context(name):
            velocity: Tensor = self.transformer(
                hidden_states=latents,
                timestep=t.expand(len(latents)),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        return velocity
