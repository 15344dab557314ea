"""`hero_fx.passes.rewrite.refresh`: some tokens are recomputed, the rest comes from the cache; attention and state follow."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from hero_fx.passes.analysis.tokens import IMAGE as IMAGE_TOKENS
from hero_fx.passes.analysis.tokens import Segment, Source, Tokens
from hero_fx.passes.render import graph_diff
from hero_fx.passes.rewrite.features import key_slots
from hero_fx.passes.rewrite.plan import (
    CachePoint,
    Extrapolate,
    Full,
    Refresh,
    Reuse,
    ScoredRefresh,
    Strategy,
    Text,
    Unsampled,
)
from hero_fx.passes.rewrite.refresh import RefreshBranches
from hero_fx.passes.rewrite.refresh_scored import RefreshScored, best_tokens
from hero_fx.step_graphs import copy_graph

from .support.steps_by_hand import BATCH, GRID, IMAGE, TEXT, WIDTH, Toy, attentions, ffns, joint, norm, numbers
from .support.tracing import run_passes

INDEX = torch.tensor([4, 1])
EVERY = torch.tensor([3, 0, 5, 1, 4, 2])
POINTS: tuple[CachePoint, ...] = ("pre_gate", "post_gate")
TEXTS: tuple[Text, ...] = ("skip", "live")
UNSAMPLED: tuple[Unsampled, ...] = ("reuse", "extrapolate")


def refresh_diff(toy: Toy, *strategies: Strategy) -> str:
    gm = copy_graph(toy.normal)
    run_passes(gm, RefreshBranches(structure=toy.structure, plan=toy.plan(*strategies), count=2))
    return graph_diff(toy.normal, gm, context=0)


def test_graph_of_an_ffn() -> None:
    assert_expected_inline(
        refresh_diff(Toy(ffns), Refresh(cache_point="post_gate"), Full()),
        """\
  ...
+ idx: i64[2] = input
+ l0_ffn_image_y0: f32[2, 6, 4] = input
  ...
- add: f32[2, 6, 4] = aten.add.Tensor(x_1, mul)
+ index_select_default: f32[2, 2, 4] = aten.index_select.default(x_1, 1, idx)
+ layer_norm_default: f32[2, 2, 4] = aten.layer_norm.default(index_select_default, [4])
+ linear_default: f32[2, 2, 4] = aten.linear.default(layer_norm_default, w_1)
+ mul_tensor: f32[2, 2, 4] = aten.mul.Tensor(gate_1, linear_default)
+ index_copy_default: f32[2, 6, 4] = aten.index_copy.default(l0_ffn_image_y0, 1, idx, mul_tensor)
+ add: f32[2, 6, 4] = aten.add.Tensor(x_1, index_copy_default)
  ...
+ copy__default: f32[2, 6, 4] = aten.copy_.default(l0_ffn_image_y0, index_copy_default)
  ...""",
    )


def test_graph_of_attention() -> None:
    assert_expected_inline(
        refresh_diff(Toy(attentions), Refresh(keys="all"), Full()),
        """\
  ...
+ idx: i64[2] = input
+ l0_attention_k: f32[2, 1, 6, 4] = input
+ l0_attention_v: f32[2, 1, 6, 4] = input
+ l0_attention_image_y0: f32[2, 6, 4] = input
  ...
- mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, linear)
+ index_select_default: f32[2, 2, 4] = aten.index_select.default(x_1, 1, idx)
+ layer_norm_default: f32[2, 2, 4] = aten.layer_norm.default(index_select_default, [4])
+ unsqueeze_default: f32[2, 1, 2, 4] = aten.unsqueeze.default(layer_norm_default, 1)
+ index_copy_default: f32[2, 1, 6, 4] = aten.index_copy.default(l0_attention_k, 2, idx, unsqueeze_default)
+ index_copy_default_1: f32[2, 1, 6, 4] = aten.index_copy.default(l0_attention_v, 2, idx, unsqueeze_default)
+ scaled_dot_product_attention_default: f32[2, 1, 2, 4] = aten.scaled_dot_product_attention.default(unsqueeze_default, index_copy_default, index_copy_default_1)
+ reshape_default: f32[2, 2, 4] = aten.reshape.default(scaled_dot_product_attention_default, [2, 2, 4])
+ linear_default: f32[2, 2, 4] = aten.linear.default(reshape_default, w_1)
+ index_copy_default_2: f32[2, 6, 4] = aten.index_copy.default(l0_attention_image_y0, 1, idx, linear_default)
+ mul: f32[2, 6, 4] = aten.mul.Tensor(gate_1, index_copy_default_2)
  ...
