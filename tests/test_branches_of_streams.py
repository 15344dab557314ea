"""`hero_fx.passes.analysis.branches` where there are several residual streams."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.analysis.tokens import IMAGE

from .support.branches import describe, found, joint, single
from .support.layers import D, Model, Part, attend, norm
from .support.tracing import normal_form


def test_joint_attention_on_two_streams() -> None:
    assert_expected_inline(
        describe(found(joint, (2, 5, D), (2, 3, D))),
        """\
image: image[0:5] x 8
text: text[0:3] x 8
l0_attention [parts.0] image: add = streams_0 + getitem_4; text: add_1 = streams_1 + getitem_3; reads streams_0 (image), streams_1 (text)
l0_ffn [parts.0] image: add_2 = add + linear_3; reads add (image)
l0_ffn_2 [parts.0] text: add_3 = add_1 + linear_5; reads add_1 (text)
l1_attention [parts.1] image: add_4 = add_2 + getitem_9; text: add_5 = add_3 + getitem_8; reads add_2 (image), add_3 (text)
l1_ffn [parts.1] image: add_6 = add_4 + linear_9; reads add_4 (image)
l1_ffn_2 [parts.1] text: add_7 = add_5 + linear_11; reads add_5 (text)
image: image 5 None""",
    )


def test_cross_attention() -> None:
    def layer(part: Part, x: Tensor, text: Tensor) -> Any:
        x = x + part.attention(norm(x))
        x = x + part.out(attend(norm(x), *part.kv(text).chunk(2, dim=-1)))
        return x + part.ffn(norm(x))

    structure = found(layer, (2, 5, D), (2, 3, 6))
    assert [b.label for b in structure.branches] == [
        "l0_attention", "l0_cross_attention", "l0_ffn", "l1_attention", "l1_cross_attention", "l1_ffn",
    ]  # fmt: skip
    assert [s.name for s in structure.streams] == ["image"]
    assert structure.lengths == {IMAGE: 5}


def test_dual_streams_then_a_single_one() -> None:
    class Flux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dual, self.single = Model(joint), Model(single)

        def forward(self, x: Tensor, text: Tensor) -> Any:
            x, text = self.dual(x, text)
            return self.single(torch.cat([text, x], dim=1))[0][:, text.shape[1] :]

    structure = find_branches(normal_form(Flux().eval(), torch.ones(2, 5, D), torch.ones(2, 3, D)))
    assert [str(s.tokens) for s in structure.streams] == [
        "dim 1: image[0:5]", "dim 1: text[0:3]", "dim 1: text[0:3] image[0:5]",
    ]  # fmt: skip
    assert [s.name for s in structure.streams] == ["image", "text", "text+image"]
    assert structure.depth == 4
    assert [b.kind for b in structure.branches if b.layer > 1] == ["parallel", "parallel"]


def test_a_stream_taken_apart_and_joined_again_in_every_layer() -> None:
    def layer(part: Part, x: Tensor) -> Any:
        x = x + part.attention(norm(x))
        first, last = x.split([2, 3], dim=1)
        last = last + part.ffn(norm(last)) * 2
        return torch.cat([first + part.ffn(norm(first)), last], dim=1)

    structure = found(layer, (2, 5, D))
    assert [f"{s.name}: {s.tokens}" for s in structure.streams] == [
        "image: dim 1: image[0:5]", "image#1: dim 1: image[2:5]", "image#2: dim 1: image[0:2]",
    ]  # fmt: skip
    assert structure.lengths == {IMAGE: 5}
    assert structure.depth == 2
