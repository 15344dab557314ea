"""A branch, computed for some of its tokens only.

`Subset` copies the nodes of a branch with a smaller token axis. For each token source it is told what to keep: all of
its tokens, none, or the rows that an index names. It then

* gathers the residual streams, and every tensor indexed by token that meets them (rotary tables, masks, per-token
  modulation), by the same indices;
* changes the sizes that Dynamo baked into `view`, `expand`, `split`, `slice`;
* drops from `cat`, `split` and `slice` what is not kept, so that a step without text has no text tokens anywhere.

Legal because `follow` has shown that every node is pointwise in the token axis, or moves it whole; attention is the
one op that mixes tokens, and is left to the caller, who decides which keys the kept tokens see.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from hero_fx.passes.analysis.follow import attends_within, slice_bounds
from hero_fx.passes.analysis.rules import letter_axes
from hero_fx.passes.analysis.tokens import Info, NoRule, Segment, Source, Tokens, normal_dim
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter, value_of

__all__ = ["Keep", "Rows", "Subset", "check_whole"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rows:
    """Keep the tokens that `index` names: int64 [K], or [B, K] where every batch element has its own."""

    index: fx.Node

    @property
    def count(self) -> int:
        return int(value_of(self.index).shape[-1])

    @property
    def per_batch(self) -> bool:
        return bool(value_of(self.index).dim() == 2)


Keep = Literal["all", "none"] | Rows
Attention = Callable[["Subset", fx.Node], fx.Node]


def check_whole(infos: Mapping[fx.Node, Info], lengths: Mapping[Source, int]) -> None:
    """Raises NoRule if some node holds only a part of a token source: rows of a part are not known statically."""
    for node, info in infos.items():
        for tokens in info if isinstance(info, tuple) else (info,):
            for segment in tokens.segments if tokens is not None else ():
                if segment.source in lengths and segment.length != lengths[segment.source]:
                    raise NoRule(node, f"it holds a part of the tokens of one source ({segment})")


class Subset:
    """Emits nodes of a branch for the kept tokens; `env` maps old nodes to new ones, None where nothing is kept."""

    def __init__(
        self, emitter: Emitter, infos: Mapping[fx.Node, Info], keep: Mapping[Source, Keep], attention: Attention
    ) -> None:
        self.emitter = emitter
        self.infos = infos
        self.keep = keep
        self.attention = attention
        self.env: dict[fx.Node, Any] = {}
        self._shifted: dict[tuple[fx.Node, int], fx.Node] = {}
        self._gathered: dict[tuple[fx.Node, Tokens], fx.Node | None] = {}

    def tokens(self, node: fx.Node) -> Tokens | None:
        info = self.infos.get(node)
        assert not isinstance(info, tuple)
        return info

    def kept(self, tokens: Tokens) -> int:
        """How many tokens of an axis are kept."""
        return sum(self._kept_of(s) for s in tokens.segments)

    def _kept_of(self, segment: Segment) -> int:
        keep = self.keep.get(segment.source, "all")
        if isinstance(keep, Rows):
            return keep.count
        return segment.length if keep == "all" else 0

    def _kept_rows(self, tokens: Tokens) -> list[Rows]:
        keeps = [self.keep.get(segment.source) for segment in tokens.segments]
        return [keep for keep in keeps if isinstance(keep, Rows)]

    def size(self, tokens: Tokens) -> int:
        """The size of an axis with the kept tokens."""
        return tokens.outer * self.kept(tokens) * tokens.inner

    def seed(self, stream: fx.Node) -> None:
        """Takes the kept tokens of a residual stream."""
        tokens = self.tokens(stream)
        assert tokens is not None
        self.env[stream] = self.gather(stream, tokens)

    def gather(self, node: fx.Node, tokens: Tokens) -> fx.Node | None:
        """The kept tokens of a tensor that has all of them; None if none are kept."""
        key = (node, tokens)
        if key not in self._gathered:
            self._gathered[key] = self._gather(node, tokens)
        return self._gathered[key]

    def _gather(self, node: fx.Node, tokens: Tokens) -> fx.Node | None:
        if tokens.folded:
            gathered = self.gather(self._unfolded(node, tokens), Tokens(tokens.dim + 1, tokens.segments))
            return gathered and self._refolded(gathered, tokens)
        call, pieces = self.emitter.call, []
        batches = [int(value_of(k.index).shape[0]) for k in self._kept_rows(tokens) if k.per_batch]
        shape = list(value_of(node).shape)
        if batches and shape[0] != batches[0]:
            assert shape[0] == 1, "a tensor indexed by token has the batch's size in front, or 1"
            node = call(aten.expand.default, node, [batches[0], *shape[1:]])
        for segment, start, stop in tokens.spans():
            keep = self.keep.get(segment.source, "all")
            if isinstance(keep, Rows):
                pieces.append(self.rows(node, tokens.dim, self.shifted(keep.index, start)))
            elif keep == "all" and segment.length == tokens.length:
                pieces.append(node)
            elif keep == "all":
                pieces.append(call(aten.slice.Tensor, node, tokens.dim, start, stop))
        if len(pieces) <= 1:
            return pieces[0] if pieces else None
        return call(aten.cat.default, pieces, tokens.dim)

    def _unfolded(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        """The tokens of a folded axis along an axis of their own."""
        shape = list(value_of(node).shape)
        own = [tokens.outer, shape[tokens.dim] // (tokens.outer * tokens.inner), tokens.inner]
        return self.emitter.call(aten.reshape.default, node, [*shape[: tokens.dim], *own, *shape[tokens.dim + 1 :]])

    def _refolded(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        shape = list(value_of(node).shape)
        size = shape[tokens.dim] * shape[tokens.dim + 1] * shape[tokens.dim + 2]
        return self.emitter.call(aten.reshape.default, node, [*shape[: tokens.dim], size, *shape[tokens.dim + 3 :]])

    def shifted(self, index: fx.Node, offset: int) -> fx.Node:
        """`index`, counted from the start of an axis on which its source begins at `offset`."""
        if offset == 0:
            return index
        key = (index, offset)
        if key not in self._shifted:
            self._shifted[key] = self.emitter.call(aten.add.Tensor, index, offset)
        return self._shifted[key]

    def rows(self, node: fx.Node, dim: int, index: fx.Node) -> fx.Node:
        """`node` at the positions `index` ([K] or [B, K]) of axis `dim`."""
        if value_of(index).dim() == 1:
            return self.emitter.call(aten.index_select.default, node, dim, index)
        shape = list(value_of(node).shape)
        return self.emitter.call(aten.gather.default, node, dim, self.spread(index, shape, dim))

    def spread(self, index: fx.Node, shape: list[int], dim: int) -> fx.Node:
        """An index [B, K] expanded over all axes but 0 and `dim`, as `gather` and `scatter` want it."""
        batch, count = value_of(index).shape
        thin = [batch if d == 0 else count if d == dim else 1 for d in range(len(shape))]
        full = [count if d == dim else size for d, size in enumerate(shape)]
        return self.emitter.call(aten.expand.default, self.emitter.call(aten.reshape.default, index, thin), full)

    def merge(self, base: fx.Node, tokens: Tokens, fresh: fx.Node) -> fx.Node:
        """`base` (all tokens) with the kept ones replaced by `fresh` (kept tokens only)."""
        if tokens.folded:
            own, new = (self._unfolded(n, tokens) for n in (base, fresh))
            return self._refolded(self.merge(own, Tokens(tokens.dim + 1, tokens.segments), new), tokens)
        call, whole, at = self.emitter.call, self.kept(tokens), 0
        for segment, start, stop in tokens.spans():
            count = self._kept_of(segment)
            if count:
                piece = fresh
                if count != whole:
                    piece = call(aten.slice.Tensor, fresh, tokens.dim, at, at + count)
                keep = self.keep.get(segment.source, "all")
                if isinstance(keep, Rows):
                    base = self._put_rows(base, tokens.dim, self.shifted(keep.index, start), piece)
                elif segment.length == tokens.length:
                    base = piece
                else:
                    base = call(aten.slice_scatter.default, base, piece, tokens.dim, start, stop)
                at += count
        return base

    def _put_rows(self, base: fx.Node, dim: int, index: fx.Node, piece: fx.Node) -> fx.Node:
        if value_of(index).dim() == 1:
            return self.emitter.call(aten.index_copy.default, base, dim, index, piece)
        shape = list(value_of(base).shape)
        return self.emitter.call(aten.scatter.src, base, dim, self.spread(index, shape, dim), piece)

    def emit(self, node: fx.Node) -> None:
        """Computes `node` for the kept tokens; its inputs have been emitted."""
        info = self.infos[node]
        if node.target is operator.getitem:
            parts, number = self.env[node.args[0]], node.args[1]  # type: ignore[index]
            assert isinstance(number, int)
            self.env[node] = (
                parts[number]
                if isinstance(parts, tuple)
                else parts and self.emitter.call(operator.getitem, parts, number)
            )
            return
        first = info[0] if isinstance(info, tuple) else info
        if first is None:
            self.env[node] = node
        elif node.target in ATTENTION:
            self.env[node] = None if self.kept(first) == 0 else self._attention(node, first)
        elif isinstance(info, tuple) and self._splits_tokens(node):
            self.env[node] = self._split(node, info)
        elif self.kept(first) == 0:
            self.env[node] = None
        else:
            self.env[node] = self._one(node, first)

    def _attention(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        return self._one(node, tokens) if attends_within(node, self.look) else self.attention(self, node)

    def look(self, node: Any) -> Tokens | None:
        """Where the tokens of a node are, if it has some."""
        return self.tokens(node) if isinstance(node, fx.Node) else None

    def _one(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        call = self.emitter.call
        source = node.args[0]
        shape = value_of(node).shape if isinstance(value_of(node), torch.Tensor) else ()
        small = [self.size(tokens) if d == tokens.dim else int(size) for d, size in enumerate(shape)]
        packet = getattr(node.target, "overloadpacket", None)
        match packet if node.target is not aten.view.dtype else None:
            case aten.view | aten.reshape | aten._unsafe_view | aten.flatten | aten.unflatten | aten.squeeze:
                return call(aten.reshape.default, self.env[source], small)  # type: ignore[index]
            case aten.expand:
                return call(aten.expand.default, self.env[source], small)  # type: ignore[index]
            case aten.slice | aten.narrow:
                return self._slice(node, tokens)
            case aten.slice_scatter:
                return self._slice_scatter(node, tokens)
            case aten.cat | aten.concat | aten.concatenate:
                return self._cat(node, tokens)
            case aten.einsum:
                return self._einsum(node, tokens)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._operand(node, n, tokens, len(shape)))
        return call(node.target, *args, **kwargs)

    def _operand(self, node: fx.Node, source: fx.Node, tokens: Tokens, rank: int) -> fx.Node:
        """An input of a pointwise op: the emitted node, or one from outside, gathered if it is indexed by token."""
        if self.infos.get(source) is not None:
            return self.env[source]  # type: ignore[no-any-return]
        value = source.meta.get("val")
        summed = node.target in _SUMMED and source is node.args[0]
        if (node.target in _PLAIN and not summed) or not isinstance(value, torch.Tensor):
            return source
        dim = tokens.dim - (rank - value.dim())
        if dim < 0 or value.shape[dim] != tokens.size or tokens.size == 1:
            return source
        if dim < tokens.dim and any(k.per_batch for k in self._kept_rows(tokens)):
            # Each batch element has rows of its own, so the table needs an axis for the batch.
            shape = [1] * (tokens.dim - dim) + list(value.shape)
            source, dim = self.emitter.call(aten.reshape.default, source, shape), tokens.dim
        gathered = self.gather(source, tokens.at(dim))
        assert gathered is not None
        return gathered

    def _slice(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        source = node.args[0]
        before = self.tokens(source)  # type: ignore[arg-type]
        new = self.env[source]  # type: ignore[index]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if normal_dim(dim, value_of(source).dim()) != tokens.dim:  # type: ignore[arg-type]
            return self.emitter.call(node.target, new, *node.args[1:], **node.kwargs)
        assert before is not None
        _, start, _ = slice_bounds(node)
        if self.kept(before) == self.kept(tokens):
            return new  # type: ignore[no-any-return]
        low = self.kept(before.cut(0, start))
        return self.emitter.call(aten.slice.Tensor, new, tokens.dim, low, low + self.kept(tokens))

    def _slice_scatter(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        base, source = node.args[:2]
        new_base, new_source = self.env[base], self.env[source]  # type: ignore[index]
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if normal_dim(dim, value_of(node).dim()) != tokens.dim:  # type: ignore[arg-type]
            return self.emitter.call(node.target, new_base, new_source, *node.args[2:], **node.kwargs)
        dim, start, stop = slice_bounds(node)
        count = self.kept(tokens.cut(start, stop))
        if count == 0:
            return new_base  # type: ignore[no-any-return]
        if count == self.kept(tokens):
            return new_source  # type: ignore[no-any-return]
        low = self.kept(tokens.cut(0, start))
        return self.emitter.call(aten.slice_scatter.default, new_base, new_source, dim, low, low + count)

    def _cat(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        inputs: list[fx.Node] = node.args[0]  # type: ignore[assignment]
        rank = value_of(node).dim()
        dim: int = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)  # type: ignore[assignment]
        if normal_dim(dim, rank) != tokens.dim:
            new = [self._operand(node, n, tokens, rank) for n in inputs]
        else:
            new = [self.env[n] if self.infos.get(n) is not None else n for n in inputs]
            new = [n for n in new if n is not None]
        return new[0] if len(new) == 1 else self.emitter.call(aten.cat.default, new, dim)

    def _einsum(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        """A product by letters: tables from outside that have the tokens' letter are gathered."""
        inputs: list[fx.Node] = node.args[1]  # type: ignore[assignment]
        new = []
        for source, axis in zip(inputs, letter_axes(node, tokens.dim), strict=True):
            table = self.infos.get(source) is None and axis is not None and value_of(source).shape[axis] == tokens.size
            new.append(self.gather(source, tokens.at(axis)) if table and axis else self.env.get(source, source))
        return self.emitter.call(node.target, node.args[0], new)

    def _splits_tokens(self, node: fx.Node) -> bool:
        if getattr(node.target, "overloadpacket", None) not in _SPLITS:
            return False
        source = node.args[0]
        tokens = self.tokens(source)  # type: ignore[arg-type]
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        return tokens is not None and normal_dim(dim, value_of(source).dim()) == tokens.dim  # type: ignore[arg-type]

    def _split(self, node: fx.Node, info: tuple[Tokens | None, ...]) -> tuple[fx.Node | None, ...]:
        counts = [self.kept(tokens) for tokens in info if tokens is not None]
        new = self.env[node.args[0]]  # type: ignore[index]
        if sum(c > 0 for c in counts) <= 1:
            return tuple(new if c else None for c in counts)
        sizes = [c for c in counts if c]
        dim = info[0].dim  # type: ignore[union-attr]
        parts = self.emitter.call(aten.split_with_sizes.default, new, sizes, dim)
        items = iter(range(len(sizes)))
        return tuple(self.emitter.call(operator.getitem, parts, next(items)) if c else None for c in counts)


_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)

# Ops whose further inputs are weights: never indexed by token, whatever their size.
_PLAIN = {
    aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.matmul.default, aten.mm.default,
    aten.bmm.default, aten.baddbmm.default, aten.addmm.default, aten.einsum.default, aten.index.Tensor,
    aten.index_select.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
}  # fmt: skip

# Of these, the first input is added to the product: it may be a table indexed by token, as a mask is.
_SUMMED = (aten.addmm.default, aten.baddbmm.default)