+ copy__default: f32[2, 1, 6, 4] = aten.copy_.default(l0_attention_k, index_copy_default)
+ copy__default_1: f32[2, 1, 6, 4] = aten.copy_.default(l0_attention_v, index_copy_default_1)
+ copy__default_2: f32[2, 6, 4] = aten.copy_.default(l0_attention_image_y0, index_copy_default_2)
  ...""",
    )


def test_graph_of_scored_tokens_without_the_score() -> None:
    toy = Toy(joint, text=True)
    gm = copy_graph(toy.normal)
    plan = toy.plan(Full(), ScoredRefresh(ratio=1 / 3), Full())
    (record,) = run_passes(gm, RefreshScored(structure=toy.structure, plan=plan, grid=GRID))
    assert record.sites == 1
    lines = graph_diff(toy.normal, gm, context=0).splitlines()
    start = next(i for i, line in enumerate(lines) if "topk" in line)
    assert_expected_inline(
        "\n".join(lines[start:]),
        """\
+ topk: (f32[2, 2], i64[2, 2]) = aten.topk.default(add_9, 2, 1)
+ getitem_1: i64[2, 2] = getitem(topk, 1)
+ expand_default: f32[2, 2] = aten.expand.default(x, [2, 2])
+ scatter_src: f32[2, 6] = aten.scatter.src(l0_ffn_stamp, 1, getitem_1, expand_default)
+ reshape_default: i64[2, 2, 1] = aten.reshape.default(getitem_1, [2, 2, 1])
+ expand_default_1: i64[2, 2, 4] = aten.expand.default(reshape_default, [2, 2, 4])
+ gather_default: f32[2, 2, 4] = aten.gather.default(add, 1, expand_default_1)
+ layer_norm_default: f32[2, 2, 4] = aten.layer_norm.default(gather_default, [4])
+ linear_default: f32[2, 2, 4] = aten.linear.default(layer_norm_default, w_1)
+ gelu_default: f32[2, 2, 4] = aten.gelu.default(linear_default)
+ reshape_default_1: i64[2, 2, 1] = aten.reshape.default(getitem_1, [2, 2, 1])
+ expand_default_2: i64[2, 2, 4] = aten.expand.default(reshape_default_1, [2, 2, 4])
+ scatter_src_1: f32[2, 6, 4] = aten.scatter.src(l0_ffn_image_y0, 1, expand_default_2, gelu_default)
+ mul_3: f32[2, 6, 4] = aten.mul.Tensor(gate_1, scatter_src_1)
  ...
- mul_4: f32[2, 2, 4] = aten.mul.Tensor(gate_1, slice_4)
+ mul_4: f32[2, 2, 4] = aten.mul.Tensor(gate_1, l0_ffn_text_y0)
  ...
