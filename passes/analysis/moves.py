"""Token rules of ops that move the token axis, and of those that take tokens apart or put them together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import (
    RESHAPES,
    SPLITS,
    argument,
    dim_of,
    int_argument,
    ints_argument,
    node_argument,
    nodes_argument,
    overloads,
)

from .rules import Rule
from .tokens import Folded, Lookup, NoRule, Segment, Source, Tokens, normal_dim, one_input, rank_of

__all__ = ["MOVING", "slice_bounds"]

aten = torch.ops.aten


def _reshape(node: fx.Node, look: Lookup) -> Tokens:
    """The token axis survives a reshape where one axis still holds all of it, alone or with neighbours folded in."""
    source, tokens = one_input(node, look)
    before, after = value_of(source).shape, value_of(node).shape
    front, folded = prod(before[: tokens.dim]) * tokens.outer, None
    for dim, size in enumerate(after):
        ahead = prod(after[:dim])
        outer = front // ahead if ahead and front % ahead == 0 else 0
        if outer and size and size % (outer * tokens.length) == 0:
            found = Tokens(dim, tokens.segments, outer, size // (outer * tokens.length), tokens.exchanged)
            if not found.folded:
                return found
            folded = folded or found
    if folded is not None:
        return folded
    raise NoRule(node, f"it merges or splits the token axis ({list(before)} -> {list(after)})")


def _transpose(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    names = ("axis0", "axis1") if node.target is aten.swapaxes.default else ("dim0", "dim1")
    a, b = (dim_of(node, rank_of(source), name) for name in names)
    return tokens.at({a: b, b: a}.get(tokens.dim, tokens.dim))


def _permute(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    order = [normal_dim(d, rank_of(source)) for d in ints_argument(node, "dims")]
    return tokens.at(order.index(tokens.dim))


def _unsqueeze(node: fx.Node, look: Lookup) -> Tokens:
    _source, tokens = one_input(node, look)
    return tokens.at(tokens.dim + (dim_of(node, rank_of(node)) <= tokens.dim))


def _squeeze(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    shape, rank = value_of(source).shape, rank_of(source)
    dims = range(rank) if node.target is aten.squeeze.default else ints_argument(node, "dim")
    gone = {d for d in (normal_dim(d, rank) for d in dims) if shape[d] == 1}
    if tokens.dim in gone:
        raise NoRule(node, "it picks one token")
    return tokens.at(tokens.dim - sum(d < tokens.dim for d in gone))


def _select(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    dim = dim_of(node, rank_of(source))
    if dim == tokens.dim:
        raise NoRule(node, "it picks one token")
    return tokens.at(tokens.dim - (dim < tokens.dim))


def slice_bounds(node: fx.Node) -> tuple[int, int, int]:
    """(dim, start, stop) of a `slice`, `narrow` or `slice_scatter` node of step 1, within the sliced axis."""
    source = node_argument(node, "self")
    dim = dim_of(node, rank_of(source))
    size = int(value_of(source).shape[dim])
    if node.target is aten.narrow.default:
        start = int_argument(node, "start") % size
        return dim, start, start + int_argument(node, "length")
    if int_argument(node, "step") != 1:
        raise NoRule(node, "it slices the token axis with a step")
    low, high, _ = slice(argument(node, "start"), argument(node, "end")).indices(size)
    return dim, low, high


def _slice(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    if dim_of(node, rank_of(source)) != tokens.dim:
        return tokens
    _, start, stop = slice_bounds(node)
    return tokens.cut(start, stop)


def _slice_scatter(node: fx.Node, look: Lookup) -> Tokens:
    base, source = (look(argument(node, name)) for name in ("self", "src"))
    if base is None or source is None:
        raise NoRule(node, "it mixes tokens with values that are none")
    if dim_of(node, rank_of(node)) != base.dim:
        return base
    _, start, stop = slice_bounds(node)
    if base.cut(start, stop) != source:
        raise NoRule(node, f"it moves tokens ({source} lands on {base.cut(start, stop)})")
    return base


def _select_scatter(node: fx.Node, look: Lookup) -> Tokens:
    base, source = (look(argument(node, name)) for name in ("self", "src"))
    dim = dim_of(node, rank_of(node))
    if base is None or source is None or dim == base.dim:
        raise NoRule(node, "it mixes tokens with values that are none, or picks one token")
    if source.at(source.dim + (dim <= source.dim)) != base:
        raise NoRule(node, f"its inputs carry different tokens ({base} and {source})")
    return base


def _split(node: fx.Node, look: Lookup) -> tuple[Tokens, ...]:
    source, tokens = one_input(node, look)
    if dim_of(node, rank_of(source)) != tokens.dim:
        return tuple(tokens for _ in value_of(node))
    parts, offset = [], 0
    for part in value_of(node):
        size = part.shape[tokens.dim]
        parts.append(tokens.cut(offset, offset + size))
        offset += size
    return tuple(parts)


def _unbind(node: fx.Node, look: Lookup) -> tuple[Tokens, ...]:
    source, tokens = one_input(node, look)
    dim = dim_of(node, rank_of(source))
    if dim == tokens.dim:
        raise NoRule(node, "it takes the token axis apart")
    return tuple(tokens.at(tokens.dim - (dim < tokens.dim)) for _ in value_of(node))


def _cat(node: fx.Node, look: Lookup) -> Tokens:
    inputs = nodes_argument(node, "tensors")
    dim = dim_of(node, rank_of(node))
    infos = [look(n) for n in inputs]
    present = [i for i in infos if i is not None]
    if any(i.dim != present[0].dim for i in present):
        raise NoRule(node, "its inputs carry tokens along different axes")
    if dim != present[0].dim:
        # What comes from outside has as many values along the token axis: it is indexed by token, like a rotary table.
        if any(i != present[0] for i in present):
            raise NoRule(node, "its inputs carry different tokens")
        return present[0]
    if any(info.folded for info in present):
        raise Folded
    segments: list[Segment] = []
    for source, info in zip(inputs, infos, strict=True):
        # Tokens that no stream holds (registers, a fixed prompt) are a source of their own, kept whole.
        own = (Segment(Source(source.name, "outside"), 0, value_of(source).shape[dim]),)
        for segment in own if info is None else info.segments:
            last = segments[-1] if segments else None
            if last is not None and (last.source, last.stop) == (segment.source, segment.start):
                segments[-1] = Segment(segment.source, last.start, segment.stop)
            else:
                segments.append(segment)
    return Tokens(dim, tuple(segments))


def _common(node: fx.Node, look: Lookup, inputs: str) -> Tokens:
    """The tokens that all of a list of inputs hold."""
    infos = [look(n) for n in nodes_argument(node, inputs)]
    if infos[0] is None or any(info != infos[0] for info in infos):
        raise NoRule(node, "its inputs carry different tokens")
    return infos[0]


def _stack(node: fx.Node, look: Lookup) -> Tokens:
    tokens = _common(node, look, "tensors")
    return tokens.at(tokens.dim + (dim_of(node, rank_of(node)) <= tokens.dim))


def _pad_sequence(node: fx.Node, look: Lookup) -> Tokens:
    """Sequences put side by side, if they are of one length and hold the same tokens."""
    tokens = _common(node, look, "sequences")
    return tokens.at(tokens.dim + (tokens.dim > 0 or bool(argument(node, "batch_first"))))


def _expand(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    out = tokens.at(tokens.dim + rank_of(node) - rank_of(source))
    if value_of(node).shape[out.dim] != tokens.size:
        raise NoRule(node, "it repeats the token axis")
    return out


def _repeat(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    times = ints_argument(node, "repeats")
    dim = tokens.dim + len(times) - rank_of(source)
    if times[dim] != 1:
        raise NoRule(node, "it repeats the token axis")
    return tokens.at(dim)


MOVING: Mapping[Any, Rule] = {
    **dict.fromkeys(RESHAPES | {aten.view.dtype}, _reshape),
    **dict.fromkeys(overloads("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(overloads("permute"), _permute),
    **dict.fromkeys(overloads("unsqueeze"), _unsqueeze),
    **dict.fromkeys(overloads("squeeze"), _squeeze),
    **dict.fromkeys(overloads("select"), _select),
    **dict.fromkeys(overloads("slice") | {aten.narrow.default}, _slice),
    **dict.fromkeys(overloads("slice_scatter"), _slice_scatter),
    **dict.fromkeys(overloads("select_scatter"), _select_scatter),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys(overloads("unbind"), _unbind),
    **dict.fromkeys(overloads("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(overloads("stack"), _stack),
    **dict.fromkeys(overloads("pad_sequence"), _pad_sequence),
    **dict.fromkeys(overloads("expand"), _expand),
    **dict.fromkeys(overloads("repeat"), _repeat),
}
"""By overload; an op that is not here, nor in `COMPUTING`, has no rule."""
