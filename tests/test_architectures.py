"""Refreshing, choosing by score and extrapolating in transformers of every make: right after a full step, nothing changes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hero_fx.build import build_steps
from hero_fx.config import Config
from hero_fx.passes.rewrite.plan import Extrapolate, Refresh, Reuse, ScoredRefresh
from hero_fx.passes.rewrite.resolve import resolve

from .support.layers import D, Layer, Model, Part, attend, norm
from .support.steps_by_hand import GRID, Toy

INDEX = torch.tensor([4, 1])


def turned(part: Part, x: Tensor, rotate: Any) -> Any:
    """Self-attention with rotated queries and keys, then an FFN."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in part.qkv(norm(x)).chunk(3, dim=-1))
    angles = torch.arange(float(k.shape[2] * k.shape[3] // 2)).reshape(k.shape[2], -1)
    out = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
    x = x + part.out(out.transpose(1, 2).flatten(2))
    return x + part.ffn(norm(x))


def rotary_by_slices(part: Part, x: Tensor) -> Any:
    """As Wan does it."""

    def rotate(heads: Tensor, angles: Tensor) -> Tensor:
        out = torch.empty_like(heads)
        a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
        out[..., 0::2] = a * angles.cos() - b * angles.sin()
        out[..., 1::2] = a * angles.sin() + b * angles.cos()
        return out.type_as(heads)

    return turned(part, x, rotate)


def rotary_by_complex_numbers(part: Part, x: Tensor) -> Any:
    """As Flux and Qwen-Image do it."""

    def rotate(heads: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads.float().reshape(*heads.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)

    return turned(part, x, rotate)


def joint(part: Part, x: Tensor, text: Tensor) -> Any:
    out = part.attention(torch.cat([norm(text), norm(x)], dim=1))
    for_text, for_image = out.split([text.shape[1], x.shape[1]], dim=1)
    x, text = x + for_image, text + for_text
    return x + part.ffn(norm(x)), text + part.ffn(norm(text))


def cross(part: Part, x: Tensor, text: Tensor) -> Any:
    x = x + part.attention(norm(x))
    x = x + part.out(attend(norm(x), *part.kv(text[..., :6]).chunk(2, dim=-1)))
    return x + part.ffn(norm(x))


def single(part: Part, x: Tensor) -> Any:
    n = norm(x)
    return x + part.both(torch.cat([attend(*part.qkv(n).chunk(3, dim=-1)), F.gelu(part.up(n))], dim=-1))


def side_by_side(part: Part, x: Tensor) -> Any:
    n = norm(x)
    return x + part.attention(n) + part.ffn(n)


def norm_at_the_end(part: Part, x: Tensor) -> Any:
    x = norm(x + part.attention(x))
    return norm(x + norm(part.ffn(x)))


def modulation_of_each_token(part: Part, x: Tensor) -> Any:
    scale, gate = torch.arange(2.0 * x.numel() // D).reshape(2, *x.shape[:2], 1).sin()
    x = x + part.attention(norm(x) * (1 + scale)) * gate
    return x + part.ffn(norm(x) * (1 + scale[0])) * gate


def grouped_heads(part: Part, x: Tensor) -> Any:
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in part.qkv(norm(x)).chunk(3, dim=-1))
    out = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    return x + part.out(out.transpose(1, 2).flatten(2))


def registers(part: Part, x: Tensor) -> Any:
    keys = part.qkv(torch.cat([part.down.weight[None, :3, :D].expand(x.shape[0], -1, -1), norm(x)], dim=1))
    x = x + part.out(attend(part.qkv(norm(x))[..., :D], *keys[..., D:].chunk(2, dim=-1)))
    return x + part.ffn(norm(x))


def parts_of_one_stream(part: Part, x: Tensor) -> Any:
    """The FFN sees first the one, then the other part of the tokens."""
    x = x + part.attention(norm(x))
    first, last = x.split([2, 4], dim=1)
    return torch.cat([first + part.ffn(norm(first)), last + part.ffn(norm(last))], dim=1)


@cache
def toy(layer: Layer) -> Toy:
    torch.manual_seed(0)
    model, text = Model(layer, layers=2).eval().requires_grad_(False), layer in (joint, cross)
    return Toy(lambda x, gate, w, v, *text: model(x, *text), text=text, width=D)


def repeats(toy: Toy, strategy: Any) -> dict[str, str]:
    """Asserts that a cached step right after a full one on the same inputs gives the same; branches that fell back."""
    plan = tuple((branch, strategy(branch)) for branch in toy.structure.branches)
    (plan,), fallbacks = resolve(toy.normal, toy.structure, [plan])
    toy.state.clear()
    expected = toy.run(toy.full(plan), toy.inputs(), inverse_gap_1=0.0)
    ours = toy.run(toy.cached(plan), toy.inputs(), index=INDEX, x=1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    return {fallback.branch: fallback.reason for fallback in fallbacks}


LAYERS = [
    rotary_by_slices, rotary_by_complex_numbers, joint, cross, single, side_by_side, norm_at_the_end,
    modulation_of_each_token, grouped_heads, registers,
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_cached_step_right_after_a_full_one_repeats_it(layer: Layer) -> None:
    for strategy in (Refresh(), Refresh(text="live", cache_point="post_gate", unsampled="extrapolate"), Extrapolate()):
        assert repeats(toy(layer), lambda branch, strategy=strategy: strategy) == {}
    for scored in (ScoredRefresh(text="live"), ScoredRefresh(score="values", cache_point="post_gate")):
        point = Reuse(cache_point=scored.cache_point)
        assert repeats(toy(layer), lambda branch, s=scored, p=point: s if branch.kind == "ffn" else p) == {}


def test_branches_on_a_part_of_the_image_fall_back() -> None:
    fallbacks = repeats(toy(parts_of_one_stream), lambda branch: Refresh())
    assert list(fallbacks) == ["l0_ffn", "l0_ffn_2", "l1_ffn", "l1_ffn_2"]
    assert all("it holds a part of the tokens of one source" in reason for reason in fallbacks.values())


def trajectory(toy: Toy, **options: Any) -> list[Tensor]:
    """The outputs of two full steps with two cached ones behind each, on inputs and tokens that change."""
    config = Config(policy="hero", grid=GRID, patch=(1, 1, 2), refresh_ratio=1 / 3, **options)
    policy = config.make_policy()
    assert policy is not None
    steps = build_steps(toy.normal, toy.structure, policy, config)
    toy.state.clear()
    results: list[Tensor] = []
    for step in range(6):
        since, gap = step % 3, 1 / 3 if step >= 3 else 0.0
        index = torch.tensor([step % 2, 2 + step % 4])
        gm = steps.cached[0] if since else steps.full
        results += toy.run(gm, toy.inputs(seed=100 * step), index=index, x=float(since), inverse_gap_1=gap)
    return results


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_collapsed_is_literal(layer: Layer) -> None:
    for points in (("pre_gate", "post_gate"), ("post_gate", "post_gate")):
        options: dict[str, Any] = {"refresh_layers": 1, "cache_point": points}
        ours, theirs = (trajectory(toy(layer), form=form, **options) for form in ("collapsed", "literal"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
