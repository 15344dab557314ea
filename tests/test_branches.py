"""`hero_fx.passes.analysis.branches`: residual branches of transformers of every make, found by structure alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from hero_fx.build import normalized
from hero_fx.passes.analysis.branch_tokens import body_of
from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import by_name

from .support import tiny
from .support.branches import describe, found, single
from .support.layers import D, Layer, Model, Part, attend, norm
from .support.tracing import normal_form, trace


def test_prenorm_attention_and_ffn() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        x = x + part.attention(norm(x))
        return x + part.ffn(norm(x))

    assert_expected_inline(
        describe(found(layer, (2, 5, D))),
        """\
image: image[0:5] x 8
l0_attention [parts.0] image: add = streams_0 + linear_1; reads streams_0 (image)
l0_ffn [parts.0] image: add_1 = add + linear_3; reads add (image)
l1_attention [parts.1] image: add_2 = add_1 + linear_5; reads add_1 (image)
l1_ffn [parts.1] image: add_3 = add_2 + linear_7; reads add_2 (image)
image: image 5 None""",
    )


def test_gates() -> None:
    def layer(part: Part, x: Tensor, time: Tensor) -> Any:
        shift, scale, gate, *second = part.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        x = x + gate * part.attention(norm(x) * (1 + scale) + shift)
        # Two gates, the second from the other side, with a cast in between.
        return part.ffn(norm(x) * second[0]).mul(second[1]).to(torch.float64).float() * second[2].tanh() + x

    assert_expected_inline(
        describe(found(layer, (2, 5, D), (2, 6))),
        """\
