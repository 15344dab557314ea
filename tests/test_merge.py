"""`MergeCaches`: the graphs before and after, where caches are not merged, numerics."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.simplify.merge import MergeCaches
from hero_fx.passes.simplify.summands import find_merges
from hero_fx.passes.slots import FeatureSlot

from .support.step_graphs import B, D, N, graph, outputs, run, tensors


class Diff(expecttest.TestCase):
    def test_merge_caches(self) -> None:
        cached, full, merges = two_branches()
        self.assertExpectedInline(
            run(cached, MergeCaches(merges=merges))[1],
            """\
  ...
- s1: f32[2, 5, 3] = input
- s2: f32[2, 5, 3] = input
- s3: f32[2, 5, 3] = input
- s4: f32[2, 5, 3] = input
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(s2, w)
- add: f32[2, 5, 3] = aten.add.Tensor(s1, mul)
+ sum_s1_image_y0: f32[2, 5, 3] = input
+ sum_s2_image_y0: f32[2, 5, 3] = input
+ mul: f32[2, 5, 3] = aten.mul.Tensor(sum_s2_image_y0, w)
+ add: f32[2, 5, 3] = aten.add.Tensor(sum_s1_image_y0, mul)
  ...
- mul_1: f32[2, 5, 3] = aten.mul.Tensor(s4, w)
- add_2: f32[2, 5, 3] = aten.add.Tensor(s3, mul_1)
- add_3: f32[2, 5, 3] = aten.add.Tensor(add_1, add_2)
- return add_3
+ return add_1""",
        )
        self.assertExpectedInline(
            run(full, MergeCaches(merges=merges), DropDeadCode())[1],
            """\
  ...
- s1: f32[2, 5, 3] = input
- s2: f32[2, 5, 3] = input
- s3: f32[2, 5, 3] = input
- s4: f32[2, 5, 3] = input
  ...
+ sum_s1_image_y0: f32[2, 5, 3] = input
+ sum_s2_image_y0: f32[2, 5, 3] = input
  ...
- sub: f32[2, 5, 3] = aten.sub.Tensor(sin, s1)
- mul: f32[2, 5, 3] = aten.mul.Tensor(sub, w)
- sub_1: f32[2, 5, 3] = aten.sub.Tensor(cos, s3)
- mul_1: f32[2, 5, 3] = aten.mul.Tensor(sub_1, w)
- copy_: f32[2, 5, 3] = aten.copy_.default(s1, sin)
- copy__1: f32[2, 5, 3] = aten.copy_.default(s2, mul)
- copy__2: f32[2, 5, 3] = aten.copy_.default(s3, cos)
- copy__3: f32[2, 5, 3] = aten.copy_.default(s4, mul_1)
+ sub_tensor: f32[2, 5, 3] = aten.sub.Tensor(add_1, x)
+ sub_tensor_1: f32[2, 5, 3] = aten.sub.Tensor(sub_tensor, sum_s1_image_y0)
+ mul_tensor: f32[2, 5, 3] = aten.mul.Tensor(sub_tensor_1, w)
+ copy__default: f32[2, 5, 3] = aten.copy_.default(sum_s1_image_y0, sub_tensor)
+ copy__default_1: f32[2, 5, 3] = aten.copy_.default(sum_s2_image_y0, mul_tensor)
  ...""",
        )


def two_branches() -> tuple[GraphModule, GraphModule, Any]:
    """A cached and a full step of two extrapolated branches, and what can be merged in them."""

    def cached(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor) -> Tensor:
        return x + (s1 + s2 * w) + (s3 + s4 * w)

    def full(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor) -> Tensor:
        u = x.sin()
        y = x + u
        v = y.cos()
        z = y + v
        d1, d2 = (u - s1) * w, (v - s3) * w
        s1.copy_(u)
        s2.copy_(d1)
        s3.copy_(v)
        s4.copy_(d2)
        return z

    inputs = merge_inputs()
    graphs = graph(cached, **inputs), graph(full, **inputs)
    families = [
        (FeatureSlot("s1", "image"), FeatureSlot("s2", "image")),
        (FeatureSlot("s3", "image"), FeatureSlot("s4", "image")),
    ]
    return *graphs, find_merges([graphs[0]], families)


def merge_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(B, N, D, generator=generator) for name in ("x", "s1", "s2", "s3", "s4")}
    return inputs | {"w": torch.tensor(0.5)}


def test_merged_caches_keep_results() -> None:
    cached, full, merges = two_branches()
    inputs = merge_inputs()
    z = outputs(full, inputs)[0]
    plain = outputs(cached, inputs)[0]
    for gm in (cached, full):
        run(gm, MergeCaches(merges=merges), DropDeadCode())
    sums = {"x": inputs["x"], "w": inputs["w"], "m1": inputs["s1"] + inputs["s3"], "m2": inputs["s2"] + inputs["s4"]}
    torch.testing.assert_close(cached(*sums.values()), plain)
    result, after = outputs(full, sums)
    torch.testing.assert_close(result, z)
    # Recorded sums are the sums of what was recorded.
    u, y = inputs["x"].sin(), inputs["x"] + inputs["x"].sin()
    torch.testing.assert_close(after[2], u + y.cos())
    torch.testing.assert_close(after[3], (u + y.cos() - sums["m1"]) * 0.5)


def test_a_sum_of_caches_alone_is_not_the_state() -> None:
    """The sum is returned, and the state it would be is written to at the next step."""

    def cached(s1: Tensor, s2: Tensor) -> Tensor:
        return s1 + s2

    gm = graph(cached, **{n: merge_inputs()[n] for n in ("s1", "s2")})
    merges = find_merges([gm], [(FeatureSlot("s1", "image"),), (FeatureSlot("s2", "image"),)])
    assert run(gm, MergeCaches(merges=merges))[0] == 1
    state = torch.ones(B, N, D)
    out = gm(state)
    state.zero_()
    assert torch.equal(out, torch.ones(B, N, D))


@pytest.mark.parametrize("case", ["live gate", "read between", "other weight"])
def test_caches_are_not_merged(case: str) -> None:
    def cached(x: Tensor, s1: Tensor, s2: Tensor, w: Tensor, gate: Tensor) -> Any:
        if case == "live gate":
            return x + gate * s1 + gate * s2
        if case == "read between":
            between = x + s1
            return between + s2, between.sin()
        return x + s1 * w + s2

    values = tensors()
    inputs = {"x": values["x"], "s1": values["s1"], "s2": values["s1"].clone(), "w": torch.tensor(2.0)}
    gm = graph(cached, **inputs, gate=values["gate"])
    merges = find_merges([gm], [(FeatureSlot("s1", "image"),), (FeatureSlot("s2", "image"),)])
    # One sum with one leaf in front of `between` is still a sum; what matters is that s1 and s2 do not become one.
    assert merges == ()
    assert MergeCaches(merges=merges).apply(gm) == 0
