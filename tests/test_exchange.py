"""`hero_fx.passes.analysis.exchange`: the token axis through what ranks send each other. With real ranks: test_ranks.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F

from hero_fx.passes.analysis.exchange import collectives, ranks_of
from hero_fx.passes.analysis.follow import follow
from hero_fx.passes.analysis.tokens import IMAGE, NoRule, Segment, Tokens
from hero_fx.passes.render import graph_diff
from hero_fx.passes.rewrite.plan import Full, Refresh
from hero_fx.passes.rewrite.refresh import RefreshBranches
from hero_fx.step_graphs import copy_graph

from .support.steps_by_hand import BATCH, WIDTH, Toy, attentions, norm
from .support.steps_by_hand import IMAGE as OWN
from .support.tracing import run_passes

RANKS = 2
HALF = WIDTH // RANKS
"""The width of a head: each rank attends with one of two."""
c10d = torch.ops._c10d_functional


def exchange(parts: Tensor) -> Tensor:
    """[RANKS, ...]: one part to each rank."""
    sizes = [parts.numel() // RANKS] * RANKS
    given = c10d.all_to_all_single(parts.flatten(), sizes, sizes, "0")
    return c10d.wait_tensor(given.reshape(parts.shape))  # type: ignore[no-any-return]


def ulysses(x: Tensor, gate: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Attention of two heads, of which each rank computes one for the tokens of both; x [BATCH, OWN, WIDTH]."""
    for weight in (w, v):
        heads = norm(x).reshape(BATCH, OWN, RANKS, 1, HALF).permute(2, 1, 0, 3, 4)
        n = exchange(heads).flatten(0, 1).permute(1, 2, 0, 3)  # [BATCH, 1, RANKS * OWN, HALF]
        out = F.scaled_dot_product_attention(n, n, n).transpose(1, 2)
        tokens = out.reshape(BATCH, RANKS, OWN, 1, HALF).permute(1, 3, 2, 0, 4)
        x = x + gate * F.linear(exchange(tokens).flatten(0, 1).transpose(0, 2).flatten(2), weight)
    return x