image: image[0:5] x 8
l0_attention [parts.0] image: add_2 = streams_0 + mul_1 of linear_2; reads streams_0 (image)
l0_ffn [parts.0] image: add_3 = add_2 + mul_4 of linear_4; reads add_2 (image)
l1_attention [parts.1] image: add_6 = add_3 + mul_6 of linear_7; reads add_3 (image)
l1_ffn [parts.1] image: add_7 = add_6 + mul_9 of linear_9; reads add_6 (image)
image: image 5 None""",
    )


def test_a_gate_for_each_frame() -> None:
    def layer(part: Part, x: Tensor, gate: Tensor) -> Any:
        return x + (part.ffn(x).unflatten(1, (2, 3)) * gate).flatten(1, 2)

    (first, _) = found(layer, (2, 6, D), (2, 2, 1, D)).branches
    assert (first.updates[0].update, first.updates[0].feature) == ("mul_tensor", "linear_1")


def test_a_factor_that_depends_on_the_stream_is_no_gate() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        return x + part.ffn(x) * x.sigmoid()

    (first, _) = found(layer, (2, 5, D)).branches
    assert first.updates[0].feature == first.updates[0].update


def test_parallel_in_one_projection() -> None:
    structure = found(single, (2, 5, D))
    assert [(b.layer, b.kind) for b in structure.branches] == [(0, "parallel"), (1, "parallel")]


def test_gated_attention_is_no_parallel_branch() -> None:
    """A product that is a factor of what attention gives is a gate."""

    def layer(part: Part, x: Tensor) -> Any:
        n = norm(x)
        x = x + part.out(attend(*part.qkv(n).chunk(3, dim=-1)) * F.sigmoid(part.kv(n[..., :6])[..., :D]))
        return x + part.ffn(norm(x))

    kinds = [(b.layer, b.kind) for b in found(layer, (2, 5, D)).branches]
    assert kinds == [(0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn")]


class _Skip(Model):
    """A skip connection around all layers, with what `behind` makes of them."""

    def __init__(self, layer: Layer, behind: Callable[[Part, Tensor], Tensor]) -> None:
        super().__init__(layer)
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        (y,) = super().forward(x)
        return x + self.behind(self.parts[0], y)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "behind",
    [lambda part, y: y, lambda part, y: part.out(y), lambda part, y: norm(part.out(y))],
    ids=["as it is", "projected", "projected, normalised"],
)
def test_a_skip_around_all_layers_is_no_branch(behind: Any) -> None:
    def layer(part: Part, x: Tensor) -> Any:
        x = x + part.attention(norm(x))
        return x + part.ffn(norm(x))

    structure = find_branches(normal_form(_Skip(layer, behind).eval(), torch.ones(2, 5, D)))
    assert [(b.label, len(b.updates)) for b in structure.branches] == [
        ("l0_attention", 1), ("l0_ffn", 1), ("l1_attention", 1), ("l1_ffn", 1),
    ]  # fmt: skip


def test_what_has_only_a_shape_of_the_stream_is_no_branch() -> None:
    class Recycled(Model):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + self.parts[0].ffn(norm(torch.zeros_like(x))))  # type: ignore[operator]

    def layer(part: Part, x: Tensor) -> Any:
        return x + part.attention(norm(x))

    structure = find_branches(normal_form(Recycled(layer).eval(), torch.ones(2, 5, D)))
    assert [b.label for b in structure.branches] == ["l0_attention", "l1_attention"]


def test_an_output_of_one_token_is_made_of_that_token() -> None:
    class Last(Model):
        def forward(self, x: Tensor) -> Any:
            (y,) = super().forward(x)
            return self.parts[0].out(norm(y)[:, -1])  # type: ignore[operator]

    def layer(part: Part, x: Tensor) -> Any:
        return x + part.attention(norm(x))

    structure = find_branches(normal_form(Last(layer).eval(), torch.ones(2, 5, D)))
    assert [str(s) for s in structure.streams[0].tokens.segments] == ["text[0:4]", "image[0:1]"]


def test_parallel_as_a_sum() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        n = norm(x)
        return x + (part.attention(n) + part.ffn(n))

    assert [(b.layer, b.kind) for b in found(layer, (2, 5, D)).branches] == [(0, "parallel"), (1, "parallel")]


def test_a_gate_of_the_heads_is_no_ffn_beside_attention() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        n = norm(x)
        return x + part.out(attend(*part.qkv(n).chunk(3, dim=-1)) * torch.sigmoid(part.out(n)))

    assert [(b.layer, b.kind) for b in found(layer, (2, 5, D)).branches] == [(0, "attention"), (1, "attention")]


def test_parallel_in_two_adds() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        n = norm(x)
        return x + part.attention(n) + part.ffn(n)

    structure = found(layer, (2, 5, D))
    assert [(b.layer, b.kind) for b in structure.branches] == [
        (0, "attention"), (0, "ffn"), (1, "attention"), (1, "ffn"),
    ]  # fmt: skip
    attention, ffn = (b.updates[0] for b in structure.branches[:2])
    assert ffn.residual == attention.add
    assert ffn.source == attention.source == attention.residual


def test_an_add_within_a_branch_is_a_part_of_it() -> None:
    """What attention gives attends to the text, and one projection takes the sum."""

    def layer(part: Part, x: Tensor, text: Tensor) -> Any:
        n = norm(x)
        a = attend(*part.qkv(n).chunk(3, dim=-1))
        a = a + part.out(attend(a, *part.kv(text).chunk(2, dim=-1)))
        return x + part.both(torch.cat([a, F.gelu(part.up(n))], dim=-1))

    first, second = found(layer, (2, 5, D), (2, 3, 6)).branches
    assert (first.label, len(first.updates), len(first.attention)) == ("l0_parallel", 1, 2)
    assert second.label == "l1_parallel"


def test_attention_within_a_stream_that_a_branch_only_reads() -> None:
    def layer(part: Part, x: Tensor, other: Tensor) -> Any:
        x = x + part.attention(norm(x))
        keys = attend(norm(other), norm(other), norm(other))
        return x + part.out(attend(norm(x), keys, keys)), other + part.attention(norm(other))

    branches = {b.label: b for b in found(layer, (2, 5, D), (2, 3, D)).branches}
    assert len(branches["l0_cross_attention"].attention) == 2


def test_a_stream_without_a_batch() -> None:
    """Its time embedding is of the same rank, and no stream: no attention is in it."""

    def layer(part: Part, x: Tensor, time: Tensor) -> Any:
        time = time + part.ffn(norm(time))
        n = norm(x)[None]
        x = x + part.out(attend(*part.qkv(n).chunk(3, dim=-1)))[0] * time
        return x + part.ffn(norm(x)), time

    structure = found(layer, (5, D), (1, D))
    assert [str(s.tokens) for s in structure.streams] == ["dim 0: image[0:5]"]
    assert [b.label for b in structure.branches] == ["l0_attention", "l0_ffn", "l1_attention", "l1_ffn"]


def gelu_by_hand(part: Part, x: Tensor) -> Any:
    u = part.up(norm(x))
    return x + part.down(0.5 * u * (1 + torch.tanh(0.8 * (u + 0.04 * u**3))))


def low_rank(part: Part, x: Tensor) -> Any:
    n = norm(x)
    return x + part.down(F.gelu(part.up(n) + 0.5 * F.linear(F.linear(n, part.up.weight[:2]), part.up.weight[:, :2])))


def time_residual(part: Part, x: Tensor, time: Tensor) -> Any:
    time = time + part.ffn(time)
    return x + time[:, None] * part.ffn(norm(x))


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [(gelu_by_hand, [(2, 5, D)]), (low_rank, [(2, 5, D)]), (time_residual, [(2, 5, D), (2, D)])],
    ids=["gelu written out", "low-rank addition", "time embedding"],
)
def test_other_sums_are_no_branches(layer: Layer, shapes: list[tuple[int, ...]]) -> None:
    structure = found(layer, *shapes)
    assert [b.label for b in structure.branches] == ["l0_ffn", "l0_ffn_1"]  # layers are told apart by attention


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(w, w).mean() + x * x,
        lambda x, w: F.linear(x + x.sin(), w),
        lambda x, w: torch.add(x, F.linear(x, w), alpha=2),
        lambda x, w: x[:, 0] + F.linear(x[:, 0], w),
        lambda x, w: F.linear(x, w) + x[:, :1],
    ],
    ids=["no product in between", "sum in front of the product", "alpha", "no token axis", "broadcast"],
)
def test_no_branches(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    structure = find_branches(trace(function, torch.ones(2, 5, D), torch.ones(D, D)))
    assert structure == Structure((), (), None, 0, None)
    assert structure.depth == 0


def test_body_lies_between_what_a_branch_reads_and_its_updates() -> None:
    def layer(part: Part, x: Tensor, gate: Tensor) -> Any:
        return x + gate * part.ffn(norm(x))

    gm = normal_form(Model(layer).eval(), torch.ones(2, 5, D), torch.ones(D))
    (branch, _) = find_branches(gm).branches
    names = {point: [n.name for n in body_of(by_name(gm), branch, to_update=point)[1]] for point in (False, True)}
    assert names == {
        False: ["layer_norm", "linear", "gelu", "linear_1"],
        True: ["layer_norm", "linear", "gelu", "linear_1", "mul"],
    }


def test_cogvideox() -> None:
    graph = tiny.captured(layers=2)
    assert_expected_inline(
        describe(find_branches(normalized(graph.gm, graph.inputs)[0])),
        """\
