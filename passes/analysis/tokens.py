"""The token axis of a tensor as segments of token sources, and the ops that hold a layer's work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from hero_fx.passes.attention import ATTENTION
from hero_fx.passes.emit import value_of
from hero_fx.passes.ops import MATMULS

__all__ = [
    "IMAGE", "Folded", "Info", "Lookup", "NoRule", "Segment", "Source", "Tokens", "is_matmul", "normal_dim", "one_input",
    "rank_of", "sizes_of",
]  # fmt: skip

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Source:
    """Where tokens come from."""

    name: str
    """For people, and to tell sources of one kind apart."""
    kind: Literal["image", "stream", "outside"] = "stream"
    """The image (or video, or sound) that is denoised; other tokens of a residual stream; tokens of no stream (registers,
    a fixed prompt)."""

    @property
    def is_image(self) -> bool:
        return self.kind == "image"

    @property
    def is_outside(self) -> bool:
        return self.kind == "outside"

    def __str__(self) -> str:
        return f"%{self.name}" if self.is_outside else self.name


IMAGE = Source("image", "image")
"""The one source of image tokens."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start:stop` of a source."""

    source: Source
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.source}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where a tensor's token axis is (from the left) and what lies along it."""

    dim: int
    segments: tuple[Segment, ...]
    outer: int = 1
    """How many times the tokens follow each other along the axis (a batch in front of them is folded in)."""
    inner: int = 1
    """How many values each token has along the axis (frames behind them are folded in)."""
    exchanged: bool = False
    """Whether they are those of all ranks, of some of the heads."""

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(s.length for s in self.segments)

    @property
    def folded(self) -> bool:
        """Whether the axis holds more than tokens."""
        return self.outer * self.inner > 1

    @property
    def size(self) -> int:
        """The size of the axis."""
        return self.outer * self.length * self.inner

    @property
    def sources(self) -> frozenset[Source]:
        """Where its tokens come from."""
        return frozenset(segment.source for segment in self.segments)

    def spans(self) -> Iterator[tuple[Segment, int, int]]:
        """(segment, start, stop): each segment with its place among the tokens of the axis."""
        start = 0
        for segment in self.segments:
            yield segment, start, start + segment.length
            start += segment.length

    def at(self, dim: int) -> Tokens:
        return Tokens(dim, self.segments, self.outer, self.inner, self.exchanged)

    def cut(self, start: int, stop: int) -> Tokens:
        """The tokens `start:stop` of this axis. Raises Folded if it holds more than tokens."""
        if self.folded and (start, stop) != (0, self.size):
            raise Folded
        if self.folded:
            return self
        kept = []
        for segment, first, end in self.spans():
            low, high = max(start, first), min(stop, end)
            if low < high:
                kept.append(Segment(segment.source, segment.start + low - first, segment.start + high - first))
        return Tokens(self.dim, tuple(kept), exchanged=self.exchanged)

    def __str__(self) -> str:
        fold = f"{self.outer} x " * (self.outer > 1), f" x {self.inner}" * (self.inner > 1)
        return f"dim {self.dim}: {fold[0]}{' '.join(map(str, self.segments))}{fold[1]}"


class Folded(Exception):
    """A part of an axis was asked for, into which more than tokens is folded."""


class NoRule(Exception):
    """The token axis could not be followed through a node."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name} = {node.target}: {reason}")
        self.node = node
        self.reason = reason


def is_matmul(node: fx.Node) -> bool:
    """True for the ops whose work caching saves: projections, convolutions, attention."""
    if node.op != "call_function":
        return False
    return node.target in MATMULS or node.target in ATTENTION


Info = Tokens | None | tuple["Tokens | None", ...]
Lookup = Callable[[Any], Tokens | None]


def rank_of(node: Any) -> int:
    """The number of axes of a node's value."""
    rank: int = value_of(node).dim()
    return rank


def sizes_of(node: Any) -> tuple[int | str, ...]:
    """The shape of a node's value, to compare; a size that only values tell (of `nonzero`) is text, equal to itself alone."""
    return tuple(size if isinstance(size, int) else str(size) for size in value_of(node).shape)


def one_input(node: fx.Node, look: Lookup) -> tuple[fx.Node, Tokens]:
    """The tensor a one-input op works on; other inputs must not carry tokens."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    tokens = look(source)
    if tokens is None or any(look(n) is not None for n in node.all_input_nodes if n is not source):
        raise NoRule(node, "the token axis comes in through an argument that the rule does not expect")
    return source, tokens


def normal_dim(dim: int, rank: int) -> int:
    """`dim` counted from the left."""
    return dim % rank if rank else 0
