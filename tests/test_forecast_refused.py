"""Plans of policy "forecast" that do not fit a model or its calls are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan

from .support import tiny, toys
from .support.forecasts import FITTING, STEPS, Conditioned, fitting, plan_of, theta
from .support.steps_by_hand import numbers
from .support.tracing import Variants

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_forecast_needs_a_plan() -> None:
    with pytest.raises(ValueError, match="needs a plan"):
        hero_fx.backend("forecast")


def run(plan: Plan, steps: int = STEPS, shift: float = 0, calls: int = 1, batch: int = 2, **options: Any) -> None:
    call = toys.torch_compile(
        Conditioned().eval(), hero_fx.backend(plan=plan, inner=tiny.INNER, **options), fullgraph=True
    )
    with torch.no_grad():
        for t in tiny.timesteps(steps) - shift:
            for _ in range(calls):
                call(numbers(batch, 3, 4, 5, seed=3), t.expand(batch))


def simple(rule: OutputRule | None = None, **more: Any) -> Plan:
    rule = rule or OutputRule(index=0, axis=1)
    return plan_of(rule, theta(1, 3, 1, 1), name="Conditioned", outputs=((3,),), **more)


def test_other_timesteps_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"step 1 is at timestep .* another number of steps"):
        run(simple(), steps=STEPS + 2)
    with pytest.raises(RuntimeError, match="step 0 is at timestep 979"):
        run(simple(), shift=20)
    with pytest.warns(UserWarning, match="step 0 is at timestep"):
        run(simple(), shift=20, plan_mismatch="warn")


def test_another_guidance_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"step 0 has 2 calls, and the plan was calibrated with 1 a step"):
        run(simple(), calls=2)
    with pytest.raises(BackendCompilerFailed, match="the batch of the output is 1 here and 2 per sample in the plan"):
        run(simple(batch=2), batch=1)


def test_a_lane_that_misses_steps_is_refused() -> None:
    backend = hero_fx.backend(plan=simple(lanes=2), inner=tiny.INNER)
    call = toys.torch_compile(Conditioned().eval(), backend, fullgraph=True)
    time = tiny.timesteps(STEPS)

    def lane(name: str, step: int) -> None:
        with torch.no_grad(), hero_fx.calling(lane=name, step_index=step):
            call(numbers(2, 3, 4, 5, seed=3), time[step].expand(2))

    lane("cond", 0)
    lane("uncond", 0)
    lane("cond", 1)  # and no second call
    lane("cond", 2)
    lane("uncond", 2)  # full, whatever came before
    lane("cond", 3)
    with pytest.raises(RuntimeError, match="was not called at every step"):
        lane("uncond", 3)


def test_another_model_is_refused() -> None:
    other = fitting(depth=5, config={**FITTING.config, "num_layers": 5})
    plan = plan_of(OutputRule(index=0, axis=2), theta(1, 1, tiny.CHANNELS, 1, 1), other)
    variants = Variants(
        error=hero_fx.backend(plan=plan, inner=tiny.INNER),
        warn=hero_fx.backend(plan=plan, inner=tiny.INNER, plan_mismatch="warn"),
    )
    call, variants.now = toys.torch_compile(tiny.cogvideox(layers=2), variants, fullgraph=True), "warn"
    with torch.no_grad(), pytest.warns(UserWarning, match="calibrated on another model"):
        call(**tiny.inputs(), timestep=tiny.timesteps(1).expand(2), return_dict=False)
    variants.now = "error"
    with (
        torch.no_grad(),
        pytest.raises(
            hero_fx.UnsupportedModel,
            match=r"depth is 2 here and 5 in the plan; config.num_layers is 2 here and 5 in the plan",
        ),
    ):
        call(**tiny.inputs(), timestep=tiny.timesteps(1).expand(2), return_dict=False)


def test_rules_that_do_not_fit_are_refused() -> None:
    for rule, message in (
        (OutputRule(index=0, axis=1, latent="x"), "'x', and the model's arguments are .*sample"),
        (OutputRule(index=0, axis=1, latent="sample", start=1), "holds no latent"),
        (OutputRule(index=1, axis=1), r"at positions \[0\] .* those at \[1\]"),
    ):
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=message):
            run(simple(rule))


def test_a_single_block_is_no_model() -> None:
    """In a regional compile all blocks share one graph, and their outputs would mix."""

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = toys.Block()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.block(x, toys.sinusoid(timestep)[:, None])
            return out

    plan = plan_of(OutputRule(index=0, axis=2), theta(1, 1, toys.WIDTH))
    call = toys.torch_compile(
        Middle().eval().requires_grad_(False), hero_fx.backend(plan=plan, plan_mismatch="warn", inner=tiny.INNER)
    )
    with pytest.raises(BackendCompilerFailed, match="part of a model"), torch.no_grad():
        call(numbers(2, 6, toys.WIDTH, seed=1), tiny.timesteps(1).expand(2))
