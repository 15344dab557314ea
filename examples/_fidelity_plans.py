"""Calibrated plans for the fidelity bench, fitted to training scenes and never to those that they are judged on."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import hero_fx
from _fidelity_rivals import even
from world.calibrate import calibrate
from world.pipeline import GUIDANCE, STEPS

__all__ = ["Calibrating", "check_options", "plan_for"]


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
    """A plan whose schedule comes first for as many steps and full steps as it has; with `search=1` it is kept."""
    closed_loop: int = 1
    """Rounds in which coefficients are fitted again to trajectories that follow the plan."""


def plan_for(
    weights: Path, task: str, full: int, how: Calibrating, folder: Path, *, apart: bool = False
) -> hero_fx.Plan:
    """The plan with `full` full steps of a task's usual number, from the folder or calibrated now; `apart`: the halves of
    guidance have full steps of their own, as many together."""
    fitted, guidance = how.fitted or task, GUIDANCE[task] if how.guidance is None else how.guidance
    first = how.start if how.start is not None and _size(how.start) == (STEPS[task], full) else None
    start = "" if first is None else f"-{hashlib.sha256(first.read_bytes()).hexdigest()[:12]}"
    rounds = "" if how.closed_loop == 1 else f"-closed-{how.closed_loop}"
    name = f"{fitted}-{STEPS[task]}-{full}-{how.scenes}-{how.search}-{how.guidance}{'-apart' * apart}{start}{rounds}"
    path = folder / f"plan-{_digest(weights)}-{name}.safetensors"
    if path.exists():
        return hero_fx.Plan.load(path)
    found = calibrate(
        weights, fitted, full, scenes=how.scenes, search=how.search, guidance=guidance, apart=apart,
        start=first, steps=STEPS[task], closed_loop=how.closed_loop, folder=folder / path.stem,
    )  # fmt: skip
    found.plan.save(path)
    found.plot(path.with_suffix(".png"))
    return found.plan


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that no plan could follow: none is made, or none has the full steps of `--start-plan`."""
    usual = Calibrating()
    of_plans = {
        "--together": arguments.together,
        "--calibration-scenes": arguments.calibration_scenes != usual.scenes,
        "--search": arguments.search != usual.search,
        "--fitted-on": arguments.fitted_on,
        "--fitted-guidance": arguments.fitted_guidance is not None,
        "--start-plan": arguments.start_plan,
        "--closed-loop": arguments.closed_loop != usual.closed_loop,
    }
    if not arguments.plans and (given := [name for name, value in of_plans.items() if value]):
        raise ValueError(f"{', '.join(given)}: of plans, and there are none without --plans; add it")
    if arguments.plans and "main" not in arguments.tables:
        raise ValueError("--plans: plans are rows of the main table; add main to --tables")
    if arguments.closed_loop < 0:
        raise ValueError(f"--closed-loop {arguments.closed_loop}: at least 0")
    if arguments.start_plan is None:
        return
    try:
        own = _size(arguments.start_plan)
    except (OSError, ValueError) as error:
        raise ValueError(f"--start-plan: {error}") from error
    asked = [(STEPS[task], sum(even(STEPS[task], n))) for task in arguments.tasks for n in arguments.intervals]
    if own not in asked:
        of = ", ".join(f"{full:g} of {steps}" for steps, full in asked)
        raise ValueError(
            f"--start-plan {arguments.start_plan}: it has {own[1]:g} full steps of {own[0]}, and what runs has {of}: "
            "change --tasks or --intervals"
        )


def _size(path: Path) -> tuple[int, float]:
    """Steps and full steps of a plan; those of halves count as a half each."""
    line = hero_fx.Plan.load(path).timelines[0]
    return len(line.schedule), sum(line.levels) / max(1, len(line.parts))


def _digest(weights: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(weights.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
