"""`hero_fx.passes.analysis.follow`: what every op does to the token axis, and that nothing is guessed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.analysis.exchange import EXCHANGING
from hero_fx.passes.analysis.follow import RULES, follow
from hero_fx.passes.analysis.tokens import Segment, Source, Tokens

from .support.axis import (
    IMAGE_TOKENS,
    TEXT,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Function,
    check,
    check_texts,
    stream,
    table,
)
from .support.tracing import trace

aten = torch.ops.aten
N = TOKENS.length

UNARY = [
    "neg", "abs", "square", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "relu", "silu", "gelu",
    "softplus", "elu", "leaky_relu", "hardtanh", "erf", "mish", "hardswish", "reciprocal", "floor", "round", "sign",
    "isnan", "nan_to_num", "logical_not", "clone", "contiguous", "detach", "alias", "conj", "resolve_conj",
    "zeros_like", "ones_like", "log1p", "expm1", "log2", "exp2", "tan", "atan", "rad2deg", "deg2rad", "ceil", "trunc",
    "log_sigmoid", "hardsigmoid", "relu6", "isinf", "isfinite", "real",
]  # fmt: skip
BINARY = [
    "add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_xor", "logaddexp", "atan2", "fmod", "remainder", "floor_divide", "true_divide", "float_power",
]  # fmt: skip


def one_input(x: Tensor) -> Tensor:
    return torch.stack([getattr(aten, name)(x.abs() + 0.5).float() for name in UNARY])


def two_inputs(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([getattr(aten, name)(x.abs(), t.abs()).float() for name in BINARY])


EXAMPLES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "pointwise, one input": (one_input, ()),
    "pointwise, two inputs": (two_inputs, (table(N, 1),)),
    "clamp": (lambda x: aten.clamp(aten.clamp_min(aten.clamp_max(x, 1.0), -1), -0.5, 0.5), ()),
    "threshold": (lambda x: aten.threshold(x, 0.1, 2.0), ()),
    "dropout": (lambda x: aten.dropout(x, 0.3, False), ()),
    "to": (lambda x: aten._to_copy(x.to(torch.bfloat16).type_as(x), dtype=torch.float64), ()),
    "where": (lambda x, m: torch.where(m > 0, x, x.masked_fill(m < -0.5, 0.0)), (table(1, N, 1),)),
    "lerp": (lambda x, t: x.lerp(x * 2, t).addcmul(t, x, value=2).addcdiv(x, t + 3), (table(N, 1),)),
    "empty_like and copy": (lambda x: aten.copy(torch.empty_like(x), x[:, :, :1]), ()),
    "copy onto a table": (lambda x, t: aten.copy(t, x), (table(2, N, WIDTH),)),
    "expand_as": (lambda x, t: t.expand_as(x) + x[:, :, :1].expand_as(t), (table(1, N, 1).expand(7, 2, N, WIDTH)[0],)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 2j).conj(), ()),
    "linear": (lambda x, w: F.linear(x, w[:, :WIDTH], w[:, 0]), (table(N, N),)),
    "layer_norm": (lambda x, w: F.layer_norm(F.rms_norm(x, (WIDTH,), w), (WIDTH,), w, w), (table(WIDTH),)),
    "softmax": (lambda x: aten._softmax(x.softmax(-1), 2, False).log_softmax(dim=-1).cumsum(dim=-1), ()),
    "softmax over heads": (lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2).softmax(dim=1), ()),
    "glu": (lambda x: F.glu(x), ()),
    "glu in front": (lambda x: F.glu(x.transpose(1, 2), dim=1), ()),
    "reductions": (lambda x: x.mean(-1) + x.sum(dim=(2,)) + x.amax(2) - x.amin(-1) + x.var(-1) * x.std(2), ()),
    "norms": (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) + aten.norm(x, 2, [-1], True), ()),
    "reduction in front": (lambda x: x.transpose(0, 2).sum(0) + x.permute(2, 1, 0).mean(dim=0, keepdim=True), ()),
    "reduction over the batch": (lambda x: x.sum(0), ()),
    "matmul": (lambda x, w: x @ w @ w[None] @ w[0], (table(WIDTH, WIDTH),)),
    "mm": (lambda x, w: aten.mm(x.select(0, 1), w), (table(WIDTH, 2),)),
    "view": (lambda x: aten._unsafe_view(x.view(2, N, 2, 2), [2, N, WIDTH, 1]).reshape(2, -1, 1, 2, 2).flatten(2), ()),
    "view of another dtype": (lambda x: x.view(torch.int32).view(torch.int16), ()),
    "unflatten": (lambda x: x.unflatten(0, (1, 2)).unflatten(-1, (2, -1)).flatten(0, 1), ()),
    "merge heads with the batch": (lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1), ()),
    "transpose": (lambda x: aten.swapaxes(x.transpose(1, -1), 0, 1), ()),
    "permute": (lambda x: x.unflatten(2, (2, 2)).permute(2, -1, 1, 0), ()),
    "unsqueeze": (lambda x: x.unsqueeze(1).unsqueeze(-1).unsqueeze(0), ()),
    "squeeze": (lambda x: x[:, None, :, None, :, None].squeeze().unsqueeze(0).unsqueeze(2).squeeze((0, 2)), ()),
    "squeeze of longer axes": (lambda x: x.squeeze(0).squeeze(1).squeeze(-1), ()),
    "select": (lambda x: x.select(-1, 1).unsqueeze(0).select(0, 0), ()),
    "slice": (lambda x: x[:, :TEXT][..., ::2].sin() + x[:1, :TEXT, 1::2], ()),
    "slice of the image": (lambda x: x[:, TEXT:] * 2, ()),
    "slice of all": (lambda x: x[:, 0:9999][:, :][-1:], ()),
    "slice_scatter": (lambda x: aten.slice_scatter(x, x[:, :TEXT] * 2, 1, 0, TEXT), ()),
    "slice_scatter of the image": (lambda x: torch.slice_scatter(x * 2, x[:, TEXT:], dim=1, start=TEXT), ()),
    "slice_scatter of every second channel": (lambda x: aten.slice_scatter(x, x[..., ::2] * 2, -1, 0, 9999, 2), ()),
    "split": (lambda x: torch.cat(x.split([TEXT, N - TEXT], 1)[::-1], dim=1), ()),
    "split with sizes": (lambda x: aten.split_with_sizes(x, [TEXT, N - TEXT, 0], 1)[0], ()),
    "split of channels": (lambda x: x.split(1, -1)[3] + x.chunk(2, dim=-1)[1].tensor_split([1], 2)[0], ()),
    "unbind": (lambda x: x.unbind(0)[1] * x.unflatten(-1, (2, -1)).unbind(2)[0].unbind(-1)[1].unbind()[0][:, None], ()),
    "cat": (lambda x: aten.concat([x, aten.concatenate([x, x * 2], -1)], 2), ()),
    "cat of channels with a table": (lambda x, t: torch.cat([t, x, t * 2], -1), (table(2, N, 3),)),
    "cat with tokens of its own": (lambda x, r: torch.cat([r, x[:, TEXT:], r * 2, x[:, :TEXT]], 1), (table(2, 7, 4),)),
    "stack": (lambda x: torch.stack([torch.stack([x, -x], dim=-1).flatten(-2)] * 2, 1), ()),
    "sequences side by side": (
        lambda x: aten.pad_sequence([x[0] * 2, x[0]], True) + aten.pad_sequence([x[0], -x[0]]).transpose(0, 1), ()
    ),
    "expand": (lambda x: x.unsqueeze(0).unsqueeze(3).expand(7, -1, -1, 3, -1).expand(2, 7, -1, -1, -1, -1), ()),
    "bits": (lambda x: aten.bitwise_or(aten.bitwise_and(x > 0, x < 1), aten.bitwise_not(x > 2)), ()),
    "angles": (lambda x: aten.asin(torch.tanh(x)) + aten.acos(torch.tanh(x)), ()),
    "bits by Python's operators": (lambda x: ((x > 0) & (x < 1)) | ((x > 2) ^ (x > 3)), ()),
    "fill": (lambda x: x * aten.fill(x, 2.0) + aten.full_like(x, 3.0), ()),
    "complex numbers": (lambda x: torch.imag(torch.complex(x, x + 1) * torch.polar(x.abs(), x)), ()),
    "flip and roll of channels": (lambda x: x.flip(2).roll(1, -1), ()),
    "sort": (lambda x: x.sort(2)[0] + x.argsort(-1) + x.topk(1, -1)[0], ()),
    "index_select of channels": (lambda x, i: x.index_select(2, i.long()), (torch.tensor([3.0, 0, 1, 2, 2, 1, 0, 3]),)),
    "index of channels": (lambda x, i: x[:, :, i.long()], (torch.tensor([3.0, 0, 1, 2, 2, 1, 0, 3]),)),
    "repeat": (lambda x: x.repeat(1, 1, 2).repeat(3, 1, 1, 1).repeat_interleave(2, 0).repeat_interleave(2, dim=-1), ()),
    "pad": (lambda x: aten.constant_pad_nd(aten.pad(x, [1, 0, 0, 0, 0, 1], value=2.0), [0, 1]), ()),
    "narrow": (lambda x: x.narrow(2, 1, 2) * x.narrow(2, -2, 2), ()),
    "narrow of the image": (lambda x: x.narrow(1, TEXT, N - TEXT) * 2, ()),
    "select_scatter": (lambda x: aten.select_scatter(x, x[:, :, 2] * 2, 2, 1), ()),
    "gather": (lambda x: x.gather(2, x.argsort(-1)).scatter(-1, x.argsort(2), x * 2), ()),
    "gather by a table": (lambda x, i: x.gather(2, i.long()), ((table(2, N, 2) > 0).float(),)),
    "einsum with matrices for each token": (
        lambda x, t: torch.einsum("bnij, bnj -> nbi", t, torch.einsum("bnj,bnji->bni", x, t[:1])),
        (table(2, N, WIDTH, WIDTH),),
    ),
    "einsum": (lambda x, w: torch.einsum("bnd,de,bnd->bne", x, w, x * 2), (table(WIDTH, 3),)),
    "bmm": (lambda x, w: aten.baddbmm(w[:, :1, :3], x, w) + torch.bmm(x, w), (table(2, WIDTH, 3),)),
    "product onto a table": (
        lambda x, w, t: torch.baddbmm(t, x, w)[0] + torch.addmm(t[0], x.select(0, 1), w[0]),
        (table(2, WIDTH, 3), table(2, N, 3)),
    ),
    "bmm of one matrix per token": (lambda x: torch.bmm(x.permute(1, 0, 2), x.permute(1, 2, 0)), ()),
    "addmm": (lambda x, w: torch.addmm(w[0], x.select(0, 1), w), (table(WIDTH, WIDTH),)),
    "convolution of single tokens": (lambda x, w: F.conv1d(x.transpose(1, 2), w), (table(3, WIDTH, 1),)),
    "convolutions across": (
        lambda x, w: F.conv3d(F.conv2d(x.transpose(1, 2)[..., None], w, padding=(0, 1))[..., None], w[:3, :3, None] * 2),
        (table(3, WIDTH, 1, 1),),
    ),
    "tokens in the batch": (
        lambda x, t: (F.linear(x.flatten(0, 1)[:, None], t[:3, :WIDTH]) * t[:, None, :1]).squeeze(1).unflatten(0, (2, N)),
        (table(2 * N, 7),),
    ),
    "frames behind tokens": (
        lambda x: (x.unsqueeze(2).expand(2, N, 3, WIDTH).flatten(1, 2) * 2).permute(2, 0, 1).reshape(WIDTH, 2, N, 3),
        (),
    ),
    "attention over frames": (
        lambda x: F.scaled_dot_product_attention(
            *[x.reshape(2 * N, 1, 2, 2).permute(0, 2, 1, 3).repeat(1, 1, 3, 1)] * 3
        ).reshape(2, N, 12),
        (),
    ),
    "attention": (lambda x, k: F.scaled_dot_product_attention(x, x * 2, x + 1), (table(1),)),
    "cross-attention": (lambda x, k: F.scaled_dot_product_attention(x, k, k * 2), (table(2, 7, WIDTH),)),
    "attention to other tokens too": (
        lambda x, k: F.scaled_dot_product_attention(x, torch.cat([k, x], 1), torch.cat([k * 2, x], 1)),
        (table(2, 7, WIDTH),),
    ),
    "a table for each token and batch": (lambda x, t: x.transpose(1, 2) * t.transpose(1, 2), (table(2, N, WIDTH),)),
    "a table for each token and head": (lambda x, t: x.unflatten(-1, (2, 2)).transpose(1, 2) * t, (table(2, N, 1),)),
    "a table for channels, as long as the axis": (lambda x, t: x[..., None] * t, (table(WIDTH, N),)),
}  # fmt: skip


def test_tokens_are_cut_and_written_in_the_order_of_their_axis() -> None:
    axis = Tokens(
        2, (Segment(TEXT_TOKENS, 0, 3), Segment(IMAGE_TOKENS, 2, 7), Segment(Source("registers", "outside"), 0, 2))
    )
    assert axis.length == 10
    assert str(axis) == "dim 2: text[0:3] image[2:7] %registers[0:2]"
    assert str(axis.cut(1, 5)) == "dim 2: text[1:3] image[2:4]"
    assert str(axis.cut(4, 99).at(0)) == "dim 0: image[3:7] %registers[0:2]"
    assert axis.cut(5, 5).length == 0


def test_only_nodes_that_depend_on_a_stream_are_followed() -> None:
    gm = trace(lambda x, t: (x.sin() + t.cos(), t[0, :1] * 2), stream(), table(N, 1))
    infos = follow(gm.graph.nodes, {gm.graph.find_nodes(op="placeholder")[0]: TOKENS})
    assert [node.name for node in infos] == ["x_1", "sin", "add"]
    assert set(infos.values()) == {TOKENS}


def test_parts_that_are_joined_again_are_one_segment() -> None:
    gm = trace(lambda x: torch.cat([x[:, :1], x[:, 1:4], x[:, 4:], x[:, :2]], 1), stream())
    *_, (_, joined) = follow(gm.graph.nodes, {gm.graph.find_nodes(op="placeholder")[0]: TOKENS}).items()
    assert str(joined) == "dim 1: text[0:3] image[0:5] text[0:2]"


@pytest.mark.parametrize("name", EXAMPLES)
def test_rule(name: str) -> None:
    function, externals = EXAMPLES[name]
    check_texts(function, *externals, image=torch.tensor([4, 1]), texts=("all", "none"))


@pytest.mark.parametrize("name", ["squeeze", "squeeze of longer axes", "slice", "expand", "cat with tokens of its own"])
def test_one_kept_token_is_not_taken_for_an_axis_of_length_one(name: str) -> None:
    function, externals = EXAMPLES[name]
    check(function, *externals, image=torch.tensor([2]), text="none")


def test_a_batch_of_one() -> None:
    check(lambda x: x.squeeze() * 2, x=stream()[:1], image=torch.tensor([4, 1]), text="all")


def test_every_rule_has_an_example() -> None:
    used = set()
    for function, externals in EXAMPLES.values():
        for node in trace(function, stream(), *externals).graph.nodes:
            used.add(getattr(node.target, "overloadpacket", None))
    assert sorted(map(str, {op.overloadpacket for op in RULES.keys() - EXCHANGING.keys()} - used)) == []
