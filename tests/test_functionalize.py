"""`hero_fx.passes.normalize.functionalize`: in-place ops become functional, whatever else reads the memory they write to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from hero_fx.passes.normalize.functionalize import Functionalize
from hero_fx.passes.ops import is_in_place
from hero_fx.passes.render import graph_diff, render

from .support.tracing import equal, run_passes, trace

Function = Callable[[Tensor], Any]


def mutable(gm: fx.GraphModule) -> list[str]:
    """Ops left in a graph that write to their arguments."""
    ops = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [str(op) for op in ops if op._schema.is_mutable]


def check(function: Function, *, left: int = 0, shape: tuple[int, ...] = (2, 3, 4)) -> fx.GraphModule:
    """The functional graph of `function` computes the same, and leaves its input as `function` does."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected_input, our_input = x.clone(), x.clone()
    gm = trace(function, x)
    before = len(mutable(gm))
    (record,) = run_passes(gm, Functionalize())
    assert record.sites == before - left
    assert len(mutable(gm)) == left
    assert equal(gm(our_input), function(expected_input))
    assert equal(our_input, expected_input)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        assert node.op == "output" or value is not None, f"{node.name} has no fake value"
    return gm


WRITES: list[Function] = []
LEFT: list[Function] = []


def name(function: Function) -> str:
    return function.__name__


@WRITES.append
def to_a_slice(x: Tensor) -> Any:
    t = x * 2
    t[:, 1:] = x[:, :2] + 1
    return t


@WRITES.append
def to_one_index(x: Tensor) -> Any:
    t = x * 2
    t[0, 1] = 5.0
    t[:, :, 0] = x[0, 0, 0]
    return t


@WRITES.append
def to_every_second_channel_as_in_wans_rotary(x: Tensor) -> Any:
    out = torch.empty_like(x)
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    out[..., 0::2] = real * 2 - imag
    out[..., 1::2] = real + imag * 3
    return out.type_as(x)


@WRITES.append
def to_nested_views(x: Tensor) -> Any:
    t = x * 2
    t[1:].transpose(1, 2)[:, 2:].copy_(x[1:, :, 2:].transpose(1, 2) + 1)
    t.permute(2, 0, 1)[0].fill_(3)
    t.unsqueeze(0).squeeze(0).flatten(1).narrow(1, 3, 4).neg_()
    return t


@WRITES.append
def to_parts_of_a_split(x: Tensor) -> Any:
    t = x * 2
    a, b = t.chunk(2, dim=-1)
    a.mul_(3)
    c, d = t.split([1, 2], dim=1)
    d[:, 0] = 7.0
    e, f = t.unflatten(-1, (2, 2)).unbind(-1)
    e.add_(f)
    return t, a, b, c, d, e, f


@WRITES.append
def in_two_dtypes(x: Tensor) -> Any:
    t = x.to(torch.bfloat16) * 2
    t.mul_(x + 0.1)
    t[:, :2] = x[:, 1:]
    return t


@WRITES.append
def of_many_kinds(x: Tensor) -> Any:
    t = x * 2
    t[torch.tensor([1])] = 1.0
    t[t > 2] = 0.0
    t.masked_fill_(t < -1, 3.0).clamp_(-2, 2)
    t += x
    t -= 1
    t *= x
    t /= 2
    t[:, :1].zero_()
    torch.nn.functional.relu(t, inplace=True)
    return t.sigmoid_().sub_(1, alpha=3)


@WRITES.append
def to_a_whole_tensor(x: Tensor) -> Any:
    t = torch.empty(2, 4, 3)
    t.copy_(x.transpose(1, 2))
    return t.view(2, 12)


@WRITES.append
def twice_to_one_view(x: Tensor) -> Any:
    t = x * 2
    part = t[:, :2]
    part.mul_(3)
    part.add_(1).neg_()
    return t, part


@WRITES.append
def and_reads_an_older_view(x: Tensor) -> Any:
    t = x * 2
    view = t.view(2, 12)
    window, (left, right) = view[:, 3:7], t.chunk(2, dim=-1)
    t.add_(1)
    return window * 1, left + right


@WRITES.append
def through_an_older_view(x: Tensor) -> Any:
    t = x * 2
    view = t.view(2, 12)
    window = view[:, 3:7]
    t.add_(1)
    view.mul_(2)
    return window * 1, view, t


@WRITES.append
def and_swaps_halves(x: Tensor) -> Any:
    t = x * 2
    first = t[:, :1].clone()
    t[:, :1] = t[:, 2:]
    t[:, 2:] = first
    return t


@WRITES.append
def to_a_copy_but_not_to_what_was_copied(x: Tensor) -> Any:
    a, b, s = torch.empty_like(x), torch.empty_like(x).view(2, 12), x * 2
    a.copy_(x)
    a.add_(1)
    b.copy_(s.view(2, 12))
    b.add_(1)
    return a, b, s, x.clone().mul_(2)


