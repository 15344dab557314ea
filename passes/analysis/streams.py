"""Residual streams: which token sources they hold, and which of those come out of the model."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import argument, dim_of, first_input, nodes_argument

from .follow import follow
from .residuals import Ancestry, ResidualAdd
from .stream_names import named
from .structure import Stream
from .tokens import Info, NoRule, Segment, Source, Tokens, normal_dim, rank_of

__all__ = ["find_image", "find_outputs", "find_streams"]

aten = torch.ops.aten


def find_streams(graph: Ancestry, adds: list[ResidualAdd]) -> list[Stream]:
    """The residual streams; sets `stream` on each update. Tokens flow from one stream into the next by what ops there are.

    A stream that is taken apart and put together again in the same order, normalised, or joined with a skip connection is
    still that stream: streams with equal tokens are one.
    """
    made = {found.add for found in adds}
    readers: dict[fx.Node, ResidualAdd] = {}
    for found in adds:
        readers.setdefault(found.residual, found)
    owner: dict[fx.Node, int] = {}
    streams: list[Stream] = []
    known: dict[fx.Node, Info] = {}
    after = {found.add: found for found in adds}
    for node in sorted({*readers, *made}, key=graph.index.__getitem__):
        if node in made:
            found = after[node]
            found.stream = owner[node] = owner[found.residual]
        else:
            tokens = _root_tokens(graph, node, len(streams), known, readers[node])
            owner[node] = next((i for i, s in enumerate(streams) if s.tokens == tokens), len(streams))
            if owner[node] == len(streams):
                streams.append(Stream(f"s{owner[node]}", node.name, tokens, value_of(node).shape[-1]))
        known[node] = streams[owner[node]].tokens
    order = list(dict.fromkeys(found.stream for found in adds))  # that of their first updates
    for found in adds:
        found.stream = order.index(found.stream)
    ordered = [streams[i] for i in order]
    return named(graph, ordered, find_outputs(graph, adds, ordered))


def _root_tokens(
    graph: Ancestry, root: fx.Node, stream: int, known: dict[fx.Node, Info], reader: ResidualAdd
) -> Tokens:
    """The tokens of a new stream: those of earlier streams it is made of, or its own, or those of the parts of a cat."""
    followed: dict[fx.Node, Info] = {}
    with suppress(NoRule):
        followed = follow(_between_streams(graph, root, known), known)
    tokens = followed.get(root)
    if isinstance(tokens, Tokens) and tokens.dim < value_of(root).dim() - 1:
        return tokens
    dim = _token_axis(graph, root, reader)
    if root.target is aten.cat.default and dim_of(root, rank_of(root)) == dim:
        parts = enumerate(nodes_argument(root, "tensors"))
        return Tokens(dim, tuple(_all_of(f"s{stream}.{i}", part, dim) for i, part in parts))
    return Tokens(dim, (_all_of(f"s{stream}", root, dim),))


def _all_of(name: str, node: fx.Node, dim: int) -> Segment:
    """The tokens of a value as a source of their own."""
    return Segment(Source(name), 0, int(value_of(node).shape[dim]))


def _token_axis(graph: Ancestry, root: fx.Node, reader: ResidualAdd) -> int:
    """The axis of a stream that its attention attends along; the last but one, where no attention says."""
    rank: int = value_of(root).dim()
    usual = rank - 2
    attention = next((n for n in graph.between([reader.source], [reader.update]) if n.target in ATTENTION), None)
    if attention is None or reader.source is not root:
        return usual
    query = attention.args[ATTENTION[attention.target].query]
    assert isinstance(query, fx.Node)
    path = graph.between([root], [query])
    for dim in (usual, *(d for d in range(rank - 1) if d != usual)):
        with suppress(NoRule):
            seed = Tokens(dim, (_all_of("tokens", root, dim),))
            tokens = follow(path, {root: seed}).get(query)
            if isinstance(tokens, Tokens) and tokens.dim == normal_dim(
                ATTENTION[attention.target].dim, value_of(query).dim()
            ):
                return dim
    return usual


def _between_streams(graph: Ancestry, root: fx.Node, known: dict[fx.Node, Info]) -> list[fx.Node]:
    """What lies between known stream values and a new root, in order."""
    bits = sum(1 << graph.index[node] for node in known)
    path: set[fx.Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node not in known and node not in path and graph.above[graph.index[node]] & bits:
            path.add(node)
            todo.extend(node.all_input_nodes)
    return sorted(path, key=graph.index.__getitem__)


def find_image(graph: Ancestry, adds: list[ResidualAdd], streams: list[Stream]) -> Segment | None:
    """The tokens that the output is made of; the most of one source if there are several (video and audio)."""
    return max(find_outputs(graph, adds, streams), key=lambda s: s.length, default=None)


def find_outputs(graph: Ancestry, adds: list[ResidualAdd], streams: list[Stream]) -> list[Segment]:
    """The tokens that the outputs are made of.

    Followed from the streams' last values: in joint blocks the text stream's last value still feeds the last FFN, but none
    of its tokens come out of it.
    """
    last = {found.stream: found.add for found in adds}
    known: dict[fx.Node, Info] = {}
    for found in adds:
        known[found.residual] = known[found.add] = streams[found.stream].tokens
    start = min(graph.index[add] for add in last.values())
    for node in graph.nodes[start:]:
        with suppress(NoRule):  # unpatchify takes the token axis apart
            known = follow([node], known)
    # What leaves for good, and does not come back into a stream by an op without a rule.
    outside = {graph.nodes[-1]}
    for node in reversed(graph.nodes[start:]):
        if node not in known and not outside.isdisjoint(node.users):
            outside.add(node)
    leaving: dict[Segment, None] = {}
    for node in graph.nodes[start:]:
        if isinstance(tokens := known.get(node), Tokens):
            for user in node.users:
                if user in outside:
                    leaving.update(dict.fromkeys(_taken(user, tokens).segments))
    return [segment for segment in leaving if not segment.source.is_outside]


def _taken(node: fx.Node, tokens: Tokens) -> Tokens:
    """The tokens that an op behind the layers takes: one of them, where it selects one, or all."""
    if node.target is not aten.select.int or tokens.folded:
        return tokens
    index = argument(node, "index")
    if dim_of(node, rank_of(first_input(node))) != tokens.dim or not isinstance(index, int):
        return tokens
    place = index % tokens.size
    return tokens.cut(place, place + 1)