+ copy__default: f32[2, 6] = aten.copy_.default(l0_ffn_stamp, scatter_src)
+ copy__default_1: f32[2, 6, 4] = aten.copy_.default(l0_ffn_image_y0, scatter_src_1)
  ...""",
    )


REPEATS: list[tuple[Strategy, Tensor]] = [
    *((Extrapolate(order=order, cache_point=point), INDEX) for order, point in product((0, 1, 2), POINTS)),
    *((Reuse(cache_point=point), INDEX) for point in POINTS),
    *(
        (Refresh(keys="all", text=text, unsampled=unsampled, cache_point=point), INDEX)
        for text, unsampled, point in product(TEXTS, UNSAMPLED, POINTS)
    ),
    *((Refresh(keys="sampled+text", text=text), EVERY) for text in TEXTS),
    (Refresh(keys="sampled", text="live"), EVERY),
]


@pytest.mark.parametrize(("strategy", "index"), REPEATS)
def test_right_after_a_full_step_a_cached_one_repeats_it(strategy: Strategy, index: Tensor) -> None:
    toy = Toy(joint, text=True)
    plan, inputs = toy.plan(strategy), toy.inputs()
    expected = toy.run(toy.full(plan), inputs, inverse_gap_1=0.0, inverse_gap_2=0.0)
    before = {name: tensor.clone() for name, tensor in toy.state.items()}
    scalars = {"x": 1.0, "x2": 0.5}
    ours = toy.run(toy.cached(plan, count=len(index)), inputs, index=index, **scalars)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(toy.state, before)


@pytest.mark.parametrize("score", ["attention", "values"])
@pytest.mark.parametrize("text", ["skip", "live"])
@pytest.mark.parametrize("point", POINTS)
def test_so_does_one_that_chooses_tokens_by_score(score: Any, text: Any, point: CachePoint) -> None:
    toy = Toy(joint, text=True)
    best = ScoredRefresh(score=score, text=text, cache_point=point)
    plan, inputs = toy.plan(Reuse(), best, Reuse(), best), toy.inputs()
    expected = toy.run(toy.full(plan), inputs)
    torch.testing.assert_close(toy.run(toy.cached(plan), inputs, x=1.0), expected)


@pytest.mark.parametrize("point", POINTS)
def test_every_token_sampled_is_the_untouched_graph(point: CachePoint) -> None:
    for function, strategy in ((ffns, Refresh(cache_point=point)), (attentions, Refresh(keys="sampled"))):
        toy = Toy(function)
        gm, inputs = toy.cached(toy.plan(strategy), count=IMAGE), toy.inputs()
        torch.testing.assert_close(toy.run(gm, inputs, index=EVERY)[0], toy.normal(*inputs))


@pytest.mark.parametrize("point", POINTS)
def test_sampled_tokens_are_fresh_and_the_others_cached(point: CachePoint) -> None:
    toy = Toy(ffns)
    x, gate, w, v = inputs = toy.inputs()
    cache = numbers(BATCH, IMAGE, WIDTH, seed=5)
    toy.state["l0_ffn_image_y0"] = cache.clone()
    ours = toy.run(toy.cached(toy.plan(Refresh(cache_point=point), Full())), inputs, index=INDEX)[0]
    fresh = F.linear(norm(x), w) * (gate if point == "post_gate" else 1)
    cache[:, INDEX] = fresh[:, INDEX]
    x = x + cache * (gate if point == "pre_gate" else 1)
    torch.testing.assert_close(ours, x + gate * F.linear(norm(x), v))
    torch.testing.assert_close(toy.state["l0_ffn_image_y0"], cache)


def test_unsampled_tokens_extrapolate_and_the_cache_stays_a_line() -> None:
    toy = Toy(ffns)
    x, gate, w, v = inputs = toy.inputs()
    y0, y1 = (numbers(BATCH, IMAGE, WIDTH, seed=seed) for seed in (5, 6))
    toy.state |= {"l0_ffn_image_y0": y0.clone(), "l0_ffn_image_y1": y1.clone()}
    plan = toy.plan(Refresh(unsampled="extrapolate"), Full())
    ours = toy.run(toy.cached(plan), inputs, index=INDEX, x=2.0)[0]
    estimate = y0 + 2 * y1
    estimate[:, INDEX] = F.linear(norm(x), w)[:, INDEX]
    x = x + gate * estimate
    torch.testing.assert_close(ours, x + gate * F.linear(norm(x), v))
    torch.testing.assert_close(toy.state["l0_ffn_image_y0"] + 2 * y1, estimate)
    assert torch.equal(toy.state["l0_ffn_image_y1"], y1)


@pytest.mark.parametrize("keys", ["sampled", "sampled+text", "all"])
@pytest.mark.parametrize("text", ["skip", "live"])
def test_what_sampled_queries_attend_to(keys: Any, text: Any) -> None:
    toy = Toy(joint, text=True)
    plan = toy.plan(Refresh(keys=keys, text=text, cache_point="post_gate"), Full())
    before, (x, gate, w, _, words) = toy.inputs(seed=7), toy.inputs(seed=8)
    toy.run(toy.full(plan), before)
    old, new = (norm(torch.cat([t, i], 1)) for t, i in ((before[4], before[0]), (words, x)))
    fresh = [*range(TEXT)] * (text == "live") + [TEXT + int(i) for i in INDEX]
    seen = old.clone()
    seen[:, fresh] = new[:, fresh]
    columns = {"sampled": fresh, "sampled+text": sorted({*range(TEXT), *fresh}), "all": [*range(TEXT + IMAGE)]}[keys]
    part = seen[:, columns]
    features = toy.state["l0_attention_text_y0"].clone(), toy.state["l0_attention_image_y0"].clone()
    merged = torch.cat(features, 1)
    merged[:, fresh] = gate * F.linear(F.scaled_dot_product_attention(new[:, fresh], part * 2, part), w)
    toy.run(toy.cached(plan), [x, gate, w, toy.inputs()[3], words], index=INDEX)
    ours = torch.cat([toy.state["l0_attention_text_y0"], toy.state["l0_attention_image_y0"]], 1)
    torch.testing.assert_close(ours, merged)
    if keys == "all":
        torch.testing.assert_close(toy.state["l0_attention_k"][:, 0], seen * 2)


def masked(x: Tensor, gate: Tensor, w: Tensor, v: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention whose mask has a row for each query and a column for each key."""
    for weight in (w, v):
        n = norm(torch.cat([text, x], 1)).unsqueeze(1)
        mask = torch.arange(float((TEXT + IMAGE) ** 2)).reshape(TEXT + IMAGE, -1).sin() * 3
        out = F.linear(F.scaled_dot_product_attention(n, n, n, attn_mask=mask).squeeze(1), weight)
        x, text = x + gate * out[:, TEXT:], text + gate * out[:, :TEXT]
    return x, text


