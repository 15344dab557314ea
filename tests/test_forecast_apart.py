"""Plans whose parts of the batch have full steps of their own: the rows of the batch, the pass, trajectories, calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

import hero_fx
from hero_fx.calibration.choose import _starts as starts_of
from hero_fx.calibration.record import Recording
from hero_fx.calibration.samples import Track
from hero_fx.calibration.search import improve, thinned
from hero_fx.calibration.tables import Outputs
from hero_fx.passes.analysis.batch_rows import follow_batch
from hero_fx.passes.analysis.tokens import NoRule
from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.rewrite.forecast import OutputRule
from hero_fx.passes.rewrite.rows_of_batch import KeepRows
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.plan import Plan, Timeline
from hero_fx.step_graphs import copy_graph

from .reference_forecast import forecast_trajectory
from .support import tiny, toys
from .support.forecasts import FITTING, STEPS, Conditioned, theta, times
from .support.steps_by_hand import numbers
from .support.tracing import run_passes, trace

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIRST = tuple(map(bool, (1, 0, 0, 0, 0, 1, 0, 0, 0, 1)))
SECOND = tuple(map(bool, (1, 1, 1, 0, 0, 1, 0, 1, 0, 1)))


def graph_of(function: Any, *shapes: tuple[int, ...], inputs: int = 1) -> fx.GraphModule:
    """A graph whose first `inputs` arguments are the model's; the others are weights."""
    gm = trace(function, *(numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)))
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node.meta |= {"model_input": number < inputs, "argument": node.name}
    return gm


def linear_with_table(x: Tensor, w: Tensor, table: Tensor) -> tuple[Tensor]:
    return (F.linear(x, w) * table,)


def test_rows_are_gathered_from_inputs_and_from_tables_that_have_rows() -> None:
    gm = graph_of(linear_with_table, (4, 3, 5), (7, 5), (4, 1, 7))
    before = render(gm)
    run_passes(gm, KeepRows(count=2), DropDeadCode())
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[4, 3, 5] = input
  w_1: f32[7, 5] = input
  table_1: f32[4, 1, 7] = input
