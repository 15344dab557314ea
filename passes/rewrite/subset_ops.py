"""What each op of a branch becomes when only some tokens are kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.follow import attends_within
from hero_fx.passes.analysis.moves import slice_bounds
from hero_fx.passes.analysis.rules import letter_axes
from hero_fx.passes.analysis.tokens import Tokens, rank_of
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import (
    EXCHANGES,
    RESHAPES,
    SPLITS,
    argument,
    dim_of,
    first_input,
    ints_argument,
    node_argument,
    nodes_argument,
    overloads,
)

from .subset import Subset

__all__ = ["emit"]

aten = torch.ops.aten


def emit(subset: Subset, node: fx.Node) -> None:
    """Computes `node` for the kept tokens; its inputs have been emitted."""
    info = subset.infos[node]
    first = info[0] if isinstance(info, tuple) else info
    if node.target is operator.getitem:
        subset.env[node] = _part(subset, node)
    elif first is None:
        subset.env[node] = node
    elif isinstance(info, tuple) and _splits_tokens(subset, node):
        subset.env[node] = _split(subset, node, info)
    elif subset.kept.count(first) == 0:
        subset.env[node] = None
    elif node.target in ATTENTION and not attends_within(node, subset.tokens):
        subset.env[node] = subset.attend(subset, node)
    else:
        subset.env[node] = _RULES.get(node.target, _same)(subset, node, first)


def _part(subset: Subset, node: fx.Node) -> Any:
    """One result of a node that has several."""
    source, number = node.args
    parts = subset.env[source]
    assert isinstance(number, int)
    if isinstance(parts, tuple):
        return parts[number]
    return parts and subset.emitter.call(operator.getitem, parts, number)


def _same(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    """Ops that are pointwise in the token axis."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: subset.operand(node, tokens, source))
    return subset.emitter.call(node.target, *args, **kwargs)


def _small(subset: Subset, node: fx.Node, tokens: Tokens) -> list[int]:
    """The shape of a node with the kept tokens."""
    size = subset.kept.size(tokens)
    return [size if d == tokens.dim else int(old) for d, old in enumerate(value_of(node).shape)]


def _reshape(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    source = subset.env[first_input(node)]
    return subset.emitter.call(aten.reshape.default, source, _small(subset, node, tokens))


def _expand(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    source = subset.env[first_input(node)]
    return subset.emitter.call(aten.expand.default, source, _small(subset, node, tokens))


def _slice(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    source = first_input(node)
    before = subset.tokens(source)
    new: fx.Node = subset.env[source]
    if not _along_tokens(subset, node):
        return subset.emitter.call(node.target, new, *node.args[1:], **node.kwargs)
    assert before is not None
    _, start, _ = slice_bounds(node)
    count = subset.kept.count(tokens)
    if subset.kept.count(before) == count:
        return new
    low = subset.kept.count(before.cut(0, start))
    return subset.emitter.call(aten.slice.Tensor, new, tokens.dim, low, low + count)


def _slice_scatter(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    base: fx.Node = subset.env[node_argument(node, "self")]
    source: fx.Node = subset.env[node_argument(node, "src")]
    if dim_of(node, rank_of(node)) != tokens.dim:
        return subset.emitter.call(node.target, base, source, *node.args[2:], **node.kwargs)
    dim, start, stop = slice_bounds(node)
    count = subset.kept.count(tokens.cut(start, stop))
    if count == 0:
        return base
    if count == subset.kept.count(tokens):
        return source
    low = subset.kept.count(tokens.cut(0, start))
    return subset.emitter.call(aten.slice_scatter.default, base, source, dim, low, low + count)


def _cat(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    inputs = nodes_argument(node, "tensors")
    if dim_of(node, rank_of(node)) != tokens.dim:
        new = [subset.operand(node, tokens, source) for source in inputs]
    else:
        new = [subset.env[n] if subset.infos.get(n) is not None else n for n in inputs]
        new = [n for n in new if n is not None]
    return new[0] if len(new) == 1 else subset.emitter.call(aten.cat.default, new, argument(node, "dim"))


def _einsum(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    """A product by letters: tables from outside that have the tokens' letter are gathered."""
    inputs, new = nodes_argument(node, "tensors"), []
    for source, axis in zip(inputs, letter_axes(node, tokens.dim), strict=True):
        table = subset.infos.get(source) is None and axis and value_of(source).shape[axis] == tokens.size
        new.append(subset.rows.gather(source, tokens.at(axis)) if axis and table else subset.env.get(source, source))
    return subset.emitter.call(node.target, argument(node, "equation"), new)


def _exchange(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    """The kept tokens of all ranks: every rank keeps as many."""
    source: fx.Node = subset.emitter.call(aten.contiguous.default, subset.env[first_input(node)])
    ranks = len(ints_argument(node, "input_split_sizes"))
    parts = [int(value_of(source).shape[0]) // ranks] * ranks
    return subset.emitter.call(node.target, source, parts, parts, argument(node, "group_name"))


def _repeat_interleave(subset: Subset, node: fx.Node, tokens: Tokens) -> fx.Node:
    """Repeats what is kept; the size that was expected of the whole is left out."""
    source = subset.operand(node, tokens, first_input(node))
    return subset.emitter.call(node.target, source, argument(node, "repeats"), argument(node, "dim"))


def _along_tokens(subset: Subset, node: fx.Node) -> bool:
    """Whether a slice or split is one of the token axis."""
    source = first_input(node)
    tokens = subset.tokens(source)
    return tokens is not None and dim_of(node, rank_of(source)) == tokens.dim


def _splits_tokens(subset: Subset, node: fx.Node) -> bool:
    return node.target in SPLITS and _along_tokens(subset, node)


def _split(subset: Subset, node: fx.Node, info: tuple[Tokens | None, ...]) -> tuple[fx.Node | None, ...]:
    """The parts of a split of the token axis of which something is kept."""
    parts = [tokens for tokens in info if tokens is not None]
    counts = [subset.kept.count(tokens) for tokens in parts]
    new = subset.env[first_input(node)]
    if sum(c > 0 for c in counts) <= 1:
        return tuple(new if c else None for c in counts)
    sizes = [c for c in counts if c]
    split = subset.emitter.call(aten.split_with_sizes.default, new, sizes, parts[0].dim)
    items = iter(range(len(sizes)))
    return tuple(subset.emitter.call(operator.getitem, split, next(items)) if c else None for c in counts)


Rule = Callable[[Subset, fx.Node, Tokens], fx.Node]

_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(RESHAPES | overloads("squeeze"), _reshape),
    **dict.fromkeys(overloads("expand"), _expand),
    **dict.fromkeys(overloads("slice", "narrow"), _slice),
    **dict.fromkeys(overloads("slice_scatter"), _slice_scatter),
    **dict.fromkeys(overloads("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(overloads("einsum"), _einsum),
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys(EXCHANGES, _exchange),
}
