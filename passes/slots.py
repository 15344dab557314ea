"""What the inputs that rewriting adds to a graph stand for: all that graphs and the runtime agree on.

A slot is a typed key. Its name is made from the key, here alone, for people to read; nothing reads it back. Two slots are
one if their keys are equal, whatever their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

__all__ = [
    "FeatureSlot", "GateSlot", "IndexSlot", "KeySlot", "PastSlot", "RowsSlot", "ScalarSlot", "ScaleSlot", "ScoreSlot", "Slot",
    "StateSlot", "TableSlot", "Term", "of_part", "slot_of", "slots_of",
]  # fmt: skip


class StateSlot(ABC):
    """One tensor of feature state, the same in all step graphs of a compiled model."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def role(self) -> str:
        """What kind of state it is, in the words of reports."""


@dataclass(frozen=True, slots=True)
class FeatureSlot(StateSlot):
    """A Taylor term Y_i of what one update adds to a stream."""

    branch: str
    stream: str
    number: int = 0
    """Which of the branch's updates of that stream."""
    term: int = 0
    """i; Y_0 is the features themselves."""
    merged: bool = False
    """The sum of this term and the same of other updates."""

    @property
    def features(self) -> str:
        """What all its terms have in common; a calibrated plan has its coefficients by it."""
        stream = self.stream.replace("+", "_").replace("#", "_")
        number = f"_{self.number}" if self.number else ""
        return f"{'sum_' if self.merged else ''}{self.branch}_{stream}{number}"

    @property
    def name(self) -> str:
        return f"{self.features}_y{self.term}"

    @property
    def role(self) -> str:
        return f"features Y_{self.term}"


@dataclass(frozen=True, slots=True)
class GateSlot(StateSlot):
    """The gate of an update at the last full step."""

    of: FeatureSlot
    """Y_0 of the update."""

    @property
    def name(self) -> str:
        return f"{self.of.features}_gate"

    @property
    def role(self) -> str:
        return "gates"


@dataclass(frozen=True, slots=True)
class KeySlot(StateSlot):
    """Keys or values of an attention op."""

    branch: str
    attention: int
    """Which of the branch's attention ops."""
    part: Literal["k", "v"]
    tokens: str = ""
    """Which of its tokens; all of them if empty."""
    repeat: int = 0
    """Which of several runs of these tokens: a sequence may hold them twice, each with keys of its own."""

    @property
    def name(self) -> str:
        attention = f"{self.branch}_{self.part}{self.attention or ''}"
        return "_".join(map(str, filter(None, (attention, self.tokens, self.repeat))))

    @property
    def role(self) -> str:
        return "keys and values"


@dataclass(frozen=True, slots=True)
class ScoreSlot(StateSlot):
    """By token [B, N]: the score that the last full step measured, or the step at which it was last computed."""

    branch: str
    part: Literal["score", "stamp"]

    @property
    def name(self) -> str:
        return f"{self.branch}_{self.part}"

    @property
    def role(self) -> str:
        return "token scores and ages"


@dataclass(frozen=True, slots=True)
class Term:
    """What a coefficient of a calibrated plan is multiplied with."""

    of: Literal["y", "v", "x"]
    """A Taylor term of features, an output of the model, or the latent it belongs to."""
    number: int | None = None
    """i of a Taylor term; how many full steps before the last one; None for the latent of this very step."""

    def __str__(self) -> str:
        return f"{self.of}{'' if self.number is None else self.number}"


@dataclass(frozen=True, slots=True)
class PastSlot(StateSlot):
    """An output of the model at an earlier full step, or the latent that it belongs to."""

    table: str
    """As in `TableSlot`."""
    term: Term
    part: int = 0
    """Of which part of the batch, where each part runs by itself."""

    @property
    def name(self) -> str:
        return f"{self.table}_{self.term}{f'_part{self.part}' if self.part else ''}"

    @property
    def role(self) -> str:
        return "past outputs" if self.term.of == "v" else "past latents"


def of_part(slot: StateSlot, part: int) -> StateSlot:
    """The same state of a part of the batch."""
    return replace(slot, part=part) if part and isinstance(slot, PastSlot) else slot


@dataclass(frozen=True, slots=True)
class ScaleSlot(StateSlot):
    """By token, the scale of int8 state."""

    of: StateSlot

    @property
    def name(self) -> str:
        return f"{self.of.name}_scale"

    @property
    def role(self) -> str:
        return "scales of int8 state"


@dataclass(frozen=True, slots=True)
class ScalarSlot:
    """A number of the call: a Taylor weight x^i / i!, or the 1 / d that the i-th difference is multiplied with."""

    of: Literal["power", "inverse_gap"]
    """x: steps since the last full step; d: those between the last two full steps, whose inverse is 0 while there have been
    fewer than i full steps."""
    order: int = 1
    """i."""

    @property
    def name(self) -> str:
        if self.of == "inverse_gap":
            return f"inverse_gap_{self.order}"
        return "x" if self.order == 1 else f"x{self.order}"


@dataclass(frozen=True, slots=True)
class IndexSlot:
    """A selection: the indices [K] of the sampled image tokens of a step."""

    layer: int | None
    """None where all layers share one selection."""

    @property
    def name(self) -> str:
        return "idx" if self.layer is None else f"idx_{self.layer}"


@dataclass(frozen=True, slots=True)
class RowsSlot:
    """The rows [rows] of the batch that a step graph computes, where each part of the batch runs by itself."""

    count: int

    @property
    def name(self) -> str:
        return "rows"


@dataclass(frozen=True, slots=True)
class TableSlot:
    """Coefficients that a calibrated plan has for the step of the call: what a term of a table is multiplied with."""

    table: str
    """`out0` for an output of the model, `FeatureSlot.features` for features."""
    term: Term
    shape: tuple[int, ...]
    """What the input has: it broadcasts to what it is multiplied with."""

    @property
    def name(self) -> str:
        return f"{self.table}_{self.term}_weight"


Slot = StateSlot | ScalarSlot | IndexSlot | RowsSlot | TableSlot


def slot_of(node: object) -> Slot | None:
    """What an extra input stands for; None for any other node, and for what is none."""
    return node.meta.get("slot") if isinstance(node, fx.Node) else None


def slots_of(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Slot]]:
    """The extra inputs of a rewritten graph, in order."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if "slot" in node.meta:
            yield node, node.meta["slot"]