- linear: f32[4, 3, 7] = aten.linear.default(x_1, w_1)
- mul: f32[4, 3, 7] = aten.mul.Tensor(linear, table_1)
- return (mul,)
+ rows: i64[2] = input
+ index_select_default: f32[2, 3, 5] = aten.index_select.default(x_1, 0, rows)
+ linear_default: f32[2, 3, 7] = aten.linear.default(index_select_default, w_1)
+ index_select_default_1: f32[2, 1, 7] = aten.index_select.default(table_1, 0, rows)
+ mul_tensor: f32[2, 3, 7] = aten.mul.Tensor(linear_default, index_select_default_1)
+ return (mul_tensor,)""",
    )
    x, w, table = numbers(4, 3, 5, seed=0), numbers(7, 5, seed=1), numbers(4, 1, 7, seed=2)
    for rows in ([0, 1], [2, 3]):
        (out,) = gm(x, w, table, torch.tensor(rows))
        assert torch.equal(out, linear_with_table(x[rows], w, table[rows])[0])


def attend(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """With the batch folded into heads, as a block of attention over frames has it."""
    q, k, v = F.linear(x, w).view(4, 6, 3, 2, 4).unbind(2)
    own = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    folded = own.transpose(1, 2).reshape(4 * 6, 2, 4)
    scores = torch.softmax(folded @ folded.transpose(1, 2), dim=-1)
    return ((scores @ folded).reshape(4, 6, 8) + torch.arange(4.0)[:, None, None],)


def convolve(x: Tensor, w: Tensor) -> tuple[Tensor]:
    down = F.group_norm(F.conv2d(x, w, padding=1), 3)
    return (F.interpolate(torch.cat([down, torch.ones(4, 1, 5, 5)], dim=1), scale_factor=2.0, mode="nearest"),)


@pytest.mark.parametrize(
    ("function", "shapes"), [(attend, [(4, 6, 8), (24, 8)]), (convolve, [(4, 3, 5, 5), (6, 3, 3, 3)])]
)
def test_rows_of_the_result_are_those_of_the_whole(function: Any, shapes: list[tuple[int, ...]]) -> None:
    gm = graph_of(function, *shapes)
    values = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    (whole,) = function(*values)
    run_passes(gm, KeepRows(count=2), DropDeadCode())
    for rows in ([0, 1], [2, 3], [3, 1]):
        torch.testing.assert_close(gm(*values, torch.tensor(rows))[0], whole[rows])


def centred(x: Tensor) -> tuple[Tensor]:
    return (x - x.mean(dim=0, keepdim=True),)


def halves_swapped(x: Tensor) -> tuple[Tensor]:
    a, b = x.chunk(2)
    return (torch.cat([b, a]),)


def normalized_over_all(x: Tensor) -> tuple[Tensor]:
    return (x / x.norm(),)


def as_tokens(x: Tensor) -> tuple[Tensor]:
    tokens = x.reshape(1, 1, 4 * 3, 5)
    return (F.scaled_dot_product_attention(tokens, tokens, tokens).reshape(4, 3, 5),)


def by_the_first(x: Tensor) -> tuple[Tensor]:
    return (x * x[0],)


def against_each_other(x: Tensor) -> tuple[Tensor]:
    flat = x.flatten(1)
    return (flat @ flat.transpose(0, 1),)


def guided(x: Tensor) -> tuple[Tensor]:
    without, having = x.chunk(2)
    return (without + 3 * (having - without),)


def shuffled(x: Tensor) -> tuple[Tensor]:
    """Without a batch: the first axis is that of channels."""
    return (F.pixel_unshuffle(F.pixel_shuffle(x[..., :3], 2), 2),)


@pytest.mark.parametrize(
    "function",
    [shuffled, centred, halves_swapped, normalized_over_all, as_tokens, by_the_first, against_each_other, guided],
)
def test_rows_that_meet_are_refused(function: Any) -> None:
    with pytest.raises(NoRule):
        follow_batch(graph_of(function, (4, 3, 5)), 4)


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


@pytest.mark.parametrize(("inner", "batch"), [("aot_eager", 2), ("eager", 4)])
def test_trajectories_equal_the_equation(inner: str, batch: int, tmp_path: Path) -> None:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs(batch=batch)
    apart("out0").save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    backend = hero_fx.backend(plan=plan, inner=inner)
    call = toys.torch_compile(model, backend, fullgraph=True)
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
    backend = hero_fx.backend(plan=apart("out0"), inner=tiny.INNER)
    model = toys.torch_compile(tiny.cogvideox(layers=2), backend, fullgraph=True)
    tiny.denoise(model, tiny.inputs(), tiny.timesteps(STEPS))
    text = str(hero_fx.explain(backend))
    for part in ("█▄▄··█·▄·█", "3 + 3 in part", "full for one of 2 parts of the batch", "10 steps, 3 + 3 in part full"):
        assert part in text


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_a_state_that_was_freed_computes_all_parts(at: int) -> None:
    """At a partial step, a cached one and a full one: there is no past to forecast from, so all is full to the end."""
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs()
    backend = hero_fx.backend(plan=apart("out0"), inner=tiny.INNER)
    compiled = toys.torch_compile(model, backend, fullgraph=True)
    with torch.no_grad():
        for step, time in enumerate(tiny.timesteps(STEPS)):
            if step == at:
                (trajectory,) = backend.steppers[0].store.holders()
                trajectory.evict()
            inputs = {**kwargs, "timestep": time.expand(2), "return_dict": False}
            out = compiled(**inputs)[0]
            if step >= at:
                torch.testing.assert_close(out, model(**inputs)[0], atol=1e-5, rtol=1e-5)
    assert backend.stats().cached_steps == sum(not level for level in apart("out0").timelines[0].levels[:at])


@torch.no_grad()
def test_a_doubt_computes_all_parts() -> None:
    """Text that is another at the second step may be of a new trajectory: nothing of the first step is used."""
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs()
    compiled = toys.torch_compile(model, hero_fx.backend(plan=apart("out0"), inner=tiny.INNER), fullgraph=True)
    first, second = (torch.full((2,), float(time)) for time in tiny.timesteps(STEPS)[:2])  # no views of one table
    compiled(**kwargs, timestep=first, return_dict=False)
    other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] + 1}
    out = compiled(**other, timestep=second, return_dict=False)[0]
    torch.testing.assert_close(out, model(**other, timestep=second, return_dict=False)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_as_long_as_two_timelines_fit_a_partial_step_is_ambiguous() -> None:
    plan, short = apart("out0"), apart("out0").timelines[0]
    cut = {name: table[:8] for name, table in short.coefficients.items()}
    eight = Timeline(
        schedule=short.schedule[:8], timesteps=short.timesteps[:8], coefficients=cut,
        parts=tuple(part[:8] for part in short.parts),
    )  # fmt: skip
    both = plan.with_timelines(
        Plan(**{**{n: getattr(plan, n) for n in ("policy", "outputs", "model", "batch")}, "timelines": (eight,)})
    )
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs()
    compiled = toys.torch_compile(model, hero_fx.backend(plan=both, inner=tiny.INNER), fullgraph=True)
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


@pytest.mark.filterwarnings("ignore:hero_fx. the plan was calibrated on another model")
@torch.no_grad()
def test_a_model_whose_rows_meet_is_refused() -> None:
    rule = OutputRule(index=0, axis=1)
    table = {"out0": theta(1, 3, 1, 1), "out0@1": theta(1, 3, 1, 1)}
    union = tuple(a or b for a, b in zip(FIRST, SECOND, strict=True))
    line = Timeline(schedule=union, timesteps=times(), coefficients=table, parts=(FIRST, SECOND))
    plan = Plan(policy="forecast", timelines=(line,), outputs=(rule,), batch=2)
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
        hero_fx.verify(tiny.cogvideox(layers=2), backend=hero_fx.backend(plan=apart("out0")), **tiny.inputs())
    with pytest.raises(ValueError, match=r"hero_fx\.batch: .*apart=True"):
        _in_a_batch()


def _in_a_batch() -> None:
    model, kwargs = tiny.cogvideox(layers=2), tiny.inputs(batch=2)
    compiled = toys.torch_compile(model, hero_fx.backend(plan=apart("out0"), inner=tiny.INNER), fullgraph=True)
    tiny.denoise(compiled, kwargs, tiny.timesteps(STEPS)[:1])
    both = {n: torch.cat([v, v]) if isinstance(v, Tensor) else v for n, v in kwargs.items()}
    with torch.no_grad(), hero_fx.batch([hero_fx.calling(session=name, step_index=0) for name in "ab"]):
        compiled(**both, timestep=torch.full((4,), 999), return_dict=False)


def test_parts_are_moved_one_at_a_time() -> None:
    wanted = (2, 0, 1, 1, 0, 2)
    seen: list[tuple[int, ...]] = []

    def objective(schedule: tuple[int, ...]) -> float:
        seen.append(schedule)
        return sum(abs(a - b) for a, b in zip(schedule, wanted, strict=True))

    assert improve([(2, 2, 2, 0, 0, 0)], objective, evaluations=500, seed=0, parts=2) == (wanted, 0)
    assert all(sum(schedule) == 6 and schedule[0] == 2 and max(schedule) <= 2 for schedule in seen)


def test_fewer_full_steps_are_some_of_those_there_are() -> None:
    late = [0.0] * 6 + [1.0] * 4
    full = tuple(step in (0, 1, 3, 5, 6, 7, 8, 9) for step in range(10))
    found = thinned(full, late, 4)
    assert sum(found) == 4
    assert found[0]
    assert found[9]
    assert [step for step, own in enumerate(found) if own and step not in (0, 9)] == [6, 8]


class Guided(nn.Module):
    """Two rows that follow the time at different speeds: the second has to be looked at more often."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rate = torch.tensor([1.0, 9.0])[:, None, None, None]
        return torch.sin(rate * timestep.float()[:, None, None, None] / 1000) * torch.cos(sample)


