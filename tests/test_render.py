"""`hero_fx.passes.render`: text, diffs and op counts of small graphs."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._higher_order_ops.wrap import wrap
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from hero_fx.passes.render import graph_counts_diff, graph_diff, op_count, render


def trace(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    with FakeTensorMode():
        return make_fx(function, pre_dispatch=True)(*map(torch.empty, shapes))


def branch(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    first, second = functional.linear(x, w).split([2, 3], -1)
    return torch.add(first, first, alpha=2), second.to(torch.bfloat16)


def test_render() -> None:
    assert_expected_inline(
        render(trace(branch, (2, 3, 7), (5, 7))),
        """\
x_1: f32[2, 3, 7] = input
w_1: f32[5, 7] = input
linear: f32[2, 3, 5] = aten.linear.default(x_1, w_1)
split_with_sizes: (f32[2, 3, 2], f32[2, 3, 3]) = aten.split_with_sizes.default(linear, [2, 3], -1)
getitem: f32[2, 3, 2] = getitem(split_with_sizes, 0)
getitem_1: f32[2, 3, 3] = getitem(split_with_sizes, 1)
add: f32[2, 3, 2] = aten.add.Tensor(getitem, getitem, alpha=2)
to: bf16[2, 3, 3] = aten.to.dtype(getitem_1, bf16)
return (add, to)""",
    )


def test_render_is_the_same_for_a_graph_and_its_module() -> None:
    gm = trace(branch, (2, 3, 7), (5, 7))
    assert render(gm.graph) == render(gm)


def test_render_literals() -> None:
    def literals(x: Tensor) -> Tensor:
        x = functional.layer_norm(x, (5,), eps=1e-6).to(torch.float16, memory_format=torch.channels_last)
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x.new_full([2, 3], float("-inf"), dtype=torch.float64, device="meta")

    assert_expected_inline(
        render(trace(literals, (2, 3, 7, 5))),
        """\
x_1: f32[2, 3, 7, 5] = input
layer_norm: f32[2, 3, 7, 5] = aten.layer_norm.default(x_1, [5], None, None, 1e-06)
to: f16[2, 3, 7, 5] = aten.to.dtype(layer_norm, f16, False, False, channels_last)
scaled_dot_product_attention: f16[2, 3, 7, 5] = aten.scaled_dot_product_attention.default(to, to, to, None, 0.0, True)
new_full: f64[2, 3] = aten.new_full.default(scaled_dot_product_attention, [2, 3], -inf, dtype=f64, device=meta, pin_memory=False)
return new_full""",
    )


def test_render_tuples_and_several_dtypes() -> None:
    def tuples(x: Tensor) -> tuple[Tensor, ...]:
        values, indices = x.max(-1)
        return values > 0, indices, x.to(torch.float8_e4m3fn), torch.complex(x, x), x.to(torch.uint8)

    assert_expected_inline(
        render(trace(tuples, (2, 3))),
        """\
x_1: f32[2, 3] = input
max_1: (f32[2], i64[2]) = aten.max.dim(x_1, -1)
getitem: f32[2] = getitem(max_1, 0)
getitem_1: i64[2] = getitem(max_1, 1)
gt: b8[2] = aten.gt.Scalar(getitem, 0)
to: f8e4m3fn[2, 3] = aten.to.dtype(x_1, f8e4m3fn)
complex_1: c64[2, 3] = aten.complex.default(x_1, x_1)
to_1: u8[2, 3] = aten.to.dtype(x_1, u8)
return (gt, getitem_1, to, complex_1, to_1)""",
    )


def test_render_long_lists_by_their_rule() -> None:
    graph = fx.Graph()
    for values in ([0] * 64, [*range(64)], [*range(3, 64, 5)], [1, 2], [*range(9), 0], [True] * 9):
        graph.call_function(torch.ops.aten.ones.default, (values,))
    graph.output(None)
    assert_expected_inline(
        render(graph),
        """\
