"""A branch, computed for some of its tokens only.

`Subset` copies the nodes of a branch with a smaller token axis. For each token source it is told what to keep: all of
its tokens, none, or the rows that an index names (`keep`). It then

* gathers the residual streams, and every tensor indexed by token that meets them (rotary tables, masks, per-token
  modulation), by the same indices (`rows`);
* changes the sizes that Dynamo baked into `view`, `expand`, `split`, `slice` (`subset_ops`);
* drops from `cat`, `split` and `slice` what is not kept, so that a step without text has no text tokens anywhere.

Legal because `follow` has shown that every node is pointwise in the token axis, or moves it whole; attention is the
one op that mixes tokens, and is left to the caller, who decides which keys the kept tokens see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.tokens import Info, Source, Tokens
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.ops import MATMULS, overloads

from .keep import Keep, Kept
from .rows import RowMover

__all__ = ["Attend", "Subset"]

aten = torch.ops.aten

Attend = Callable[["Subset", fx.Node], fx.Node]
"""Emits an attention op for the kept tokens."""


class Subset:
    """What is known while a branch is emitted for the kept tokens."""

    def __init__(
        self, emitter: Emitter, infos: Mapping[fx.Node, Info], keep: Mapping[Source, Keep], attend: Attend
    ) -> None:
        self.emitter = emitter
        self.infos = infos
        self.kept = Kept(keep)
        self.rows = RowMover(emitter, self.kept)
        self.attend = attend
        self.env: dict[Any, Any] = {}
        """The new node of an old one; None where none of its tokens are kept, a tuple for the parts of a split."""

    def tokens(self, node: Any) -> Tokens | None:
        """Where the tokens of a node are, if it has some."""
        info = self.infos.get(node) if isinstance(node, fx.Node) else None
        assert not isinstance(info, tuple), "only getitem reads a node with several outputs"
        return info

    def seed(self, stream: fx.Node) -> None:
        """Takes the kept tokens of a residual stream."""
        tokens = self.tokens(stream)
        assert tokens is not None
        self.env[stream] = self.rows.gather(stream, tokens)

    def operand(self, node: fx.Node, tokens: Tokens, source: fx.Node) -> fx.Node:
        """An input of a pointwise op: the emitted node, or one from outside, gathered if it is indexed by token."""
        if self.infos.get(source) is not None:
            found: fx.Node = self.env[source]
            return found
        value, result = source.meta.get("val"), value_of(node)
        rank = result.dim() if isinstance(result, torch.Tensor) else 0
        summed = node.target in _SUMMED and source is node.args[0]
        if (node.target in _PLAIN and not summed) or not isinstance(value, torch.Tensor):
            return source
        dim = tokens.dim - (rank - value.dim())
        if dim < 0 or value.shape[dim] != tokens.size or tokens.size == 1:
            return source
        if dim < tokens.dim and self.kept.batch(tokens) is not None:
            # Each batch element has rows of its own, so the table needs an axis for the batch.
            shape = [1] * (tokens.dim - dim) + list(value.shape)
            source, dim = self.emitter.call(aten.reshape.default, source, shape), tokens.dim
        gathered = self.rows.gather(source, tokens.at(dim))
        assert gathered is not None
        return gathered


# Ops whose further inputs are weights: never indexed by token, whatever their size.
_PLAIN = MATMULS | overloads(
    "layer_norm",
    "rms_norm",
    "index",
    "index_select",
    "embedding",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)

# Of these, the first input is added to the product: it may be a table indexed by token, as a mask is.
_SUMMED = (aten.addmm.default, aten.baddbmm.default)
