"""Cached steps, shallow layers: some tokens are computed anew, the others take their cached features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Branch, Structure
from hero_fx.passes.analysis.tokens import Source, Tokens
from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import Emitter, by_name, value_of
from hero_fx.passes.ops import argument_of, with_arguments

from .extrapolate import taylor
from .plan import Analysis, Refresh, ScoredRefresh, StepPlan, Strategy, Text, analyse, term_slot
from .record import key_slots
from .subset import Keep, Rows, Subset

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
            if isinstance(strategy, Refresh):
                self._branch(emitter, nodes, branch, strategy)
                sites += 1
        return sites

    def _branch(self, emitter: Emitter, nodes: Mapping[str, fx.Node], branch: Branch, strategy: Refresh) -> None:
        analysis = analyse(nodes, self.structure, branch, strategy.cache_point)
        device = value_of(analysis.targets[0]).device
        index = emitter.indices(branch.layer if strategy.per_layer else None, self.count, device)
        keep = _keep(self.structure, Rows(index), strategy.text)

        def attend(subset: Subset, node: fx.Node) -> fx.Node:
            return self._attend(branch, strategy, analysis, subset, node)

        _recompute(self.structure, branch, strategy, analysis, emitter, keep, attend, self.state_dtype)

    def _attend(self, branch: Branch, strategy: Refresh, analysis: Analysis, subset: Subset, node: fx.Node) -> fx.Node:
        op, emitter = ATTENTION[node.target], subset.emitter
        tokens = subset.tokens(node.args[op.key])  # type: ignore[arg-type]
        number = branch.attention.index(node.name)
        args = list(node.args)
        seen: Subset | None = subset
        args[op.query] = subset.env[node.args[op.query]]  # type: ignore[index]
        for role, argument in (("k", op.key), ("v", op.value)):
            source = node.args[argument]
            assert isinstance(source, fx.Node)
            if tokens is None:  # cross-attention to keys of no stream
                continue
            fresh = subset.env[source]
            if strategy.keys == "sampled":
                # Where no key is kept, they are another stream's: those are computed as the model does.
                if fresh is None:
                    _hoist(source, _first_reader(analysis))
                args[argument], seen = (source, None) if fresh is None else (fresh, seen)
                continue
            everything = strategy.keys == "all"
            cached = {}
            for slot, start, stop, step in key_slots(branch, number, role, tokens, strategy):
                rows = [slice(None)] * tokens.dim + [slice(start, stop, step)]
                with emitter.mode:
                    like = value_of(source)[tuple(rows)]
                state = emitter.state(slot, like, self.state_dtype)
                cached[start] = (state, emitter.read(state, like))
            if everything:
                state, value = cached[0]
                args[argument] = subset.merge(value, tokens, fresh)
                emitter.write_back(state, args[argument])  # type: ignore[arg-type]
            else:
                args[argument], seen = _beside(subset, tokens, fresh, {s: v for s, (_, v) in cached.items()})
        return _attention_call(node, args, analysis, subset, None if strategy.keys == "all" else seen)


def _keep(structure: Structure, rows: Rows, text: Text) -> dict[Source, Keep]:
    """What a cached step keeps of each token source."""
    return {source: rows if source.is_image else "all" if text == "live" else "none" for source in structure.lengths}


def _beside(subset: Subset, tokens: Tokens, fresh: fx.Node, cached: dict[int, fx.Node]) -> tuple[fx.Node, Subset]:
    """Fresh keys with the cached ones of skipped sources and landmarks beside them, and what of the sources they stand for."""
    seen = Subset(
        subset.emitter,
        subset.infos,
        {source: "all" if keep == "none" else keep for source, keep in subset.keep.items()},
        subset.attention,
    )
    pieces, at = [], 0
    for segment, start, _ in tokens.spans():
        count = subset.kept(Tokens(tokens.dim, (segment,)))
        if count:
            piece = fresh
            if count != subset.kept(tokens):
                piece = subset.emitter.call(aten.slice.Tensor, fresh, tokens.dim, at, at + count)
            pieces.append(piece)
            at += count
        if start in cached and (not count or segment.source.is_image):
            pieces.append(cached[start])
    if len(pieces) == 1:
        return pieces[0], seen
    return subset.emitter.call(aten.cat.default, pieces, tokens.dim), seen


def _attention_call(
    node: fx.Node,
    args: list,  # type: ignore[type-arg]
    analysis: Analysis,
    queries: Subset,
    keys: Subset | None,
) -> fx.Node:
    """The attention op on kept queries; its mask keeps the kept queries' rows and the kept keys' columns."""
    op = ATTENTION[node.target]
    changes: dict[str, object] = {}
    mask = argument_of(node, op.mask or "")
    if isinstance(mask, fx.Node):
        for operand, dim, subset in ((op.query, -2, queries), (op.key, -1, keys)):
            tokens = analysis.infos.get(node.args[operand])  # type: ignore[arg-type]
            shape = value_of(mask).shape
            if isinstance(tokens, Tokens) and subset is not None and shape[dim] == tokens.length != 1:
                gathered = subset.gather(mask, tokens.at(len(shape) + dim))
                assert gathered is not None
                mask = gathered
        changes[op.mask or ""] = mask
    for name, operand in zip(op.lengths, (op.query, op.key), strict=False):
        if argument_of(node, name) is not None:  # the op is told how many tokens there are
            changes[name] = int(value_of(args[operand]).shape[op.dim])
    given, kwargs = with_arguments(node, changes)
    for operand in (op.query, op.key, op.value):
        given[operand] = args[operand]
    return queries.emitter.call(node.target, *given, **kwargs)


def _recompute(
    structure: Structure,
    branch: Branch,
    strategy: Refresh | ScoredRefresh,
    analysis: Analysis,
    emitter: Emitter,
    keep: dict[Source, Keep],
    attend: Callable[[Subset, fx.Node], fx.Node],
    dtype: torch.dtype | None,
) -> None:
    """Emits the branch for the kept tokens, merges each stream's part into its cache and puts it in the feature's place."""
    anchor = _anchor(analysis)
    terms = 2 if _extrapolates(strategy) else 1
    with emitter.before(anchor):
        subset = Subset(emitter, analysis.infos, keep, attend)
        for source in analysis.sources:
            subset.seed(source)
        for node in analysis.body:
            subset.emit(node)
        merged = []
        for target, update in zip(analysis.targets, branch.updates, strict=True):
            slots = [term_slot(branch, structure.streams, update, i) for i in range(terms)]
            estimate, states = taylor(emitter, slots, value_of(target), dtype)
            fresh, tokens = subset.env[target], analysis.tokens(target)
            if fresh is None:
                merged.append(estimate)
                continue
            merged.append(subset.merge(estimate, tokens, fresh))
            kept = merged[-1]
            if terms == 2:
                # The cache stays a line in x: what is stored reaches the fresh value at this step's x.
                slope = subset.gather(emitter.read(states[1], value_of(target)), tokens)
                assert slope is not None
                rise = emitter.call(aten.mul.Tensor, slope, emitter.scalar("x", value_of(target).device))
                start = emitter.call(aten.sub.Tensor, fresh, rise)
                kept = subset.merge(emitter.read(states[0], value_of(target)), tokens, start)
            emitter.write_back(states[0], kept)
    for target, value in zip(analysis.targets, merged, strict=True):
        target.replace_all_uses_with(value)


def _extrapolates(strategy: Strategy) -> bool:
    return isinstance(strategy, Refresh) and strategy.unsampled != "reuse"


def _first_reader(analysis: Analysis) -> fx.Node:
    """The first reader of a target: what is emitted for the branch stands in front of it."""
    return min(user for t in analysis.targets for user in t.users)


def _hoist(node: fx.Node, anchor: fx.Node) -> None:
    """Moves a node that stands behind `anchor`, with all it is computed from, in front of it."""
    if node >= anchor and node.op in ("call_function", "get_attr"):
        for source in node.all_input_nodes:
            _hoist(source, anchor)
        anchor.prepend(node)


def _anchor(analysis: Analysis) -> fx.Node:
    """The first reader of a target; what the emitted nodes need (gates, tables) is moved in front of it."""
    anchor, inside = _first_reader(analysis), set(analysis.body)
    for node in analysis.body:
        for source in node.all_input_nodes:
            if source not in inside:
                _hoist(source, anchor)
    return anchor
