"""`hero_fx.passes.normalize.trace` and `.identities`: the ops of a normalised graph, its names and meta; ops that do nothing go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hero_fx.passes.compat import FakeTensor
from hero_fx.passes.normalize.functionalize import Functionalize
from hero_fx.passes.normalize.identities import DropIdentities
from hero_fx.passes.normalize.trace import normalize
from hero_fx.passes.render import graph_diff, op_count, render

from .support.tracing import capture, equal, normal_form, outputs, run_passes, trace


class Block(nn.Module):
    """Norm, attention with a constant, dropout; its own names for what Dynamo makes inputs of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
        self.drop = nn.Dropout(0.1)
        self.register_buffer("table", torch.arange(5.0)[:, None] / 3)

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: float = 2.0) -> Tensor:
        x = self.norm(hidden_states) + self.table + timestep[:, None, None]
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        out[:, 1:] = out[:, 1:] * torch.tensor([1.0, 2.0, 3.0, 4.0])
        result: Tensor = hidden_states + self.drop(out.to(hidden_states.dtype).contiguous())
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


X, T = torch.linspace(-1, 1, 40).reshape(2, 5, 4), torch.tensor([0.5, 2.0])


def test_graph_of_a_block() -> None:
    torch.manual_seed(0)
    assert_expected_inline(
        render(normal_form(Block().eval(), X, T)),
        """\
norm_weight: f32[4] = input
norm_bias: f32[4] = input
hidden_states: f32[2, 5, 4] = input
table: f32[5, 1] = input
timestep: f32[2] = input
attn_qkv_weight: f32[12, 4] = input
attn_qkv_bias: f32[12] = input
layer_norm: f32[2, 5, 4] = aten.layer_norm.default(hidden_states, [4], norm_weight, norm_bias)
add: f32[2, 5, 4] = aten.add.Tensor(layer_norm, table)
unsqueeze: f32[2, 1] = aten.unsqueeze.default(timestep, 1)
unsqueeze_1: f32[2, 1, 1] = aten.unsqueeze.default(unsqueeze, 2)
add_1: f32[2, 5, 4] = aten.add.Tensor(add, unsqueeze_1)
linear: f32[2, 5, 12] = aten.linear.default(add_1, attn_qkv_weight, attn_qkv_bias)
unflatten: f32[2, 5, 3, 2, 2] = aten.unflatten.int(linear, -1, [3, 2, 2])
permute: f32[3, 2, 2, 5, 2] = aten.permute.default(unflatten, [2, 0, 3, 1, 4])
select: f32[2, 2, 5, 2] = aten.select.int(permute, 0, 0)
select_1: f32[2, 2, 5, 2] = aten.select.int(permute, 0, 1)
select_2: f32[2, 2, 5, 2] = aten.select.int(permute, 0, 2)
scaled_dot_product_attention: f32[2, 2, 5, 2] = aten.scaled_dot_product_attention.default(select, select_1, select_2, scale=2.0)
transpose: f32[2, 5, 2, 2] = aten.transpose.int(scaled_dot_product_attention, 1, 2)
flatten: f32[2, 5, 4] = aten.flatten.using_ints(transpose, 2)
slice_1: f32[2, 4, 4] = aten.slice.Tensor(flatten, 1, 1, 9223372036854775807)
_tensor_constant0: f32[4] = self._tensor_constant0
lift_fresh_copy: f32[4] = aten.lift_fresh_copy.default(_tensor_constant0)
mul: f32[2, 4, 4] = aten.mul.Tensor(slice_1, lift_fresh_copy)
slice_scatter_default: f32[2, 5, 4] = aten.slice_scatter.default(flatten, mul, 1, 1, 9223372036854775807)
reshape_default: f32[2, 5, 2, 2] = aten.reshape.default(slice_scatter_default, [2, 5, 2, 2])
transpose_int: f32[2, 2, 5, 2] = aten.transpose.int(reshape_default, 1, 2)
transpose_int_1: f32[2, 5, 2, 2] = aten.transpose.int(transpose_int, 1, 2)
flatten_using_ints: f32[2, 5, 4] = aten.flatten.using_ints(transpose_int_1, 2)
add_2: f32[2, 5, 4] = aten.add.Tensor(hidden_states, flatten_using_ints)
return (add_2,)""",
    )


def test_same_inputs_same_outputs() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    gm, inputs = capture(model, X, T)
    normal = normalize(gm, inputs)
    assert equal(normal(*inputs), gm(*inputs))
    assert equal(outputs(normal_form(model, X, T)(*inputs))[0], model(X, T))


def test_inputs_keep_their_order_and_say_what_they_are() -> None:
    gm, inputs = capture(Model().eval(), hidden_states=X, timestep=T)
    found = normalize(gm, inputs).graph.find_nodes(op="placeholder")
    rows = [f"{n.name} {n.meta['argument']} {n.meta['model_input']} {list(n.meta['val'].shape)}" for n in found]
    assert_expected_inline(
        "\n".join(rows),
        """\
blocks_0_norm_weight weight False [4]
blocks_0_norm_bias bias False [4]
hidden_states hidden_states True [2, 5, 4]
blocks_0_table table False [5, 1]
timestep timestep True [2]
blocks_0_attn_qkv_weight weight False [12, 4]
blocks_0_attn_qkv_bias bias False [12]
blocks_1_norm_weight weight False [4]
blocks_1_norm_bias bias False [4]
blocks_1_table table False [5, 1]
blocks_1_attn_qkv_weight weight False [12, 4]
blocks_1_attn_qkv_bias bias False [12]""",
    )


