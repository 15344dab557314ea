"""`SinkScatters` and `ForwardGathers`: the graphs before and after, where they must not fire, numerics."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

from hero_fx.passes.pipeline import Pass
from hero_fx.passes.render import op_count
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.passes.simplify.common_subexpressions import CommonSubexpressions
from hero_fx.passes.simplify.scatters import ForwardGathers, SinkScatters
from hero_fx.passes.simplify.write_rows import WriteRows

from .support.step_graphs import assert_same, block, graph, must_not_fire, run, tensors


class Diffs(expecttest.TestCase):
    def test_sink_scatters(self) -> None:
        _, diff = run(graph(block, **tensors()), SinkScatters(), DropDeadCode())
        self.assertExpectedInline(
            diff,
            """\
  ...
- mul: f32[2, 5, 3] = aten.mul.Tensor(gate, index_copy)
- add: f32[2, 5, 3] = aten.add.Tensor(x, mul)
+ mul_tensor: f32[2, 5, 3] = aten.mul.Tensor(gate, s1)
+ mul_tensor_1: f32[2, 2, 3] = aten.mul.Tensor(gate, v)
+ index_select_default: f32[2, 2, 3] = aten.index_select.default(x, 1, idx)
+ add_tensor: f32[2, 5, 3] = aten.add.Tensor(x, mul_tensor)
+ add_tensor_1: f32[2, 2, 3] = aten.add.Tensor(index_select_default, mul_tensor_1)
+ index_copy_default_1: f32[2, 5, 3] = aten.index_copy.default(add_tensor, 1, idx, add_tensor_1)
  ...
- index_select: f32[2, 2, 3] = aten.index_select.default(add, 1, idx)
+ index_select: f32[2, 2, 3] = aten.index_select.default(index_copy_default_1, 1, idx)
  ...
- return (mul_1, add)
+ return (mul_1, index_copy_default_1)""",
        )

    def test_forward_gathers(self) -> None:
        gm = graph(block, **tensors())
        run(gm, SinkScatters(), DropDeadCode())
        self.assertExpectedInline(
            run(gm, ForwardGathers())[1],
            """\
  ...
- index_select: f32[2, 2, 3] = aten.index_select.default(index_copy_default_1, 1, idx)
- mul_1: f32[2, 2, 3] = aten.mul.Tensor(index_select, 2)
+ mul_1: f32[2, 2, 3] = aten.mul.Tensor(add_tensor_1, 2)
  ...""",
        )


@pytest.mark.parametrize(
    "passes",
    [
        (CommonSubexpressions(),),
        (SinkScatters(),),
        (SinkScatters(), ForwardGathers()),
        (SinkScatters(), ForwardGathers(), CommonSubexpressions(), DropDeadCode(), WriteRows()),
        (WriteRows(),),
    ],
    ids=lambda passes: "-".join(p.name for p in passes),
)
def test_rewrites_keep_results_and_state(passes: tuple[Pass, ...]) -> None:
    before, after = graph(block, **tensors()), graph(block, **tensors())
    run(after, *passes)
    assert_same(before, after, tensors())


def test_scatter_stays_where_indices_differ() -> None:
    def two(x: Tensor, s1: Tensor, v: Tensor, idx: Tensor, idx1: Tensor) -> Tensor:
        return torch.index_copy(x, 1, idx, v) + torch.index_copy(s1, 1, idx1, v)

    values = tensors()
    inputs = {n: values[n] for n in ("x", "s1", "v", "idx")} | {"idx1": torch.tensor([0, 2])}
    must_not_fire(two, SinkScatters(), **inputs)


def test_scatter_stays_where_nothing_gathers() -> None:
    def last(x: Tensor, s1: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        return x + torch.index_copy(s1, 1, idx, v)

    must_not_fire(last, SinkScatters(), **{n: tensors()[n] for n in ("x", "s1", "v", "idx")})


def test_gather_stays_where_axes_differ() -> None:
    def across(x: Tensor, v: Tensor, idx: Tensor) -> Tensor:
        return torch.index_select(torch.index_copy(x, 1, idx, v), 2, idx)

    values = tensors()
    idx = torch.tensor([0, 2])
    must_not_fire(across, ForwardGathers(), x=values["x"], v=values["v"], idx=idx)


@pytest.mark.parametrize("one", [SinkScatters(), ForwardGathers(), WriteRows()], ids=lambda p: p.name)
@pytest.mark.parametrize("dim", [1, -2])
def test_scatters_by_an_index_of_the_models_own_stay(one: Pass, dim: int) -> None:
    """Its indices may repeat, and its axis may be counted from the right: rows of x would not be those of the table."""

    def own(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, own: Tensor) -> Tensor:
        merged = torch.index_copy(s1, dim, own, v)
        out = x + gate * merged
        gathered = torch.index_select(merged, dim, own) + torch.index_select(out, dim, own)
        s1.copy_(merged)
        return gathered

    values = tensors()
    inputs = {n: values[n] for n in ("x", "s1", "v", "gate")} | {"own": torch.tensor([2, 2])}
    must_not_fire(own, one, **inputs)


def test_scatters_that_the_model_writes_to_stay() -> None:
    def written(x: Tensor, s1: Tensor, v: Tensor, gate: Tensor, idx: Tensor) -> Any:
        merged = torch.index_copy(s1, 1, idx, v)
        out = x + gate * merged
        out[0, :3].diagonal().add_(1)  # has no functional form
        rows = torch.index_select(out, 1, idx)
        s1.copy_(merged)
        return rows, out

    inputs = tensors()
    before, after = graph(written, **inputs), graph(written, **inputs)
    run(after, SinkScatters(), ForwardGathers(), DropDeadCode(), WriteRows())
    assert op_count(after, "aten.index_select")["aten.index_select"] == 1
    assert_same(before, after, inputs)
