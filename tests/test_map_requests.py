"""`map_requests`: the step graph of one request, for several. End to end: test_batch.py."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F

from hero_fx.passes.render import render
from hero_fx.passes.rewrite.map_requests import map_requests

from .support.step_graphs import graph
from .support.steps_by_hand import numbers

TOKENS, WIDTH, REQUESTS = 5, 3, 4


def cached_step(x: Tensor, mask: Tensor, matrix: Tensor, s1: Tensor, idx: Tensor) -> Tensor:
    """Sampled tokens attend to all keys, their own among them: x [1, TOKENS, WIDTH], state s1 [1, 1, TOKENS, WIDTH]."""
    rows = F.linear(x.index_select(1, idx), matrix).unsqueeze(1)
    s1.index_copy_(2, idx, rows)
    out = F.scaled_dot_product_attention(rows, s1, s1, mask).squeeze(1)
    return torch.slice_scatter(x, out, 1, 0, 2)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Of one request; mask and matrix are those of all."""
    return {
        "x": numbers(1, TOKENS, WIDTH, seed=seed), "mask": numbers(2, TOKENS, seed=100),
        "matrix": numbers(WIDTH, WIDTH, seed=101), "s1": numbers(1, 1, TOKENS, WIDTH, seed=seed + 50),
        "idx": torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))[:2],
    }  # fmt: skip


OWN = (True, False, False, True, True)


def mapped(gm: fx.GraphModule) -> fx.GraphModule:
    return map_requests(gm, OWN, REQUESTS)


def test_graph() -> None:
    assert_expected_inline(
        render(graph(cached_step, **inputs())),
        """\
x: f32[1, 5, 3] = input
mask: f32[2, 5] = input
matrix: f32[3, 3] = input
s1: f32[1, 1, 5, 3] = input
idx: i64[2] = input
index_select: f32[1, 2, 3] = aten.index_select.default(x, 1, idx)
linear: f32[1, 2, 3] = aten.linear.default(index_select, matrix)
unsqueeze: f32[1, 1, 2, 3] = aten.unsqueeze.default(linear, 1)
index_copy_: f32[1, 1, 5, 3] = aten.index_copy_.default(s1, 2, idx, unsqueeze)
scaled_dot_product_attention: f32[1, 1, 2, 3] = aten.scaled_dot_product_attention.default(unsqueeze, index_copy_, index_copy_, mask)
squeeze: f32[1, 2, 3] = aten.squeeze.dim(scaled_dot_product_attention, 1)
slice_scatter: f32[1, 5, 3] = aten.slice_scatter.default(x, squeeze, 1, 0, 2)
return slice_scatter""",
    )
    assert_expected_inline(
        render(mapped(graph(cached_step, **inputs()))),
        """\
x: f32[4, 1, 5, 3] = input
mask: f32[2, 5] = input
matrix: f32[3, 3] = input
s1: f32[4, 1, 1, 5, 3] = input
idx: i64[4, 2] = input
view: i64[4, 1, 2, 1] = aten.view.default(idx, [4, 1, 2, 1])
view_1: i64[4, 1, 2, 1] = aten.view.default(view, [4, 1, 2, 1])
expand: i64[4, 1, 2, 3] = aten.expand.default(view_1, [4, 1, 2, 3])
gather: f32[4, 1, 2, 3] = aten.gather.default(x, 2, expand)
permute: f32[4, 1, 2, 3] = aten.permute.default(gather, [0, 1, 2, 3])
view_2: f32[4, 2, 3] = aten.view.default(permute, [4, 2, 3])
t: f32[3, 3] = aten.t.default(matrix)
view_3: f32[8, 3] = aten.view.default(view_2, [8, 3])
mm: f32[8, 3] = aten.mm.default(view_3, t)
_unsafe_view: f32[4, 2, 3] = aten._unsafe_view.default(mm, [4, 2, 3])
view_4: f32[4, 1, 2, 3] = aten.view.default(_unsafe_view, [4, 1, 2, 3])
unsqueeze: f32[4, 1, 1, 2, 3] = aten.unsqueeze.default(view_4, 2)
transpose: f32[4, 5, 1, 1, 3] = aten.transpose.int(s1, 1, 3)
transpose_1: f32[4, 2, 1, 1, 3] = aten.transpose.int(unsqueeze, 1, 3)
arange: i64[4] = aten.arange.default(4, dtype=i64, layout=strided, device=cpu)
unsqueeze_1: i64[4, 1] = aten.unsqueeze.default(arange, -1)
expand_1: i64[4, 2] = aten.expand.default(unsqueeze_1, [4, 2])
index_put_: f32[4, 5, 1, 1, 3] = aten.index_put_.default(transpose, [unsqueeze_1, idx], transpose_1)
permute_1: f32[4, 1, 1, 2, 3] = aten.permute.default(unsqueeze, [0, 1, 2, 3, 4])
permute_2: f32[4, 1, 1, 5, 3] = aten.permute.default(s1, [0, 1, 2, 3, 4])
permute_3: f32[4, 1, 1, 5, 3] = aten.permute.default(s1, [0, 1, 2, 3, 4])
view_5: f32[1, 1, 1, 2, 5] = aten.view.default(mask, [1, 1, 1, 2, 5])
expand_2: f32[4, 1, 1, 2, 5] = aten.expand.default(view_5, [4, 1, 1, 2, 5])
view_6: f32[4, 1, 2, 5] = aten.view.default(expand_2, [4, 1, 2, 5])
view_7: f32[4, 1, 2, 3] = aten.view.default(permute_1, [4, 1, 2, 3])
view_8: f32[4, 1, 5, 3] = aten.view.default(permute_2, [4, 1, 5, 3])
view_9: f32[4, 1, 5, 3] = aten.view.default(permute_3, [4, 1, 5, 3])
_scaled_dot_product_flash_attention_for_cpu: (f32[4, 1, 2, 3], f32[4, 1, 2]) = aten._scaled_dot_product_flash_attention_for_cpu.default(view_7, view_8, view_9, attn_mask=view_6)
getitem: f32[4, 1, 2, 3] = getitem(_scaled_dot_product_flash_attention_for_cpu, 0)
getitem_1: f32[4, 1, 2] = getitem(_scaled_dot_product_flash_attention_for_cpu, 1)
view_10: f32[4, 1, 1, 2, 3] = aten.view.default(getitem, [4, 1, 1, 2, 3])
squeeze: f32[4, 1, 2, 3] = aten.squeeze.dims(view_10, [2])
permute_4: f32[4, 1, 5, 3] = aten.permute.default(x, [0, 1, 2, 3])
permute_5: f32[4, 1, 2, 3] = aten.permute.default(squeeze, [0, 1, 2, 3])
slice_scatter: f32[4, 1, 5, 3] = aten.slice_scatter.default(permute_4, permute_5, 2, 0, 2)
return slice_scatter""",
    )


