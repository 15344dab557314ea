"""The compiled transformer of each task: from files that `hero_fx.save` wrote, or compiled at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hero_fx
from world.calibrate import PLANS
from world.latents import FOLD
from world.model import FRAMES
from world.pipeline import STEPS, WEIGHTS, WorldModelPipeline

from .messages import Limits, Request

__all__ = ["GIVEN", "SYSTEMS", "Model", "Settings", "make"]

SYSTEMS = ("plan", "hero", "plain")
"""A calibrated plan, HERO without one, plain `torch.compile`."""
GIVEN = {"planning": 2, "reconstruction": FRAMES}
"""Frames that each task is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a replica runs."""

    system: str = "plan"
    """One of `SYSTEMS`."""
    tasks: tuple[str, ...] = ("planning", "reconstruction")
    weights: Path = WEIGHTS
    """Folder of a saved pipeline."""
    artifacts: Path | None = None
    """Folder with `<task>.hero` for each task; None compiles at the start."""
    inner: str = "inductor"
    interval: int = 2
    """Of `"hero"`: a full step every so many steps."""
    live: int = 2
    """Trajectories that take turns in a replica."""
    max_state_bytes: int | None = None
    """Of each task, where it is compiled at the start; a file has the bound that it was saved with."""

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"system={self.system!r} must be one of {', '.join(map(repr, SYSTEMS))}")
        if not self.tasks or not set(self.tasks) <= set(GIVEN):
            raise ValueError(f"tasks={self.tasks!r} must be some of {', '.join(map(repr, GIVEN))}")
        if self.live < 1:
            raise ValueError(f"live={self.live} must be at least 1: so many trajectories take turns")
        if self.system == "plain" and self.artifacts is not None:
            raise ValueError("artifacts are of hero_fx and system='plain' is without it: leave artifacts out")


def file_of(folder: Path, task: str) -> Path:
    """Where the file of a task lies."""
    return folder / f"{task}.hero"


class Told(nn.Module):
    """A transformer for one trajectory: says of each call whose it is and which step."""

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a child: its weights are not this module's
        self.request = request
        self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def forward(self, **inputs: Any) -> Any:
        """What the model returns. All of the step's lanes are in one batch, so that calls are steps."""
        step, self.step = self.step, self.step + 1
        with hero_fx.calling(session=self.request.id, step_index=step, num_steps=self.request.steps):
            return self.model(**inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The transformer of one task, and what a pipeline around it needs."""

    task: str
    transformer: Any
    backend: hero_fx.Backend | None
    """None for plain `torch.compile`."""
    scheduler: Any
    side: int

    @property
    def max_state_bytes(self) -> int | None:
        """The bound on feature state."""
        return None if self.backend is None else self.backend.config.max_state_bytes

    @property
    def planned_steps(self) -> tuple[int, ...] | None:
        """Numbers of steps that its plan is for; None without a plan."""
        plan = None if self.backend is None else self.backend.config.plan
        return tuple(line.num_steps for line in plan.timelines) if isinstance(plan, hero_fx.Plan) else None

    def run(self, request: Request, step_is_done: Callable[[int], None]) -> dict[str, np.ndarray[Any, Any]]:
        """Denoises; what a result has. The pipeline and its scheduler are made for it: a scheduler is for one trajectory."""

        def callback(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step_is_done(step)
            return tensors

        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipe = WorldModelPipeline(Told(self.transformer, request), scheduler)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(
            clip(request.frames),
            request.task,
            request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            callback_on_step_end=callback,
        )
        arrays = {**out, "latents": out.latents.cpu().numpy()}
        return {name: array[0] for name, array in arrays.items()}

    def drop(self, request: Request) -> None:
        """Forgets a request and frees its state."""
        hero_fx.session(request.id).drop()

    def warm_up(self) -> int:
        """Runs one step, which compiles what is not compiled yet; the bytes of feature state that a request takes."""
        frames = np.zeros((GIVEN[self.task], self.side, self.side, 3), np.uint8)
        steps = STEPS[self.task]
        request = Request(id=f"warm-up of {self.task}", task=self.task, frames=frames, seed=0, steps=steps)

        def stop(_step: int) -> None:
            raise InterruptedError

        try:
            self.run(request, stop)
        except InterruptedError:
            return 0 if self.backend is None else self.backend.stats().state_bytes
        finally:
            self.drop(request)
        raise AssertionError("a trajectory without steps")


def clip(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """The given frames [given, S, S, 3] at their places in a clip [1, FRAMES, 3, S, S] in [0, 1]; the rest is 0."""
    given = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float() / 255
    video = torch.zeros(1, FRAMES, *given.shape[1:])
    video[0, :: (FRAMES - 1) // (len(given) - 1)] = given
    return video


def make(settings: Settings) -> tuple[dict[str, Model], Limits]:
    """The models of a replica by task, and what it takes.

    Raises:
        ValueError: a file cannot be loaded; the message says why.
    """
    pipe = WorldModelPipeline.from_pretrained(settings.weights)
    side = FOLD * pipe.transformer.config.sample_height
    models = {}
    for task in settings.tasks:
        transformer, backend = compiled(settings, pipe.transformer, task)
        models[task] = Model(task=task, transformer=transformer, backend=backend, scheduler=pipe.scheduler, side=side)
    limits = Limits(
        given={task: GIVEN[task] for task in models},
        side=side,
        steps={task: model.planned_steps for task, model in models.items()},
        usual={task: STEPS[task] for task in models},
    )
    return models, limits


def compiled(settings: Settings, transformer: Any, task: str) -> tuple[Any, hero_fx.Backend | None]:
    """The transformer for a task, and its backend."""
    if settings.artifacts is not None:
        loaded = hero_fx.load(file_of(settings.artifacts, task), transformer)
        return loaded, loaded.backend
    if settings.system == "plain":
        return torch.compile(transformer, backend=settings.inner, fullgraph=True), None
    options: Mapping[str, Any] = {"interval": settings.interval}
    if settings.system == "plan":
        options = {"plan": PLANS / f"{task}.safetensors"}
    backend = hero_fx.backend(inner=settings.inner, max_state_bytes=settings.max_state_bytes, **options)
    return torch.compile(transformer, backend=backend, fullgraph=True), backend
