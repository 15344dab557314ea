"""The rows of the batch, followed through a whole graph: whether each row of the outputs comes from the same row of the inputs.

The axis of the batch is followed by the rules that follow the axis of tokens, with rules of its own where rows may do what
tokens may not: they attend within themselves, number the batch on both sides of a product, and lie in front of what a
convolution or a normalisation works on. An op without a rule, or one that works along the rows, ends it: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import PROJECTIONS, argument, has_side_effect, node_argument, overloads

from .branch_tokens import check_whole
from .exchange import collectives
from .follow import follow, token_rule
from .rules import Rule, einsum_letters
from .tokens import Info, Lookup, NoRule, Segment, Source, Tokens, one_input, rank_of

__all__ = ["BATCH", "follow_batch"]

aten = torch.ops.aten

BATCH = Source("batch")
"""The source of all rows."""


def follow_batch(gm: fx.GraphModule, batch: int) -> dict[fx.Node, Info]:
    """Where the rows of a batch of `batch` are, for every node that depends on an input with rows.

    An input has rows if its first axis has the size of the batch and the model is called with it. One that only happens to
    have that size is followed as well, and then is no harm: what is shown is that rows of the outputs need no other rows of it.

    Raises:
        NoRule: rows meet in some op, or in one that has no rule; or an output has none.
    """
    rows = Tokens(0, (Segment(BATCH, 0, batch),))
    inputs = [
        n for n in gm.graph.find_nodes(op="placeholder") if n.meta.get("model_input", True) and "slot" not in n.meta
    ]
    seeds = {node: rows for node in inputs if _has_rows(node, batch)}
    written = [node for node in gm.graph.nodes if node.op == "call_function" and has_side_effect(node)]
    if written:
        raise NoRule(written[0], "it writes to an input or buffer of the model, which all rows share")
    if exchanges := collectives(gm):
        raise NoRule(exchanges[0], "it exchanges values with other processes")
    infos = follow(gm.graph.nodes, seeds, rule_of=_rule)
    check_whole(infos, {BATCH: batch})
    output = gm.graph.output_node()
    for value in output.args[0]:  # type: ignore[union-attr]
        if not isinstance(value, fx.Node) or infos.get(value) != rows:
            raise NoRule(output, f"its output {value} has no rows in front")
    return infos


def _has_rows(node: fx.Node, batch: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch


def _rule(node: fx.Node) -> Rule | None:
    return _attention if node.target in ATTENTION else _ROWS.get(node.target, token_rule(node))


def _attention(node: fx.Node, look: Lookup) -> Info:
    """Queries, keys and values of the same rows, which number the batch or are folded into it."""
    op = ATTENTION[node.target]
    operands = op.operands(node)
    rows = look(operands[0])
    if reason := op.ordered(node, whole=True):
        raise NoRule(node, reason)
    within = {rank_of(operands[0]) + op.dim, rank_of(operands[0]) - 1}
    if rows is None or rows.dim in within or any(look(n) != rows for n in operands[1:]):
        raise NoRule(node, "its queries, keys and values do not have the same rows in front")
    mask = argument(node, op.mask or "")
    if (of_mask := look(mask)) is not None and of_mask.at(of_mask.dim + rank_of(operands[0]) - rank_of(mask)) != rows:
        raise NoRule(node, "its mask has other rows")
    value = value_of(node)
    if not isinstance(value, (tuple, list)):
        return rows
    if isinstance(mask, fx.Node) and of_mask is None:
        raise NoRule(node, "its mask comes from no input, and may have rows of its own")
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise NoRule(node, "more of its results are used than what attention gives")
    return (rows, *[None] * (len(value) - 1))


def _in_front(node: fx.Node, look: Lookup) -> Info:
    """Ops that take the first axis for a batch, whatever they do along the others."""
    source, rows = one_input(node, look)
    # Without a batch the first axis is that of channels, which these ops mix.
    batched = node.target not in _CONVOLUTIONS or rank_of(source) == rank_of(node_argument(node, "weight"))
    if rows.dim or not batched or (node.target in _SHUFFLES and rank_of(source) < 4):
        raise NoRule(node, "it works along the rows")
    value = value_of(node)
    return (rows, *[None] * (len(value) - 1)) if isinstance(value, (tuple, list)) else rows


def _matmul(node: fx.Node, look: Lookup) -> Info:
    """Products of batches of matrices that both have the rows in front, or of which the left one has."""
    left, right = node_argument(node, "self"), node_argument(node, "other")
    rows, others = look(left), look(right)
    if rows is not None and others is not None:
        ahead = rank_of(node) - rank_of(left), rank_of(node) - rank_of(right)
        same = rows.at(rows.dim + ahead[0]) == others.at(others.dim + ahead[1])
        if not same or rows.dim >= rank_of(left) - 2 or others.dim >= rank_of(right) - 2:
            raise NoRule(node, "a product along or between rows has no rule")
        return rows.at(rows.dim + ahead[0])
    found = token_rule(node)
    assert found is not None
    return found(node, look)


def _einsum(node: fx.Node, look: Lookup) -> Info:
    found = token_rule(node)
    assert found is not None
    rows = found(node, look)
    assert isinstance(rows, Tokens)
    inputs, result = einsum_letters(node)
    for letters, source in zip(inputs, argument(node, "tensors"), strict=True):
        if look(source) is None and result[rows.dim] in letters:
            raise NoRule(node, "a table that comes from no input has rows of its own in it")
    return rows


def _repeat_interleave(node: fx.Node, look: Lookup) -> Info:
    """Rows that are repeated where they stand, as masks are for each head, are folded into the axis."""
    source, rows = one_input(node, look)
    times, dim = argument(node, "repeats"), argument(node, "dim")
    if not isinstance(times, int) or dim is None:
        raise NoRule(node, "it repeats rows by numbers that only values tell")
    return replace(rows, inner=rows.inner * times) if dim % rank_of(source) == rows.dim else rows


def _embedding(node: fx.Node, look: Lookup) -> Info:
    """Looks its rows up in a table that has none."""
    rows = look(argument(node, "indices"))
    if rows is None or look(argument(node, "weight")) is not None:
        raise NoRule(node, "its table depends on the rows")
    return rows


_CONVOLUTIONS = PROJECTIONS - overloads("linear") | overloads(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
)
_SHUFFLES = overloads("pixel_shuffle", "pixel_unshuffle")

_ROWS: Mapping[object, Rule] = {
    **dict.fromkeys(
        _CONVOLUTIONS
        | _SHUFFLES
        | overloads(
            "group_norm", "instance_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d",
            "max_pool3d",
            "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
            "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
        ),
        _in_front,
    ),
    **dict.fromkeys(overloads("matmul"), _matmul),
    **dict.fromkeys(overloads("einsum"), _einsum),
    **dict.fromkeys(overloads("embedding"), _embedding),
    **dict.fromkeys(overloads("repeat_interleave"), _repeat_interleave),
}  # fmt: skip
"""Where rows differ from tokens."""
