"""Calibrated plans for the fidelity bench, fitted to training scenes and never to those that they are judged on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import hero_fx
from world.calibrate import calibrate
from world.pipeline import GUIDANCE, STEPS

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
    start: Path | None = None
    """A plan whose schedule comes first; with `search=1` it is kept."""


def plan_for(
    weights: Path, task: str, full: int, how: Calibrating, folder: Path, *, apart: bool = False
) -> hero_fx.Plan:
    """The plan with `full` full steps of a task's usual number, from the folder or calibrated now; `apart`: the halves of
    guidance have full steps of their own, as many together."""
    fitted, guidance = how.fitted or task, GUIDANCE[task] if how.guidance is None else how.guidance
    start = "" if how.start is None else f"-{hashlib.sha256(how.start.read_bytes()).hexdigest()[:12]}"
    name = f"{fitted}-{STEPS[task]}-{full}-{how.scenes}-{how.search}-{how.guidance}{'-apart' * apart}{start}"
    path = folder / f"plan-{_digest(weights)}-{name}.safetensors"
    if path.exists():
        return hero_fx.Plan.load(path)
    found = calibrate(
        weights, fitted, full, scenes=how.scenes, search=how.search, guidance=guidance, apart=apart,
        start=how.start, steps=STEPS[task], folder=folder / path.stem,
    )  # fmt: skip
    found.plan.save(path)
    found.plot(path.with_suffix(".png"))
    return found.plan


def _digest(weights: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(weights.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