ones_default = aten.ones.default([0] * 64)
ones_default_1 = aten.ones.default([*range(0, 64)])
ones_default_2 = aten.ones.default([*range(3, 68, 5)])
ones_default_3 = aten.ones.default([1, 2])
ones_default_4 = aten.ones.default([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])
ones_default_5 = aten.ones.default([True] * 9)
return None""",
    )


def test_render_without_metadata_and_with_functions_of_every_kind() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(7, 5)
            self.scale = torch.nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.silu(self.proj(x)) * self.scale
            return torch.cat([x[:, None, 1:3], x.chunk(2, dim=-1)[0]], dim=1)

    assert_expected_inline(
        render(fx.symbolic_trace(Model())),
        """\
x = input
proj = self.proj(x)
silu = torch.nn.functional.silu(proj, inplace=False)
scale = self.scale
mul = mul(silu, scale)
getitem = getitem(mul, (:, None, 1:3))
chunk = mul.chunk(2, dim=-1)
getitem_1 = getitem(chunk, 0)
cat = torch.cat([getitem, getitem_1], dim=1)
return cat""",
    )


def test_render_of_a_dynamo_graph_with_symbolic_sizes() -> None:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda x: x.reshape(x.shape[0] * 3) + x.shape[0], backend=keep, dynamic=True)(torch.ones(5, 3))
    text = render(graphs[0])
    # Symbol numbers are PyTorch's own affair.
    symbol = next(str(n.meta["example_value"]) for n in graphs[0].graph.nodes if n.op == "placeholder")
    assert_expected_inline(
        text.replace(symbol, "s"),
        """\
s: Sym(s) = input
l_x_: f32[s, 3] = input
mul: Sym(3*s) = mul(s, 3)
reshape: f32[3*s] = l_x_.reshape(mul)
add: f32[3*s] = add(reshape, s)
return (add,)""",
    )


def test_subgraphs_are_rendered_once_below_their_node_and_counted() -> None:
    inner = trace(lambda x: (x * 2,), (2, 3))
    graph = fx.Graph()
    x = graph.placeholder("x")
    body = graph.get_attr("body")
    again = graph.get_attr("body")
    graph.output((graph.call_function(wrap, (body, x)), graph.call_function(wrap, (again, x))))
    gm = fx.GraphModule({"body": inner}, graph)
    assert_expected_inline(
        render(gm),
        """\
x = input
body = self.body
    x_1: f32[2, 3] = input
    mul: f32[2, 3] = aten.mul.Tensor(x_1, 2)
    return (mul,)
body_1 = self.body
wrap = wrap(body, x)
wrap_1 = wrap(body_1, x)
return (wrap, wrap_1)""",
    )
    assert op_count(gm) == {"wrap": 2, "aten.mul": 1}


def test_diff_is_empty_for_equal_graphs() -> None:
    gm = trace(branch, (2, 3, 7), (5, 7))
    assert graph_diff(gm, copy.deepcopy(gm)) == ""


def chain(*factors: int) -> fx.GraphModule:
    def function(x: Tensor) -> Tensor:
        for factor in factors:
            x = x * factor
        return x

    return trace(function, (2, 3))


def test_diff_shows_context_and_skips_the_rest() -> None:
    before, after = chain(1, 2, 3, 4, 5, 6, 7, 8), chain(1, 2, 9, 4, 5, 6, 7, 8)
    assert_expected_inline(
        graph_diff(before, after),
        """\
  x_1: f32[2, 3] = input
  mul: f32[2, 3] = aten.mul.Tensor(x_1, 1)
  mul_1: f32[2, 3] = aten.mul.Tensor(mul, 2)
- mul_2: f32[2, 3] = aten.mul.Tensor(mul_1, 3)
+ mul_2: f32[2, 3] = aten.mul.Tensor(mul_1, 9)
  mul_3: f32[2, 3] = aten.mul.Tensor(mul_2, 4)
  mul_4: f32[2, 3] = aten.mul.Tensor(mul_3, 5)
  ...""",
    )
    assert_expected_inline(
        graph_diff(before, after, context=0),
        """\
  ...
