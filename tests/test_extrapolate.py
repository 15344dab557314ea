"""The passes that record, reuse and extrapolate features on the least toys there are, and what is left to do in a cached step."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

import hero_fx
from hero_fx.passes.pipeline import Pass
from hero_fx.passes.render import graph_diff, op_count, render
from hero_fx.passes.rewrite.extrapolate import ExtrapolateBranches, ReuseBranches
from hero_fx.passes.rewrite.plan import (
    CachePoint,
    Extrapolate,
    Full,
    Refresh,
    Reuse,
    ScoredRefresh,
    Strategy,
    recordings,
)
from hero_fx.passes.rewrite.record import RecordFeatures, attention_received, small_values
from hero_fx.passes.rewrite.refresh import RefreshBranches
from hero_fx.passes.rewrite.refresh_scored import RefreshScored
from hero_fx.step_graphs import copy_graph

from .support import tiny, toys
from .support.steps_by_hand import GRID, IMAGE, TEXT, Toy, attentions, ffns, joint, norm, numbers
from .support.tracing import Shared, capture, equal, run_passes

POINTS: tuple[CachePoint, ...] = ("pre_gate", "post_gate")


def feature(inputs: list[Tensor], point: CachePoint) -> Tensor:
    """What the first FFN of `ffns` gives."""
    x, gate, w, _ = inputs
    return F.linear(norm(x), w) * (gate if point == "post_gate" else 1)


def check_untouched(toy: Toy, *strategies: Strategy) -> None:
    """No pass but the one for its strategy fires, and the others leave the graph alone."""
    plan = toy.plan(*strategies)
    common: Any = {"structure": toy.structure, "plan": plan}
    passes: dict[type, Pass] = {
        Refresh: RefreshBranches(count=2, **common),
        ScoredRefresh: RefreshScored(grid=GRID, **common),
        Extrapolate: ExtrapolateBranches(**common),
        Reuse: ReuseBranches(**common),
    }
    for kind, rewrite in passes.items():
        gm = copy_graph(toy.normal)
        (record,) = run_passes(gm, rewrite)
        assert bool(record.sites) == any(isinstance(s, kind) for s in strategies)
        assert record.sites or render(gm) == render(toy.normal)


def test_every_pass_minds_its_own_strategy() -> None:
    check_untouched(Toy(ffns), Full(), Full())
    check_untouched(Toy(ffns), Extrapolate(), Full())
    check_untouched(Toy(ffns), Full(), Reuse())
    check_untouched(Toy(ffns), Refresh(), Reuse())
    check_untouched(Toy(joint, text=True), Reuse(), ScoredRefresh(), Full())


def test_record_graph() -> None:
    toy = Toy(ffns)
    assert_expected_inline(
        graph_diff(toy.normal, toy.full(toy.plan(Extrapolate(order=1, cache_point="pre_gate"), Full()))),
        """\
  ...
  w_1: f32[4, 4] = input
  v_1: f32[4, 4] = input
+ l0_ffn_image_y0: f32[2, 6, 4] = input
+ inverse_gap_1: f32[] = input
+ l0_ffn_image_y1: f32[2, 6, 4] = input
  layer_norm: f32[2, 6, 4] = aten.layer_norm.default(x_1, [4])
  linear: f32[2, 6, 4] = aten.linear.default(layer_norm, w_1)
  ...
  mul_1: f32[2, 6, 4] = aten.mul.Tensor(gate_1, linear_1)
  add_1: f32[2, 6, 4] = aten.add.Tensor(add, mul_1)
