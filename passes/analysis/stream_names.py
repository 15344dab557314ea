"""What to call the tokens of a stream: by the argument of the model that they come in by."""

from __future__ import annotations

import re
from math import prod

import torch
from torch import fx

from hero_fx.passes.emit import value_of

from .residuals import Ancestry
from .structure import Stream

__all__ = ["entries_of", "word_for"]

aten = torch.ops.aten


def entries_of(graph: Ancestry, streams: list[Stream]) -> dict[str, fx.Node]:
    """By token source, the model's input that its tokens come in by, where the graph shows it."""
    nodes = {node.name: node for node in graph.nodes}
    found: dict[str, fx.Node] = {}
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


def word_for(entry: fx.Node | None, denoised: bool, mute: set[str]) -> str:
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
