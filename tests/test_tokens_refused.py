"""`hero_fx.passes.analysis.follow`: what mixes tokens has no rule, and the reason says which op and why."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.analysis.tokens import NoRule

from .support.axis import TEXT, TOKENS, WIDTH, Function, stream, table, tokens_of

aten = torch.ops.aten
N = TOKENS.length


REFUSED: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "mean": (lambda x: x.mean(1), ()),
    "sum over all": (lambda x: x.sum(), ()),
    "var over two axes": (lambda x: x.var((1, 2)), ()),
    "norm over all": (lambda x: aten.linalg_vector_norm(x, 2), ()),
    "softmax": (lambda x: x.softmax(1), ()),
    "cumsum": (lambda x: x.cumsum(1), ()),
    "glu": (lambda x: F.glu(x, 1), ()),
    "roll": (lambda x: x.roll(1, 1), ()),
    "flip": (lambda x: x.flip(1), ()),
    "sort": (lambda x: x.sort(1)[0], ()),
    "windows": (lambda x: x.unfold(1, 2, 2), ()),
    "topk": (lambda x: x.topk(2, 1)[0], ()),
    "repeat": (lambda x: x.repeat(1, 2, 1), ()),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), ()),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 1)), ()),
    "select_scatter": (lambda x: aten.select_scatter(x, x[:, 0], 1, 2), ()),
    "select_scatter of a table": (lambda x, t: aten.select_scatter(x, t, 2, 1), (table(2, N),)),
    "index": (lambda x, i: x[:, i.long()], (torch.tensor([1.0, 2]),)),
    "index by a mask": (lambda x, i: x[i.long(), :, 0], (torch.tensor([1.0, 0]),)),
    "scatter by another index": (lambda x, i: x.scatter(2, i.long(), 1.0), (torch.zeros(2, 3, 1),)),
    "einsum over tokens": (lambda x: torch.einsum("bnd,bne->bde", x, x), ()),
    "einsum between tokens": (lambda x: torch.einsum("bnd,bmd->bnm", x, x), ()),
    "einsum with a table": (lambda x, t: torch.einsum("bnd,n->bnd", x, t), (table(N),)),
    "einsum with a table in another order": (lambda x, t: torch.einsum("bnd,nb->bnd", x, t), (table(N, 2),)),
    "einsum with dots": (lambda x, w: torch.einsum("...d,de->...e", x, w), (table(WIDTH, 3),)),
    "bmm of tokens": (lambda x: torch.bmm(x, x.transpose(1, 2)), ()),
    "addmm over tokens": (lambda x, w: torch.addmm(w[0, 0], w, x.select(0, 1)), (table(3, N),)),
    "baddbmm onto tokens": (lambda x, w: torch.baddbmm(x, x, w), (table(2, WIDTH, WIDTH),)),
    "convolution with a stride": (lambda x, w: F.conv1d(x.transpose(1, 2), w, stride=2), (table(3, WIDTH, 1),)),
    "linear": (lambda x, w: F.linear(x.transpose(1, 2), w), (table(3, N),)),
    "layer_norm": (lambda x: F.layer_norm(x, (N, WIDTH)), ()),
    "complex": (lambda x: torch.view_as_complex(x[:, :2].transpose(1, 2).contiguous()), ()),
    "matmul over tokens": (lambda x, w: x.transpose(1, 2) @ w, (table(N, 3),)),
    "matmul of tokens": (lambda x: x @ x.transpose(1, 2), ()),
    "matmul with one matrix per token": (lambda x, w: x.transpose(0, 1) @ w, (table(N, WIDTH, 3),)),
    "merge with channels, and mix": (lambda x: x.reshape(2, N * WIDTH).softmax(-1), ()),
    "merge with the batch, and cut": (lambda x: x.flatten(0, 1)[:TEXT], ()),
    "merge with the batch, and join": (lambda x: torch.cat([x.flatten(0, 1), x.flatten(0, 1)]), ()),
    "merge with the batch, and repeat": (lambda x: x.flatten(0, 1).repeat_interleave(2, 0), ()),
    "attention over a merged batch": (lambda x: F.scaled_dot_product_attention(*[x.flatten(0, 1)] * 3), ()),
    "grid": (lambda x: x.unflatten(1, (2, 4)), ()),
    "one token": (lambda x: x[:, 0], ()),
    "unbind": (lambda x: x.unbind(1)[0], ()),
    "step": (lambda x: x[:, ::2], ()),
    "scatter with a step": (lambda x: aten.slice_scatter(x, x[:, :4], 1, 0, 9999, 2), ()),
    "scatter elsewhere": (lambda x: aten.slice_scatter(x, x[:, :TEXT], 1, TEXT, 2 * TEXT), ()),
    "scatter onto a table": (lambda x, t: aten.slice_scatter(t, x[:, :TEXT], 1, 0, TEXT), (table(2, N, WIDTH),)),
    "part of the image": (lambda x: x[:, TEXT : TEXT + 2], ()),
    "part of the text": (lambda x: x.split([2, N - 2], 1)[0], ()),
    "tokens against tokens": (lambda x: x[:, :, None] - x[:, None], ()),
    "text against the image": (lambda x: x[:, :TEXT] * x[:, TEXT : 2 * TEXT], ()),
    "stack with another": (lambda x, t: torch.stack([x, t]), (table(2, N, WIDTH),)),
    "cat of channels of other tokens": (lambda x: torch.cat([x[:, :TEXT], x[:, TEXT : 2 * TEXT]], -1), ()),
    "cat along different axes": (lambda x: torch.cat([x, x.transpose(1, 2).reshape(2, WIDTH, N)[..., :4]], 1), ()),
    "broadcast of one token": (lambda x, t: x[:, TEXT - 1 : TEXT] * t, (table(2, N, WIDTH),)),
    "expand of one token": (lambda x: x[:, :1].expand(2, N, WIDTH), ()),
    "convolution": (lambda x, w: F.conv1d(x.transpose(1, 2), w), (table(3, WIDTH, 3),)),
    "gather": (lambda x, i: x.gather(1, i.long().expand(2, 2, WIDTH)), (torch.ones(1, 2, 1),)),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), ()),
    "attention over heads": (lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3), ()),
    "attention with a mask of tokens": (lambda x, w: F.scaled_dot_product_attention(x, x, x, x @ w), (table(4, N),)),
    "attention of other queries": (lambda x, q: F.scaled_dot_product_attention(q, x, x), (table(2, 7, WIDTH),)),
    "attention of other values": (lambda x, v: F.scaled_dot_product_attention(x, x, v), (table(2, N, WIDTH),)),
}  # fmt: skip


def test_what_mixes_tokens_has_no_rule() -> None:
    reasons = {}
    for name, (function, externals) in REFUSED.items():
        with pytest.raises(NoRule) as caught:
            tokens_of(function, stream(), *externals)
        reasons[name] = str(caught.value)
    assert_expected_inline(
        "\n".join(f"{name}: {reason}" for name, reason in reasons.items()),
        """\