def test_graph() -> None:
    """Queries of the sampled tokens of all ranks, in parts as small as these are."""
    toy = Toy(ulysses)
    gm = copy_graph(toy.normal)
    (record,) = run_passes(
        gm, RefreshBranches(structure=toy.structure, plan=toy.plan(Refresh(keys="all"), Full()), count=2)
    )
    assert record.sites == 1
    assert_expected_inline(
        graph_diff(toy.normal, gm, context=0),
        """\
  ...
+ idx: i64[2] = input
+ l0_attention_k: f32[2, 1, 12, 2] = input
+ l0_attention_v: f32[2, 1, 12, 2] = input
+ l0_attention_image_y0: f32[2, 6, 4] = input
  ...
- mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, linear)
+ index_select_default: f32[2, 2, 4] = aten.index_select.default(x_1, 1, idx)
+ layer_norm_default: f32[2, 2, 4] = aten.layer_norm.default(index_select_default, [4])
+ reshape_default: f32[2, 2, 2, 1, 2] = aten.reshape.default(layer_norm_default, [2, 2, 2, 1, 2])
+ permute_default: f32[2, 2, 2, 1, 2] = aten.permute.default(reshape_default, [2, 1, 0, 3, 4])
+ reshape_default_1: f32[16] = aten.reshape.default(permute_default, [16])
+ contiguous_default: f32[16] = aten.contiguous.default(reshape_default_1)
+ all_to_all_single_default: f32[16] = _c10d_functional.all_to_all_single.default(contiguous_default, [8, 8], [8, 8], '0')
+ reshape_default_2: f32[2, 2, 2, 1, 2] = aten.reshape.default(all_to_all_single_default, [2, 2, 2, 1, 2])
+ wait_tensor_default: f32[2, 2, 2, 1, 2] = _c10d_functional.wait_tensor.default(reshape_default_2)
+ reshape_default_3: f32[4, 2, 1, 2] = aten.reshape.default(wait_tensor_default, [4, 2, 1, 2])
+ permute_default_1: f32[2, 1, 4, 2] = aten.permute.default(reshape_default_3, [1, 2, 0, 3])
+ add_tensor: i64[2] = aten.add.Tensor(idx, 6)
+ cat_default: i64[4] = aten.cat.default([idx, add_tensor])
+ index_copy_default: f32[2, 1, 12, 2] = aten.index_copy.default(l0_attention_k, 2, cat_default, permute_default_1)
+ index_copy_default_1: f32[2, 1, 12, 2] = aten.index_copy.default(l0_attention_v, 2, cat_default, permute_default_1)
+ scaled_dot_product_attention_default: f32[2, 1, 4, 2] = aten.scaled_dot_product_attention.default(permute_default_1, index_copy_default, index_copy_default_1)
+ transpose_int: f32[2, 4, 1, 2] = aten.transpose.int(scaled_dot_product_attention_default, 1, 2)
+ reshape_default_4: f32[2, 2, 2, 1, 2] = aten.reshape.default(transpose_int, [2, 2, 2, 1, 2])
+ permute_default_2: f32[2, 1, 2, 2, 2] = aten.permute.default(reshape_default_4, [1, 3, 2, 0, 4])
+ reshape_default_5: f32[16] = aten.reshape.default(permute_default_2, [16])
+ contiguous_default_1: f32[16] = aten.contiguous.default(reshape_default_5)
+ all_to_all_single_default_1: f32[16] = _c10d_functional.all_to_all_single.default(contiguous_default_1, [8, 8], [8, 8], '0')
+ reshape_default_6: f32[2, 1, 2, 2, 2] = aten.reshape.default(all_to_all_single_default_1, [2, 1, 2, 2, 2])
+ wait_tensor_default_1: f32[2, 1, 2, 2, 2] = _c10d_functional.wait_tensor.default(reshape_default_6)
+ reshape_default_7: f32[2, 2, 2, 2] = aten.reshape.default(wait_tensor_default_1, [2, 2, 2, 2])
+ transpose_int_1: f32[2, 2, 2, 2] = aten.transpose.int(reshape_default_7, 0, 2)
+ reshape_default_8: f32[2, 2, 4] = aten.reshape.default(transpose_int_1, [2, 2, 4])
+ linear_default: f32[2, 2, 4] = aten.linear.default(reshape_default_8, w_1)
+ index_copy_default_2: f32[2, 6, 4] = aten.index_copy.default(l0_attention_image_y0, 1, idx, linear_default)
+ mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, index_copy_default_2)
  ...
+ copy__default: f32[2, 1, 12, 2] = aten.copy_.default(l0_attention_k, index_copy_default)
+ copy__default_1: f32[2, 1, 12, 2] = aten.copy_.default(l0_attention_v, index_copy_default_1)
+ copy__default_2: f32[2, 6, 4] = aten.copy_.default(l0_attention_image_y0, index_copy_default_2)
  ...""",
    )


def test_ranks_are_counted_in_the_graph() -> None:
    exchanged, alone = (Toy(function).normal for function in (ulysses, attentions))
    assert (ranks_of(exchanged), ranks_of(alone)) == (RANKS, 1)
    assert (len(collectives(exchanged)), len(collectives(alone))) == (2 * 2, 0)


@pytest.mark.parametrize(
    ("shape", "dim", "outer", "parts", "reason"),
    [
        ((4, 6), 1, 1, [[2, 2], [2, 2]], ""),
        ((24,), 0, 4, [[12, 12], [12, 12]], ""),
        ((24,), 0, 2, [[8, 8, 8], [8, 8, 8]], "it cuts the token axis between ranks"),
        ((24,), 0, 2, [[12, 12], [16, 8]], "parts of different sizes"),
    ],
)
def test_the_token_axis_through_an_exchange(
    shape: tuple[int, ...], dim: int, outer: int, parts: list[list[int]], reason: str
) -> None:
    graph = fx.Graph()
    given = graph.placeholder("x")
    sent = graph.call_function(c10d.all_to_all_single.default, (given, *parts, "0"))
    result = graph.call_function(c10d.wait_tensor.default, (sent,))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(shape)
    tokens = Tokens(dim, (Segment(IMAGE, 0, 6),), outer)
    if reason:
        with pytest.raises(NoRule, match=reason):
            follow(graph.nodes, {given: tokens})
    else:
        assert follow(graph.nodes, {given: tokens})[result] == replace(tokens, exchanged=True)
