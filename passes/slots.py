"""What the inputs that rewriting adds to a graph stand for: all that graphs and the runtime agree on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["IndexSlot", "ScalarSlot", "Slot", "StateSlot", "TableSlot", "slots_of"]


@dataclass(frozen=True, slots=True)
class StateSlot:
    """One tensor of feature state, the same in all step graphs of a compiled model."""

    name: str
    """For people."""
    of: tuple[Any, ...] = ()
    """What it holds: two tensors whose names come out the same are two all the same."""


@dataclass(frozen=True, slots=True)
class ScalarSlot:
    """A number of the call: `x` (steps since the last full step), `x2`, ... (x^i / i!), `inverse_gap_1`, ..."""

    name: str


@dataclass(frozen=True, slots=True)
class IndexSlot:
    """Indices of the sampled image tokens; `layer` is None where all layers share one selection."""

    layer: int | None


@dataclass(frozen=True, slots=True)
class TableSlot:
    """Coefficients that a calibrated plan has for the step of the call: what a term of a table is multiplied with."""

    table: str
    """`out0` for an output of the model, the name of the features for theirs."""
    term: str
    """`v0`, `x`, ... for an output (see `ForecastOutputs`), `y0`, `y1`, ... for features."""
    shape: tuple[int, ...]
    """What the input has: it broadcasts to what it is multiplied with."""


Slot = StateSlot | ScalarSlot | IndexSlot | TableSlot


def slots_of(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Slot]]:
    """The extra inputs of a rewritten graph, in order."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if "slot" in node.meta:
            yield node, node.meta["slot"]
