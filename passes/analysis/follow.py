"""The token axis, followed through a graph as segments of the sequence.

A residual stream [B, N, D] holds tokens along one axis. On its way through a branch that axis is moved (transpose),
split off and joined (slice, split, cat of text and image), and met by tensors that are indexed by token (rotary
tables, masks, per-token modulation). `follow` says of every node between the streams and the branch output where its
token axis is and which tokens of which source lie along it: `Tokens(dim=2, segments=(text[0:9], image[0:120]))`.

An op carries the axis by a rule (of `rules`, `moves`, or of attention, here), or `follow` raises `NoRule` with its name:
nothing is guessed. The rules need sizes only, so the analysis changes nothing and allocates nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import argument

from .exchange import EXCHANGING
from .moves import MOVING
from .rules import COMPUTING, Rule
from .tokens import Folded, Info, Lookup, NoRule, Segment, Source, Tokens, normal_dim, rank_of

__all__ = ["RULES", "attends_within", "follow", "token_rule"]

RULES: Mapping[Any, Rule] = {**COMPUTING, **MOVING, **EXCHANGING}
"""By overload; attention ops have a table of their own."""


def follow(
    nodes: Iterable[fx.Node],
    seeds: Mapping[fx.Node, Tokens] | Mapping[fx.Node, Info],
    whole: Collection[Source] = (),
    rule_of: Callable[[fx.Node], Rule | None] | None = None,
) -> dict[fx.Node, Info]:
    """Tokens of every node that depends on a seed.

    Args:
        nodes: nodes in topological order; those without an argument in the result are passed over.
        seeds: residual streams and their tokens.
        whole: sources of which a step computes all tokens or none: attention among them may be causal.
        rule_of: the rule of an op, where the axis is another than that of tokens.

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
            source, number = node.args
            parts = known[source] if isinstance(source, fx.Node) else None
            assert isinstance(parts, tuple)
            assert isinstance(number, int)
            known[node] = parts[number]
            continue
        if all(known.get(source) is None for source in node.all_input_nodes):
            known[node] = None
            continue
        rule = token_rule(node, whole) if rule_of is None else rule_of(node)
        if rule is None:
            raise NoRule(node, "no rule says what this op does to the token axis")
        try:
            known[node] = rule(node, look)
        except Folded:
            raise NoRule(node, "it takes a part of an axis into which more than tokens is folded") from None
    return known


def token_rule(node: fx.Node, whole: Collection[Source] = ()) -> Rule | None:
    """What an op does to the token axis."""
    if node.target in ATTENTION:
        return lambda node, look: _attention(node, look, whole)
    return RULES.get(node.target)


def _attention(node: fx.Node, look: Lookup, whole: Collection[Source]) -> Info:
    op = ATTENTION[node.target]
    query, key, value = op.operands(node)
    tokens, k, v = look(query), look(key), look(value)
    met = frozenset[Source]().union(*(info.sources for info in (tokens, k, v) if info is not None))
    reason = op.ordered(node, whole=met <= set(whole))
    if reason:
        raise NoRule(node, reason)
    for name, source, info in (("query", query, tokens), ("key", key, k), ("value", value, v)):
        if info is not None and info.dim != normal_dim(op.dim, rank_of(source)) and not attends_within(node, look):
            raise NoRule(node, f"the token axis of its {name} is not where the op attends")
    if look(argument(node, op.mask or "")) is not None:
        raise NoRule(node, "its mask depends on the tokens themselves")
    of_ranks = tokens is not None and tokens.exchanged and tokens.inner == 1
    merged = tokens is not None and tokens.folded and not of_ranks
    if tokens is None or (merged and not attends_within(node, look)) or not _alike(k, v):
        raise NoRule(node, "queries without tokens, or keys and values with different ones")
    if not isinstance(value_of(node), (tuple, list)):
        return tokens
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise NoRule(node, "more of its results are used than what attention gives")
    return (tokens, *[None] * (len(value_of(node)) - 1))


def attends_within(node: fx.Node, look: Lookup) -> bool:
    """Whether an attention op has its tokens in the batch, so that each attends within itself (over frames)."""
    op = ATTENTION[node.target]
    query, *more = op.operands(node)
    tokens = look(query)
    alone = tokens is not None and rank_of(query) == 4 and tokens.dim == 0 and all(look(n) == tokens for n in more)
    return alone and not isinstance(argument(node, op.mask or ""), fx.Node)


def _alike(k: Tokens | None, v: Tokens | None) -> bool:
    """The same tokens in the same order; tokens of no stream have a name of their own on either side."""
    if k is None or v is None:
        return k is v

    def plain(segment: Segment) -> Segment:
        return replace(segment, source=Source("", "outside")) if segment.source.is_outside else segment

    return (k.dim, k.outer, k.inner) == (v.dim, v.outer, v.inner) and list(map(plain, k.segments)) == list(
        map(plain, v.segments)
    )
