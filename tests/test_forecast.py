"""Policy "forecast": the passes that record and forecast outputs, and compiled trajectories against the equations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F

import hero_fx
from hero_fx.passes.render import graph_diff, op_count, render
from hero_fx.passes.rewrite.forecast import ForecastOutputs, OutputRule, RecordOutputs
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.plan import Plan, Timeline
from hero_fx.step_graphs import copy_graph

from .reference_forecast import forecast_trajectory
from .support import tiny, toys
from .support.forecasts import CAPTURED, FITTING, MASK, STEPS, Conditioned, by_reference, fitting, plan_of, theta, times
from .support.steps_by_hand import numbers
from .support.tracing import run_passes, trace

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def linear(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (F.linear(x, w),)


def toy_graph() -> fx.GraphModule:
    gm = trace(linear, numbers(2, 3, 5, seed=0), numbers(7, 5, seed=1))
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta |= {"model_input": node.name == "x_1", "argument": node.name}
    return gm


def test_record_shifts_the_last_outputs() -> None:
    gm = toy_graph()
    before = render(gm)
    run_passes(gm, RecordOutputs(rules=(OutputRule(index=0, axis=2, history=2),)))
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[2, 3, 5] = input
  w_1: f32[7, 5] = input
+ out0_v1: f32[2, 3, 7] = input
+ out0_v0: f32[2, 3, 7] = input
  linear: f32[2, 3, 7] = aten.linear.default(x_1, w_1)
+ copy__default: f32[2, 3, 7] = aten.copy_.default(out0_v1, out0_v0)
+ copy__default_1: f32[2, 3, 7] = aten.copy_.default(out0_v0, linear)
  return (linear,)""",
    )


def test_forecast_combines_them_and_runs_nothing() -> None:
    gm = toy_graph()
    before = render(gm)
    run_passes(gm, ForecastOutputs(rules=(OutputRule(index=0, axis=2, history=2),)), DropDeadCode())
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[2, 3, 5] = input
  w_1: f32[7, 5] = input
