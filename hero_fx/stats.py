"""Counts of what a backend has compiled and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """What a backend has compiled and run so far."""

    graphs: int
    """Dynamo graphs that are compiled now (one per resolution, and per model of a class of its own)."""
    full_steps: int
    """Steps of trajectories whose calls computed every layer."""
    cached_steps: int
    """Steps with a call that used cached features."""
    full_calls: int
    """Calls that computed every layer. A step makes several where guidance calls the model twice."""
    cached_calls: int
    """Calls that used cached features."""
    refused_calls: int
    """Of the full calls those whose step, lane or request could not be told (`strict=False`; they are errors otherwise)."""
    state_bytes: int
    """Bytes of feature state held now, over all sessions and lanes."""
    sessions: int
    """Sessions that are known."""
    batched_graphs: int = 0
    """Step graphs that were compiled for several requests (`hero_fx.batch`)."""
    partial_calls: int = 0
    """Of the full calls those that computed a part of the batch alone (a plan made with `apart=True`)."""
    evictions: int = 0
    """Times that a session's state was freed to make room for another's (`max_state_bytes`)."""
    bytes_by_session: Mapping[str, int] = field(default_factory=dict)
    """Feature state of each; the empty name is that of calls without a session. One whose state was freed has none."""
