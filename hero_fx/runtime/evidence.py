"""What a call is made of: the evidence from which its trajectory and lane are told, beside the timestep.

A loop hands the same text embeddings, masks and tables to the model at every step of a trajectory, and others to the
next trajectory, or to the other branch of classifier-free guidance. Which memory a tensor lies in tells them apart;
nothing is read, and no tensor is kept alive.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hero_fx.passes import compat

from .timestep import Timestep

__all__ = ["Evidence", "Mark", "Owner", "Roles", "current_owner", "find_roles", "marks"]


@dataclass(frozen=True, slots=True)
class Mark:
    """The memory that a tensor shows, and how; equal marks are the same values."""

    storage: compat.StorageId
    view: tuple[Any, ...]
    """Offset, shape and strides: which part of the memory it is."""
    version: int
    """Writes to the memory so far; -1 where PyTorch does not count them (inference tensors)."""
    part: bool = field(compare=False)
    """Whether it shows only a part of its memory."""

    @property
    def place(self) -> tuple[Any, ...] | None:
        """Which part of a larger tensor it is, as the window of a sliding-window loop is; None for a whole tensor."""
        return self.view if self.part else None

    @property
    def alive(self) -> bool:
        """Whether someone still holds the memory."""
        return self.storage.alive


def marks(tensors: Sequence[torch.Tensor]) -> tuple[Mark, ...]:
    """One mark for each tensor."""
    return tuple(
        Mark(
            compat.StorageId(t),
            (t.storage_offset(), t.shape, t.stride()),
            -1 if t.is_inference() else t._version,
            0 < t.numel() * t.itemsize < t.untyped_storage().nbytes(),
        )
        for t in tensors
    )


@dataclass(frozen=True, slots=True)
class Roles:
    """What the inputs of a model are, by position among them, the timestep left out."""

    latents: frozenset[int] = frozenset()
    """What may change from step to step."""
    conditioning: frozenset[int] = frozenset()
    """What should stay the same along a trajectory. Numbers of a step or a request are neither."""


def find_roles(shapes: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], rows: int) -> Roles:
    """The roles of a model's inputs.

    Args:
        shapes: of the inputs.
        outputs: shapes of the model's outputs. An input that differs from one in at most one axis is latents.
        rows: the batch size; an input with no more elements is numbers.
    """

    def is_latents(shape: Sequence[int]) -> bool:
        return any(
            len(shape) == len(out) and sum(a != b for a, b in zip(shape, out, strict=True)) < 2 for out in outputs
        )

    latents = frozenset(i for i, shape in enumerate(shapes) if is_latents(shape))
    large = frozenset(i for i, shape in enumerate(shapes) if torch.Size(shape).numel() > rows)
    return Roles(latents, large - latents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that is known of a call."""

    timestep: Timestep
    marks: tuple[Mark, ...] = ()
    """Of the model's inputs without the timestep; as many at every call of a graph."""
    name: str | None = None
    """Lane, where `cache_context` or `hero_fx.calling` names it."""
    step_index: int | None = None
    told: bool = False
    """The name is from `hero_fx.calling`: it is the lane, and comes once a step."""
    num_steps: int | None = None
    """Steps of the trajectory, where `hero_fx.calling` says it."""
    batched: bool = False
    """It is of a `hero_fx.batch`: its inputs lie in memory of the batch, which tells nothing."""


class Owner:
    """The thread and asyncio task that a call comes from, held weakly."""

    __slots__ = ("_task", "_thread")

    def __init__(self, thread: threading.Thread, task: asyncio.Task[Any] | None) -> None:
        self._thread = weakref.ref(thread)
        self._task = None if task is None else weakref.ref(task)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner) and (self._thread, self._task) == (other._thread, other._task)

    def __hash__(self) -> int:
        return hash(self._thread)

    def __str__(self) -> str:
        thread, task = self._thread(), self._task and self._task()
        name = "a thread that has ended" if thread is None else f"thread {thread.name}"
        return name if self._task is None else f"{task.get_name() if task else 'a task that has ended'} of {name}"


def current_owner() -> Owner:
    """Where the current call comes from."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        task = None
    return Owner(threading.current_thread(), task)
