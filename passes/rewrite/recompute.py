"""A refreshed branch in a cached step: some tokens are computed anew, the others take their cached features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.branch_tokens import BranchTokens
from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.analysis.tokens import Source
from hero_fx.passes.emit import Emitter, value_of
from hero_fx.passes.slots import ScalarSlot

from .features import feature_slots, taylor
from .keep import Keep, Rows
from .plan import Refresh, ScoredRefresh
from .subset import Attend, Subset
from .subset_ops import emit

__all__ = ["Site", "hoist"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of a cached step that is to be computed for some of its tokens."""

    emitter: Emitter
    structure: Structure
    branch: Branch
    strategy: Refresh | ScoredRefresh
    tokens: BranchTokens[fx.Node]
    dtype: torch.dtype | None
    """Of feature state."""

    @staticmethod
    def of(
        emitter: Emitter,
        nodes: Mapping[str, fx.Node],
        structure: Structure,
        branch: Branch,
        strategy: Refresh | ScoredRefresh,
        dtype: torch.dtype | None,
    ) -> Site:
        """Of a resolved plan; `nodes` are the graph's by name."""
        assert strategy.tokens is not None, "`resolve` comes before rewriting"
        return Site(emitter, structure, branch, strategy, strategy.tokens.over(nodes.__getitem__), dtype)

    @property
    def first_reader(self) -> fx.Node:
        """The first reader of a target: what is emitted for the branch stands in front of it."""
        return min(user for target in self.tokens.targets for user in target.users)

    def anchor(self) -> fx.Node:
        """The first reader of a target, with what the emitted nodes need (gates, tables) moved in front of it."""
        anchor, inside = self.first_reader, set(self.tokens.body)
        for node in self.tokens.body:
            for source in node.all_input_nodes:
                if source not in inside:
                    hoist(source, anchor)
        return anchor

    def recompute(self, rows: Rows, attend: Attend) -> None:
        """Emits the branch for the kept tokens, merges each stream's part into its cache and puts it in the feature's place.

        Args:
            rows: the image tokens that are kept.
        """
        with self.emitter.before(self.anchor()):
            subset = Subset(self.emitter, self.tokens.infos, self._keep(rows), attend)
            for source in self.tokens.sources:
                subset.seed(source)
            for node in self.tokens.body:
                emit(subset, node)
            merged = [self._merge(subset, number) for number in range(len(self.tokens.targets))]
        for target, value in zip(self.tokens.targets, merged, strict=True):
            target.replace_all_uses_with(value)

    def _keep(self, rows: Rows) -> dict[Source, Keep]:
        """What a cached step keeps of each token source."""
        text: Keep = "all" if self.strategy.text == "live" else "none"
        return {source: rows if source.is_image else text for source in self.structure.lengths}

    def _merge(self, subset: Subset, number: int) -> fx.Node:
        """The cached features of one update with what was computed of them."""
        emitter, update, target = self.emitter, self.branch.updates[number], self.tokens.targets[number]
        extrapolates = isinstance(self.strategy, Refresh) and self.strategy.unsampled != "reuse"
        slots = feature_slots(self.structure, self.branch, update, 2 if extrapolates else 1)
        like, tokens, fresh = value_of(target), self.tokens.of(target), subset.env[target]
        estimate, states = taylor(emitter, slots, like, self.dtype)
        if fresh is None:
            return estimate
        merged = kept = subset.rows.merge(estimate, tokens, fresh)
        if extrapolates:
            # What is extrapolated from the cache at this step's x must be the fresh value.
            slope = subset.rows.gather(emitter.read(states[1], like), tokens)
            assert slope is not None
            rise = emitter.call(aten.mul.Tensor, slope, emitter.scalar(ScalarSlot("power"), like.device))
            start = emitter.call(aten.sub.Tensor, fresh, rise)
            kept = subset.rows.merge(emitter.read(states[0], like), tokens, start)
        emitter.write_back(states[0], kept)
        return merged


def hoist(node: fx.Node, anchor: fx.Node) -> None:
    """Moves a node that stands behind `anchor`, with all it is computed from, in front of it."""
    if node >= anchor and node.op in ("call_function", "get_attr"):
        for source in node.all_input_nodes:
            hoist(source, anchor)
        anchor.prepend(node)
