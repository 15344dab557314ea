"""Kept tokens out of tensors that have all, and back into them."""

from __future__ import annotations

import torch
from torch import fx

from hero_fx.passes.analysis.tokens import Tokens
from hero_fx.passes.emit import Emitter, value_of

from .keep import Kept, Rows

__all__ = ["RowMover"]

aten = torch.ops.aten


class RowMover:
    """Gathers kept tokens and merges them back, each gather and each index once."""

    def __init__(self, emitter: Emitter, kept: Kept) -> None:
        self.emitter = emitter
        self.kept = kept
        self._shifted: dict[tuple[fx.Node, int], fx.Node] = {}
        self._repeats: dict[tuple[fx.Node, Tokens], fx.Node] = {}
        self._gathered: dict[tuple[fx.Node, Tokens], fx.Node | None] = {}

    def gather(self, node: fx.Node, tokens: Tokens) -> fx.Node | None:
        """The kept tokens of a tensor that has all of them; None if none are kept."""
        key = (node, tokens)
        if key not in self._gathered:
            self._gathered[key] = self._gather(node, tokens)
        return self._gathered[key]

    def _gather(self, node: fx.Node, tokens: Tokens) -> fx.Node | None:
        repeated = self._repeated(tokens)
        if repeated is not None:
            return self._take_rows(node, tokens.dim, repeated)
        if tokens.folded:
            gathered = self.gather(self._unfolded(node, tokens), Tokens(tokens.dim + 1, tokens.segments))
            return gathered and self._refolded(gathered, tokens)
        call, pieces = self.emitter.call, []
        batch, shape = self.kept.batch(tokens), list(value_of(node).shape)
        if batch is not None and shape[0] != batch:
            assert shape[0] == 1, "a tensor indexed by token has the batch's size in front, or 1"
            node = call(aten.expand.default, node, [batch, *shape[1:]])
        for segment, start, stop in tokens.spans():
            keep = self.kept.of(segment)
            if isinstance(keep, Rows):
                pieces.append(self._take_rows(node, tokens.dim, self._from(keep.index, start)))
            elif keep == "all" and segment.length == tokens.length:
                pieces.append(node)
            elif keep == "all":
                pieces.append(call(aten.slice.Tensor, node, tokens.dim, start, stop))
        if len(pieces) <= 1:
            return pieces[0] if pieces else None
        return call(aten.cat.default, pieces, tokens.dim)

    def merge(self, base: fx.Node, tokens: Tokens, fresh: fx.Node) -> fx.Node:
        """`base` (all tokens) with the kept ones replaced by `fresh` (kept tokens only)."""
        repeated = self._repeated(tokens)
        if repeated is not None:
            return self._put_rows(base, tokens.dim, repeated, fresh)
        if tokens.folded:
            own, new = (self._unfolded(n, tokens) for n in (base, fresh))
            return self._refolded(self.merge(own, Tokens(tokens.dim + 1, tokens.segments), new), tokens)
        call, whole, at = self.emitter.call, self.kept.count(tokens), 0
        for segment, start, stop in tokens.spans():
            count = self.kept.count_of(segment)
            if not count:
                continue
            piece = fresh
            if count != whole:
                piece = call(aten.slice.Tensor, fresh, tokens.dim, at, at + count)
            keep = self.kept.of(segment)
            if isinstance(keep, Rows):
                base = self._put_rows(base, tokens.dim, self._from(keep.index, start), piece)
            elif segment.length == tokens.length:
                base = piece
            else:
                base = call(aten.slice_scatter.default, base, piece, tokens.dim, start, stop)
            at += count
        return base

    def _repeated(self, tokens: Tokens) -> fx.Node | None:
        """Positions of the kept tokens of one source that follow each other several times; None for other axes."""
        keep = self.kept.of(tokens.segments[0])
        if (
            tokens.outer == 1
            or tokens.inner > 1
            or len(tokens.segments) > 1
            or not isinstance(keep, Rows)
            or keep.per_batch
        ):
            return None
        key = (keep.index, tokens.at(0))
        if key not in self._repeats:
            turns = [self._from(keep.index, turn * tokens.length) for turn in range(tokens.outer)]
            self._repeats[key] = self.emitter.call(aten.cat.default, turns)
        return self._repeats[key]

    def _unfolded(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        """The tokens of a folded axis along an axis of their own."""
        shape = list(value_of(node).shape)
        own = [tokens.outer, shape[tokens.dim] // (tokens.outer * tokens.inner), tokens.inner]
        return self.emitter.call(aten.reshape.default, node, [*shape[: tokens.dim], *own, *shape[tokens.dim + 1 :]])

    def _refolded(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        shape = list(value_of(node).shape)
        size = shape[tokens.dim] * shape[tokens.dim + 1] * shape[tokens.dim + 2]
        return self.emitter.call(aten.reshape.default, node, [*shape[: tokens.dim], size, *shape[tokens.dim + 3 :]])

    def _from(self, index: fx.Node, start: int) -> fx.Node:
        """`index`, counted from the start of an axis on which its source begins at `start`."""
        if start == 0:
            return index
        key = (index, start)
        if key not in self._shifted:
            self._shifted[key] = self.emitter.call(aten.add.Tensor, index, start)
        return self._shifted[key]

    def _take_rows(self, node: fx.Node, dim: int, index: fx.Node) -> fx.Node:
        """`node` at the positions `index` ([K] or [B, K]) of axis `dim`."""
        if value_of(index).dim() == 1:
            return self.emitter.call(aten.index_select.default, node, dim, index)
        return self.emitter.call(aten.gather.default, node, dim, self._spread(index, node, dim))

    def _put_rows(self, base: fx.Node, dim: int, index: fx.Node, piece: fx.Node) -> fx.Node:
        """`base` with `piece` at the positions `index` of axis `dim`."""
        if value_of(index).dim() == 1:
            return self.emitter.call(aten.index_copy.default, base, dim, index, piece)
        return self.emitter.call(aten.scatter.src, base, dim, self._spread(index, base, dim), piece)

    def _spread(self, index: fx.Node, like: fx.Node, dim: int) -> fx.Node:
        """An index [B, K] expanded over all axes of `like` but 0 and `dim`, as `gather` and `scatter` want it."""
        shape = list(value_of(like).shape)
        batch, count = value_of(index).shape
        thin = [batch if d == 0 else count if d == dim else 1 for d in range(len(shape))]
        full = [count if d == dim else size for d, size in enumerate(shape)]
        return self.emitter.call(aten.expand.default, self.emitter.call(aten.reshape.default, index, thin), full)