- linear: f32[2, 3, 7] = aten.linear.default(x_1, w_1)
- return (linear,)
+ out0_v0: f32[2, 3, 7] = input
+ out0_v0_weight: f32[1, 1, 7] = input
+ out0_v1: f32[2, 3, 7] = input
+ out0_v1_weight: f32[1, 1, 7] = input
+ mul_tensor: f32[2, 3, 7] = aten.mul.Tensor(out0_v0, out0_v0_weight)
+ mul_tensor_1: f32[2, 3, 7] = aten.mul.Tensor(out0_v1, out0_v1_weight)
+ add_tensor: f32[2, 3, 7] = aten.add.Tensor(mul_tensor, mul_tensor_1)
+ return (add_tensor,)""",
    )


def test_without_rules_nothing_fires() -> None:
    gm = toy_graph()
    before = render(gm)
    records = run_passes(gm, RecordOutputs(rules=()), ForecastOutputs(rules=()))
    assert [record.sites for record in records] == [0, 0]
    assert render(gm) == before


def test_full_step_is_the_model_bit_for_bit() -> None:
    gm = toy_graph()
    x, w = numbers(2, 3, 5, seed=0), numbers(7, 5, seed=1)
    full = copy_graph(gm)
    run_passes(full, RecordOutputs(rules=(OutputRule(index=0, axis=2, history=3),)))
    states = [torch.full((2, 3, 7), float(n)) for n in range(3)]
    (out,) = full(x, w, *states)
    assert torch.equal(out, F.linear(x, w))
    assert float(states[0].mean()) == 1.0, "the oldest holds what was one full step younger"
    assert float(states[1].mean()) == 2.0
    assert torch.equal(states[2], out)


def check(inner: Any, history: int, latent: bool, **options: Any) -> hero_fx.Backend:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs()
    table = theta(1, 1, tiny.CHANNELS, 1, 1)
    rule = OutputRule(index=0, axis=2, latent="hidden_states" if latent else None, history=history)
    backend = hero_fx.backend(plan=plan_of(rule, table, fitting(**CAPTURED)), inner=inner, **options)
    ours = tiny.denoise(tiny.captured(layers=2).compiled(backend), kwargs, tiny.timesteps(STEPS))
    theirs = by_reference(model, kwargs, table, slice(None) if latent else None, history)
    assert backend.stats().cached_steps == MASK.count(False)
    assert tiny.worst(ours, theirs) < 1e-5
    return backend


def toy_by_reference(model: Any, table: Tensor, batch: int) -> list[Tensor]:
    """The closed loop of `toys.loop`, with two past outputs and latents."""
    x, times, result = toys.latents(batch), toys.times(STEPS, batch), []
    outs = forecast_trajectory(lambda step: model(x, times[step]), table, MASK, lambda step: x, history=2)
    with torch.no_grad():
        for out in outs:
            result.append(out)
            x = x - out / STEPS
    return result


@pytest.mark.exhaustive
def test_a_batch_of_a_published_model_that_changes_keeps_the_plan() -> None:
    model, table = tiny.cogvideox(layers=2), theta(1, 1, tiny.CHANNELS, 1, 1)
    plan = plan_of(OutputRule(index=0, axis=2, latent="hidden_states", history=2), table, FITTING)
    backend = hero_fx.backend(plan=plan, inner="aot_eager")
    call = toys.torch_compile(model, backend, fullgraph=True)
    for batch in (2, 3):
        kwargs = tiny.inputs(batch=batch)
        ours = tiny.denoise(call, kwargs, tiny.timesteps(STEPS))
        assert tiny.worst(ours, by_reference(model, kwargs, table, slice(None), 2)) < 1e-5
    assert backend.stats().graphs == 2


def test_a_batch_that_changes_keeps_the_plan() -> None:
    """Dynamo then makes sizes inputs too, which are named after the tensors that they are of."""
    model, table = toys.toy(), theta(1, 1, toys.CHANNELS)
    fits = hero_fx.Fingerprint(name="ToyDiT", depth=2, width=toys.WIDTH, outputs=((toys.CHANNELS,),))
    plan = plan_of(OutputRule(index=0, axis=2, latent="latents", history=2), table, fits)
    backend = hero_fx.backend(plan=plan, inner="aot_eager")
    call = toys.torch_compile(model, backend, fullgraph=True)
    for batch in (2, 3):
        ours = toys.loop(call, toys.latents(batch), toys.times(STEPS, batch))
        assert tiny.worst(ours, toy_by_reference(model, table, batch)) < 1e-5
    assert backend.stats().graphs == 2


@pytest.mark.parametrize("history", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("latent", [True, False])
def test_trajectories_equal_the_equation(history: int, latent: bool) -> None:
    graphs = check("aot_eager" if history == 3 else tiny.INNER, history, latent).graphs[0]
    assert not op_count(graphs.cached[0], "aten.linear")["aten.linear"]
    assert len(graphs.state) == history + 2 * latent


def test_one_large_graph_is_compiled_and_one_of_a_few_sums() -> None:
    """So that the first output comes hardly later than with plain torch.compile, whatever the depth."""
    compiled: list[list[str]] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Any:
        compiled.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    check(inner, 3, True)
    full, cached = sorted(compiled, key=len, reverse=True)
    assert any("scaled_dot_product_attention" in op for op in full)
    assert Counter(cached) == {"aten.mul.Tensor": 6, "aten.add.Tensor": 5}


def test_explain_shows_the_plan() -> None:
    text = str(hero_fx.explain(check(tiny.INNER, 3, True)))
    for part in ("it forecasts the outputs", "███··█·█··", "past outputs", "past latents", "10 steps, 5 full"):
        assert part in text


def test_coefficients_by_frame_and_half_of_the_batch() -> None:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs(batch=4)
    frames = tiny.GRID[0]
    table = theta(2, frames, tiny.CHANNELS, 1, 1)
    rule = OutputRule(index=0, axis=2, frames=1, groups=2, latent="hidden_states")
    fits = fitting(outputs=((4, 3),), **CAPTURED)
    backend = hero_fx.backend(plan=plan_of(rule, table, fits, batch=2), inner=tiny.INNER)
    ours = tiny.denoise(tiny.captured(layers=2, batch=4).compiled(backend), kwargs, tiny.timesteps(STEPS))
    theirs = by_reference(model, kwargs, table.repeat_interleave(2, dim=2), slice(None), 3)
    assert tiny.worst(ours, theirs) < 1e-5


@pytest.mark.parametrize(("inner", "bound"), [(tiny.INNER, 1e-5), ("inductor", 1e-4)])
def test_a_model_without_branches_and_with_conditioning_channels(inner: str, bound: float) -> None:
    """Through Inductor too: were state written back in another order, all of the past would become the newest output."""
    model = Conditioned(extra=2).eval().requires_grad_(False)
    table = theta(1, 3, 1, 1)
    rule = OutputRule(index=0, axis=1, latent="sample", start=1)
    sample, hint = numbers(2, 3, 4, 5, seed=3), numbers(2, 1, 4, 5, seed=4)
    backend = hero_fx.backend(plan=plan_of(rule, table, name="Conditioned", outputs=((3,),)), inner=inner)
    call = toys.torch_compile(model, backend, fullgraph=True)

    def loop(call: Any) -> list[Tensor]:
        x, result = sample, []
        for t in tiny.timesteps(STEPS):
            result.append(call(x, t))
            x = x - result[-1] / STEPS
        return result

    def given(x: Tensor) -> Tensor:
        return torch.cat([hint, x, hint], dim=1)

    with torch.no_grad():
        ours = loop(lambda x, t: call(given(x), t.expand(2)))
        state: dict[str, Tensor] = {"x": sample}
        outs = forecast_trajectory(
            lambda step: model(given(state["x"]), tiny.timesteps(STEPS)[step].expand(2)),
            table,
            MASK,
            lambda step: state["x"],
        )
        theirs = []
        for out in outs:
            theirs.append(out)
            state["x"] = state["x"] - out / STEPS
    assert tiny.worst(ours, theirs) < bound


def test_two_outputs_each_with_its_latent() -> None:
    """Video and audio: both are forecast, each from its own past and latent."""
    model = Conditioned().eval().requires_grad_(False)
    rules = (OutputRule(index=0, axis=1, latent="sample"), OutputRule(index=1, axis=2, latent="audio", history=2))
    tables = {"out0": theta(1, 3, 1, 1), "out1": theta(1, 1, 4, seed=8)}
    line = Timeline(schedule=MASK, timesteps=times(), coefficients=tables)
    fits = hero_fx.Fingerprint(name="Conditioned", outputs=((3,), (4,)))
    plan = Plan(policy="forecast", timelines=(line,), outputs=rules, model=fits)
    call = toys.torch_compile(model, hero_fx.backend(plan=plan, inner=tiny.INNER), fullgraph=True)
    video = [numbers(1, 3, 4, 5, seed=i) for i in range(STEPS)]
    audio = [numbers(1, 6, 4, seed=50 + i) for i in range(STEPS)]
    time = tiny.timesteps(STEPS)
    with torch.no_grad():
        ours = [call(video[i], time[i].expand(1), audio[i]) for i in range(STEPS)]

        def part(number: int) -> Any:
            return lambda step: model(video[step], time[step].expand(1), audio[step])[number]

        first = forecast_trajectory(part(0), tables["out0"], MASK, video.__getitem__)
        second = forecast_trajectory(part(1), tables["out1"], MASK, audio.__getitem__, history=2)
        assert tiny.worst([out[0] for out in ours], list(first)) < 1e-5
        assert tiny.worst([out[1] for out in ours], list(second)) < 1e-5


def test_separate_calls_have_coefficients_of_their_own() -> None:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs(batch=1)
    tables = {"out0": theta(1, 1, tiny.CHANNELS, 1, 1), "out0@1": theta(1, 1, tiny.CHANNELS, 1, 1, seed=9)}
    rule = OutputRule(index=0, axis=2)
    line = Timeline(schedule=MASK, timesteps=times(), coefficients=tables)
    plan = Plan(policy="forecast", timelines=(line,), outputs=(rule,), lanes=2, model=fitting(**CAPTURED))
    call = tiny.captured(layers=2, batch=1).compiled(hero_fx.backend(plan=plan, inner=tiny.INNER))
    other = kwargs | {"encoder_hidden_states": numbers(1, tiny.TEXT, tiny.WIDTH, seed=11)}
    ours: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for t in tiny.timesteps(STEPS):
            for lane, given in enumerate((kwargs, other)):
                ours[lane].append(call(**given, timestep=t.expand(1), return_dict=False)[0])
        for lane, given in enumerate((kwargs, other)):

            def out(step: int, given: Any = given) -> Tensor:
                return model(**given, timestep=tiny.timesteps(STEPS)[step].expand(1), return_dict=False)[0]  # type: ignore[no-any-return]

            table = tables["out0@1" if lane else "out0"]
            assert tiny.worst(ours[lane], list(forecast_trajectory(out, table, MASK, None))) < 1e-5


def taylor(steps: int, mask: tuple[bool, ...]) -> Tensor:
    """θ1 = x / d: what TaylorSeer of order 1 extrapolates with; 0 while there is one full step."""
    table, fulls = torch.zeros(steps, 5, 1, 1, 1, 1, 1), list[int]()
    for step, full in enumerate(mask):
        if full:
            fulls.append(step)
        elif len(fulls) > 1:
            table[step, 1] = (step - fulls[-1]) / (fulls[-1] - fulls[-2])
    return table


def test_taylors_coefficients_extrapolate_the_output_linearly() -> None:
    rule = OutputRule(index=0, axis=None, history=2)
    plan = plan_of(rule, taylor(STEPS, MASK), fitting(outputs=((),), **CAPTURED))
    call = tiny.captured(layers=2).compiled(hero_fx.backend(plan=plan, inner=tiny.INNER))
    ours = tiny.denoise(call, tiny.inputs(), tiny.timesteps(STEPS))
    past: list[tuple[int, Tensor]] = []
    for step, full in enumerate(MASK):
        if full:
            past.append((step, ours[step]))
            continue
        (before, old), (last, new) = past[-2:]
        expected = new + (step - last) / (last - before) * (new - old)
        torch.testing.assert_close(ours[step], expected, rtol=1e-5, atol=1e-5)


def test_state_of_aether_is_under_a_tenth_of_a_gigabyte() -> None:
    """At batch 2 in bfloat16; its latent is the first 56 of 96 channels. However many layers there are: here one."""
    config = {
        "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 1, "in_channels": 96, "out_channels": 56,
        "time_embed_dim": 512, "text_embed_dim": 4096, "use_rotary_positional_embeddings": True, "sample_width": 90,
        "sample_height": 60, "sample_frames": 41,
    }  # fmt: skip
    rule = OutputRule(index=0, axis=2, latent="hidden_states")
    backend = hero_fx.backend(plan=plan_of(rule, theta(1, 1, 56, 1, 1)), plan_mismatch="warn")
    with torch.device("meta"), torch.no_grad():
        model: Any = CogVideoXTransformer3DModel(**config)
        model = model.bfloat16().eval()
        call = {
            "hidden_states": torch.empty(2, 11, 96, 60, 90, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.empty(2, 226, 4096, dtype=torch.bfloat16),
            "timestep": torch.empty(2),
            "image_rotary_emb": (torch.empty(14850, 64), torch.empty(14850, 64)),
        }
        with pytest.warns(UserWarning, match="another model"):
            steps = hero_fx.trace(model, backend=backend, return_dict=False, **call)
    assert steps.state_bytes == 5 * 2 * 11 * 56 * 60 * 90 * 2 < 0.1e9
