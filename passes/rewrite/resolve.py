"""From what a policy wants to what a model allows: plans with the token analysis of each branch in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx

from hero_fx.passes.analysis.branch_tokens import BranchTokens, follow_branch
from hero_fx.passes.analysis.follow import follow
from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.analysis.model_writes import attended, check_moved, check_recorded
from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.analysis.tokens import Info, NoRule, Segment, Source, Tokens, normal_dim, rank_of
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import by_name, value_of
from hero_fx.passes.ops import argument

from .features import cached_node, gate_of
from .plan import CachePoint, Fallback, Full, Refresh, ScoredBy, ScoredRefresh, StepPlan, Strategy

__all__ = ["resolve"]


def resolve(
    gm: fx.GraphModule, structure: Structure, steps: Sequence[StepPlan]
) -> tuple[tuple[StepPlan, ...], tuple[Fallback, ...]]:
    """Replaces what cannot be done by `Full`, and says why; a branch without a gate has none to follow and reuses.

    The plans that come out carry, by the names of nodes, what the analysis of each refreshed branch has found.

    Raises:
        ValueError: gates are to be followed, and no branch has one.
    """
    resolver = _Resolver(gm, structure)
    reasons: dict[str, str] = {}
    for plan in steps:
        for branch, strategy in plan:
            if branch.label not in reasons:
                try:
                    resolver.check(branch, strategy)
                except NoRule as error:
                    reasons[branch.label] = str(error)
    follow_gate = [b for plan in steps for b, s in plan if isinstance(s, Refresh) and s.unsampled == "gate"]
    if follow_gate and not any(map(resolver.gated, follow_gate)):
        raise ValueError(
            "unsampled='gate': no refreshed branch of this model ends in a product with one gate for all tokens, as adaLN has "
            "it, so there is none to follow; use 'reuse' or 'extrapolate'"
        )
    plans = tuple(
        tuple((b, Full() if b.label in reasons else resolver.analysed(b, strategy)) for b, strategy in plan)
        for plan in steps
    )
    return plans, tuple(Fallback(label, reason) for label, reason in reasons.items())


class _Resolver:
    """What is known of a graph; each branch is analysed once."""

    def __init__(self, gm: fx.GraphModule, structure: Structure) -> None:
        self.structure = structure
        self.nodes, self.memory = by_name(gm), Memory(gm.graph)
        self._tokens: dict[tuple[Branch, CachePoint], BranchTokens[fx.Node] | NoRule] = {}

    def tokens(self, branch: Branch, cache_point: CachePoint) -> BranchTokens[fx.Node]:
        """The token axis through a branch. Raises NoRule."""
        key = (branch, cache_point)
        if key not in self._tokens:
            try:
                to_update = cache_point == "post_gate"
                self._tokens[key] = follow_branch(self.nodes, self.structure, branch, to_update=to_update)
            except NoRule as error:
                self._tokens[key] = error
        found = self._tokens[key]
        if isinstance(found, NoRule):
            raise found
        return found

    def gated(self, branch: Branch) -> bool:
        """Whether all updates of a branch end in a gate."""
        return all(gate_of(self.nodes, self.structure, update) is not None for update in branch.updates)

    def check(self, branch: Branch, strategy: Strategy) -> None:
        """Raises NoRule if a cached step cannot do with a branch what is planned."""
        if isinstance(strategy, Full):
            return
        check_recorded(self.memory, [cached_node(self.nodes, u, strategy.cache_point) for u in branch.updates])
        if not isinstance(strategy, Refresh | ScoredRefresh):
            return
        tokens = self.tokens(branch, strategy.cache_point)
        check_moved(self.memory, tokens.body, tokens.targets)
        if isinstance(strategy, ScoredRefresh):
            _check_batch_in_front(tokens)
            check_recorded(self.memory, attended(self.nodes[self._scored_by(branch).attention]))
            return
        if strategy.keys == "landmarks":
            _check_no_mask(tokens.body)
        if strategy.keys not in ("all", "sampled"):
            _check_one_by_one(self.nodes, branch, tokens)
        check_recorded(self.memory, [n for name in branch.attention for n in attended(self.nodes[name])])
        if strategy.unsampled == "gate":
            gates = [gate_of(self.nodes, self.structure, update) for update in branch.updates]
            check_recorded(self.memory, [gate for found in gates if found is not None for gate in found])

    def analysed(self, branch: Branch, strategy: Strategy) -> Strategy:
        """A strategy that `check` has passed, with what was found of the branch."""
        if not isinstance(strategy, Refresh | ScoredRefresh):
            return strategy
        tokens = self.tokens(branch, strategy.cache_point).over(lambda node: node.name)
        if isinstance(strategy, ScoredRefresh):
            return replace(strategy, tokens=tokens, scored_by=self._scored_by(branch))
        if strategy.unsampled == "gate" and not self.gated(branch):
            strategy = replace(strategy, unsampled="reuse")
        return replace(strategy, tokens=tokens)

    def _scored_by(self, branch: Branch) -> ScoredBy:
        """The attention in the branch's layer that image tokens both query and are keys of.

        Raises:
            NoRule: the layer has none.
        """
        for other in self.structure.branches:
            if other.layer != branch.layer or not other.attention:
                continue
            infos = self.tokens(other, "pre_gate").infos
            for name in other.attention:
                op = ATTENTION[self.nodes[name].target]
                query, key, _ = attended(self.nodes[name])
                tokens, rank = infos.get(key), value_of(query).dim()
                if not isinstance(tokens, Tokens) or rank != 4 or tokens.dim != op.dim + 4 or infos.get(query) is None:
                    continue
                if tokens.folded:
                    continue
                for segment, start, stop in tokens.spans():
                    if segment.source.is_image:
                        return ScoredBy(name, start, stop)
        raise NoRule(self.nodes[branch.updates[0].add], "its layer has no self-attention to score tokens by")


def _check_batch_in_front(tokens: BranchTokens[fx.Node]) -> None:
    """Raises NoRule unless all that has tokens is [batch, .., tokens, ..]: each batch element has chosen rows of its own."""
    reason = "tokens by score are chosen where the stream and all between are [batch, .., tokens, ..]"
    batch: dict[fx.Node, Info] = {}
    for source in tokens.sources:
        if tokens.of(source).dim != 1 or tokens.of(source).folded:
            raise NoRule(source, reason)
        batch[source] = Tokens(0, (Segment(Source("batch"), 0, int(value_of(source).shape[0])),))
    for node in tokens.body:
        if node.target in ATTENTION:
            batch[node] = batch.get(attended(node)[0])
        else:
            batch = follow([node], batch)  # the batch, as tokens are followed
        for info, place in zip(_parts(tokens.infos.get(node)), _parts(batch.get(node)), strict=False):
            if info is not None and (info.folded or place is None or place.dim != 0 or place.folded):
                raise NoRule(node, reason)


def _parts(info: Info) -> tuple[Tokens | None, ...]:
    return info if isinstance(info, tuple) else (info,)


def _check_one_by_one(nodes: Mapping[str, fx.Node], branch: Branch, tokens: BranchTokens[fx.Node]) -> None:
    """Raises NoRule where keys are of all ranks: the text among them, or landmarks, are no one slice."""
    for name in branch.attention:
        op, (_, key, _) = ATTENTION[nodes[name].target], attended(nodes[name])
        info = tokens.infos.get(key)
        if isinstance(info, Tokens) and info.folded and info.dim == normal_dim(op.dim, rank_of(key)):
            raise NoRule(nodes[name], "it attends to tokens of several ranks; use keys='all' or 'sampled'")


def _check_no_mask(body: Iterable[fx.Node]) -> None:
    for node in body:
        op = ATTENTION.get(node.target)
        if op is not None and isinstance(argument(node, op.mask or ""), fx.Node):
            raise NoRule(node, "landmark keys are for attention without a mask; use keys='all' or 'sampled'")