def test_each_request_is_what_it_is_alone() -> None:
    gm = graph(cached_step, **inputs())
    requests = [list(inputs(seed).values()) for seed in range(REQUESTS)]
    together = [torch.stack(values) if own else values[0] for own, *values in zip(OWN, *requests, strict=True)]
    outputs = mapped(gm)(*together)
    for number, request in enumerate(requests):
        torch.testing.assert_close(outputs[number], gm(*request), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(together[3][number], request[3], rtol=1e-6, atol=1e-6)


def test_a_linear_layer_and_attention_stay_whole_where_requests_have_masks_and_weights_of_their_own() -> None:
    gm = graph(cached_step, **inputs())
    requests = [[t + 0.1 * seed if t.is_floating_point() else t for t in inputs(seed).values()] for seed in range(2)]
    outputs = map_requests(gm, [True] * 5, 2)(*map(torch.stack, zip(*requests, strict=True)))
    for number, request in enumerate(requests):
        torch.testing.assert_close(outputs[number], gm(*request), rtol=1e-6, atol=1e-6)


def noise(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def into_shared(x: Tensor, table: Tensor) -> Tensor:
    return table.add_(x)


def test_what_no_request_can_have_for_itself() -> None:
    x = numbers(1, TOKENS, WIDTH, seed=0)
    with pytest.raises(RuntimeError, match=r"vmap: called random operation"):
        map_requests(graph(noise, x=x), [True], 2)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        map_requests(graph(into_shared, x=x, table=x + 1), [True, False], 2)
