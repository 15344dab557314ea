"""A way in which the quickstart runs its model: what a process of `_quickstart_processes.py` holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from tqdm import tqdm

import hero_fx
from _quickstart_processes import Settings
from _systems import System, compiled_with, plain_system
from world.pipeline import WorldModelPipeline
from world.render import Clips, render
from world.scenes import HELD_OUT, sample_scenes
from world.settings import GUIDANCE

__all__ = ["Outcome", "Runner", "clips_of"]


@dataclass(frozen=True)
class Outcome:
    """What a way of running the model took and gave."""

    counted: str
    """How many steps are full and cached."""
    by_kind: dict[int | str | None, float]
    """Median seconds of each kind of step, over all runs; the key of full steps is None."""
    seconds: float
    """Per trajectory, the median over runs."""
    of_medians: float
    """The same as a sum of the medians of its steps."""
    whole: hero_fx.Flops | None
    """Of the model itself for as many steps; None for plain `torch.compile`, which has no graphs to count."""
    spent: hero_fx.Flops | None
    state_bytes: int
    output: Any


def load(weights: Path) -> WorldModelPipeline:
    """The pipeline, without the bar of its parts: several processes would draw it at once."""
    logging.disable_progress_bar()
    try:
        return WorldModelPipeline.from_pretrained(weights)
    finally:
        logging.enable_progress_bar()


def clips_of(scenes: int) -> Clips:
    """The first of the held-out scenes."""
    return render(sample_scenes(range(HELD_OUT, HELD_OUT + scenes)))


class Runner:
    """The model, compiled in one way: by plain `torch.compile`, or with options of `hero_fx.backend`."""

    def __init__(self, name: str, settings: Settings, options: dict[str, Any] | None) -> None:
        torch.set_grad_enabled(False)
        self.settings = settings
        self.pipe = load(settings.weights)
        self.pipe.set_progress_bar_config(disable=True)
        model = self.pipe.transformer
        self.system: System = (
            plain_system(model, settings.inner)
            if options is None
            else compiled_with(model, name, inner=settings.inner, **options)
        )
        self.pipe.transformer = self.system.transformer
        self.rgb = clips_of(settings.scenes).rgb

    def description(self) -> str:
        """Of the model, and of what is done with it."""
        settings, config = self.settings, self.pipe.transformer.config
        return (
            f"{config.num_layers} layers of width {config.num_attention_heads * config.attention_head_dim}, {settings.task} of "
            f"{settings.scenes} scenes, guidance {GUIDANCE[settings.task]}, {settings.steps} DDIM steps, "
            f"{torch.get_num_threads()} threads"
        )

    def first_call(self) -> float:
        """The seconds of the first step, which compiles."""
        return self._run(1)[0]

    def denoise(self) -> None:
        """A trajectory, with a bar."""
        if self.system.backend is not None:
            self.system.backend.reset()
        with tqdm(total=self.settings.steps, desc=self.system.name) as bar:
            self.system.seconds.append(self._run(self.settings.steps, bar))

    def outcome(self) -> Outcome:
        """Of all trajectories so far."""
        system, steps, backend = self.system, self.settings.steps, self.system.backend
        seconds = system.by_kind(steps)
        normal = None if backend is None else backend.graphs[-1].normal
        return Outcome(
            counted=system.counted(steps),
            by_kind=seconds,
            seconds=system.total(),
            of_medians=sum(seconds[kind] for kind in system.kinds(steps)),
            whole=None if normal is None else hero_fx.flops(normal) * steps,
            spent=None if normal is None else system.flops(steps, normal),
            state_bytes=0 if backend is None else backend.stats().state_bytes,
            output=system.output,
        )

    def _run(self, steps: int, bar: Any = None) -> list[float]:
        """Denoises once from the noise of seed 0; the seconds of each step."""
        marks = [time.perf_counter()]

        def mark(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(time.perf_counter())
            if bar is not None:
                bar.update()
            return tensors

        generator = torch.Generator().manual_seed(0)
        self.system.output = self.pipe(
            self.rgb, self.settings.task, steps, generator=generator, callback_on_step_end=mark
        )
        return [after - before for before, after in pairwise(marks)]
