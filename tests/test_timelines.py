"""Plans for several numbers of steps: which one a trajectory follows is told by its timesteps, or said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from .reference_forecast import forecast_trajectory
from .support import tiny, toys
from .support.forecasts import Conditioned, theta
from .support.steps_by_hand import numbers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MODEL = Conditioned().eval().requires_grad_(False)
RULE = OutputRule(index=0, axis=1, latent="sample")
SPACED = {
    "four": (1000.0, 700.0, 400.0, 100.0),
    "six": (1000.0, 800.0, 600.0, 400.0, 200.0, 0.0),
    "odd": (1000.0, 700.0, 300.0),
}
MASKS = {"four": (True, True, False, True), "six": (True, False, False, True, False, False), "odd": (True, False, True)}


def line(name: str, **more: Any) -> Timeline:
    steps = len(MASKS[name])
    table = theta(1, 3, 1, 1, steps=steps, seed=steps)
    return Timeline(schedule=MASKS[name], timesteps=SPACED[name], coefficients={"out0": table}, **more)


def plan(*names: str) -> Plan:
    return Plan(policy="forecast", timelines=tuple(map(line, names)), outputs=(RULE,))


def loop(call: Any, times: Sequence[float], num_steps: int | None = None) -> list[Tensor]:
    x, result = numbers(1, 3, 4, 5, seed=3), []
    with torch.no_grad():
        for t in times:
            with hero_fx.calling(num_steps=num_steps):
                result.append(call(x, torch.tensor([t])))
            x = x - result[-1] / len(times)
    return result


def by_reference(name: str) -> list[Tensor]:
    (of,) = plan(name).timelines
    x, result = numbers(1, 3, 4, 5, seed=3), list[Tensor]()
    with torch.no_grad():
        outs = forecast_trajectory(
            lambda step: MODEL(x, torch.tensor([of.timesteps[step]])), of.coefficients["out0"], of.schedule, lambda _: x
        )
        for out in outs:
            result.append(out)
            x = x - out / of.num_steps
    return result


def compiled(*names: str, **options: Any) -> Any:
    return toys.torch_compile(MODEL, hero_fx.backend(plan=plan(*names), inner="aot_eager", **options), fullgraph=True)


def test_each_trajectory_follows_the_plan_of_its_timesteps(tmp_path: Path) -> None:
    """From one file and one compiled model; only the second timestep tells them apart."""
    plan("four").with_timelines(plan("six")).save(tmp_path / "plan.safetensors")
    backend = hero_fx.backend(plan=tmp_path / "plan.safetensors", inner="aot_eager")
    call = toys.torch_compile(MODEL, backend, fullgraph=True)
    for name in ("six", "four", "six"):
        assert tiny.worst(loop(call, SPACED[name]), by_reference(name)) < 1e-6
    assert (backend.stats().graphs, backend.stats().full_steps) == (1, 2 + 3 + 2)
    for part in ("4 steps, 3 full", "6 steps, 2 full", "██·█", "█··█··"):
        assert part in str(hero_fx.explain(backend))
    with pytest.raises(RuntimeError, match=r"timesteps 1000, 500, which none of the plan's timelines has .*1000 .. 0"):
        loop(call, (1000.0, 500.0, 0.0))


def test_where_timesteps_do_not_tell_the_number_of_steps_is_asked_for() -> None:
    """Both are at 700 after 1000, where one step is full and the other is not."""
    call = compiled("four", "odd")
    with pytest.raises(hero_fx.AmbiguousCall, match=r"after the timesteps 1000, 700 .* 4, 3 steps.*num_steps="):
        loop(call, SPACED["odd"])
    hero_fx.reset()
    for name in ("odd", "four"):
        assert tiny.worst(loop(call, SPACED[name], num_steps=len(MASKS[name])), by_reference(name)) < 1e-6
    given = compiled("four", "odd", num_steps=3)
    assert tiny.worst(loop(given, SPACED["odd"]), by_reference("odd")) < 1e-6
    with pytest.raises(ValueError, match="num_steps=5: the plan is for 4, 3 steps"):
        loop(call, SPACED["four"], num_steps=5)
