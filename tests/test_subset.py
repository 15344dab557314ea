"""`hero_fx.passes.rewrite.subset`: ops computed for some tokens give the rows that they give for all tokens."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.analysis.tokens import Segment, Source, Tokens
from hero_fx.passes.emit import Emitter
from hero_fx.passes.render import graph_diff, op_count, render
from hero_fx.passes.rewrite.keep import Rows
from hero_fx.passes.rewrite.subset import Subset

from .support.axis import (
    BATCH,
    IMAGE,
    IMAGE_TOKENS,
    TEXT,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Text,
    attend_to_all,
    check,
    emit_subset,
    kept_rows,
    stream,
)
from .support.tracing import trace

aten = torch.ops.aten


def values(*shape: int) -> Tensor:
    """Numbers that a graph makes for itself."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).sin()


def part(x: Tensor, dim: int, start: int, stop: int | None, step: int = 1) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


@dataclass
class Chain:
    """A tensor in the course of a chain of ops: where its tokens are, and how many lie in each of its segments."""

    value: Tensor
    dim: int
    lengths: list[int]
    batch_in_front: bool = False

    @property
    def rank(self) -> int:
        return self.value.dim()

    @property
    def others(self) -> list[int]:
        return [d for d in range(self.batch_in_front, self.rank) if d != self.dim]

    def segment(self, n: int) -> tuple[int, int]:
        """Bounds of one of the segments."""
        number = n % len(self.lengths)
        return sum(self.lengths[:number]), sum(self.lengths[: number + 1])

    def step(self, op: str, n: int) -> None:
        """Applies an op, in the variant that `n` says; ops that do not fit are left out."""
        x, dim, last = self.value, self.dim, self.value.shape[-1]
        other, another = self.others[n % len(self.others)], self.others[n // 3 % len(self.others)]
        match op:
            case "pointwise":
                self.value = [F.gelu(x), x * 2 + 1, x.clamp(-1, 1) - x, x.to(torch.float64).sin().float()][n % 4]
            case "with constants":
                self.value = torch.where(values(last) > 0, x * values(last), x + values(*x.shape[other:]).mean())
            case "with a table":
                whole = [1] * self.rank
                whole[dim] = x.shape[dim]
                if n % 2:
                    whole[other] = x.shape[other]
                self.value = (
                    x * values(*whole) if n % 3 else x.masked_fill(values(*whole[dim * (n % 2 == 0) :]) < 0, 0.0)
                )
            case "linear" if dim < self.rank - 1:
                self.value = F.linear(x, values(2 * (n % 3 + 1), last))
            case "layer_norm" if dim < self.rank - 1:
                self.value = F.layer_norm(x, x.shape[dim + 1 :])
            case "transpose":
                self.value = x.transpose(dim, other) if n % 2 else x.transpose(other - self.rank, another)
                self.dim = {dim: other, other: dim}.get(dim, dim) if n % 2 else dim
            case "permute":
                order = [*range(n % self.rank, self.rank), *range(n % self.rank)]
                self.value, self.dim = x.permute(order), order.index(dim)
            case "heads" if last % 2 == 0 and dim < self.rank - 1 and self.rank < 6:
                self.value = x.reshape(*x.shape[:-1], 2, -1) if n % 2 else x.unflatten(-1, (-1, 2))
            case "flatten" if self.rank > 3:
                start = next((d for d in range(self.rank - 1) if dim not in (d, d + 1)), None)
                if start is not None:
                    self.value, self.dim = x.flatten(start, start + 1), dim - (start < dim)
            case "unsqueeze" if self.rank < 5:
                at = n % (self.rank + 1)
                self.value, self.dim = x.unsqueeze(at), dim + (at <= dim)
            case "squeeze" if x.shape[other] == 1 and self.rank > 2:
                self.value, self.dim = x.squeeze(other) if n % 2 else x.select(other, 0), dim - (other < dim)
            case "slice" if x.shape[other] > 3:
                self.value = part(x, other, n % 2, None, 1 + n % 3)
            case "cat of channels":
                self.value = torch.cat([x, x * 2], other)
            case "stack":
                self.value = torch.stack([x, x.sin()], -1)[..., n % 2]
            case "unbind" if self.rank > 2:
                self.value, self.dim = x.unbind(other)[-1], dim - (other < dim)
            case "softmax":
                self.value = x.softmax(other)
            case "reduce" if self.rank > 2:
                self.value, self.dim = x.mean(other), dim - (other < dim)
            case "reduce and keep":
                self.value = x - x.amax(other, keepdim=True)
            case "repeat" if self.rank < 5:
                times = [1 + (d == other) for d in range(self.rank)]
                self.value, self.dim = x.repeat(*[1] * (n % 2), *times), dim + n % 2
            case "repeat_interleave":
                self.value = x.repeat_interleave(2, other)
            case "pad":
                pads = [[n % 2, 1] if d == other else [0, 0] for d in reversed(range(self.rank))]
                self.value = F.pad(x, functools.reduce(operator.iadd, pads, []), value=0.5)
            case "narrow":
                self.value = x.narrow(other, 0, 1) if n % 2 else x.narrow(dim, 0, x.shape[dim])
            case "flip, roll, sort":
                self.value = [x.flip(other), x.roll(1, other), x.sort(other)[0], x.topk(1, other)[0]][n % 4]
            case "select_scatter":
                self.value = aten.select_scatter(x, x.select(other, 0) * 2, other, -1)
            case "gather":
                places = x.argsort(other)
                self.value = x.gather(other, places) if n % 2 else torch.zeros_like(x).scatter(other, places, x)
            case "einsum" if dim < self.rank - 1:
                letters = "abcdefgh"[: self.rank]
                self.value = torch.einsum(f"{letters},{letters[-1]}z->{letters[:-1]}z", x, values(last, 2))
            case "bmm" if self.rank == 3 and dim == 1:
                self.value = torch.bmm(x, values(x.shape[0], last, 3))
            case "convolution" if self.rank == 3 and dim == 2:
                self.value = F.conv1d(x, values(2, x.shape[1], 1))
            case "fold" if dim > 0 and self.rank > 2:
                folded = x.flatten(dim - 1, dim)
                table = values(*folded.shape[: dim - 1], folded.shape[dim - 1], *[1] * (folded.dim() - dim))
                self.value = (folded.sin() * table if n % 2 else folded * 2).reshape(x.shape)
            case "fold behind" if dim < self.rank - 2:
                self.value = x.flatten(dim, dim + 1).cos().unflatten(dim, (x.shape[dim], -1))
            case "expand" if self.rank < 5:
                self.value, self.dim = x.expand(n % 2 + 1, *x.shape), dim + 1
            case "split and swap" if len(self.lengths) > 1:
                first, *rest = x.split(self.lengths, dim)
                self.value, self.lengths = torch.cat([*rest, first * 2], dim), [*self.lengths[1:], self.lengths[0]]
            case "one segment" if len(self.lengths) > 1:
                self.value, self.lengths = part(x, dim, *self.segment(n)), [self.lengths[n % len(self.lengths)]]
            case "slice_scatter":
                start, stop = self.segment(n)
                self.value = aten.slice_scatter(x, part(x, dim, start, stop) * 3, dim, start, stop)
            case "registers" if len(self.lengths) < 4:
                shape = list(x.shape)
                shape[dim] = 2
                self.value, self.lengths = torch.cat([values(*shape), x], dim), [2, *self.lengths]
            case "attention" if self.rank > 2 and dim == self.rank - 2:
                self.value = F.scaled_dot_product_attention(x, x.sin(), x * 2)


OPS = [
    "pointwise", "with constants", "with a table", "linear", "layer_norm", "transpose", "permute", "heads", "flatten",
    "unsqueeze", "squeeze", "slice", "cat of channels", "stack", "unbind", "softmax", "reduce", "reduce and keep",
    "expand", "split and swap", "one segment", "slice_scatter", "registers", "attention", "repeat",
    "repeat_interleave", "pad", "narrow", "fold", "fold behind", "flip, roll, sort", "select_scatter", "gather", "einsum", "bmm", "convolution",
]  # fmt: skip
BATCH_IN_FRONT = [
    "pointwise", "with constants", "linear", "layer_norm", "heads", "cat of channels", "stack", "reduce and keep",
    "slice", "softmax",
    "split and swap", "one segment", "slice_scatter", "registers",
]  # fmt: skip

PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]