image: image[0:72] x 32
text: text[0:7] x 32
l0_attention [transformer_blocks.0.attn1] image: add_6 = slice_4 + mul_9 of getitem_11; text: add_7 = slice_3 + mul_10 of getitem_10; reads slice_4 (image), slice_3 (text)
l0_ffn [transformer_blocks.0.ff.net] image: add_12 = add_6 + mul_13 of slice_9; text: add_13 = add_7 + mul_14 of slice_10; reads add_6 (image), add_7 (text)
l1_attention [transformer_blocks.1.attn1] image: add_20 = add_12 + mul_21 of getitem_29; text: add_21 = add_13 + mul_22 of getitem_28; reads add_12 (image), add_13 (text)
l1_ffn [transformer_blocks.1.ff.net] image: add_26 = add_20 + mul_25 of slice_15; reads add_20 (image), add_21 (text)
image: image 72 (3, 4, 6)""",
    )


def test_labels_are_unique_however_many_branches_a_layer_has() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        x = x + part.attention(norm(x))
        for number in range(14):
            x = x + part.ffn(norm(x) * number)
        return x

    labels = [branch.label for branch in found(layer, (2, 5, D)).branches]
    assert len(labels) == len(set(labels)) == 30
    assert labels[:4] == ["l0_attention", "l0_ffn", "l0_ffn_2", "l0_ffn_3"]
