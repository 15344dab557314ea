"""`JoinGroups`: the graph before and after, where it must not fire, numerics. End to end: sana_wm of test_zoo.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from hero_fx.passes.normalize.join_groups import JoinGroups
from hero_fx.passes.render import graph_diff
from hero_fx.step_graphs import copy_graph

from .support.tracing import equal, run_passes, trace


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def applied(function: Any, *values: Tensor) -> tuple[Any, Any, int]:
    """The graph of a function, the same after the pass, and the sites it reports."""
    before = trace(function, *values)
    after = copy_graph(before)
    (record,) = run_passes(after, JoinGroups())
    return before, after, record.sites


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """A scale and a shift for each of 3 frames of 5 tokens."""
    return (x.reshape(2, 3, 5, 7) * (1 + scale) + shift).reshape(2, 15, 7).relu()


def test_graph() -> None:
    before, after, sites = applied(modulated, *inputs((2, 15, 7), (2, 3, 1, 7), (5, 1)))
    assert sites == 1
    assert_expected_inline(
        graph_diff(before, after),
        """\
  x_1: f32[2, 15, 7] = input
  scale_1: f32[2, 3, 1, 7] = input
  shift_1: f32[5, 1] = input
- reshape: f32[2, 3, 5, 7] = aten.reshape.default(x_1, [2, 3, 5, 7])
  add: f32[2, 3, 1, 7] = aten.add.Tensor(scale_1, 1)
- mul: f32[2, 3, 5, 7] = aten.mul.Tensor(reshape, add)
- add_1: f32[2, 3, 5, 7] = aten.add.Tensor(mul, shift_1)
- reshape_1: f32[2, 15, 7] = aten.reshape.default(add_1, [2, 15, 7])
- relu: f32[2, 15, 7] = aten.relu.default(reshape_1)
+ expand_default: f32[2, 3, 5, 7] = aten.expand.default(add, [2, 3, 5, 7])
+ reshape_default: f32[2, 15, 7] = aten.reshape.default(expand_default, [2, 15, 7])
+ mul_tensor: f32[2, 15, 7] = aten.mul.Tensor(x_1, reshape_default)
+ expand_default_1: f32[3, 5, 1] = aten.expand.default(shift_1, [3, 5, 1])
+ reshape_default_1: f32[15, 1] = aten.reshape.default(expand_default_1, [15, 1])
+ add_tensor: f32[2, 15, 7] = aten.add.Tensor(mul_tensor, reshape_default_1)
+ relu: f32[2, 15, 7] = aten.relu.default(add_tensor)
  return relu""",
    )


def between_streams(x: Tensor, y: Tensor, gate: Tensor) -> Any:
    """Two splits meet, and two joins follow."""
    groups = x.unflatten(1, (3, 5)) + gate * y.unflatten(1, (3, 5))
    return groups.flatten(1, 2).sin(), groups.to(torch.float64).view(2, 15, 7)


def by_place(x: Tensor, table: Tensor) -> Any:
    """One value for each place in a group, and one for all."""
    return (x.view(2, 3, 5, 7) * table).addcmul(table[:, :1], table[0]).flatten(1, 2)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (modulated, [(2, 15, 7), (2, 3, 1, 7), (5, 1)]),
        (modulated, [(2, 15, 7), (7,), (1, 1, 1)]),
        (modulated, [(2, 15, 7), (3, 5, 7), (2, 3, 5, 7)]),
        (between_streams, [(2, 15, 7), (2, 15, 7), (2, 3, 1, 1)]),
        (by_place, [(2, 15, 7), (5, 7)]),
    ],
)
def test_numerics(function: Any, shapes: list[tuple[int, ...]]) -> None:
    values = inputs(*shapes)
    _, after, sites = applied(function, *values)
    assert sites
    assert equal(after(*values), function(*values))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: (x.reshape(2, 15, 1, 7) * t).reshape(2, 15, 7),  # an axis of its own for each token, no groups
        lambda x, t: (x.reshape(2, 15, 7, 1) * 2).reshape(2, 15, 7),  # of channels
        lambda x, t: (x.reshape(2, 3, 5, 7) * t).transpose(1, 2).reshape(2, 15, 7),  # joined in another order
        lambda x, t: (x.reshape(2, 3, 5, 7) * t).sum(1),  # not joined
        lambda x, t: (y := x.reshape(2, 3, 5, 7) * t, y.reshape(2, 15, 7)),  # nor all of it
        lambda x, t: x.reshape(2, 3, 5, 7).reshape(2, 15, 7) * t[0],  # no arithmetic between
    ],
    ids=["each token", "channels", "other order", "not joined", "not all joined", "no arithmetic"],
)
def test_must_not_fire(function: Any) -> None:
    before, after, sites = applied(function, *inputs((2, 15, 7), (1, 7)))
    assert (sites, graph_diff(before, after)) == (0, "")