numbers = st.integers(0, 59)
chains = st.lists(st.tuples(st.sampled_from(OPS), numbers), min_size=2, max_size=6)
rows = st.lists(st.integers(0, IMAGE - 1), min_size=1, max_size=IMAGE, unique=True)
texts = st.sampled_from(["all", "none"])


@settings(max_examples=100, deadline=None, phases=PHASES)
@given(chains, rows, texts)
def test_chains(ops: list[tuple[str, int]], image: list[int], text: Text) -> None:
    last: list[Chain] = []

    def function(x: Tensor) -> Tensor:
        chain = Chain(x, 1, [TEXT, IMAGE])
        for op, n in ops:
            chain.step(op, n)
        last[:] = [chain]
        return chain.value * 1

    tokens = check(function, image=torch.tensor(image), text=text)
    (chain,) = last
    assert tokens.dim == chain.dim
    assert tokens.length == sum(chain.lengths)


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(
    st.lists(st.tuples(st.sampled_from(BATCH_IN_FRONT), numbers), min_size=2, max_size=6),
    st.lists(st.permutations(range(IMAGE)), min_size=BATCH, max_size=BATCH),
    st.integers(1, IMAGE),
    texts,
)
def test_chains_with_rows_for_each_batch_element(
    ops: list[tuple[str, int]], orders: list[list[int]], count: int, text: Text
) -> None:
    def function(x: Tensor) -> Tensor:
        chain = Chain(x * values(TEXT + IMAGE, 1), 1, [TEXT, IMAGE], batch_in_front=True)
        for op, n in ops:
            chain.step(op, n)
        return chain.value * values(1, *chain.value.shape[1:]) * values(*chain.value.shape)

    check(function, image=torch.tensor(orders)[:, :count], text=text)