mean: mean = aten.mean.dim: it reduces over the token axis
sum over all: sum_1 = aten.sum.default: it reduces over the token axis
var over two axes: var = aten.var.dim: it reduces over the token axis
norm over all: linalg_vector_norm = aten.linalg_vector_norm.default: it reduces over the token axis
softmax: softmax = aten.softmax.int: it works along the token axis
cumsum: cumsum = aten.cumsum.default: it works along the token axis
glu: glu = aten.glu.default: it works along the token axis
roll: roll = aten.roll.default: it works along the token axis
flip: flip = aten.flip.default: it works along the token axis
sort: sort = aten.sort.default: it works along the token axis
windows: unfold = aten.unfold.default: no rule says what this op does to the token axis
topk: topk = aten.topk.default: it works along the token axis
repeat: repeat = aten.repeat.default: it repeats the token axis
repeat_interleave: repeat_interleave = aten.repeat_interleave.self_int: it works along the token axis
pad: pad = aten.pad.default: it works along the token axis
select_scatter: select = aten.select.int: it picks one token
select_scatter of a table: select_scatter = aten.select_scatter.default: it mixes tokens with values that are none, or picks one token
index: index = aten.index.Tensor: it picks tokens by an index
index by a mask: index = aten.index.Tensor: it picks tokens by an index
scatter by another index: scatter = aten.scatter.value: it picks tokens by an index, or its inputs carry different ones
einsum over tokens: einsum = aten.einsum.default: a product over or between token axes has no rule
einsum between tokens: einsum = aten.einsum.default: a product over or between token axes has no rule
einsum with a table: einsum = aten.einsum.default: its inputs carry different tokens
einsum with a table in another order: einsum = aten.einsum.default: its inputs carry different tokens
einsum with dots: einsum = aten.einsum.default: an einsum with `...` or without `->` has no rule
bmm of tokens: bmm = aten.bmm.default: a product over or between token axes has no rule
addmm over tokens: addmm = aten.addmm.default: a product over or between token axes has no rule
baddbmm onto tokens: baddbmm = aten.baddbmm.default: the token axis comes in through an argument that the rule does not expect
convolution with a stride: conv1d = aten.conv1d.default: it works along the token axis
linear: linear = aten.linear.default: it works along the token axis
layer_norm: layer_norm = aten.layer_norm.default: it works along the token axis
complex: view_as_complex = aten.view_as_complex.default: it works along the token axis
matmul over tokens: matmul = aten.matmul.default: a product over or between token axes has no rule
matmul of tokens: matmul = aten.matmul.default: a product over or between token axes has no rule
matmul with one matrix per token: matmul = aten.matmul.default: a product over or between token axes has no rule
merge with channels, and mix: softmax = aten.softmax.int: it works along the token axis
merge with the batch, and cut: slice_1 = aten.slice.Tensor: it takes a part of an axis into which more than tokens is folded
merge with the batch, and join: cat = aten.cat.default: it takes a part of an axis into which more than tokens is folded
merge with the batch, and repeat: repeat_interleave = aten.repeat_interleave.self_int: it works along the token axis
attention over a merged batch: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: queries without tokens, or keys and values with different ones
grid: unflatten = aten.unflatten.int: it merges or splits the token axis ([2, 8, 4] -> [2, 2, 4, 4])
one token: select = aten.select.int: it picks one token
unbind: unbind = aten.unbind.int: it takes the token axis apart
step: slice_1 = aten.slice.Tensor: it slices the token axis with a step
scatter with a step: slice_scatter = aten.slice_scatter.default: it slices the token axis with a step
scatter elsewhere: slice_scatter = aten.slice_scatter.default: it moves tokens (dim 1: text[0:3] lands on dim 1: image[0:3])
scatter onto a table: slice_scatter = aten.slice_scatter.default: it mixes tokens with values that are none
part of the image: slice_1 = aten.slice.Tensor: it holds a part of the tokens of one source (image[0:2])
part of the text: split_with_sizes = aten.split_with_sizes.default: it holds a part of the tokens of one source (text[0:2])
tokens against tokens: sub = aten.sub.Tensor: its inputs carry different tokens (dim 1: text[0:3] image[0:5] and dim 2: text[0:3] image[0:5])
text against the image: mul = aten.mul.Tensor: its inputs carry different tokens (dim 1: text[0:3] and dim 1: image[0:3])
stack with another: stack = aten.stack.default: its inputs carry different tokens
cat of channels of other tokens: cat = aten.cat.default: its inputs carry different tokens
cat along different axes: cat = aten.cat.default: its inputs carry tokens along different axes
broadcast of one token: mul = aten.mul.Tensor: the token axis is broadcast against itself
expand of one token: expand = aten.expand.default: it repeats the token axis
convolution: conv1d = aten.conv1d.default: it works along the token axis
gather: gather = aten.gather.default: it picks tokens by an index, or its inputs carry different ones
causal attention: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: is_causal=True: it depends on the order of the tokens
attention over heads: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: the token axis of its query is not where the op attends
attention with a mask of tokens: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: its mask depends on the tokens themselves
attention of other queries: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: queries without tokens, or keys and values with different ones
attention of other values: scaled_dot_product_attention = aten.scaled_dot_product_attention.default: queries without tokens, or keys and values with different ones""",
    )
