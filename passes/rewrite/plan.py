"""What a cached step does with each branch: the vocabulary between policies (which decide) and passes (which rewrite)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from hero_fx.passes.analysis.branches import body_of
from hero_fx.passes.analysis.follow import follow
from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.analysis.model_writes import attended, check_moved, check_recorded
from hero_fx.passes.analysis.structure import Branch, Stream, Structure, Update
from hero_fx.passes.analysis.tokens import Info, NoRule, Segment, Source, Tokens
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import by_name, value_of
from hero_fx.passes.ops import argument_of
from hero_fx.passes.slots import StateSlot

from .subset import check_whole

__all__ = [
    "CachePoint", "Extrapolate", "Fallback", "Full", "Keys", "Recording", "Refresh", "Reuse", "ScoredRefresh",
    "StepPlan", "Strategy", "Text", "Unsampled", "analyse", "cached_node", "gate_of", "recordings", "resolve", "term_slot",
]  # fmt: skip

CachePoint = Literal["pre_gate", "post_gate"]
Keys = Literal["sampled", "sampled+text", "landmarks", "all"]
Text = Literal["skip", "live"]
Unsampled = Literal["reuse", "extrapolate", "gate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """Compute the branch as the model does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """Add the features of the last full step (FORA)."""

    cache_point: CachePoint = "pre_gate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolate:
    """Estimate the features from those of the last full steps: sum over i <= order of Y_i x^i / i! (HERO Eq. 6)."""

    order: int = 1
    cache_point: CachePoint = "post_gate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refresh:
    """Recompute sampled image tokens, take the cached features for all others (HERO Eq. 4)."""

    cache_point: CachePoint = "pre_gate"
    keys: Keys = "all"
    stride: int = 1
    """`keys="landmarks"`: one image token in so many is a landmark, whose keys and values are kept."""
    text: Text = "skip"
    unsampled: Unsampled = "reuse"
    """Tokens that are not sampled: keep the cached features (Eq. 4), extrapolate them (Eq. 6), or follow the change of the
    gate to first order: (g + x (g - g_prev) / d) F, for caches behind the gate."""
    per_layer: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRefresh:
    """Recompute the image tokens with the highest scores, take the cached features for all others (ToCa, DuCa)."""

    cache_point: CachePoint = "pre_gate"
    text: Text = "skip"
    ratio: float = 0.25
    score: Literal["attention", "values"] = "attention"
    """Attention received (ToCa), or 1 - |v| (DuCa)."""
    interval: int = 2
    """N of the staleness bonus 0.25 * age / N."""


