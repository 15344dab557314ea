"""The graphs that one model becomes, and the feature state that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes import compat
from hero_fx.passes.analysis.memory import Memory
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import value_of
from hero_fx.passes.pipeline import PassRecord
from hero_fx.passes.rewrite.outputs import returned_state
from hero_fx.passes.rewrite.plan import (
    Fallback,
    Recording,
    StepPlan,
)
from hero_fx.passes.slots import StateSlot, of_part, slots_of

from .selection import PatchSampler

__all__ = ["StateSpec", "StepGraphs"]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor of feature state."""

    slot: StateSlot
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """The graphs of one model at one resolution: what plain compilation would run, and what HERO runs in its place."""

    normal: fx.GraphModule
    """The normalised graph, as the model is."""
    structure: Structure
    plans: tuple[StepPlan, ...]
    """What each kind of cached step does, branch by branch."""
    recordings: tuple[Recording, ...]
    fallbacks: tuple[Fallback, ...]
    """Branches that could not be refreshed and are computed in full instead."""
    full: fx.GraphModule
    """Full step: computes all, records features."""
    cached: tuple[fx.GraphModule, ...]
    """Cached steps, one graph per kind."""
    sampler: PatchSampler | None
    """The patch-wise sampling, where the plan refreshes tokens."""
    records: tuple[PassRecord, ...]
    """What each pass did."""
    parts: int = 1
    """Equal parts of the batch that a step graph runs for, one after another."""

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The feature state of one lane: every state tensor that some step graph reads or writes."""
        specs: dict[StateSlot, StateSpec] = {}
        parts = range(self.parts)
        for gm in (self.full, *self.cached):
            for node, slot in slots_of(gm):
                if isinstance(slot, StateSlot):
                    value = value_of(node)
                    for own in (of_part(slot, part) for part in parts):
                        spec = StateSpec(own, tuple(value.shape), value.dtype, value.device)
                        known = specs.setdefault(own, spec)
                        assert spec == known, f"step graphs disagree about the state {own.name}: {spec} and {known}"
        return tuple(specs.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of feature state per lane."""
        return sum(spec.nbytes for spec in self.state)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes have the same names and fake values."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, (env := {}))  # type: ignore[var-annotated]
    graph.output(output)
    for old, new in env.items():
        new.meta = dict(old.meta)
    return compat.graph_module(gm, graph)


def check_state(steps: StepGraphs) -> None:
    """Asserts that the step graphs agree about their state, and that none of it gets out of them."""
    assert steps.state_bytes >= 0
    for gm in (steps.full, *steps.cached):
        returned = returned_state(gm, Memory(gm.graph))
        assert not returned, f"the state {returned[0].name} is an output of a step graph"
