"""Compiled step graphs, and calls that are ready to run in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hero_fx.dynamo import Compiled
from hero_fx.passes.slots import Slot, StateSlot

from .lane_state import LaneState
from .tracker import Call

__all__ = ["BatchedStep", "CompiledStep", "Placed"]


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """A compiled step graph and what its extra inputs are."""

    run: Compiled
    slots: tuple[Slot, ...]
    device: torch.device


@dataclass(frozen=True, slots=True)
class BatchedStep:
    """The same for several requests at once: all but weights and shared inputs have them along a new first axis."""

    step: CompiledStep
    read: frozenset[StateSlot]
    """State that it reads."""
    written: frozenset[StateSlot]
    """State that it writes."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A call that has its place, and all that its step graph needs."""

    call: Call
    lane: int
    """Which call of the step it is, counted from 0."""
    state: LaneState
    pattern: tuple[int, ...]
    """Of each call of the lane in this trajectory, whether it was full (of how many parts of the batch), this one included."""
    computed: tuple[bool, ...] = ()
    """Of each part of the batch, whether it is computed; empty where the batch has no parts."""
    part: int = 0
    """The part that runs."""