Strategy = Full | Reuse | Extrapolate | Refresh | ScoredRefresh
StepPlan = tuple[tuple[Branch, Strategy], ...]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A branch that cached steps compute in full although the policy wanted to refresh it, and why."""

    branch: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recording:
    """What a full step keeps of one branch."""

    branch: Branch
    cache_point: CachePoint
    terms: int
    """Taylor terms Y_0 .. Y_{terms-1} per stream; 1 is the features alone."""
    gate: bool = False
    """Y_1 is the change of the gate times the features in front of it, not the change of the features."""
    keys: Keys | None = None
    """Keep keys and values of its attention: of all tokens, of the text tokens, or of these and of landmarks."""
    stride: int = 1
    score: ScoredRefresh | None = None
    """Keep the scores that select tokens for this branch."""


def cached_node(gm_nodes: Mapping[str, fx.Node], update: Update, cache_point: CachePoint) -> fx.Node:
    """The node whose value is cached: the feature, or the gated update."""
    return gm_nodes[update.feature if cache_point == "pre_gate" else update.update]


def gate_of(gm_nodes: Mapping[str, fx.Node], update: Update, tokens: Tokens) -> tuple[fx.Node, fx.Node] | None:
    """(gate, what it scales) if the update of tokens [.., L, D] is their product with one gate for all tokens."""
    node = gm_nodes[update.update]
    if node.target is not torch.ops.aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    dim = tokens.dim - value_of(node).dim()
    for gate, scaled in (node.args, node.args[::-1]):
        assert isinstance(gate, fx.Node)
        assert isinstance(scaled, fx.Node)
        shape = value_of(gate).shape
        if (len(shape) < -dim or shape[dim] == 1) and value_of(scaled).shape == value_of(node).shape:
            return gate, scaled
    return None


def term_slot(branch: Branch, streams: Sequence[Stream], update: Update, term: int) -> StateSlot:
    """The state tensor of Taylor term `term` of one stream of a branch."""
    stream, name = update.stream, streams[update.stream].name.replace("+", "_").replace("#", "_")
    number = [u.add for u in branch.updates if u.stream == stream].index(update.add)
    label = f"{branch.label}_{name}{f'_{number}' if number else ''}_y{term}"
    return StateSlot(label, (branch.label, stream, number, term))


@dataclass(frozen=True, slots=True)
class Analysis:
    """The token axis through one branch."""

    sources: tuple[fx.Node, ...]
    body: tuple[fx.Node, ...]
    targets: tuple[fx.Node, ...]
    infos: dict[fx.Node, Info]

    def tokens(self, node: fx.Node) -> Tokens:
        tokens = self.infos[node]
        assert isinstance(tokens, Tokens)
        return tokens


def analyse(nodes: Mapping[str, fx.Node], structure: Structure, branch: Branch, cache_point: CachePoint) -> Analysis:
    """Follows the token axis from the streams a branch reads to what is cached of it; `nodes` are the graph's by name.

    Raises:
        NoRule: the branch cannot be computed for a part of its tokens.
    """
    sources, body, targets = body_of(nodes, branch, to_update=cache_point == "post_gate")
    seeds = {node: structure.streams[stream].tokens for node, (_, stream) in zip(sources, branch.reads, strict=True)}
    if any(_only_masks(node, body, targets) for node in sources):
        sources = [node for node in sources if not _only_masks(node, body, targets)]
        seeds, body = {node: seeds[node] for node in sources}, _moved(sources, body)
    infos = follow(body, seeds, whole=structure.lengths.keys() - {structure.image})
    check_whole(infos, structure.lengths)
    for target, update in zip(targets, branch.updates, strict=True):
        if infos.get(target) != structure.streams[update.stream].tokens:
            raise NoRule(target, "its tokens are not those of the stream it is added to")
    return Analysis(tuple(sources), tuple(body), tuple(targets), infos)


def _only_masks(source: fx.Node, body: Sequence[fx.Node], targets: Sequence[fx.Node]) -> bool:
    """Whether a stream's value goes into nothing but masks of attention: those are tables for whole tokens, as any others."""
    moved = {source}
    for node in body:
        if moved.isdisjoint(node.all_input_nodes):
            continue
        op = ATTENTION.get(node.target)
        if op is None or any(node.args[i] in moved for i in (op.query, op.key, op.value)):
            moved.add(node)
    return moved.isdisjoint(targets)