def biased(x: Tensor, gate: Tensor, w: Tensor, v: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Joint attention; what the second one adds to its scores is made of the tokens that come into the first."""
    first = torch.cat([text, x], 1)
    for weight, mask in ((w, None), (v, (first @ first.transpose(1, 2)).unsqueeze(1))):
        n = norm(torch.cat([text, x], 1)).unsqueeze(1)
        out = F.linear(F.scaled_dot_product_attention(n, n, n, attn_mask=mask).squeeze(1), weight)
        x, text = x + gate * out[:, TEXT:], text + gate * out[:, :TEXT]
    return x, text


@pytest.mark.parametrize("function", [masked, biased])
@pytest.mark.parametrize(
    ("strategy", "index"),
    [
        (Refresh(keys="sampled", text="live"), EVERY),
        (Refresh(keys="sampled+text", text="skip"), EVERY),
        (Refresh(keys="all", text="skip"), INDEX),
        (Refresh(keys="all", text="live"), INDEX),
    ],
)
def test_masks_lose_the_rows_and_columns_of_tokens_that_are_not_there(
    strategy: Refresh, index: Tensor, function: Any
) -> None:
    toy = Toy(function, text=True)
    plan, inputs = toy.plan(*(strategy, Full()) if function is masked else (Full(), strategy)), toy.inputs()
    expected = toy.run(toy.full(plan), inputs)
    ours = toy.run(toy.cached(plan, count=len(index)), inputs, index=index)
    torch.testing.assert_close(ours, expected)


def late(x: Tensor, gate: Tensor, w: Tensor, v: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Tables and constants of the text's part of a branch are made behind the image's update."""
    for weight in (w, v):
        n = norm(torch.cat([text, x], 1)).unsqueeze(1)
        out = F.linear(F.scaled_dot_product_attention(n, n, n).squeeze(1), weight)
        x = x + gate * out[:, TEXT:]
        text = text + (out[:, :TEXT] * gate.sin().cos()) @ torch.tensor([[1.0, 2, 3, 4]]).expand(WIDTH, WIDTH)
    return x, text


@pytest.mark.parametrize("text", ["skip", "live"])
def test_what_the_branch_needs_is_there_when_its_first_reader_comes(text: Any) -> None:
    toy = Toy(late, text=True)
    plan, inputs = toy.plan(Refresh(text=text)), toy.inputs()
    expected = toy.run(toy.full(plan), inputs)
    torch.testing.assert_close(toy.run(toy.cached(plan), inputs, index=INDEX), expected)


def test_state_in_another_dtype() -> None:
    toy = Toy(attentions)
    plan, inputs = toy.plan(Refresh(unsampled="extrapolate"), Extrapolate()), toy.inputs()
    expected = toy.run(toy.full(plan, dtype=torch.bfloat16), inputs, inverse_gap_1=0.0)
    ours = toy.run(toy.cached(plan, dtype=torch.bfloat16), inputs, index=INDEX, x=1.0)
    assert {tensor.dtype for tensor in toy.state.values()} == {torch.bfloat16}
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def best_by_hand(total: list[float], grid: tuple[int, int, int], count: int) -> list[int]:
    """`total` is score and staleness; the best token of each 1 x 2 x 2 cell gets 0.4 more."""
    frames, height, width = grid
    cells: dict[tuple[int, int, int], list[int]] = {}
    for i, (f, h, w) in enumerate(product(range(frames), range(height), range(width))):
        cells.setdefault((f, h // 2, w // 2), []).append(i)
    winners = {max(cell, key=total.__getitem__) for cell in cells.values()}
    return sorted(range(len(total)), key=lambda i: -(total[i] + 0.4 * (i in winners)))[:count]


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 3, 5), (3, 4, 6), (1, 1, 7)])
def test_best_tokens(grid: tuple[int, int, int]) -> None:
    count = torch.Size(grid).numel()
    score, age = numbers(3, count, seed=1), torch.arange(3.0 * count).reshape(3, count) % 5
    ours = best_tokens(score, age, 4, grid, count // 2)
    total = (score + 0.25 * age / 4).tolist()
    assert ours.tolist() == [best_by_hand(row, grid, count // 2) for row in total]


def test_scored_tokens_are_fresh_and_stamped() -> None:
    toy = Toy(joint, text=True)
    plan = toy.plan(Reuse(), ScoredRefresh(ratio=1 / 3, interval=3), Full())
    toy.run(toy.full(plan), toy.inputs(seed=7))
    gm, before = toy.cached(plan), toy.state["l0_ffn_image_y0"].clone()
    toy.run(gm, toy.inputs(seed=8), x=2.0)
    best = best_tokens(toy.state["l0_ffn_score"], torch.full((BATCH, IMAGE), 2.0), 3, GRID, 2)
    stamp = torch.zeros(BATCH, IMAGE).scatter(1, best, 2.0)
    assert torch.equal(toy.state["l0_ffn_stamp"], stamp)
    assert torch.equal((toy.state["l0_ffn_image_y0"] != before).any(-1), stamp > 0)
    again = best_tokens(toy.state["l0_ffn_score"], 3.0 - stamp, 3, GRID, 2)
    toy.run(gm, toy.inputs(seed=9), x=3.0)
    assert torch.equal(toy.state["l0_ffn_stamp"], stamp.scatter(1, again, 3.0))


def test_keys_of_tokens_that_are_there_twice_have_state_of_their_own() -> None:
    """Where a sequence holds the image's tokens again, projected otherwise, one tensor cannot hold both."""
    toy = Toy(joint, text=True)
    (branch, *_) = [b for b in toy.structure.branches if b.attention]
    segments = (Segment(Source("text"), 0, 2), Segment(IMAGE_TOKENS, 0, 6), Segment(IMAGE_TOKENS, 0, 6))
    kept = key_slots(branch, 0, "k", Tokens(2, segments), Refresh(keys="landmarks", stride=3))
    assert [(slot.name, *place) for slot, *place in kept] == [
        ("l0_attention_k_text", 0, 2, 1),
        ("l0_attention_k_landmarks", 2, 8, 3),
        ("l0_attention_k_landmarks_1", 8, 14, 3),
    ]
