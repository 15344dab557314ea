"""What the analysis of a model's graph finds: layers, branches, streams, token grid. Plain data, all nodes by name."""

from __future__ import annotations

from dataclasses import dataclass

from .tokens import Source, Tokens

__all__ = ["Branch", "Stream", "Structure", "Update"]


@dataclass(frozen=True, slots=True)
class Update:
    """One residual update `add = residual + update` of a stream, `update = gate * feature`; all are node names."""

    stream: int
    add: str
    residual: str
    source: str
    """The stream's value that the branch reads (the residual itself, or an earlier one in parallel branches)."""
    update: str
    feature: str
    """The branch's output before its gate; the update itself where there is no gate."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: what lies between the values it reads and the updates it gives."""

    layer: int
    kind: str
    """`attention`, `cross_attention`, `ffn`, or `parallel` (attention and FFN summed by one projection)."""
    label: str
    """Unique and short: `l0_attention`."""
    module: str
    """The module path that people know it by; empty if the graph does not say."""
    updates: tuple[Update, ...]
    reads: tuple[tuple[str, int], ...]
    """(node, stream) of every stream value it computes from; more than its updates' where it only reads a stream."""
    attention: tuple[str, ...]
    """Its attention nodes."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A residual stream: hidden states [B, tokens, width] that the branches add to."""

    name: str
    root: str
    """The node with its value in front of the first layer."""
    tokens: Tokens
    width: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What was found in a normalised graph; all nodes by name, so that it holds for copies of the graph too."""

    branches: tuple[Branch, ...]
    streams: tuple[Stream, ...]
    image: Source | None
    """The source of the image (video) tokens, the longest one that reaches the output; None if none does."""
    image_tokens: int
    grid: tuple[int, int, int] | None
    """(frames, height, width) of the image tokens, where the graph shows it."""
    ranks: int = 1
    """Processes that share the tokens; those of this one are counted here."""

    @property
    def depth(self) -> int:
        return self.branches[-1].layer + 1 if self.branches else 0

    @property
    def lengths(self) -> dict[Source, int]:
        """Tokens of each source."""
        lengths: dict[Source, int] = {}
        for segment in (s for stream in self.streams for s in stream.tokens.segments):
            lengths[segment.source] = max(segment.stop, lengths.get(segment.source, 0))
        return lengths
