"""What to call streams and the sources of their tokens: by the argument of the model that the tokens come in by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import fx

from hero_fx.passes.emit import value_of

from .residuals import Ancestry
from .structure import Stream
from .tokens import IMAGE, Segment, Source, Tokens

__all__ = ["named"]

aten = torch.ops.aten


def named(graph: Ancestry, streams: list[Stream], outputs: Sequence[Segment]) -> list[Stream]:
    """Streams and sources with the names people use: `image` for the image tokens, `text` for what conditions them.

    Another source that comes out of the model is no text: it is named after the argument that it comes in by (`audio`).
    A source of which only a part is image (a sequence that the model filled in place) is two or three sources.

    Args:
        outputs: the tokens that come out of the model.
    """
    image = max(outputs, key=lambda s: s.length, default=None)
    entries = _entries_of(graph, streams)
    denoised = {segment.source for segment in outputs}
    # A name that the image's argument has too, as all of `*args` do, tells nothing of one of them.
    mute = {str(entries[image.source].meta.get("argument"))} if image is not None and image.source in entries else set()
    if image is not None:
        streams = [replace(stream, tokens=_parted(stream.tokens, image)) for stream in streams]
    segments = list(dict.fromkeys(s for stream in streams for s in stream.tokens.segments))
    sources = list(dict.fromkeys(s.source for s in segments))
    others = [s for s in sources if not s.is_image]
    words = {s: _word_for(entries.get(s), s in denoised, mute) for s in others}
    names = {IMAGE: IMAGE}
    for s in others:
        alike = [other for other in others if words[other] == words[s]]
        names[s] = Source(words[s] if len(alike) == 1 else f"{words[s]}{alike.index(s)}")
    starts = {source: min(s.start for s in segments if s.source == source) for source in sources}
    result: list[Stream] = []
    seen: Counter[str] = Counter()
    for stream in streams:
        own = tuple(
            Segment(names[s.source], s.start - starts[s.source], s.stop - starts[s.source])
            for s in stream.tokens.segments
        )
        name = "+".join(dict.fromkeys(str(s.source) for s in own))
        number = f"#{seen[name]}" if seen[name] else ""
        seen[name] += 1
        result.append(replace(stream, name=name + number, tokens=replace(stream.tokens, segments=own)))
    return result


def _parted(tokens: Tokens, image: Segment) -> Tokens:
    """The axis with the image as the source `IMAGE`, and the tokens before and behind it as sources of their own."""
    segments: list[Segment] = []
    for segment in tokens.segments:
        if segment.source != image.source:
            segments.append(segment)
            continue
        inner = (b for b in (image.start, image.stop) if segment.start < b < segment.stop)
        for start, stop in pairwise((segment.start, *inner, segment.stop)):
            segments.append(Segment(_part(segment.source, start, stop, image), start, stop))
    return replace(tokens, segments=tuple(segments))


def _part(source: Source, start: int, stop: int, image: Segment) -> Source:
    if stop <= image.start:
        return replace(source, name=f"{source.name}/before")
    return replace(source, name=f"{source.name}/behind") if start >= image.stop else IMAGE


def _entries_of(graph: Ancestry, streams: list[Stream]) -> dict[Source, fx.Node]:
    """By token source, the model's input that its tokens come in by, where the graph shows it."""
    nodes = {node.name: node for node in graph.nodes}
    found: dict[Source, fx.Node] = {}
    for stream in streams:
        root, segments = nodes[stream.root], stream.tokens.segments
        joined = root.args[0] if root.target is aten.cat.default else ()
        parts: list[fx.Node] = list(joined) if len(joined) == len(segments) else [root]
        for part, segment in zip(parts, segments, strict=False):
            if len(parts) == len(segments):
                found.setdefault(segment.source, _entry(graph, part))
    return found


def _entry(graph: Ancestry, node: fx.Node) -> fx.Node:
    """Up from a node, at each op to its largest operand that the call decides."""
    while operands := [n for n in node.all_input_nodes if graph.depends_on_call(n)]:
        node = max(operands, key=_elements)  # the first of equal ones
    return node


def _elements(node: fx.Node) -> int:
    value = value_of(node)
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(prod(map(int, t.shape)) for t in tensors if isinstance(t, torch.Tensor))


def _word_for(entry: fx.Node | None, denoised: bool, mute: set[str]) -> str:
    """What to call tokens that are not the image: `audio` for `audio_hidden_states`, `text` for what only conditions."""
    value = None if entry is None else value_of(entry)
    if entry is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return "text"  # numbers of words, if anything
    argument = str(entry.meta.get("argument", ""))
    word = "" if argument in mute else _SUFFIX.sub("", argument)
    if "audio" in word.split("_"):
        return "audio"
    return word if denoised and word not in _TEXT else "text"


# What arguments with the text are called, behind which comes a `_SUFFIX`, and names that say nothing.
_TEXT = {"", "image", "encoder", "prompt", "text", "txt", "context", "caption"}
_SUFFIX = re.compile(r"(^|_)(hidden_states|hidden|states|latents|latent|embeds|tokens|input|inputs)$")
