"""Which tokens of which source a cached step computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from hero_fx.passes.analysis.tokens import Segment, Source, Tokens
from hero_fx.passes.emit import value_of

__all__ = ["Keep", "Kept", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Keep the tokens that `index` names: int64 [K], or [B, K] where every batch element has its own."""

    index: fx.Node

    @property
    def count(self) -> int:
        return int(value_of(self.index).shape[-1])

    @property
    def per_batch(self) -> bool:
        return bool(value_of(self.index).dim() == 2)


Keep = Literal["all", "none"] | Rows


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of each token source; of one that is not named, all."""

    by_source: Mapping[Source, Keep]

    def of(self, segment: Segment) -> Keep:
        """What is kept of a segment."""
        return self.by_source.get(segment.source, "all")

    def count_of(self, segment: Segment) -> int:
        """How many tokens of a segment are kept."""
        keep = self.of(segment)
        if isinstance(keep, Rows):
            return keep.count
        return segment.length if keep == "all" else 0

    def count(self, tokens: Tokens) -> int:
        """How many tokens of an axis are kept."""
        return sum(map(self.count_of, tokens.segments))

    def size(self, tokens: Tokens) -> int:
        """The size of an axis with the kept tokens."""
        return tokens.outer * self.count(tokens) * tokens.inner

    def batch(self, tokens: Tokens) -> int | None:
        """The size of the batch where every element of it has rows of its own; None where all have the same."""
        rows = (self.of(segment) for segment in tokens.segments)
        return next((int(value_of(k.index).shape[0]) for k in rows if isinstance(k, Rows) and k.per_batch), None)
