"""Cached steps, shallow layers: some tokens are computed anew, the others take their cached features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from hero_fx.passes.analysis.model_writes import attended
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.analysis.tokens import Source, Tokens
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter, by_name, value_of
from hero_fx.passes.ops import argument, with_arguments
from hero_fx.passes.slots import IndexSlot

from .features import key_slots
from .keep import Keep, Kept, Rows
from .plan import Refresh, StepPlan
from .recompute import Site, hoist
from .rows import RowMover
from .subset import Subset

__all__ = ["RefreshBranches"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshBranches:
    """Computes a branch for the sampled image tokens and merges the result into its cached features (Eq. 4).

    Before::

        norm = aten.layer_norm.default(x, [D])  # x: [B, N, D]
        linear = aten.linear.default(norm, weight)
        add = aten.add.Tensor(x, linear)

    After, for the sampled tokens idx [K]::

        sampled = aten.index_select.default(x, 1, idx)  # [B, K, D]
        norm_1 = aten.layer_norm.default(sampled, [D])
        linear_1 = aten.linear.default(norm_1, weight)
        merged = aten.index_copy.default(y0, 1, idx, linear_1)
        add = aten.add.Tensor(x, merged)
        copy_ = aten.copy_.default(y0, merged)

    Legal in the paper's sense for the merge (Eq. 4, numerics change), and exact for the part: every op between the
    stream and the feature is pointwise in tokens or moves them whole (`tokens.follow`), so computing on gathered
    tokens is gathering what would be computed. Attention is where tokens meet: sampled queries see the keys and values
    of the sampled tokens (`keys="sampled"`), also the text's from the last full step (`"sampled+text"`), and those of
    every so many image tokens (`"landmarks"`, which need no mask), or a cache of all keys and values in which the sampled
    ones are brought up to date (`"all"`).
    """

    structure: Structure
    plan: StepPlan
    count: int
    """K, the number of sampled image tokens."""
    state_dtype: torch.dtype | None = None
    name: str = "refresh"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, nodes = Emitter(gm), by_name(gm)
        sites = 0
        for branch, strategy in self.plan:
            if not isinstance(strategy, Refresh):
                continue
            site = Site.of(emitter, nodes, self.structure, branch, strategy, self.state_dtype)
            slot = IndexSlot(branch.layer if strategy.per_layer else None)
            index = emitter.selection(slot, self.count, value_of(site.tokens.targets[0]).device)
            site.recompute(Rows(index), _Attention(site, strategy))
            sites += 1
        return sites


@dataclass(frozen=True, slots=True)
class _Attention:
    """Attention of the kept queries, by the keys and values that a strategy lets them see."""

    site: Site
    strategy: Refresh

    def __call__(self, subset: Subset, node: fx.Node) -> fx.Node:
        op = ATTENTION[node.target]
        query, key, value = attended(node)
        tokens = subset.tokens(key)
        operands = {op.query: subset.env[query], op.key: key, op.value: value}
        seen: RowMover | None = subset.rows
        if tokens is not None:  # otherwise it is cross-attention to keys of no stream
            operands[op.key], _ = self._visible(subset, node, "k", tokens, key)
            operands[op.value], seen = self._visible(subset, node, "v", tokens, value)
        return _call(subset, node, operands, None if self.strategy.keys == "all" else seen)

    def _visible(
        self, subset: Subset, node: fx.Node, part: Literal["k", "v"], tokens: Tokens, source: fx.Node
    ) -> tuple[fx.Node, RowMover | None]:
        """Keys or values that kept queries see, and what moves rows to these; None where they see all tokens."""
        fresh = subset.env[source]
        if self.strategy.keys == "sampled":
            # Where no key is kept, they are another stream's: those are computed as the model does.
            if fresh is None:
                hoist(source, self.site.first_reader)
                return source, None
            return fresh, subset.rows
        cached = self._cached(node, part, tokens, source)
        if self.strategy.keys == "all":
            ((state, everything),) = cached.values()
            merged = subset.rows.merge(everything, tokens, fresh)
            subset.emitter.write_back(state, merged)
            return merged, None
        return _beside(subset, tokens, fresh, {start: value for start, (_, value) in cached.items()})

    def _cached(
        self, node: fx.Node, part: Literal["k", "v"], tokens: Tokens, source: fx.Node
    ) -> dict[int, tuple[fx.Node, fx.Node]]:
        """(state, its value) of the keys or values that are kept, by the first token that they are of."""
        branch, emitter, cached = self.site.branch, self.site.emitter, {}
        number = branch.attention.index(node.name)
        for slot, *rows in key_slots(branch, number, part, tokens, self.strategy):
            with emitter.mode:
                like = value_of(source)[(*[slice(None)] * tokens.dim, slice(*rows))]
            state = emitter.state(slot, like, self.site.dtype)
            cached[rows[0]] = (state, emitter.read(state, like))
        return cached


def _beside(subset: Subset, tokens: Tokens, fresh: fx.Node, cached: Mapping[int, fx.Node]) -> tuple[fx.Node, RowMover]:
    """Fresh keys with the cached ones of skipped sources and landmarks beside them, and what moves rows to the sources they
    stand for."""
    call, kept = subset.emitter.call, subset.kept
    seen: Mapping[Source, Keep] = {source: "all" if keep == "none" else keep for source, keep in kept.by_source.items()}
    pieces, at = [], 0
    for segment, start, _ in tokens.spans():
        count = kept.count_of(segment)
        if count:
            whole = count == kept.count(tokens)
            pieces.append(fresh if whole else call(aten.slice.Tensor, fresh, tokens.dim, at, at + count))
            at += count
        if start in cached and (not count or segment.source.is_image):
            pieces.append(cached[start])
    joined = pieces[0] if len(pieces) == 1 else call(aten.cat.default, pieces, tokens.dim)
    return joined, RowMover(subset.emitter, Kept(seen))


def _call(subset: Subset, node: fx.Node, operands: Mapping[int, fx.Node], keys: RowMover | None) -> fx.Node:
    """The attention op on these operands; its mask keeps the kept queries' rows and the seen keys' columns."""
    op = ATTENTION[node.target]
    changes: dict[str, object] = {}
    mask = argument(node, op.mask or "")
    if isinstance(mask, fx.Node):
        query, key, _ = attended(node)
        for operand, dim, rows in ((query, -2, subset.rows), (key, -1, keys)):
            tokens, shape = subset.tokens(operand), value_of(mask).shape
            if tokens is not None and rows is not None and shape[dim] == tokens.size != 1:
                mask = rows.gather(mask, tokens.at(len(shape) + dim))
                assert mask is not None, "attention is emitted where some of its tokens are kept"
        changes[op.mask or ""] = mask
    for name, place in zip(op.lengths, (op.query, op.key), strict=False):
        if argument(node, name) is not None:  # the op is told how many tokens there are
            changes[name] = int(value_of(operands[place]).shape[op.dim])
    given, kwargs = with_arguments(node, changes)
    for place, operand in operands.items():
        given[place] = operand
    return subset.emitter.call(node.target, *given, **kwargs)
