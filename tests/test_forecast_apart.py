"""Plans whose parts of the batch have full steps of their own: trajectories, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.plan import Plan, Timeline

from .reference_forecast import forecast_trajectory
from .support import tiny, toys
from .support.forecasts import CAPTURED, FITTING, STEPS, Conditioned, fitting, theta, times
from .support.steps_by_hand import numbers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIRST = tuple(map(bool, (1, 0, 0, 0, 0, 1, 0, 0, 0, 1)))
SECOND = tuple(map(bool, (1, 1, 1, 0, 0, 1, 0, 1, 0, 1)))


def apart(table: str, *, first: tuple[bool, ...] = FIRST, second: tuple[bool, ...] = SECOND, **more: Any) -> Plan:
    """A plan for halves of the batch, with coefficients [steps, 5, 1, 1, channels, 1, 1] of each."""
    coefficients = {table: theta(1, 1, tiny.CHANNELS, 1, 1), f"{table}@1": theta(1, 1, tiny.CHANNELS, 1, 1, seed=8)}
    union = tuple(a or b for a, b in zip(first, second, strict=True))
    line = Timeline(schedule=union, timesteps=times(), coefficients=coefficients, parts=(first, second))
    rule = OutputRule(index=0, axis=2, latent="hidden_states")
    usual: dict[str, Any] = {"policy": "forecast", "outputs": (rule,), "model": FITTING, "batch": 2}
    return Plan(timelines=(line,), **{**usual, **more})


def by_halves(model: Any, kwargs: dict[str, Any], plan: Plan) -> list[Tensor]:
    """The closed loop by the equations: each half is forecast, or computed by a call of its own."""
    line, sample, rows = plan.timelines[0], kwargs["hidden_states"], kwargs["hidden_states"].shape[0] // 2

    def half(part: int) -> Any:
        own = slice(part * rows, (part + 1) * rows)

        def call(step: int) -> Tensor:
            inputs = {**kwargs, "hidden_states": sample, "timestep": tiny.timesteps(STEPS)[step].expand(2 * rows)}
            cut = {n: v[own] if isinstance(v, Tensor) and n != "image_rotary_emb" else v for n, v in inputs.items()}
            out: Tensor = model(**cut, return_dict=False)[0]
            return out

        table = line.coefficients["out0" if part == 0 else f"out0@{part}"]
        return forecast_trajectory(call, table, line.parts[part], lambda step: sample[own], 3)

    result, halves = [], [half(0), half(1)]
    with torch.no_grad():
        for _ in range(STEPS):
            result.append(torch.cat([next(own) for own in halves]))
            sample = sample - result[-1] / STEPS
    return result


TRACED = apart("out0", model=fitting(**CAPTURED))
"""For what `tiny.captured` traced once for all tests."""


@pytest.mark.parametrize(("inner", "batch"), [("aot_eager", 2), ("eager", 4)])
def test_trajectories_equal_the_equation(inner: str, batch: int, tmp_path: Path) -> None:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs(batch=batch)
    through_dynamo = inner == "aot_eager"
    (apart("out0") if through_dynamo else TRACED).save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    backend = hero_fx.backend(plan=plan, inner=inner)
    traced = tiny.captured(layers=2, batch=batch)
    call = toys.torch_compile(model, backend, fullgraph=True) if through_dynamo else traced.compiled(backend)
    for _ in range(2):  # the second trajectory finds the state of the first
        ours = tiny.denoise(call, kwargs, tiny.timesteps(STEPS))
        assert tiny.worst(ours, by_halves(model, kwargs, plan)) < 1e-5
    stats = backend.stats()
    assert (stats.graphs, stats.full_steps, stats.cached_steps, stats.partial_calls) == (1, 12, 8, 6)
    (steps,) = backend.graphs
    assert stats.state_bytes == steps.state_bytes == 5 * kwargs["hidden_states"].nbytes
    assert hero_fx.flops(steps.full).total * 2 == hero_fx.flops(steps.normal).total
    assert hero_fx.trajectory_flops(steps, backend.config, STEPS).total == 9 * hero_fx.flops(steps.full).total
    kinds = hero_fx.step_kinds(backend.config, backend.steppers[0].policy, STEPS)
    assert kinds == [None, "part", "part", 0, 0, None, 0, "part", 0, None]


def test_explain_shows_the_parts() -> None:
    backend = hero_fx.backend(plan=TRACED, inner=tiny.INNER)
    tiny.denoise(tiny.captured(layers=2).compiled(backend), tiny.inputs(), tiny.timesteps(STEPS))
    text = str(hero_fx.explain(backend))
    for part in ("█▄▄··█·▄·█", "3 + 3 in part", "full for one of 2 parts of the batch", "10 steps, 3 + 3 in part full"):
        assert part in text


@torch.no_grad()
def test_a_state_that_was_freed_computes_all_parts() -> None:
    """At a partial step, a cached one and a full one: there is no past to forecast from, so all is full to the end."""
    model, kwargs, cached = tiny.cogvideox(layers=2), tiny.inputs(), 0
    backend = hero_fx.backend(plan=TRACED, inner=tiny.INNER)
    compiled = tiny.captured(layers=2).compiled(backend)
    for at in (1, 3, 5, 7):
        backend.reset()
        for step, time in enumerate(tiny.timesteps(STEPS)):
            if step == at:
                (trajectory,) = backend.steppers[0].store.holders()
                trajectory.evict()
            inputs = {**kwargs, "timestep": time.expand(2), "return_dict": False}
            out = compiled(**inputs)[0]
            if step >= at:
                torch.testing.assert_close(out, model(**inputs)[0], atol=1e-5, rtol=1e-5)
        cached += sum(not level for level in TRACED.timelines[0].levels[:at])
        assert backend.stats().cached_steps == cached, at


@torch.no_grad()
def test_a_doubt_computes_all_parts() -> None:
    """Text that is another at the second step may be of a new trajectory: nothing of the first step is used."""
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs()
    compiled = tiny.captured(layers=2).compiled(hero_fx.backend(plan=TRACED, inner=tiny.INNER))
    first, second = (torch.full((2,), float(time)) for time in tiny.timesteps(STEPS)[:2])  # no views of one table
    compiled(**kwargs, timestep=first, return_dict=False)
    other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] + 1}
    out = compiled(**other, timestep=second, return_dict=False)[0]
    torch.testing.assert_close(out, model(**other, timestep=second, return_dict=False)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_as_long_as_two_timelines_fit_a_partial_step_is_ambiguous() -> None:
    plan, short = TRACED, TRACED.timelines[0]
    cut = {name: table[:8] for name, table in short.coefficients.items()}
    eight = Timeline(
        schedule=short.schedule[:8], timesteps=short.timesteps[:8], coefficients=cut,
        parts=tuple(part[:8] for part in short.parts),
    )  # fmt: skip
    both = plan.with_timelines(
        Plan(**{**{n: getattr(plan, n) for n in ("policy", "outputs", "model", "batch")}, "timelines": (eight,)})
    )
    kwargs = tiny.inputs()
    compiled = tiny.captured(layers=2).compiled(hero_fx.backend(plan=both, inner=tiny.INNER))
    first, second, *_ = tiny.timesteps(STEPS)
    compiled(**kwargs, timestep=first.expand(2), return_dict=False)
    with pytest.raises(hero_fx.AmbiguousCall, match="these differ here"):
        compiled(**kwargs, timestep=second.expand(2), return_dict=False)


class Meeting(nn.Module):
    """Its rows meet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Conditioned()

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        out = self.inner(sample, timestep)
        return out - out.mean(dim=0, keepdim=True)


