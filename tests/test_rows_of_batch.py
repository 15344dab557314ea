"""`KeepRows`: graphs before and after, rows that meet are refused, numerics. End to end: test_forecast_apart.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F

from hero_fx.passes.analysis.batch_rows import follow_batch
from hero_fx.passes.analysis.tokens import NoRule
from hero_fx.passes.render import graph_diff, render
from hero_fx.passes.rewrite.rows_of_batch import KeepRows
from hero_fx.passes.simplify.cleanup import DropDeadCode
from hero_fx.step_graphs import copy_graph

from .support.steps_by_hand import numbers
from .support.tracing import run_passes, trace


def graph_of(function: Any, *shapes: tuple[int, ...], inputs: int = 1) -> fx.GraphModule:
    """A graph whose first `inputs` arguments are the model's; the others are weights."""
    gm = trace(function, *(numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)))
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node.meta |= {"model_input": number < inputs, "argument": node.name}
    return gm


def linear_with_table(x: Tensor, w: Tensor, table: Tensor) -> tuple[Tensor]:
    return (F.linear(x, w) * table,)


def test_rows_are_gathered_from_inputs_and_from_tables_that_have_rows() -> None:
    gm = graph_of(linear_with_table, (4, 3, 5), (7, 5), (4, 1, 7))
    before = render(gm)
    run_passes(gm, KeepRows(count=2), DropDeadCode())
    assert_expected_inline(
        graph_diff(before, gm),
        """\
  x_1: f32[4, 3, 5] = input
  w_1: f32[7, 5] = input
  table_1: f32[4, 1, 7] = input
- linear: f32[4, 3, 7] = aten.linear.default(x_1, w_1)
- mul: f32[4, 3, 7] = aten.mul.Tensor(linear, table_1)
- return (mul,)
+ rows: i64[2] = input
+ index_select_default: f32[2, 3, 5] = aten.index_select.default(x_1, 0, rows)
+ linear_default: f32[2, 3, 7] = aten.linear.default(index_select_default, w_1)
+ index_select_default_1: f32[2, 1, 7] = aten.index_select.default(table_1, 0, rows)
+ mul_tensor: f32[2, 3, 7] = aten.mul.Tensor(linear_default, index_select_default_1)
+ return (mul_tensor,)""",
    )
    x, w, table = numbers(4, 3, 5, seed=0), numbers(7, 5, seed=1), numbers(4, 1, 7, seed=2)
    for rows in ([0, 1], [2, 3]):
        (out,) = gm(x, w, table, torch.tensor(rows))
        assert torch.equal(out, linear_with_table(x[rows], w, table[rows])[0])


def attend(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """With the batch folded into heads, as a block of attention over frames has it."""
    q, k, v = F.linear(x, w).view(4, 6, 3, 2, 4).unbind(2)
    own = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    folded = own.transpose(1, 2).reshape(4 * 6, 2, 4)
    scores = torch.softmax(folded @ folded.transpose(1, 2), dim=-1)
    return ((scores @ folded).reshape(4, 6, 8) + torch.arange(4.0)[:, None, None],)


def convolve(x: Tensor, w: Tensor) -> tuple[Tensor]:
    down = F.group_norm(F.conv2d(x, w, padding=1), 3)
    return (F.interpolate(torch.cat([down, torch.ones(4, 1, 5, 5)], dim=1), scale_factor=2.0, mode="nearest"),)


@pytest.mark.parametrize(
    ("function", "shapes"), [(attend, [(4, 6, 8), (24, 8)]), (convolve, [(4, 3, 5, 5), (6, 3, 3, 3)])]
)
def test_rows_of_the_result_are_those_of_the_whole(function: Any, shapes: list[tuple[int, ...]]) -> None:
    gm = graph_of(function, *shapes)
    values = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    (whole,) = function(*values)
    run_passes(gm, KeepRows(count=2), DropDeadCode())
    for rows in ([0, 1], [2, 3], [3, 1]):
        torch.testing.assert_close(gm(*values, torch.tensor(rows))[0], whole[rows])


def centred(x: Tensor) -> tuple[Tensor]:
    return (x - x.mean(dim=0, keepdim=True),)


def halves_swapped(x: Tensor) -> tuple[Tensor]:
    a, b = x.chunk(2)
    return (torch.cat([b, a]),)


def normalized_over_all(x: Tensor) -> tuple[Tensor]:
    return (x / x.norm(),)


def as_tokens(x: Tensor) -> tuple[Tensor]:
    tokens = x.reshape(1, 1, 4 * 3, 5)
    return (F.scaled_dot_product_attention(tokens, tokens, tokens).reshape(4, 3, 5),)


def by_the_first(x: Tensor) -> tuple[Tensor]:
    return (x * x[0],)


def against_each_other(x: Tensor) -> tuple[Tensor]:
    flat = x.flatten(1)
    return (flat @ flat.transpose(0, 1),)


def guided(x: Tensor) -> tuple[Tensor]:
    without, having = x.chunk(2)
    return (without + 3 * (having - without),)


def shuffled(x: Tensor) -> tuple[Tensor]:
    """Without a batch: the first axis is that of channels."""
    return (F.pixel_unshuffle(F.pixel_shuffle(x[..., :3], 2), 2),)


@pytest.mark.parametrize(
    "function",
    [shuffled, centred, halves_swapped, normalized_over_all, as_tokens, by_the_first, against_each_other, guided],
)
def test_rows_that_meet_are_refused(function: Any) -> None:
    with pytest.raises(NoRule):
        follow_batch(graph_of(function, (4, 3, 5)), 4)


def test_a_copy_of_the_graph_stays_whole() -> None:
    gm = graph_of(linear_with_table, (4, 3, 5), (7, 5), (4, 1, 7))
    copied = copy_graph(gm)
    before = render(gm)
    run_passes(copied, KeepRows(count=1), DropDeadCode())
    assert render(gm) == before
