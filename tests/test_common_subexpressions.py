"""`CommonSubexpressions`: the graph before and after, where it must not fire, numerics."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

from hero_fx.passes.render import op_count
from hero_fx.passes.simplify.common_subexpressions import CommonSubexpressions

from .support.step_graphs import assert_same, graph, must_not_fire, run, tensors


class Diff(expecttest.TestCase):
    def test_common_subexpressions(self) -> None:
        def twice(x: Tensor, idx: Tensor) -> Tensor:
            return torch.index_select(x, 1, idx) + torch.index_select(x, 1, idx) * 2

        inputs = {name: tensors()[name] for name in ("x", "idx")}
        self.assertExpectedInline(
            run(graph(twice, **inputs), CommonSubexpressions())[1],
            """\
  ...
- index_select_1: f32[2, 2, 3] = aten.index_select.default(x, 1, idx)
- mul: f32[2, 2, 3] = aten.mul.Tensor(index_select_1, 2)
+ mul: f32[2, 2, 3] = aten.mul.Tensor(index_select, 2)
  ...""",
        )


def test_random_ops_are_not_shared() -> None:
    def noise(x: Tensor) -> Tensor:
        return x + torch.rand_like(x) + torch.rand_like(x)

    must_not_fire(noise, CommonSubexpressions(), x=tensors()["x"])


@pytest.mark.parametrize("how", ["slice", "diagonal", "out", "of the view that is read"])
def test_nothing_is_shared_across_a_write(how: str) -> None:
    def around(x: Tensor, v: Tensor) -> Tensor:
        part = x[0] if how == "of the view that is read" else x
        before = part.sin()
        if how == "slice":
            x[:, 1:3].copy_(v)
        elif how == "diagonal":
            x[0, :3].diagonal().add_(1)
        elif how == "out":
            torch.cos(v, out=x[:, :2])
        else:
            x.mul_(2)
        return before + part.sin()

    inputs = {n: tensors()[n] for n in ("x", "v")}
    must_not_fire(around, CommonSubexpressions(), **inputs)


def test_writes_elsewhere_do_not_matter_and_equals_behind_one_are_shared() -> None:
    def around(x: Tensor, v: Tensor) -> Tensor:
        before = x.sin()
        v[:, 0].zero_()
        same = x.sin()
        x[:, 0].zero_()
        return before + same + x.sin() + x.sin()

    inputs = {n: tensors()[n] for n in ("x", "v")}
    gm, before = graph(around, **inputs), graph(around, **inputs)
    assert run(gm, CommonSubexpressions())[0] == 2
    assert_same(before, gm, inputs)


def test_results_that_are_written_or_returned_both_are_not_shared() -> None:
    def written(x: Tensor) -> Tensor:
        a, b = x[0].sin(), x[0].sin()
        a.diagonal().zero_()
        return a + b

    def returned(x: Tensor) -> Any:
        a, b = x.sin(), x.sin()
        return a, b[0]

    for function in (written, returned):
        gm, inputs = graph(function, x=tensors()["x"]), {"x": tensors()["x"]}
        run(gm, CommonSubexpressions())
        assert op_count(gm, "aten.sin")["aten.sin"] == 2
        assert_same(graph(function, **inputs), gm, inputs)


def test_regions_of_autocast_are_not_shared_across() -> None:
    def mixed(x: Tensor) -> Tensor:
        a = x @ x.mT
        with torch.autocast("cpu", torch.bfloat16):
            b = x @ x.mT
        return a + b

    gm = graph(mixed, x=tensors()["x"])
    run(gm, CommonSubexpressions())
    assert op_count(gm, "aten.matmul")["aten.matmul"] == 2