+ sub_tensor: f32[2, 6, 4] = aten.sub.Tensor(linear, l0_ffn_image_y0)
+ mul_tensor: f32[2, 6, 4] = aten.mul.Tensor(sub_tensor, inverse_gap_1)
+ copy__default: f32[2, 6, 4] = aten.copy_.default(l0_ffn_image_y0, linear)
+ copy__default_1: f32[2, 6, 4] = aten.copy_.default(l0_ffn_image_y1, mul_tensor)
  return add_1""",
    )


def test_record_nothing() -> None:
    toy = Toy(ffns)
    gm = copy_graph(toy.normal)
    (record,) = run_passes(gm, RecordFeatures(structure=toy.structure, recordings=recordings([toy.plan(Full())])))
    assert record.sites == 0
    assert render(gm) == render(toy.normal)


@pytest.mark.parametrize("point", POINTS)
def test_record_keeps_features_and_their_differences(point: CachePoint) -> None:
    toy = Toy(ffns)
    gm = toy.full(toy.plan(Extrapolate(order=2, cache_point=point)))
    seen: list[Tensor] = []
    for step, gaps in enumerate([(0, 0), (1 / 2, 0), (1 / 3, 1 / 3)]):
        inputs = toy.inputs(seed=10 * step)
        out = toy.run(gm, inputs, inverse_gap_1=gaps[0], inverse_gap_2=gaps[1])
        assert equal(out, toy.normal(*inputs))
        seen.append(feature(inputs, point))
    slopes = [(seen[1] - seen[0]) / 2, (seen[2] - seen[1]) / 3]
    for term, expected in enumerate([seen[2], slopes[1], (slopes[1] - slopes[0]) / 3]):
        torch.testing.assert_close(toy.state[f"l0_ffn_image_y{term}"], expected)
    assert len(toy.state) == 6


def test_record_in_another_dtype() -> None:
    toy = Toy(ffns)
    inputs = toy.inputs()
    out = toy.run(toy.full(toy.plan(Extrapolate()), dtype=torch.bfloat16), inputs, inverse_gap_1=0.0)
    assert equal(out, toy.normal(*inputs))
    assert torch.equal(toy.state["l0_ffn_image_y0"], feature(inputs, "post_gate").bfloat16())


@pytest.mark.parametrize("keys", ["sampled", "sampled+text", "all"])
def test_record_keys_and_values(keys: Any) -> None:
    toy = Toy(joint, text=True)
    inputs = toy.inputs()
    assert equal(toy.run(toy.full(toy.plan(Refresh(keys=keys), Full())), inputs), toy.normal(*inputs))
    n = norm(torch.cat([inputs[4], inputs[0]], 1)).unsqueeze(1)
    kept = {"sampled": {}, "all": {"k": n * 2, "v": n}, "sampled+text": {"k_text": 2 * n[:, :, :TEXT]}}[keys]
    if keys == "sampled+text":
        kept["v_text"] = n[:, :, :TEXT]
    names = {"l0_attention_image_y0", "l0_attention_text_y0", *(f"l0_attention_{name}" for name in kept)}
    assert set(toy.state) == names
    for name, expected in kept.items():
        assert torch.equal(toy.state[f"l0_attention_{name}"], expected)


@pytest.mark.parametrize("score", ["attention", "values"])
def test_record_scores(score: Any) -> None:
    toy = Toy(joint, text=True)
    inputs = toy.inputs()
    gm = toy.full(toy.plan(Full(), ScoredRefresh(score=score), Full()))
    toy.state["l0_ffn_stamp"] = torch.ones(2, IMAGE)
    assert equal(toy.run(gm, inputs), toy.normal(*inputs))
    n = norm(torch.cat([inputs[4], inputs[0]], 1)).unsqueeze(1)
    received = attention_received(n, n * 2, 0.5, TEXT, TEXT + IMAGE)
    expected = received if score == "attention" else small_values(n, TEXT, TEXT + IMAGE)
    torch.testing.assert_close(toy.state["l0_ffn_score"], expected)
    assert not toy.state["l0_ffn_stamp"].any()


def test_scores_by_hand() -> None:
    query = torch.eye(3)[None, None] * 100
    received = attention_received(query, query[:, :, [0, 0, 1]], 1.0, 0, 3)
    torch.testing.assert_close(received, F.normalize(torch.tensor([[5 / 6, 5 / 6, 4 / 3]])))
    values = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]]]])
    torch.testing.assert_close(small_values(values, 0, 3), torch.tensor([[0.5, 1.0, 0.0]]))


def test_extrapolate_graph() -> None:
    toy = Toy(ffns)
    gm = copy_graph(toy.normal)
    plan = toy.plan(Extrapolate(order=1, cache_point="pre_gate"), Full())
    run_passes(gm, ExtrapolateBranches(structure=toy.structure, plan=plan))
    assert_expected_inline(
        graph_diff(toy.normal, gm, context=1),
        """\
  ...
  v_1: f32[4, 4] = input
+ l0_ffn_image_y0: f32[2, 6, 4] = input
+ l0_ffn_image_y1: f32[2, 6, 4] = input
+ x: f32[] = input
  layer_norm: f32[2, 6, 4] = aten.layer_norm.default(x_1, [4])
+ mul_tensor: f32[2, 6, 4] = aten.mul.Tensor(l0_ffn_image_y1, x)
+ add_tensor: f32[2, 6, 4] = aten.add.Tensor(l0_ffn_image_y0, mul_tensor)
  linear: f32[2, 6, 4] = aten.linear.default(layer_norm, w_1)
- mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, linear)
+ mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, add_tensor)
  add: f32[2, 6, 4] = aten.add.Tensor(x_1, mul)
  ...""",
    )


@pytest.mark.parametrize("point", POINTS)
def test_extrapolate_by_hand(point: CachePoint) -> None:
    toy = Toy(ffns)
    gm = toy.cached(toy.plan(Extrapolate(order=2, cache_point=point), Full()))
    x, gate, _, v = inputs = toy.inputs()
    y = [toy.state.setdefault(f"l0_ffn_image_y{i}", numbers(2, IMAGE, 4, seed=i)) for i in range(3)]
    estimate = y[0] + 3.0 * y[1] + 4.5 * y[2]
    x = x + (gate * estimate if point == "pre_gate" else estimate)
    torch.testing.assert_close(toy.run(gm, inputs, x=3.0, x2=4.5)[0], x + gate * F.linear(norm(x), v))


def test_reuse_graph() -> None:
    toy = Toy(attentions)
    gm = copy_graph(toy.normal)
    run_passes(gm, ReuseBranches(structure=toy.structure, plan=toy.plan(Reuse(cache_point="post_gate"), Full())))
    assert_expected_inline(
        graph_diff(toy.normal, gm, context=1),
        """\
  ...
  v_1: f32[4, 4] = input
+ l0_attention_image_y0: f32[2, 6, 4] = input
  layer_norm: f32[2, 6, 4] = aten.layer_norm.default(x_1, [4])
  ...
  mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, linear)
- add: f32[2, 6, 4] = aten.add.Tensor(x_1, mul)
+ add: f32[2, 6, 4] = aten.add.Tensor(x_1, l0_attention_image_y0)
  layer_norm_1: f32[2, 6, 4] = aten.layer_norm.default(add, [4])
  ...""",
    )


@pytest.mark.parametrize("point", POINTS)
def test_reuse_by_hand(point: CachePoint) -> None:
    toy = Toy(ffns)
    plan = toy.plan(Reuse(cache_point=point))
    before, now = toy.inputs(seed=1), toy.inputs(seed=2)
    toy.run(toy.full(plan), before)
    first, second = (toy.state[f"l0_ffn_{name}"] for name in ("image_y0", "1_image_y0"))
    assert torch.equal(first, feature(before, point))
    x, gate = now[0], now[1] if point == "pre_gate" else 1
    torch.testing.assert_close(toy.run(toy.cached(plan), now)[0], x + gate * first + gate * second)


DEPTH = 3
EMBEDDINGS = 3  # of the latents, of the time, and back to latents
# A layer projects to qkv, out, up and down, and its modulation from the time.
COUNTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "hero": ({"refresh_layers": 1}, 1, EMBEDDINGS + 5),
    "hero, all deep": ({"refresh_layers": 0}, 0, EMBEDDINGS - 1),  # gates are cached: no need of the time
    "hero, all shallow": ({"refresh_layers": DEPTH}, DEPTH, EMBEDDINGS + 5 * DEPTH),
    "fora": ({}, 0, EMBEDDINGS + DEPTH),
    "taylorseer": ({"order": 2}, 0, EMBEDDINGS + DEPTH),
    "toca": ({}, 0, EMBEDDINGS + 3 * DEPTH),
}


OPS = ("aten.scaled_dot_product_attention", "aten.linear")


@cache
def captured() -> Shared:
    return Shared(*capture(toys.toy(layers=DEPTH), toys.latents(), toys.times(1)[0]))


@pytest.mark.parametrize("form", ["literal", "collapsed"])
@pytest.mark.parametrize("case", COUNTS)
def test_ops_of_a_cached_step(case: str, form: Literal["literal", "collapsed"]) -> None:
    options, attentions, linears = COUNTS[case]
    policy = case.split(",")[0]
    if policy in ("hero", "toca"):
        options = {**options, "grid": toys.GRID}
    backend = hero_fx.backend(policy, inner=tiny.INNER, form=form, **options)
    run = captured().compiled(backend)  # held, as Dynamo would
    assert callable(run)
    (steps,) = backend.graphs
    for gm in (steps.normal, steps.full):
        assert tuple(op_count(gm, *OPS).values()) == (DEPTH, EMBEDDINGS + 5 * DEPTH)
    assert tuple(op_count(steps.cached[0], *OPS).values()) == (attentions, linears)


def test_a_cached_step_computes_sampled_tokens_only() -> None:
    backend = hero_fx.backend(inner=tiny.INNER, form="literal", grid=toys.GRID, refresh_layers=DEPTH, refresh_ratio=0.3)
    torch._dynamo.reset()
    call = toys.torch_compile(toys.toy(layers=DEPTH), backend=backend, fullgraph=True)
    outputs = toys.loop(call, toys.latents(), toys.times(6))
    assert all(out.isfinite().all() for out in outputs)
    assert (backend.stats().full_steps, backend.stats().cached_steps) == (4, 2)
    (steps,) = backend.graphs
    sizes = {
        str(target): [n.meta["val"].shape[-2] for n in steps.cached[0].graph.nodes if str(n.target).startswith(target)]
        for target in OPS
    }
    assert sizes[OPS[0]] == [9] * DEPTH
    assert sizes[OPS[1]].count(9) == 4 * DEPTH  # the modulations and the embeddings are no part of a branch
    assert sizes[OPS[1]].count(toys.TOKENS) == 2