def _moved(sources: Iterable[fx.Node], body: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of a body that depend on a source."""
    moved = set(sources)
    for node in body:
        if not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
    return [node for node in body if node in moved]


def self_attention(nodes: Mapping[str, fx.Node], structure: Structure, branch: Branch) -> fx.Node:
    """The attention node in the branch's layer that image tokens both query and are keys of.

    Raises:
        NoRule: the layer has none.
    """
    for other in structure.branches:
        if other.layer != branch.layer or not other.attention:
            continue
        infos = analyse(nodes, structure, other, "pre_gate").infos
        for name in other.attention:
            node = nodes[name]
            op = ATTENTION[node.target]
            query, key = node.args[op.query], node.args[op.key]
            assert isinstance(query, fx.Node)
            assert isinstance(key, fx.Node)
            tokens, rank = infos.get(key), value_of(query).dim()
            if not isinstance(tokens, Tokens) or structure.image not in tokens.sources:
                continue
            if rank == 4 and tokens.dim == op.dim + 4 and infos.get(query) is not None:
                return node
    raise NoRule(nodes[branch.updates[0].add], "its layer has no self-attention to score tokens by")


def resolve(
    gm: fx.GraphModule, structure: Structure, steps: Sequence[StepPlan]
) -> tuple[tuple[StepPlan, ...], tuple[Fallback, ...]]:
    """Replaces what cannot be done by `Full`, and says why; a branch without a gate has none to follow and reuses.

    Raises:
        ValueError: gates are to be followed, and no branch has one.
    """
    reasons: dict[str, str] = {}
    nodes, memory = by_name(gm), Memory(gm.graph)

    def gated(branch: Branch) -> bool:
        return all(gate_of(nodes, u, structure.streams[u.stream].tokens) is not None for u in branch.updates)

    def resolved(branch: Branch, strategy: Strategy) -> Strategy:
        if branch.label in reasons:
            return Full()
        if isinstance(strategy, Refresh) and strategy.unsampled == "gate" and not gated(branch):
            return replace(strategy, unsampled="reuse")
        return strategy

    for plan in steps:
        for branch, strategy in plan:
            if not isinstance(strategy, Full) and branch.label not in reasons:
                try:
                    _check(nodes, structure, memory, branch, strategy)
                except NoRule as error:
                    reasons[branch.label] = str(error)
    follow_gate = [b for plan in steps for b, s in plan if isinstance(s, Refresh) and s.unsampled == "gate"]
    if follow_gate and not any(gated(branch) for branch in follow_gate):
        raise ValueError(
            "unsampled='gate': no refreshed branch of this model ends in a product with one gate for all tokens, as adaLN has "
            "it, so there is none to follow; use 'reuse' or 'extrapolate'"
        )
    plans = tuple(tuple((branch, resolved(branch, strategy)) for branch, strategy in plan) for plan in steps)
    return plans, tuple(Fallback(label, reason) for label, reason in reasons.items())


def _check(
    nodes: Mapping[str, fx.Node],
    structure: Structure,
    memory: Memory,
    branch: Branch,
    strategy: Reuse | Extrapolate | Refresh | ScoredRefresh,
) -> None:
    """Raises NoRule if a cached step cannot do with a branch what is planned."""
    check_recorded(memory, [cached_node(nodes, update, strategy.cache_point) for update in branch.updates])
    if isinstance(strategy, Reuse | Extrapolate):
        return
    analysis = analyse(nodes, structure, branch, strategy.cache_point)
    check_moved(memory, analysis.body, analysis.targets)
    if isinstance(strategy, ScoredRefresh):
        _batch_in_front(analysis)
        check_recorded(memory, attended(self_attention(nodes, structure, branch)))
        return
    if strategy.keys == "landmarks":
        _no_mask(analysis.body)
    check_recorded(memory, [n for name in branch.attention for n in attended(nodes[name])])
    gates = [gate_of(nodes, u, structure.streams[u.stream].tokens) for u in branch.updates]
    if strategy.unsampled == "gate":
        check_recorded(memory, [gate for found in gates if found is not None for gate in found])


def _batch_in_front(analysis: Analysis) -> None:
    """Raises NoRule unless all that has tokens is [batch, .., tokens, ..]: each batch element has chosen rows of its own."""
    reason = "tokens by score are chosen where the stream and all between are [batch, .., tokens, ..]"
    batch: dict[fx.Node, Info] = {}
    for source in analysis.sources:
        tokens = analysis.tokens(source)
        if tokens.dim != 1 or tokens.folded:
            raise NoRule(source, reason)
        batch[source] = Tokens(0, (Segment(Source("batch"), 0, int(value_of(source).shape[0])),))
    for node in analysis.body:
        if node.target in ATTENTION:
            batch[node] = batch.get(node.args[ATTENTION[node.target].query])  # type: ignore[arg-type]
        else:
            batch = follow([node], batch)  # the batch, as tokens are followed
        for info, place in zip(_parts(analysis.infos.get(node)), _parts(batch.get(node)), strict=False):
            if info is not None and (info.folded or place is None or place.dim != 0 or place.folded):
                raise NoRule(node, reason)


def _parts(info: Info) -> tuple[Tokens | None, ...]:
    return info if isinstance(info, tuple) else (info,)


def _no_mask(body: Sequence[fx.Node]) -> None:
    for node in body:
        op = ATTENTION.get(node.target)
        if op is None:
            continue
        if isinstance(argument_of(node, op.mask or ""), fx.Node):
            raise NoRule(node, "landmark keys are for attention without a mask; use keys='all' or 'sampled'")


def recordings(steps: Sequence[StepPlan]) -> tuple[Recording, ...]:
    """What full steps must keep so that all cached steps have what they read."""
    result = []
    for strategies in zip(*steps, strict=True):
        branch = strategies[0][0]
        wanted = [s for _, s in strategies if not isinstance(s, Full)]
        if not wanted:
            continue
        points = {s.cache_point for s in wanted}
        assert len(points) == 1, "all step kinds of a policy cache a branch at the same point"
        result.append(
            Recording(
                branch=branch,
                cache_point=points.pop(),
                terms=max(_terms(s) for s in wanted),
                gate=any(isinstance(s, Refresh) and s.unsampled == "gate" for s in wanted),
                keys=next((s.keys for s in wanted if isinstance(s, Refresh) and s.keys != "sampled"), None),
                stride=next((s.stride for s in wanted if isinstance(s, Refresh)), 1),
                score=next((s for s in wanted if isinstance(s, ScoredRefresh)), None),
            )
        )
    return tuple(result)


def _terms(strategy: Strategy) -> int:
    if isinstance(strategy, Extrapolate):
        return strategy.order + 1
    return 2 if isinstance(strategy, Refresh) and strategy.unsampled != "reuse" else 1
