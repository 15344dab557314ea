"""What branches are called: the number of their layer, a label of their own, and the module that people know them by."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from .residuals import ResidualAdd
from .structure import Stream
from .tokens import Source, is_matmul

__all__ = ["Labels", "LayerNumbers", "module_path"]


class Labels:
    """Tells the branches of a layer apart: `l0_attention`, `l0_ffn`, and a second FFN by its place there, `l0_ffn_2`."""

    def __init__(self) -> None:
        self.places: Counter[int] = Counter()
        self.used: set[str] = set()

    def next(self, layer: int, kind: str) -> str:
        """A label that no other branch has: no two have one place in a layer, and no kind ends in a number."""
        label, place = f"l{layer}_{kind}", self.places[layer]
        label = f"{label}_{place}" if label in self.used else label
        self.places[layer] += 1
        self.used.add(label)
        return label

    def check(self) -> None:
        """Asserts that no two branches have one label: their feature state goes by it."""
        assert len(self.used) == self.places.total(), "every branch has a label of its own"


class LayerNumbers:
    """Counts layers: each has self-attention, if need be beside another or on other tokens, and then its FFNs."""

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams
        self.layer = -1
        self._start()

    def _start(self) -> None:
        self.layer += 1
        self.attended: set[Source] = set()
        self.read: set[fx.Node] = set()
        self.over = False

    def next(self, kind: str, group: list[ResidualAdd]) -> int:
        """The layer of the next branch."""
        if kind not in ("attention", "parallel"):
            self.over |= kind == "ffn" and bool(self.attended)
            return self.layer
        tokens = set[Source]().union(*(self.streams[f.stream].tokens.sources for f in group))
        read = {f.source for f in group}
        again = bool(tokens & self.attended) and not read <= self.read
        if again or (self.over and not read <= self.read):
            self._start()
        self.attended |= tokens
        self.read |= read
        return self.layer


def module_path(body: list[fx.Node]) -> str:
    """The module that all matrix products of the branch lie in, as Dynamo names it."""
    paths = []
    for node in body:
        stack = node.meta.get("nn_module_stack")
        if is_matmul(node) and stack:
            paths.append(_clean(list(stack.values())[-1][0]).split("."))
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _clean(path: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn1` -> `blocks.0.attn1`."""
    path = re.sub(r"^L\['self'\]", "", path)
    path = re.sub(r"(\.__dict__)?(\['_modules'\]|\._modules)", "", path)
    path = re.sub(r"\[[\"']?([^\]\"']*)[\"']?\]", r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".")