@WRITES.append
def to_what_is_the_same_tensor_again(x: Tensor) -> Any:
    t = x * 2
    t.contiguous().mul_(2)
    t.to(torch.float32).add_(1)
    t.detach()[0].zero_()
    torch.dropout(t, 0.3, train=False).sub_(x)
    return t


@WRITES.append
def to_no_value_but_to_the_shape(x: Tensor) -> Any:
    t = (x * 2).detach_()
    part = t[0]
    part.unsqueeze_(0)
    part.mul_(2)
    t.add_(1)
    return t, part.squeeze_(0) + 1


@pytest.mark.parametrize("function", WRITES, ids=name)
def test_write(function: Function) -> None:
    check(function)


VIEWS: dict[str, Function] = {
    "slice": lambda t: t[:, 1:],
    "step": lambda t: t[..., ::2],
    "select": lambda t: t[0][None],
    "flip": lambda t: t.transpose(0, -1),
    "permute": lambda t: t.permute(*range(1, t.dim()), 0),
    "split": lambda t: t.split([1, t.shape[0] - 1])[1] if t.shape[0] > 1 else t.unbind(0)[0],
    "unsqueeze": lambda t: t.unsqueeze(1),
    "chunk": lambda t: t.chunk(2, dim=-1)[0],
}
STEPS = st.tuples(st.sampled_from([*VIEWS, "mul_", "copy_", "copy_ from another", "add_ another"]), st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=9))
def test_writes_and_views_in_any_order(steps: list[tuple[str, int]]) -> None:
    def function(x: Tensor) -> Any:
        known = [x * 2, x * 3]
        for step, number in steps:
            target, other = known[number % len(known)], known[number // 7 % len(known)]
            match step:
                case "mul_":
                    target.mul_(number)
                case "copy_":
                    target.copy_(x.flatten()[0] + number)
                case "copy_ from another":
                    target.copy_(other.clone().flatten()[0])
                case "add_ another":
                    target.add_(other.flatten()[-1].clone(), alpha=2)
                case _ if min(target.shape, default=0) > 0 and target.dim() > 1:
                    known.append(VIEWS[step](target))
        return [t + 0 for t in known]

    check(function)


@LEFT.append
def to_the_input(x: Tensor) -> Any:
    x[:, 0] = 1.0
    return x * 2


@LEFT.append
def to_a_view_of_the_input(x: Tensor) -> Any:
    x.view(2, 12)[:, 3:5].add_(1)
    return x * 2


@LEFT.append
def through_a_view_without_scatter(x: Tensor) -> Any:
    t = x[0, :3, :3] * 2
    diagonal = t.diagonal().add_(1)
    t.mul_(3)
    return t, diagonal


@LEFT.append
def to_an_out_argument(x: Tensor) -> Any:
    y = torch.empty(2, 3, 4)
    torch.cos(x, out=y)
    return x + y


@LEFT.append
def behind_a_copy_of_the_input(x: Tensor) -> Any:
    t = torch.empty_like(x)
    t.copy_(x)
    x.mul_(2)
    return t + x


@pytest.mark.parametrize("function", LEFT, ids=name)
def test_a_write_that_others_can_see_or_that_has_no_functional_form_is_left_alone(function: Function) -> None:
    check(function, left=1)


def rotary(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """How CogVideoX turns the image part of its queries."""
    query = query * 3
    part = query[:, 2:]
    query[:, 2:] = part * cos + part.flip(-1) * sin
    return query.sum(1)


def test_graph_of_a_slice_assignment() -> None:
    gm = trace(rotary, torch.ones(2, 5, 4), torch.ones(3, 4), torch.ones(3, 4))
    before = copy.deepcopy(gm)
    (record,) = run_passes(gm, Functionalize())
    assert record.sites == 1
    assert_expected_inline(
        graph_diff(before, gm, context=1),
        """\
  ...
  add: f32[2, 3, 4] = aten.add.Tensor(mul_1, mul_2)
- slice_2: f32[2, 3, 4] = aten.slice.Tensor(mul, 1, 2, 9223372036854775807)
- copy_: f32[2, 3, 4] = aten.copy_.default(slice_2, add)
- sum_1: f32[2, 4] = aten.sum.dim_IntList(mul, [1])
+ slice_scatter_default: f32[2, 5, 4] = aten.slice_scatter.default(mul, add, 1, 2, 9223372036854775807)
+ sum_1: f32[2, 4] = aten.sum.dim_IntList(slice_scatter_default, [1])
  return sum_1""",
    )


def test_nothing_to_do() -> None:
    gm = trace(lambda x: (x * 2)[:, 1:].add(1), torch.ones(2, 3, 4))
    before = render(gm)
    (record,) = run_passes(gm, Functionalize())
    assert record.sites == 0
    assert render(gm) == before


def test_what_counts_as_in_place() -> None:
    gm = trace(lambda x: torch.cos(x * 2, out=torch.empty_like(x)).mul_(2), torch.ones(2, 3))
    assert [node.name for node in gm.graph.nodes if is_in_place(node)] == ["mul_"]