def of_convolution(**more: Any) -> Plan:
    """A plan for halves of the batch of `Conditioned`, which compiles in no time."""
    table = {"out0": theta(1, 3, 1, 1), "out0@1": theta(1, 3, 1, 1)}
    union = tuple(a or b for a, b in zip(FIRST, SECOND, strict=True))
    line = Timeline(schedule=union, timesteps=times(), coefficients=table, parts=(FIRST, SECOND))
    return Plan(policy="forecast", timelines=(line,), outputs=(OutputRule(index=0, axis=1),), batch=2, **more)


@pytest.mark.filterwarnings("ignore:hero_fx. the plan was calibrated on another model")
@torch.no_grad()
def test_a_model_whose_rows_meet_is_refused() -> None:
    plan = of_convolution()
    compiled = toys.torch_compile(Meeting().eval(), hero_fx.backend(plan=plan, inner=tiny.INNER), fullgraph=True)
    with pytest.raises(Exception, match=r"not known to be independent: .*reduces over.*without apart=True"):
        compiled(numbers(2, 3, 4, 4, seed=0), torch.tensor([900, 900]))
    backend = hero_fx.backend(plan=plan, inner=tiny.INNER, plan_mismatch="warn")
    compiled = toys.torch_compile(Conditioned().eval(), backend, fullgraph=True)
    with pytest.raises(Exception, match="2 equal parts of the batch, and the model was called with a batch of 3"):
        compiled(numbers(3, 3, 4, 4, seed=0), torch.tensor([900, 900, 900]))


def test_plans_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="true where some of its parts"):
        Timeline(schedule=SECOND, timesteps=times(), coefficients={}, parts=(FIRST, FIRST))
    with pytest.raises(ValueError, match="the first of them true"):
        Timeline(schedule=SECOND, timesteps=times(), coefficients={}, parts=(SECOND, (False, *SECOND[1:])))
    with pytest.raises(ValueError, match="one call a step"):
        apart("out0", lanes=2)
    with pytest.raises(ValueError, match="follows a plan"):
        hero_fx.verify(
            Conditioned().eval(), backend=hero_fx.backend(plan=apart("out0")), sample=numbers(2, 3, 4, 4, seed=0)
        )
    with pytest.raises(ValueError, match=r"hero_fx\.batch: .*apart=True"):
        _in_a_batch()


def _in_a_batch() -> None:
    plan = of_convolution(model=hero_fx.Fingerprint(name="Conditioned", outputs=((3,),)))
    compiled = toys.torch_compile(Conditioned().eval(), hero_fx.backend(plan=plan, inner=tiny.INNER), fullgraph=True)
    with torch.no_grad():
        compiled(numbers(2, 3, 4, 4, seed=0), torch.full((2,), 999))
        with hero_fx.batch([hero_fx.calling(session=name, step_index=0) for name in "ab"]):
            compiled(numbers(4, 3, 4, 4, seed=0), torch.full((4,), 999))
