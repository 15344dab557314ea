"""`UnflattenProducts`: graphs before and after, where it must not fire, numerics. End to end: int8 weights, test_model_forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from hero_fx.passes.normalize.functionalize import Functionalize
from hero_fx.passes.normalize.unflatten import UnflattenProducts
from hero_fx.passes.render import graph_diff
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.step_graphs import copy_graph

from .support.tracing import equal, run_passes, trace


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def int8_linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Any:
    """As torchao writes it: the bias is added in place to a view of the flat product."""
    y = (torch.mm(x.reshape(-1, 5), w) * scale).reshape(2, 3, 7)
    y += bias
    return y.relu()


def applied(function: Any, *values: Tensor) -> tuple[Any, Any, int]:
    """The functional graph of a function, the same after the pass, and the sites it reports."""
    before = trace(function, *values)
    run_passes(before, Functionalize(), DropDeadCode())
    after = copy_graph(before)
    record, _ = run_passes(after, UnflattenProducts(), DropDeadCode())
    return before, after, record.sites


def test_graph() -> None:
    before, after, sites = applied(int8_linear, *inputs((2, 3, 5), (5, 7), (7,), (7,)))
    assert sites == 2
    assert_expected_inline(
        graph_diff(before, after),
        """\
  ...
  scale_1: f32[7] = input
  bias_1: f32[7] = input
- reshape: f32[6, 5] = aten.reshape.default(x_1, [-1, 5])
- mm: f32[6, 7] = aten.mm.default(reshape, w_1)
- mul: f32[6, 7] = aten.mul.Tensor(mm, scale_1)
- reshape_1: f32[2, 3, 7] = aten.reshape.default(mul, [2, 3, 7])
- add_tensor: f32[2, 3, 7] = aten.add.Tensor(reshape_1, bias_1)
- reshape_default: f32[6, 7] = aten.reshape.default(add_tensor, [6, 7])
- reshape_default_1: f32[2, 3, 7] = aten.reshape.default(reshape_default, [2, 3, 7])
- relu: f32[2, 3, 7] = aten.relu.default(reshape_default_1)
+ matmul_default: f32[2, 3, 7] = aten.matmul.default(x_1, w_1)
+ mul_tensor: f32[2, 3, 7] = aten.mul.Tensor(matmul_default, scale_1)
+ add_tensor: f32[2, 3, 7] = aten.add.Tensor(mul_tensor, bias_1)
+ relu: f32[2, 3, 7] = aten.relu.default(add_tensor)
  return relu""",
    )


def reads_it_flat(x: Tensor, w: Tensor) -> Any:
    """The rows are sorted: that is not by row."""
    flat = torch.mm(x.reshape(-1, 5), w)
    return flat.sort(dim=0).values, flat.reshape(2, 3, 7)


def other_rows(x: Tensor, w: Tensor, rows: Tensor) -> Any:
    """What is added has rows of its own."""
    return (torch.mm(x.reshape(-1, 5), w) + rows).reshape(2, 3, 7)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (int8_linear, [(2, 3, 5), (5, 7), (7,), (7,)]),
        (reads_it_flat, [(2, 3, 5), (5, 7)]),
        (other_rows, [(2, 3, 5), (5, 7), (6, 7)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_numerics(function: Any, shapes: list[tuple[int, ...]]) -> None:
    values = inputs(*shapes)
    _, after, sites = applied(function, *values)
    assert sites
    assert equal(after(*values), function(*values))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.mm(x.reshape(10, 3), w[:3]),  # channels of two tokens in one row
        lambda x, w: torch.mm(x[0], w),  # flat from the start
        lambda x, w: (x @ w).reshape(-1, 7).reshape(2, 3, 7),  # no flat product
    ],
    ids=["channels split", "two axes", "no product"],
)
def test_must_not_fire(function: Any) -> None:
    before, after, sites = applied(function, *inputs((2, 3, 5), (5, 7)))
    assert (sites, graph_diff(before, after)) == (0, "")