ORDERS = {
    "text first": TOKENS,
    "image first": Tokens(1, (Segment(IMAGE_TOKENS, 0, IMAGE), Segment(TEXT_TOKENS, 0, TEXT))),
    "image alone": Tokens(1, (Segment(IMAGE_TOKENS, 0, TEXT + IMAGE),)),
    "registers": Tokens(
        1, (Segment(Source("0", "outside"), 0, 1), Segment(IMAGE_TOKENS, 0, IMAGE), Segment(TEXT_TOKENS, 0, TEXT - 1))
    ),
}


@pytest.mark.parametrize("tokens", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("text", ["all", "none"])
@pytest.mark.parametrize("image", [[4, 1], [[0, 3], [3, 2]]], ids=["shared", "per batch element"])
def test_merge_puts_kept_tokens_in_their_places(tokens: Tokens, text: Text, image: Any) -> None:
    base, fresh, index = stream(1), stream(2), torch.tensor(image)
    gm = trace(lambda base, fresh, index: (base, fresh, index), base, fresh, index)
    inputs = gm.graph.find_nodes(op="placeholder")
    emitter = Emitter(gm)
    with emitter.before(emitter.output):
        subset = Subset(emitter, {}, {IMAGE_TOKENS: Rows(inputs[2]), TEXT_TOKENS: text}, attend_to_all)
        kept = subset.rows.gather(inputs[1], tokens)
        assert kept is not None
        assert kept.meta["val"].shape == (BATCH, subset.kept.count(tokens), WIDTH)
        emitter.output.args = (subset.rows.merge(inputs[0], tokens, kept),)
    gm.recompile()
    expected = base.clone()
    for batch, rows in enumerate(kept_rows(tokens, index, text).expand(BATCH, -1)):
        expected[batch, rows] = fresh[batch, rows]
    assert torch.equal(gm(base, fresh, index), expected)


def rotated(x: Tensor, cos: Tensor) -> Tensor:
    """A rotary table for the image part of two heads, as in CogVideoX."""
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    heads = torch.slice_scatter(heads, heads[:, :, TEXT:] * cos, 2, TEXT)
    return heads.transpose(1, 2).reshape(BATCH, TEXT + IMAGE, WIDTH)


def rotated_diff(text: Text) -> str:
    """What computing for two image tokens adds to the graph of `rotated`."""
    check(rotated, values(IMAGE, 2), image=torch.tensor([4, 1]), text=text)
    gm = trace(rotated, stream(), values(IMAGE, 2))
    before = render(gm)
    emit_subset(gm, torch.tensor([4, 1]), text)
    return graph_diff(before, gm, context=0)


def test_graph_without_text() -> None:
    assert_expected_inline(
        rotated_diff("none"),
        """\
  ...
+ idx: i64[2] = input
  ...
- return reshape
+ add_tensor: i64[2] = aten.add.Tensor(idx, 3)
+ index_select_default: f32[2, 2, 4] = aten.index_select.default(x_1, 1, add_tensor)
+ reshape_default: f32[2, 2, 2, 2] = aten.reshape.default(index_select_default, [2, 2, 2, 2])
+ transpose_int: f32[2, 2, 2, 2] = aten.transpose.int(reshape_default, 1, 2)
+ index_select_default_1: f32[2, 2] = aten.index_select.default(cos_1, 0, idx)
+ mul_tensor: f32[2, 2, 2, 2] = aten.mul.Tensor(transpose_int, index_select_default_1)
+ transpose_int_1: f32[2, 2, 2, 2] = aten.transpose.int(mul_tensor, 1, 2)
+ reshape_default_1: f32[2, 2, 4] = aten.reshape.default(transpose_int_1, [2, 2, 4])
+ return (reshape, reshape_default_1)""",
    )


def test_graph_with_text() -> None:
    assert_expected_inline(
        rotated_diff("all"),
        """\
  ...
+ idx: i64[2] = input
  ...
- return reshape
+ slice_tensor: f32[2, 3, 4] = aten.slice.Tensor(x_1, 1, 0, 3)
+ add_tensor: i64[2] = aten.add.Tensor(idx, 3)
+ index_select_default: f32[2, 2, 4] = aten.index_select.default(x_1, 1, add_tensor)
+ cat_default: f32[2, 5, 4] = aten.cat.default([slice_tensor, index_select_default], 1)
+ reshape_default: f32[2, 5, 2, 2] = aten.reshape.default(cat_default, [2, 5, 2, 2])
+ transpose_int: f32[2, 2, 5, 2] = aten.transpose.int(reshape_default, 1, 2)
+ slice_tensor_1: f32[2, 2, 2, 2] = aten.slice.Tensor(transpose_int, 2, 3, 5)
+ index_select_default_1: f32[2, 2] = aten.index_select.default(cos_1, 0, idx)
+ mul_tensor: f32[2, 2, 2, 2] = aten.mul.Tensor(slice_tensor_1, index_select_default_1)
+ slice_scatter_default: f32[2, 2, 5, 2] = aten.slice_scatter.default(transpose_int, mul_tensor, 2, 3, 5)
+ transpose_int_1: f32[2, 5, 2, 2] = aten.transpose.int(slice_scatter_default, 1, 2)
+ reshape_default_1: f32[2, 5, 4] = aten.reshape.default(transpose_int_1, [2, 5, 4])
+ return (reshape, reshape_default_1)""",
    )


def test_tensors_from_outside_are_gathered_once() -> None:
    gm = trace(lambda x, t: (x * t).sin() * t + x, stream(), values(TEXT + IMAGE, 1))
    emit_subset(gm, torch.tensor([4, 1]), "none")
    assert op_count(gm)["aten.index_select"] == 2


def test_what_lies_in_no_segment_that_is_kept_is_not_computed() -> None:
    gm = trace(lambda x: torch.cat([x[:, :TEXT].sin(), x[:, TEXT:].cos()], 1), stream())
    emit_subset(gm, torch.tensor([4, 1]), "none")
    assert op_count(gm, "aten.sin", "aten.cos", "aten.cat") == {"aten.sin": 1, "aten.cos": 2, "aten.cat": 1}


def test_inlining_behind_an_op_whose_size_only_values_tell() -> None:
    """The size that `nonzero` makes is not the inlined trace's to account for."""
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    gm = trace(lambda x: x, x)
    (given,) = gm.graph.find_nodes(op="placeholder")
    emitter = Emitter(gm)
    with emitter.before(emitter.output):
        places = emitter.call(torch.ops.aten.nonzero.default, given)
        emitter.output.args = ((places, emitter.inline(lambda t: t.repeat_interleave(2, dim=0).sin(), given)),)
    gm.recompile()
    found, twice = gm(x)
    assert found.tolist() == [[0, 1], [1, 0]]
    assert torch.equal(twice, x.repeat_interleave(2, dim=0).sin())