- mul_2: f32[2, 3] = aten.mul.Tensor(mul_1, 3)
+ mul_2: f32[2, 3] = aten.mul.Tensor(mul_1, 9)
  ...""",
    )


def test_diff_writes_a_single_skipped_line_out() -> None:
    assert_expected_inline(
        graph_diff(chain(1, 2, 3, 4, 5), chain(9, 2, 3, 4, 8), context=1),
        """\
  x_1: f32[2, 3] = input
- mul: f32[2, 3] = aten.mul.Tensor(x_1, 1)
+ mul: f32[2, 3] = aten.mul.Tensor(x_1, 9)
  mul_1: f32[2, 3] = aten.mul.Tensor(mul, 2)
  mul_2: f32[2, 3] = aten.mul.Tensor(mul_1, 3)
  mul_3: f32[2, 3] = aten.mul.Tensor(mul_2, 4)
- mul_4: f32[2, 3] = aten.mul.Tensor(mul_3, 5)
+ mul_4: f32[2, 3] = aten.mul.Tensor(mul_3, 8)
  return mul_4""",
    )


def test_diff_takes_an_earlier_render_for_a_graph_rewritten_in_place() -> None:
    gm = chain(2, 3)
    before = render(gm)
    gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0].update_arg(1, 7)
    assert_expected_inline(
        graph_diff(before, gm, context=1),
        """\
  x_1: f32[2, 3] = input
- mul: f32[2, 3] = aten.mul.Tensor(x_1, 2)
+ mul: f32[2, 3] = aten.mul.Tensor(x_1, 7)
  mul_1: f32[2, 3] = aten.mul.Tensor(mul, 3)
  return mul_1""",
    )


def test_diff_refuses_negative_context() -> None:
    with pytest.raises(ValueError, match="context=-1"):
        graph_diff("a", "b", context=-1)


def test_op_count_sums_overloads() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for overload in (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar, torch.ops.aten.mul.Tensor):
        x = graph.call_function(overload, (x, 2))
    x = graph.call_function(operator.getitem, (x, 0))
    graph.output(graph.call_method("neg", (x,)))
    assert op_count(graph) == {"aten.add": 2, "aten.mul": 1, "getitem": 1, "Tensor.neg": 1}


@pytest.mark.parametrize(
    "op",
    [
        pytest.param("aten.add", id="name"),
        pytest.param("aten::add", id="schema"),
        pytest.param("aten.add.Tensor", id="overload-name"),
        pytest.param(torch.ops.aten.add, id="packet"),
        pytest.param(torch.ops.aten.add.Tensor, id="overload"),
    ],
)
def test_op_count_of_one_op_however_it_is_named(op: Any) -> None:
    assert op_count(trace(branch, (2, 3, 7), (5, 7)), op) == {"aten.add": 1}


def test_op_count_keeps_requested_ops_that_are_absent() -> None:
    counts = op_count(chain(2), "aten.mul", "aten.linear", "torch.nn.functional.silu")
    assert dict(counts) == {"aten.mul": 1, "aten.linear": 0, "torch.nn.functional.silu": 0}


def test_counts_diff() -> None:
    def after(x: Tensor, w: Tensor) -> Tensor:
        return functional.linear(x, w).sin().sin()

    before = trace(branch, (2, 3, 7), (5, 7))
    assert_expected_inline(
        graph_counts_diff(op_count(before), trace(after, (2, 3, 7), (5, 7))),
        """\
op                       before    after    change
---------------------  --------  -------  --------
aten.add                      1        0        -1
aten.linear                   1        1
aten.sin                      0        2        +2
aten.split_with_sizes         1        0        -1
aten.to                       1        0        -1
getitem                       2        0        -2""",
    )
