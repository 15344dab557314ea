"""The token axis, followed through a graph as segments of the sequence.

A residual stream [B, N, D] holds tokens along one axis. On its way through a branch that axis is moved (transpose),
split off and joined (slice, split, cat of text and image), and met by tensors that are indexed by token (rotary
tables, masks, per-token modulation). `follow` says of every node between the streams and the branch output where its
token axis is and which tokens of which source lie along it: `Tokens(dim=2, segments=(text[0:9], image[0:120]))`.

An op either carries the axis by a rule of `_RULES`, or is pointwise in it, or `follow` raises `NoRule` with its name:
nothing is guessed. The rules need sizes only, so the analysis changes nothing and allocates nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION, AttentionOp
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import argument_of

from .rules import OTHER_AXES, narrow_bounds
from .tokens import Folded, Info, Lookup, NoRule, Segment, Source, Tokens, is_matmul, normal_dim, one_input, rank_of

__all__ = [
    "ATTENTION", "AttentionOp", "Info", "NoRule", "Segment", "Tokens", "attends_within", "follow", "is_matmul",
    "normal_dim",
]  # fmt: skip

aten = torch.ops.aten


def follow(
    nodes: Iterable[fx.Node], seeds: Mapping[fx.Node, Tokens] | Mapping[fx.Node, Info], whole: Collection[Source] = ()
) -> dict[fx.Node, Info]:
    """Tokens of every node that depends on a seed.

    Args:
        nodes: nodes in topological order; those without an argument in the result are passed over.
        seeds: residual streams and their tokens.
        whole: sources of which a step computes all tokens or none: attention among them may be causal.

    Returns:
        The seeds and all followed nodes; a node with several outputs has a tuple.

    Raises:
        NoRule: a node moves the axis in a way that no rule describes.
    """
    known: dict[fx.Node, Info] = dict(seeds)

    def look(value: Any) -> Tokens | None:
        info = known.get(value) if isinstance(value, fx.Node) else None
        assert not isinstance(info, tuple), "only getitem reads a node with several outputs"
        return info

    for node in nodes:
        if node in known or node.op != "call_function":
            continue
        if not any(source in known for source in node.all_input_nodes):
            continue
        if node.target is operator.getitem:
            parts = known[node.args[0]]  # type: ignore[index]
            assert isinstance(parts, tuple)
            known[node] = parts[node.args[1]]  # type: ignore[index]
            continue
        if all(known.get(source) is None for source in node.all_input_nodes):
            known[node] = None
            continue
        rule = _RULES.get(getattr(node.target, "overloadpacket", node.target))
        if node.target in ATTENTION:
            rule = partial(_attention, whole=whole)
        if rule is None:
            raise NoRule(node, "no rule says what this op does to the token axis")
        try:
            known[node] = rule(node, look)
        except Folded:
            raise NoRule(node, "it takes a part of an axis into which more than tokens is folded") from None
    return known


def _pointwise(node: fx.Node, look: Lookup) -> Tokens:
    """Broadcasting ops: all inputs with tokens agree once aligned from the right."""
    rank, out = value_of(node).dim(), None
    for source in node.all_input_nodes:
        tokens = look(source)
        if tokens is None:
            continue
        aligned = tokens.at(tokens.dim + rank - rank_of(source))
        if out is not None and aligned != out:
            raise NoRule(node, f"its inputs carry different tokens ({out} and {aligned})")
        out = aligned
    assert out is not None
    if value_of(node).shape[out.dim] != out.size:
        raise NoRule(node, "the token axis is broadcast against itself")
    return out


def _from_left(node: fx.Node, look: Lookup) -> Tokens:
    """view_as_real and view_as_complex: only the last axis changes."""
    source, tokens = one_input(node, look)
    if tokens.dim == rank_of(source) - 1:
        raise NoRule(node, "it mixes values along the token axis")
    return tokens


def _along_last(dims: Callable[[fx.Node], int]) -> Callable[[fx.Node, Lookup], Tokens]:
    """Ops that mix the last `dims(node)` axes only (linear, norms): the token axis must lie in front of them."""

    def rule(node: fx.Node, look: Lookup) -> Tokens:
        source, tokens = one_input(node, look)
        if tokens.dim >= rank_of(source) - dims(node):
            raise NoRule(node, "it mixes values along the token axis")
        return tokens

    return rule


def _over_dim(argument: int, default: int = -1) -> Callable[[fx.Node, Lookup], Tokens]:
    """Ops that mix one axis of unchanged rank (softmax, glu, cumsum)."""

    def rule(node: fx.Node, look: Lookup) -> Tokens:
        source, tokens = one_input(node, look)
        dim = node.args[argument] if len(node.args) > argument else default
        if normal_dim(dim, rank_of(source)) == tokens.dim:  # type: ignore[arg-type]
            raise NoRule(node, "it mixes values along the token axis")
        return tokens

    return rule


def _reduction(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    dims = next((a for a in node.args[1:] if isinstance(a, (list, tuple)) and a), node.kwargs.get("dim"))
    if dims is None:
        raise NoRule(node, "it reduces over the token axis")
    reduced = {normal_dim(d, rank_of(source)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}  # type: ignore[arg-type]
    if tokens.dim in reduced:
        raise NoRule(node, "it reduces over the token axis")
    keeps = value_of(node).dim() == rank_of(source)
    return tokens if keeps else tokens.at(tokens.dim - sum(d < tokens.dim for d in reduced))


def _matmul(node: fx.Node, look: Lookup) -> Tokens:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    tokens = look(left)
    if tokens is None or look(right) is not None or tokens.dim == rank_of(left) - 1 or rank_of(right) > rank_of(left):
        raise NoRule(node, "a product over or between token axes has no rule")
    ours = tokens.dim - rank_of(left) + rank_of(right)
    if 0 <= ours < rank_of(right) - 2 and value_of(right).shape[ours] != 1:
        raise NoRule(node, "a product over or between token axes has no rule")
    return tokens


def _reshape(node: fx.Node, look: Lookup) -> Tokens:
    """The token axis survives a reshape where one axis still holds all of it, alone or with neighbours folded in."""
    source, tokens = one_input(node, look)
    before, after = value_of(source).shape, value_of(node).shape
    front, folded = prod(before[: tokens.dim]) * tokens.outer, None
    for dim, size in enumerate(after):
        ahead = prod(after[:dim])
        outer = front // ahead if ahead and front % ahead == 0 else 0
        if outer and size and size % (outer * tokens.length) == 0:
            found = Tokens(dim, tokens.segments, outer, size // (outer * tokens.length))
            if not found.folded:
                return found
            folded = folded or found
    if folded is not None:
        return folded
    raise NoRule(node, f"it merges or splits the token axis ({list(before)} -> {list(after)})")


def _transpose(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    a, b = (normal_dim(d, rank_of(source)) for d in node.args[1:3])  # type: ignore[arg-type]
    return tokens.at({a: b, b: a}.get(tokens.dim, tokens.dim))


def _permute(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    order = [normal_dim(d, rank_of(source)) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return tokens.at(order.index(tokens.dim))


def _unsqueeze(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    dim = normal_dim(node.args[1], rank_of(source) + 1)  # type: ignore[arg-type]
    return tokens.at(tokens.dim + (dim <= tokens.dim))


def _squeeze(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    shape, rank = value_of(source).shape, rank_of(source)
    dims = node.args[1] if len(node.args) > 1 else range(rank)
    gone = {normal_dim(d, rank) for d in (dims if isinstance(dims, (list, tuple, range)) else [dims])}  # type: ignore[arg-type]
    gone = {d for d in gone if shape[d] == 1}
    if tokens.dim in gone:
        raise NoRule(node, "it picks one token")
    return tokens.at(tokens.dim - sum(d < tokens.dim for d in gone))


def _select(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    dim = normal_dim(node.args[1], rank_of(source))  # type: ignore[arg-type]
    if dim == tokens.dim:
        raise NoRule(node, "it picks one token")
    return tokens.at(tokens.dim - (dim < tokens.dim))


def slice_bounds(node: fx.Node) -> tuple[int, int, int]:
    """(dim, start, stop) of an `aten.slice` or `aten.slice_scatter` node of step 1, within the sliced axis."""
    if node.target is aten.narrow.default:
        return narrow_bounds(node)
    skip = 2 if node.target is aten.slice_scatter.default else 1
    given: tuple[Any, ...] = node.args[skip:]
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, stop, step = given + defaults[len(given) :]
    dim = node.kwargs.get("dim", dim)
    start, stop = node.kwargs.get("start", start), node.kwargs.get("end", stop)
    if node.kwargs.get("step", step) != 1:
        raise NoRule(node, "it slices the token axis with a step")
    dim = normal_dim(dim, rank_of(node.args[0]))
    size = value_of(node.args[0]).shape[dim]  # type: ignore[arg-type]
    low, high, _ = slice(start, stop).indices(size)
    return dim, low, high


def _slice(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if normal_dim(dim, rank_of(source)) != tokens.dim:  # type: ignore[arg-type]
        return tokens
    _, start, stop = slice_bounds(node)
    return tokens.cut(start, stop)


def _slice_scatter(node: fx.Node, look: Lookup) -> Tokens:
    base, source = look(node.args[0]), look(node.args[1])
    dim = normal_dim(node.args[2] if len(node.args) > 2 else 0, value_of(node).dim())  # type: ignore[arg-type]
    if base is None or source is None:
        raise NoRule(node, "it mixes tokens with values that are none")
    if dim != base.dim:
        return base
    _, start, stop = slice_bounds(node)
    if base.cut(start, stop) != source:
        raise NoRule(node, f"it moves tokens ({source} lands on {base.cut(start, stop)})")
    return base


def split_sizes(node: fx.Node, dim: int) -> list[int]:
    """Sizes of the parts that a split, chunk or unbind gives along `dim`."""
    return [value.shape[dim] for value in value_of(node)]


def _split(node: fx.Node, look: Lookup) -> tuple[Tokens, ...]:
    source, tokens = one_input(node, look)
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if normal_dim(dim, rank_of(source)) != tokens.dim:  # type: ignore[arg-type]
        return tuple(tokens for _ in value_of(node))
    parts, offset = [], 0
    for size in split_sizes(node, tokens.dim):
        parts.append(tokens.cut(offset, offset + size))
        offset += size
    return tuple(parts)


def _unbind(node: fx.Node, look: Lookup) -> tuple[Tokens, ...]:
    source, tokens = one_input(node, look)
    dim = normal_dim(node.args[1] if len(node.args) > 1 else 0, rank_of(source))  # type: ignore[arg-type]
    if dim == tokens.dim:
        raise NoRule(node, "it takes the token axis apart")
    return tuple(tokens.at(tokens.dim - (dim < tokens.dim)) for _ in value_of(node))


def _cat(node: fx.Node, look: Lookup) -> Tokens:
    inputs: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    rank = value_of(node).dim()
    dim = normal_dim(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0), rank)  # type: ignore[arg-type]
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


def _stack(node: fx.Node, look: Lookup) -> Tokens:
    inputs: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    infos = [look(n) for n in inputs]
    if infos[0] is None or any(i != infos[0] for i in infos):
        raise NoRule(node, "its inputs carry different tokens")
    dim = normal_dim(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0), value_of(node).dim())  # type: ignore[arg-type]
    return infos[0].at(infos[0].dim + (dim <= infos[0].dim))


def _expand(node: fx.Node, look: Lookup) -> Tokens:
    source, tokens = one_input(node, look)
    out = tokens.at(tokens.dim + value_of(node).dim() - rank_of(source))
    if value_of(node).shape[out.dim] != tokens.size:
        raise NoRule(node, "it repeats the token axis")
    return out


def _attention(node: fx.Node, look: Lookup, whole: Collection[Source]) -> Info:
    op = ATTENTION[node.target]
    query, key, value = (node.args[i] for i in (op.query, op.key, op.value))
    tokens, k, v = look(query), look(key), look(value)
    met = frozenset[Source]().union(*(info.sources for info in (tokens, k, v) if info is not None))
    reason = op.ordered(node, whole=met <= set(whole))
    if reason:
        raise NoRule(node, reason)
    for name, source, info in (("query", query, tokens), ("key", key, k), ("value", value, v)):
        if info is not None and info.dim != normal_dim(op.dim, rank_of(source)) and not attends_within(node, look):
            raise NoRule(node, f"the token axis of its {name} is not where the op attends")
    if look(argument_of(node, op.mask or "")) is not None:
        raise NoRule(node, "its mask depends on the tokens themselves")
    if tokens is None or (tokens.folded and not attends_within(node, look)) or not _alike(k, v):
        raise NoRule(node, "queries without tokens, or keys and values with different ones")
    if not isinstance(value_of(node), (tuple, list)):
        return tokens
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise NoRule(node, "more of its results are used than what attention gives")
    return (tokens, *[None] * (len(value_of(node)) - 1))


def attends_within(node: fx.Node, look: Lookup) -> bool:
    """Whether an attention op has its tokens in the batch, so that each attends within itself (over frames)."""
    op = ATTENTION[node.target]
    query, *more = (node.args[i] for i in (op.query, op.key, op.value))
    tokens = look(query)
    alone = tokens is not None and rank_of(query) == 4 and tokens.dim == 0 and all(look(n) == tokens for n in more)
    return alone and not isinstance(argument_of(node, op.mask or ""), fx.Node)


def _alike(k: Tokens | None, v: Tokens | None) -> bool:
    """The same tokens in the same order; tokens of no stream have a name of their own on either side."""
    if k is None or v is None:
        return k is v

    def plain(segment: Segment) -> Segment:
        return replace(segment, source=Source("", "outside")) if segment.source.is_outside else segment

    return k.dim == v.dim and list(map(plain, k.segments)) == list(map(plain, v.segments))


def _packets(*names: str) -> list[Any]:
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


_RULES: dict[Any, Callable[[fx.Node, Lookup], Info]] = {
    **dict.fromkeys(
        _packets(
            "add", "sub", "rsub", "mul", "div", "neg", "abs", "square", "sqrt", "rsqrt", "pow", "exp", "log", "sin",
            "cos", "tanh", "sigmoid", "relu", "silu", "gelu", "softplus", "elu", "leaky_relu", "hardtanh", "erf",
            "mish", "hardswish", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "masked_fill",
            "lerp", "addcmul", "addcdiv", "reciprocal", "floor", "round", "sign", "isnan", "nan_to_num", "eq", "ne",
            "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "to", "_to_copy", "type_as", "clone",
            "contiguous", "detach", "alias", "dropout", "conj", "resolve_conj",
            "zeros_like", "ones_like", "empty_like", "copy", "expand_as", "threshold", "logaddexp", "log1p", "expm1", "log2",
            "tan", "atan", "atan2", "ceil", "trunc", "fmod", "remainder", "floor_divide", "true_divide", "fill",
            "log_sigmoid", "hardsigmoid", "relu6", "isinf", "isfinite", "real", "imag", "complex", "polar",
            "bitwise_and", "bitwise_or", "bitwise_not", "full_like", "float_power", "exp2",
        ),
        _pointwise,
    ),
    **dict.fromkeys(_packets("view_as_real", "view_as_complex"), _from_left),
    aten.linear: _along_last(lambda node: 1),
    **dict.fromkeys(_packets("layer_norm", "rms_norm"), _along_last(lambda node: len(node.args[1]))),  # type: ignore[arg-type]
    **dict.fromkeys(_packets("softmax", "_softmax", "log_softmax", "cumsum"), _over_dim(1)),
    aten.glu: _over_dim(1),
    **dict.fromkeys(_packets("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"), _reduction),
    **dict.fromkeys(_packets("matmul", "mm"), _matmul),
    **dict.fromkeys(_packets("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(_packets("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(_packets("permute"), _permute),
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.select: _select,
    aten.slice: _slice,
    aten.slice_scatter: _slice_scatter,
    **dict.fromkeys(_packets("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    aten.unbind: _unbind,
    **dict.fromkeys(_packets("cat", "concat", "concatenate"), _cat),
    aten.stack: _stack,
    aten.expand: _expand,
    **OTHER_AXES,
}  # fmt: skip