def test_every_node_has_a_static_fake_value_of_one_mode() -> None:
    normal = normal_form(Model().eval(), X, T)
    values = [value for node in normal.graph.nodes if node.op != "output" for value in outputs(node.meta["val"])]
    assert len({value.fake_mode for value in values if isinstance(value, FakeTensor)}) == 1
    assert all(isinstance(value, FakeTensor) for value in values)
    assert all(type(size) is int for value in values for size in value.shape)


def test_symbolic_sizes_are_taken_at_their_present_value() -> None:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(normalize(gm, inputs))
        return gm.forward

    torch.compile(lambda x: x.flatten(1) * x.shape[1], backend=keep, dynamic=True)(torch.ones(3, 5, 7))
    (normal,) = graphs
    values = [node.meta["val"] for node in normal.graph.find_nodes(op="placeholder")]
    assert values[:-1] == [3, 5, 7]
    (product,) = normal.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert product.meta["val"].shape == (3, 35)
    assert equal(normal(3, 5, 7, torch.ones(3, 5, 7)), torch.full((3, 35), 5.0))


def test_nodes_keep_the_modules_that_made_them() -> None:
    normal = normal_form(Model().eval(), X, T)
    linears = normal.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in linears]
    assert [path.count("qkv") for path in paths] == [1, 1]
    assert ["1" in path.split("blocks")[-1] for path in paths] == [False, True]


def test_linear_layer_norm_and_attention_stay_whole() -> None:
    counts = op_count(normal_form(Model().eval(), X, T))
    assert counts["aten.linear"] == counts["aten.layer_norm"] == counts["aten.scaled_dot_product_attention"] == 2
    assert not {"aten.addmm", "aten.mm", "aten.bmm", "aten.softmax", "aten.native_layer_norm"} & set(counts)


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout outside training": lambda x: F.dropout(x, 0.3, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "cast to its dtype": lambda x: x.to(torch.float32),
    "cast to its device and dtype": lambda x: x.to("cpu", torch.float32),
    "cast to the type of another": lambda x: x.type_as(x * 2),
    "cast as another": lambda x: x.to(x * 2),
    "contiguous": lambda x: torch.ops.aten.contiguous(x),
    "detach": lambda x: x.detach(),
}


@pytest.mark.parametrize("function", IDENTITIES.values(), ids=IDENTITIES.keys())
def test_an_op_that_returns_its_input_is_dropped(function: Callable[[Tensor], Tensor]) -> None:
    gm = trace(lambda x: function(x.sin()).cos(), torch.ones(2, 3))
    (record,) = run_passes(gm, DropIdentities())
    assert record.sites == 1
    assert op_count(gm)["aten.cos"] == op_count(gm)["aten.sin"] == 1
    assert equal(gm(X), X.sin().cos())


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout in training": lambda x: F.dropout(x, 0.3, training=True),
    "cast": lambda x: x.to(torch.bfloat16),
    "cast there and back": lambda x: x.double().type_as(x.to(torch.float16)),
    "copying cast": lambda x: x.to(torch.float32, copy=True),
    "cast to another layout": lambda x: x.reshape(1, 2, 3, 1).to(memory_format=torch.channels_last),
    "contiguous of a transposed": lambda x: x.t().contiguous(),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS.keys())
def test_an_op_that_does_something_stays(function: Callable[[Tensor], Tensor]) -> None:
    gm = trace(lambda x: function(x.sin()).cos(), torch.ones(2, 3))
    before = render(gm)
    (record,) = run_passes(gm, DropIdentities())
    assert record.sites == 0
    assert render(gm) == before


def test_a_copy_stays_where_the_original_is_written_to() -> None:
    def function(x: Tensor) -> Tensor:
        kept = x.to(torch.float32, copy=True)
        x.mul_(2)
        return kept + x

    gm = trace(function, X)
    run_passes(gm, Functionalize(), DropIdentities())
    assert equal(gm(X.clone()), X + 2 * X)


def test_graph_without_identities() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.dropout(F.linear(x, w), 0.1, training=False).to(torch.float32)
        return x + hidden, hidden.detach()

    gm = trace(function, torch.ones(2, 5, 3), torch.ones(3, 3))
    before = copy.deepcopy(gm)
    run_passes(gm, DropIdentities())
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[2, 5, 3] = input
  w_1: f32[3, 3] = input
  linear: f32[2, 5, 3] = aten.linear.default(x_1, w_1)
- dropout: f32[2, 5, 3] = aten.dropout.default(linear, 0.1, False)
- to: f32[2, 5, 3] = aten.to.dtype(dropout, f32)
- add: f32[2, 5, 3] = aten.add.Tensor(x_1, to)
- detach: f32[2, 5, 3] = aten.detach.default(to)
+ add: f32[2, 5, 3] = aten.add.Tensor(x_1, linear)
+ detach: f32[2, 5, 3] = aten.detach.default(linear)
  return (add, detach)""",
    )
