"""Residual streams: which token sources they hold, which of those is the image, and the grid its tokens lie on."""

from __future__ import annotations

from contextlib import suppress
from math import prod

import torch
from torch import fx

from .emit import value_of
from .residuals import Ancestry, ResidualAdd
from .structure import Stream
from .tokens import Info, NoRule, Segment, Tokens, follow, is_matmul

__all__ = ["find_grid", "find_image", "find_streams"]

aten = torch.ops.aten


def find_streams(graph: Ancestry, adds: list[ResidualAdd]) -> list[Stream]:
    """The residual streams; sets `stream` on each update. Tokens flow from one stream into the next through cat."""
    owner: dict[fx.Node, int] = {}
    streams: list[Stream] = []
    known: dict[fx.Node, Info] = {}
    for found in adds:
        stream = owner.get(found.residual)
        if stream is None:
            root = found.residual
            tokens = _root_tokens(root, len(streams), known)
            # A stream that is taken apart and put together again in the same order is still that stream.
            stream = next((i for i, s in enumerate(streams) if s.tokens == tokens), len(streams))
            if stream == len(streams):
                streams.append(Stream(f"s{stream}", root.name, tokens, value_of(root).shape[-1]))
            known[root] = tokens
            owner[root] = stream
        found.stream = stream
        owner[found.add] = stream
        known[found.add] = streams[stream].tokens
    return _named(graph, adds, streams)


def _root_tokens(root: fx.Node, stream: int, known: dict[fx.Node, Info]) -> Tokens:
    """The tokens of a new stream: those of earlier streams it is made of, or its own, or those of the parts of a cat."""
    try:
        followed = follow(_between_streams(root, known), known)
    except NoRule:
        followed = {}
    tokens = followed.get(root)
    if isinstance(tokens, Tokens) and tokens.dim == 1:
        return tokens
    if root.target is aten.cat.default and len(root.args) > 1 and root.args[1] in (1, -2):
        parts: list[fx.Node] = root.args[0]  # type: ignore[assignment]
        return Tokens(
            1,
            tuple(Segment(f"s{stream}.{i}", 0, int(value_of(p).shape[1])) for i, p in enumerate(parts)),
        )
    return Tokens(1, (Segment(f"s{stream}", 0, int(value_of(root).shape[1])),))


def _between_streams(root: fx.Node, known: dict[fx.Node, Info]) -> list[fx.Node]:
    """The few nodes (casts, cat, slice) between known stream values and a new root, in order."""
    path: list[fx.Node] = []
    todo = [root]
    while todo and len(path) < 32:
        node = todo.pop()
        if node in known or node.op != "call_function" or is_matmul(node):
            continue
        path.append(node)
        todo.extend(node.all_input_nodes)
    order = {n: i for i, n in enumerate(root.graph.nodes)} if path else {}
    return sorted(path, key=order.__getitem__)


def find_image(graph: Ancestry, adds: list[ResidualAdd], streams: list[Stream]) -> tuple[str | None, int]:
    """The token source that the output is made of; the longest one if there are several.

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
    leaving = [
        segment
        for node in graph.nodes[start:]
        if isinstance(info := known.get(node), Tokens) and any(user not in known for user in node.users)
        for segment in info.segments
        if not segment.source.startswith("%")
    ]
    longest = max(leaving, key=lambda s: s.length, default=None)
    return (None, 0) if longest is None else (longest.source, longest.length)


def _named(graph: Ancestry, adds: list[ResidualAdd], streams: list[Stream]) -> list[Stream]:
    """Streams and sources get the names people use: `image` for the image tokens, `text` for the one other source."""
    image, _ = find_image(graph, adds, streams)
    sources = list(dict.fromkeys(s.source for stream in streams for s in stream.tokens.segments))
    others = [s for s in sources if s != image]
    names = {image: "image"}
    names |= {s: "text" if len(others) == 1 else f"text{i}" for i, s in enumerate(others)}
    result: list[Stream] = []
    for stream in streams:
        tokens = Tokens(
            stream.tokens.dim,
            tuple(Segment(names[s.source], s.start, s.stop) for s in stream.tokens.segments),
        )
        name = "+".join(dict.fromkeys(s.source for s in tokens.segments))
        taken = sum(s.name.split("#")[0] == name for s in result)
        result.append(Stream(f"{name}#{taken}" if taken else name, stream.root, tokens, stream.width))
    return result


def find_grid(gm: fx.GraphModule, tokens: int) -> tuple[int, int, int] | None:
    """(frames, height, width) whose product is `tokens`, read from the patch embedding or from the unpatchify at the end.

    A patch embedding is a convolution whose output [.., D, height, width] or [B, D, frames, height, width] holds the
    tokens; an unpatchify splits the token axis of [B, tokens, D'] into the grid.
    """
    if tokens == 0:
        return None
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.conv3d.default):
            continue
        spatial = [int(s) for s in value_of(node).shape[2:]]
        if len(spatial) == 2 and tokens % prod(spatial) == 0:
            return tokens // prod(spatial), spatial[0], spatial[1]
        if len(spatial) == 3 and prod(spatial) == tokens:
            return spatial[0], spatial[1], spatial[2]
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node.target not in (
            aten.reshape.default,
            aten.view.default,
            aten.unflatten.int,
        ):
            continue
        before, after = list(value_of(node.args[0]).shape), list(value_of(node).shape)
        if len(before) == 3 and before[1] == tokens and len(after) > 4 and after[0] == before[0]:
            for rank in (3, 2):
                if prod(after[1 : 1 + rank]) == tokens:
                    return (1, 1, *map(int, after[1 : 1 + rank]))[-3:]  # type: ignore[return-value]
    return None
