"""Merging caches that an extrapolated refresh reads twice: whole in the sum, and the sampled rows of Y_1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import TestCase
from torch import Tensor
from torch.fx import GraphModule

import hero_fx
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.simplify.merge import MergeCaches
from hero_fx.passes.simplify.summands import find_merges
from hero_fx.passes.slots import FeatureSlot

from .support import toys
from .support.step_graphs import graph, run, tensors

FAMILIES = [
    (FeatureSlot("s1", "image"), FeatureSlot("s2", "image")),
    (FeatureSlot("s3", "image"), FeatureSlot("s4", "image")),
]


def cached(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor, idx: Tensor, v: Tensor) -> Tensor:
    """Two extrapolated branches, cached behind the gate, refreshed to v and v^2 where sampled."""
    result = x + (s1 + s2 * w) + (s3 + s4 * w)
    first = v - s2.index_select(1, idx) * w
    second = v * v - s4.index_select(1, idx) * w
    s1.index_copy_(1, idx, first)
    s3.index_copy_(1, idx, second)
    return result


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    known = tensors()
    state = {name: torch.randn(known["x"].shape, generator=generator) for name in ("x", "s1", "s2", "s3", "s4")}
    return state | {"w": torch.tensor(0.5), "idx": known["idx"], "v": known["v"]}


def merged(function: Any) -> tuple[GraphModule, GraphModule, Any]:
    before, after = graph(function, **inputs()), graph(function, **inputs())
    return before, after, find_merges([after], FAMILIES)


class Diffs(TestCase):
    def test_rows_of_the_difference_are_merged_too(self) -> None:
        _, gm, merges = merged(cached)
        _, diff = run(gm, MergeCaches(merges=merges), DropDeadCode())
        self.assertExpectedInline(
            diff,
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
- index_select: f32[2, 2, 3] = aten.index_select.default(s2, 1, idx)
+ index_select: f32[2, 2, 3] = aten.index_select.default(sum_s2_image_y0, 1, idx)
  ...
- index_select_1: f32[2, 2, 3] = aten.index_select.default(s4, 1, idx)
- mul_4: f32[2, 2, 3] = aten.mul.Tensor(index_select_1, w)
- sub_1: f32[2, 2, 3] = aten.sub.Tensor(mul_3, mul_4)
- index_copy_: f32[2, 5, 3] = aten.index_copy_.default(s1, 1, idx, sub)
- index_copy__1: f32[2, 5, 3] = aten.index_copy_.default(s3, 1, idx, sub_1)
- return add_3
+ add_tensor: f32[2, 2, 3] = aten.add.Tensor(sub, mul_3)
+ index_copy__default: f32[2, 5, 3] = aten.index_copy_.default(sum_s1_image_y0, 1, idx, add_tensor)
+ return add_1""",
        )


def test_merged_rows_keep_results_and_state() -> None:
    before, after, merges = merged(cached)
    assert len(merges) == 1
    run(after, MergeCaches(merges=merges), DropDeadCode())
    given = inputs()
    plain = before(*given.values())
    sums = {"m1": inputs()["s1"] + inputs()["s3"], "m2": inputs()["s2"] + inputs()["s4"]}
    names = [node.name for node in after.graph.find_nodes(op="placeholder")]
    state = iter(sums.values())
    torch.testing.assert_close(after(*[given[n] if n in ("x", "w", "idx", "v") else next(state) for n in names]), plain)
    # `before` has written to s1 and s3, `after` to their sum.
    torch.testing.assert_close(sums["m1"], given["s1"] + given["s3"])


def test_rows_that_are_read_elsewhere_are_not_merged() -> None:
    def shown(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor, idx: Tensor, v: Tensor) -> Any:
        rows = s2.index_select(1, idx) * w
        result = x + (s1 + s2 * w) + (s3 + s4 * w)
        s1.index_copy_(1, idx, v - rows)
        s3.index_copy_(1, idx, v - s4.index_select(1, idx) * w)
        return result, rows

    assert merged(shown)[2] == ()


def test_rows_that_go_into_another_cache_are_not_merged() -> None:
    def crossed(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor, s4: Tensor, w: Tensor, idx: Tensor, v: Tensor) -> Tensor:
        result = x + (s1 + s2 * w) + (s3 + s4 * w)
        first, second = v - s4.index_select(1, idx) * w, v - s2.index_select(1, idx) * w
        s1.index_copy_(1, idx, first)
        s3.index_copy_(1, idx, second)
        return result

    assert merged(crossed)[2] == ()


def test_gates_that_differ_from_token_to_token_cannot_be_followed() -> None:
    """A timestep for each token makes a gate for each token; to reuse in silence would not be what was asked for."""
    backend = hero_fx.backend(unsampled="gate", grid=toys.GRID)
    one = torch.full((2,), 7)
    assert hero_fx.trace(toys.toy(), toys.latents(), one, backend=backend).cached
    with pytest.raises(ValueError, match="none to follow; use 'reuse' or 'extrapolate'"):
        hero_fx.trace(toys.toy(), toys.latents(), one[:, None].expand(2, toys.TOKENS), backend=backend)
