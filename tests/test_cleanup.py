"""`hero_fx.passes.simplify.cleanup`: what a rewrite left without readers goes, what has an effect stays."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.rewrite.extrapolate import ReuseBranches
from hero_fx.passes.rewrite.plan import Full, Reuse
from hero_fx.passes.simplify.cleanup import DropDeadCode, DropUnreadState
from hero_fx.passes.slots import FeatureSlot
from hero_fx.step_graphs import copy_graph

from .support.step_graphs import graph, run, tensors
from .support.steps_by_hand import Toy, attentions
from .support.tracing import equal, run_passes, trace


def test_graph() -> None:
    toy = Toy(attentions)
    gm = copy_graph(toy.normal)
    run_passes(gm, ReuseBranches(structure=toy.structure, plan=toy.plan(Reuse(), Full())))
    before = render(gm)
    (record,) = run_passes(gm, DropDeadCode())
    assert record.sites == 5
    assert_expected_inline(
        graph_diff(before, gm, context=0),
        """\
  ...
- layer_norm: f32[2, 6, 4] = aten.layer_norm.default(x_1, [4])
- unsqueeze: f32[2, 1, 6, 4] = aten.unsqueeze.default(layer_norm, 1)
- scaled_dot_product_attention: f32[2, 1, 6, 4] = aten.scaled_dot_product_attention.default(unsqueeze, unsqueeze, unsqueeze)
- squeeze: f32[2, 6, 4] = aten.squeeze.dim(scaled_dot_product_attention, 1)
- linear: f32[2, 6, 4] = aten.linear.default(squeeze, w_1)
  ...""",
    )
    (record,) = run_passes(gm, DropDeadCode())
    assert record.sites == 0


def test_writes_inputs_and_what_they_read_stay() -> None:
    def function(state: Tensor, unused: Tensor, x: Tensor) -> Tensor:
        F.scaled_dot_product_attention(x.sin(), x, x)
        state.copy_(x.cos())
        return x * 2

    inputs = [torch.zeros(2, 3), torch.zeros(5), torch.ones(2, 3)]
    gm = trace(function, *inputs)
    (record,) = run_passes(gm, DropDeadCode())
    assert record.sites == 2
    assert_expected_inline(
        render(gm),
        """\
state_1: f32[2, 3] = input
unused_1: f32[5] = input
x_1: f32[2, 3] = input
cos: f32[2, 3] = aten.cos.default(x_1)
copy_: f32[2, 3] = aten.copy_.default(state_1, cos)
mul: f32[2, 3] = aten.mul.Tensor(x_1, 2)
return mul""",
    )
    assert equal(gm(*inputs), torch.full((2, 3), 2.0))
    assert torch.equal(inputs[0], torch.ones(2, 3).cos())


def test_state_that_no_step_reads_goes() -> None:
    def record(x: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
        s1.copy_(x)
        s2.copy_(x * 2)
        return x + 1

    values = tensors()
    gm = graph(record, x=values["x"], s1=values["s1"], s2=values["s1"].clone())
    assert_expected_inline(
        run(gm, DropUnreadState(read=frozenset({FeatureSlot("s1", "image")})))[1],
        """\
  ...
- s2: f32[2, 5, 3] = input
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(x, 2)
- copy__1: f32[2, 5, 3] = aten.copy_.default(s2, mul)
  ...""",
    )
    assert run(gm, DropUnreadState(read=frozenset({FeatureSlot("s1", "image")})))[0] == 0