def test_calibration_finds_which_part_needs_more_full_steps() -> None:
    model = Guided().eval()

    def run(call: Any, i: int) -> Tensor:
        sample = numbers(1, 3, 4, 4, seed=i)
        for time in tiny.timesteps(12):
            without, having = call(torch.cat([sample] * 2), time.expand(2)).chunk(2)
            sample = sample - (without + 3 * (having - without)) / 12
        return sample

    options: dict[str, Any] = {"num_steps": 12, "budget": 5, "scenes": 2, "holdout": 1, "search": 60, "inner": "eager"}
    halves: dict[str, Any] = {"by": ("batch",)}
    together = hero_fx.calibrate(model, run, **options, **halves)
    found = hero_fx.calibrate(model, run, apart=True, **options)
    (line,) = found.plan.timelines
    assert found.plan.parts == 2
    assert sum(line.parts[0]) + sum(line.parts[1]) == 2 * 5
    assert sum(line.parts[1]) > sum(line.parts[0])
    assert found.candidates[0].error["sample"] < 0.8 * together.candidates[0].error["sample"]
    assert "in part" in str(found)


@pytest.mark.parametrize("full", range(4, 16))
def test_any_number_of_full_steps_has_a_start(full: int) -> None:
    gains = torch.linspace(0, 1, 8)[:, None, None] * torch.tensor([0.1, 1.0])
    gram = {"out0": torch.eye(16).expand(1, 2, 1, 3, 16, 16)}
    recording = Recording(tuple(map(float, range(8, 0, -1))), gram, {}, gains, Track({}, {}))
    outputs = Outputs((recording,), (OutputRule(index=0, axis=1, groups=2, latent="x"),), (4,), apart=True)
    job: Any = SimpleNamespace(parts=2, timesteps=recording.timesteps, must=frozenset({0, 3}))
    for start in starts_of(job, outputs, full):
        assert sum(start) == full
        assert start[0] == start[3] == 2
        assert max(start) <= 2


