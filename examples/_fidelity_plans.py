"""Calibrated plans for the fidelity bench, fitted to training scenes and never to those that they are judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hero_fx
from _metrics import relative_l2
from world.latents import MODALITIES
from world.model import FRAMES, SIZE
from world.pipeline import STEPS, WorldModelPipeline
from world.render import render
from world.scenes import TRAINING, sample_scenes

__all__ = ["Calibrating", "plan_for"]


@dataclass(frozen=True)
class Calibrating:
    """How plans are calibrated."""

    scenes: int = 4
    """Training scenes that are fitted to."""
    search: int = 60
    """Schedules that may be tried."""
    fitted: str | None = None
    """The task that is fitted to; None: the one that is run."""
    guidance: float | None = None
    """The guidance scale that is fitted to; None: the task's own."""


def plan_for(weights: Path, task: str, full: int, how: Calibrating, folder: Path) -> hero_fx.Plan:
    """The plan with `full` full steps of a task's usual number, from the folder or calibrated now."""
    fitted = how.fitted or task
    name = f"{fitted}-{STEPS[task]}-{full}-{how.scenes}-{how.search}-{how.guidance}"
    path = folder / f"plan-{_digest(weights)}-{name}.safetensors"
    if path.exists():
        return hero_fx.Plan.load(path)
    pipeline = WorldModelPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)

    def run(model: Any, i: int) -> Tensor:
        pipeline.transformer = model
        clips = render(sample_scenes([TRAINING + i]), FRAMES, SIZE)
        latents: Tensor = pipeline(
            clips.rgb,
            task=fitted,
            num_inference_steps=STEPS[task],
            guidance_scale=how.guidance,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).latents
        return latents

    found = hero_fx.calibrate(
        pipeline.transformer, run, num_steps=STEPS[task], budget=full, scenes=how.scenes, holdout=2,
        search=how.search, by=("frames", "batch"), distances=by_modality, folder=folder / path.stem, inner="eager",
    )  # fmt: skip
    found.plan.save(path)
    found.plot(path.with_suffix(".png"))
    return found.plan


def by_modality(sample: Tensor, reference: Tensor) -> Mapping[str, float]:
    """Relative L2 of RGB, disparity and raymap."""
    return {
        name: float(relative_l2(sample[:, :, channels].numpy(), reference[:, :, channels].numpy()).mean())
        for name, channels in MODALITIES.items()
    }


def _digest(weights: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(weights.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
