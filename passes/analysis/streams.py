"""Residual streams: which token sources they hold, which of those is the image, and the grid its tokens lie on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import RESHAPES

from .follow import follow
from .residuals import Ancestry, ResidualAdd
from .stream_names import entries_of, word_for
from .structure import Stream
from .tokens import Info, NoRule, Segment, Tokens, normal_dim

__all__ = ["find_grid", "find_image", "find_outputs", "find_streams"]

aten = torch.ops.aten
Grid = tuple[int, int, int]


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
    return _named(graph, adds, [streams[i] for i in order])


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
    along = root.args[1] if len(root.args) > 1 else root.kwargs.get("dim", 0)
    if root.target is aten.cat.default and along in (dim, dim - value_of(root).dim()):
        parts: list[fx.Node] = root.args[0]  # type: ignore[assignment]
        return Tokens(
            dim,
            tuple(Segment(f"s{stream}.{i}", 0, int(value_of(p).shape[dim])) for i, p in enumerate(parts)),
        )
    return Tokens(dim, (Segment(f"s{stream}", 0, int(value_of(root).shape[dim])),))


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
            seed = Tokens(dim, (Segment("tokens", 0, int(value_of(root).shape[dim])),))
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
    return [segment for segment in leaving if not segment.source.startswith("%")]


def _taken(node: fx.Node, tokens: Tokens) -> Tokens:
    """The tokens that an op behind the layers takes: one of them, where it selects one, or all."""
    if node.target is not aten.select.int or tokens.folded:
        return tokens
    _, dim, index = node.args
    source = value_of(node.all_input_nodes[0])
    if normal_dim(dim, source.dim()) != tokens.dim or not isinstance(index, int):  # type: ignore[arg-type]
        return tokens
    place = index % tokens.size
    return tokens.cut(place, place + 1)


def _named(graph: Ancestry, adds: list[ResidualAdd], streams: list[Stream]) -> list[Stream]:
    """Streams and sources get the names people use: `image` for the image tokens, `text` for what conditions them.

    Another source that comes out of the model is no text: it is named after the argument that it comes in by (`audio`).
    A source of which only a part is image (a sequence that the model filled in place) is two or three sources.
    """
    outputs = find_outputs(graph, adds, streams)
    image = max(outputs, key=lambda s: s.length, default=None)
    entries = entries_of(graph, streams)
    denoised = {segment.source for segment in outputs}
    # A name that the image's argument has too, as all of `*args` do, tells nothing of one of them.
    mute = {str(entries[image.source].meta.get("argument"))} if image is not None and image.source in entries else set()
    if image is not None:
        streams = [replace(stream, tokens=_parted(stream.tokens, image)) for stream in streams]
        image = replace(image, source=_part_name(image, image))
    sources = list(dict.fromkeys(s.source for stream in streams for s in stream.tokens.segments))
    others = [s for s in sources if image is None or s != image.source]
    names = {image.source: "image"} if image is not None else {}
    words = {s: word_for(entries.get(s), s in denoised, mute) for s in others}
    for s in others:
        alike = [other for other in others if words[other] == words[s]]
        names[s] = words[s] if len(alike) == 1 else f"{words[s]}{alike.index(s)}"
    firsts = {(s.source, s.start) for stream in streams for s in stream.tokens.segments}
    starts = {source: min(start for name, start in firsts if name == source) for source in sources}
    result: list[Stream] = []
    for stream in streams:
        segments = tuple(
            Segment(names[s.source], s.start - starts[s.source], s.stop - starts[s.source])
            for s in stream.tokens.segments
        )
        tokens = replace(stream.tokens, segments=segments)
        name = "+".join(dict.fromkeys(s.source for s in tokens.segments))
        taken = sum(s.name.split("#")[0] == name for s in result)
        result.append(Stream(f"{name}#{taken}" if taken else name, stream.root, tokens, stream.width))
    return result


def _parted(tokens: Tokens, image: Segment) -> Tokens:
    """The axis with the tokens before, in and behind the image as sources of their own."""
    segments: list[Segment] = []
    for segment in tokens.segments:
        if segment.source != image.source:
            segments.append(segment)
            continue
        bounds = [
            segment.start,
            *(b for b in (image.start, image.stop) if segment.start < b < segment.stop),
            segment.stop,
        ]
        for start, stop in pairwise(bounds):
            part = Segment(segment.source, start, stop)
            segments.append(replace(part, source=_part_name(part, image)))
    return replace(tokens, segments=tuple(segments))


def _part_name(part: Segment, image: Segment) -> str:
    where = "before" if part.stop <= image.start else "behind" if part.start >= image.stop else "within"
    return f"{part.source}/{where}"


def find_grid(gm: fx.GraphModule, tokens: int) -> Grid | None:
    """(frames, height, width) whose product is `tokens`, where the graph shows it.

    Read from what is found first of: a patch embedding (a convolution whose output [.., D, height, width] or
    [B, D, frames, height, width] holds the tokens); an unpatchify that splits the token axis of [B, tokens, D'] at the
    end; the mesh that positions are made of; a reshape that folds a grid into the token axis (a rotary table, or patches).
    """
    if tokens == 0:
        return None
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    reshapes = [node for node in calls if node.target in RESHAPES]
    shown = [*_of_convolutions(calls, tokens), *_of_unpatchify(reshapes, tokens), *_of_meshes(calls, tokens)]
    # A line of tokens is no grid: patches cut out one by one look like it.
    return next((g for g in [*shown, *_of_tables(reshapes, tokens)] if g.count(1) < 2), None)


def _of_convolutions(calls: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in calls:
        if node.target not in (aten.conv2d.default, aten.conv3d.default):
            continue
        spatial = [int(s) for s in value_of(node).shape[2:]]
        if len(spatial) == 2 and tokens % prod(spatial) == 0:
            yield tokens // prod(spatial), spatial[0], spatial[1]
        if len(spatial) == 3 and prod(spatial) == tokens:
            yield spatial[0], spatial[1], spatial[2]


def _of_unpatchify(reshapes: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in reversed(reshapes):
        before, after = list(value_of(node.all_input_nodes[0]).shape), list(value_of(node).shape)
        if len(before) == 3 and before[1] == tokens and len(after) > 4 and after[0] == before[0]:
            for rank in (3, 2):
                if prod(after[1 : 1 + rank]) == tokens:
                    yield (1, 1, *map(int, after[1 : 1 + rank]))[-3:]  # type: ignore[misc]


def _of_meshes(calls: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in calls:
        if str(node.target).startswith("aten.meshgrid"):
            mesh = [int(s) for s in value_of(node)[0].shape]
            if len(mesh) in (2, 3) and prod(mesh) == tokens:
                yield (1, 1, *mesh)[-3:]  # type: ignore[misc]


def _of_tables(reshapes: list[fx.Node], tokens: int) -> Iterator[Grid]:
    for node in reshapes:
        before, after = list(value_of(node.all_input_nodes[0]).shape), list(value_of(node).shape)
        for at in range(len(before) - 2):
            grid, rest = before[at : at + 3], before[at + 3 :]
            folds = after == [*before[:at], tokens, *rest] and len(rest) < 2
            patches = at == 0 and len(rest) > 1 and after == [tokens, prod(rest)]
            if (folds or patches) and prod(grid) == tokens:
                yield int(grid[0]), int(grid[1]), int(grid[2])