def test_calibration_refuses_what_has_no_parts() -> None:
    def run(call: Any, i: int) -> Tensor:
        sample = numbers(1, 3, 4, 4, seed=i)
        for time in tiny.timesteps(4):
            sample = sample - call(sample, time.expand(1)) / 4
        return sample

    with pytest.raises(ValueError, match=r"apart=True: the model is called with a batch of 1"):
        hero_fx.calibrate(
            Conditioned().eval(), run, num_steps=4, budget=2, scenes=1, holdout=1, apart=True, inner="eager"
        )
    with pytest.raises(ValueError, match=r"apart=True: is for policies=\('forecast',\)"):
        hero_fx.calibrate(Conditioned(), run, num_steps=4, budget=2, policies=("hero",), apart=True)


def test_a_copy_of_the_graph_stays_whole() -> None:
    gm = graph_of(linear_with_table, (4, 3, 5), (7, 5), (4, 1, 7))
    copied = copy_graph(gm)
    before = render(gm)
    run_passes(copied, KeepRows(count=1), DropDeadCode())
    assert render(gm) == before


def test_a_schedule_that_is_given_is_kept() -> None:
    def run(call: Any, i: int) -> Tensor:
        sample = numbers(2, 3, 4, 4, seed=i)
        for time in tiny.timesteps(4):
            sample = sample - call(sample, time.expand(2)) / 4
        return sample

    options: dict[str, Any] = {"num_steps": 4, "scenes": 1, "holdout": 1, "search": 1, "inner": "eager"}
    model = Conditioned().eval()
    line = Timeline(
        schedule=(True, False, False, True), timesteps=times(4), coefficients={"out0": theta(1, 3, 1, 1, steps=4)}
    )
    start = Plan(policy="forecast", timelines=(line,), outputs=(OutputRule(index=0, axis=1),))
    found = hero_fx.calibrate(model, run, budget=2, start=start, **options)
    assert found.plan.timelines[0].schedule == line.schedule
    with pytest.raises(ValueError, match=r"start: the plan has 2 full steps, and budget=3"):
        hero_fx.calibrate(model, run, budget=3, start=start, **options)
    with pytest.raises(ValueError, match=r"start: the plan has 2 full steps, and budget=1.3 allows"):
        hero_fx.calibrate(model, run, budget=1.3, start=start, **options)
    with pytest.raises(ValueError, match=r"start: the plan has 1 part\(s\) .* the calibration is for 2 and 1"):
        hero_fx.calibrate(model, run, budget=2, start=start, apart=True, **options)
