"""Learns the plans that are shipped beside the weights, from training scenes alone.

    python examples/world/calibrate.py [--task planning] [--full 19] [--scenes 8] [--search 120]

It takes some minutes a plan on a CPU: trajectories of full compute are recorded, then schedules are tried by running them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import hero_fx
from world.latents import MODALITIES
from world.model import FRAMES, SIZE
from world.pipeline import WorldModelPipeline
from world.render import render
from world.scenes import TRAINING, sample_scenes
from world.settings import GUIDANCE, PLANS, STEPS, TASKS, WEIGHTS

__all__ = ["PLANS", "by_modality", "calibrate"]

FULL = {"planning": 19, "reconstruction": 12}
"""Full steps of the shipped plans."""


def calibrate(
    weights: Path, task: str, full: int, *, scenes: int = 8, search: int = 60, guidance: float | None = None,
    apart: bool = False, rgb: float = 1.0, start: Path | None = None, steps: int | None = None, closed_loop: int = 1,
    folder: Path | None = None,
) -> hero_fx.Calibration:  # fmt: skip
    """The plan of `steps` steps (the task's own, if not given) with `full` full ones, fitted to `scenes` training scenes.

    `apart`: the halves of guidance have full steps of their own, as many together; `start`: a plan whose schedule comes first;
    `rgb`: how much RGB counts in the search, against 1 for disparity and raymap; `closed_loop`: rounds in the closed loop.
    """
    pipeline = WorldModelPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)

    def run(model: Any, i: int) -> Tensor:
        pipeline.transformer = model
        clips = render(sample_scenes([TRAINING + i]), FRAMES, SIZE)
        latents: Tensor = pipeline(
            clips.rgb,
            task=task,
            num_inference_steps=steps or STEPS[task],
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).latents
        return latents

    return hero_fx.calibrate(
        pipeline.transformer, run, num_steps=steps or STEPS[task], budget=full, scenes=scenes, holdout=2,
        search=search, by=("frames", "batch"), apart=apart, start=start, distances=by_modality,
        weights={"rgb": rgb}, closed_loop=closed_loop, folder=folder, inner="eager",
    )  # fmt: skip


def by_modality(sample: Tensor, reference: Tensor) -> Mapping[str, float]:
    """Relative L2 of the latents [B, F, 22, h, w] of RGB, disparity and raymap, the mean over clips."""

    def norms(latents: Tensor, channels: slice) -> Tensor:
        return latents[:, :, channels].flatten(1).norm(dim=1)

    return {
        name: float((norms(sample - reference, channels) / norms(reference, channels)).mean())
        for name, channels in MODALITIES.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Calibrates, prints the report, saves plan and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="planning", choices=TASKS)
    parser.add_argument("--full", type=int, help=f"full steps; {FULL} if not given")
    parser.add_argument("--scenes", type=int, default=8, help="training scenes that are fitted to")
    parser.add_argument("--together", action="store_true", help="the halves of guidance have the same full steps")
    parser.add_argument(
        "--rgb", type=float, default=1.0, help="how much RGB counts in the search, against 1 for the others"
    )
    parser.add_argument("--start", type=Path, help="a plan whose schedule is tried first")
    parser.add_argument("--search", type=int, default=120, help="schedules that may be tried")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a saved pipeline")
    parser.add_argument("--output", type=Path, default=PLANS, help="folder for the plan and its picture")
    arguments = parser.parse_args(argv)
    task = arguments.task
    found = calibrate(
        arguments.weights, task, arguments.full or FULL[task], scenes=arguments.scenes, search=arguments.search,
        apart=GUIDANCE[task] > 1 and not arguments.together, rgb=arguments.rgb, start=arguments.start,
    )  # fmt: skip
    print(found)
    arguments.output.mkdir(parents=True, exist_ok=True)
    found.plan.save(arguments.output / f"{task}.safetensors")
    found.plot(arguments.output / f"{task}.png")


if __name__ == "__main__":
    main()
