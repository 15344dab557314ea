"""What runs at each call of the compiled model: the guard chooses a step graph, and its extra inputs are filled in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any

import torch

from hero_fx.passes.emit import IndexSlot, ScalarSlot, Slot, StateSlot, TableSlot

from ._compat import Compiled
from .diffusers_context import ContextListener
from .guard import Call, TimestepReader
from .planned import Planned
from .policy import Policy
from .schedule import Schedule
from .selection import PatchSampler, Selection
from .state import StateStore, Trajectory, current_session
from .steps import StateSpec

__all__ = ["Selections", "Step", "Stepper", "scalar_value"]


@dataclass(frozen=True, slots=True)
class Step:
    """A compiled step graph and what its extra inputs are."""

    run: Compiled
    slots: tuple[Slot, ...]
    device: torch.device


def scalar_value(name: str, call: Call) -> float:
    """The number that a `ScalarSlot` stands for at a call.

    `x<i>`: x^i / i!, with x the steps since the last full step (`x` is `x1`). `inverse_gap_<i>`: 1 / d, with d the
    distance of this full step to the one before, or 0 while there have been fewer than i full steps: then the i-th
    difference does not exist yet.
    """
    if name.startswith("inverse_gap_"):
        return 1.0 / call.gap if call.fulls >= int(name.removeprefix("inverse_gap_")) else 0.0
    power = int(name.removeprefix("x") or 1)
    return float(call.since_full**power) / factorial(power)


class Selections:
    """The selections of a trajectory, drawn once: they depend on the seed and on which steps were full, nothing else."""

    def __init__(self, sampler: PatchSampler, device: torch.device, most: int = 512) -> None:
        self.sampler = sampler
        self.device = device
        self._known: dict[tuple[bool, ...], tuple[torch.Tensor, ...]] = {}
        self._most = most
        self._frontier: tuple[tuple[bool, ...], Selection] = ((), sampler.start())
        self._lock = threading.Lock()

    def at(self, pattern: tuple[bool, ...]) -> tuple[torch.Tensor, ...]:
        """Indices [K] on the device, one tensor per draw, for a call that is cached after the calls of `pattern`.

        `pattern` says of each call of the lane in this trajectory whether it was full, up to and with this one.
        """
        with self._lock:
            if pattern not in self._known:
                if len(self._known) >= self._most:
                    self._known.clear()
                drawn = self._draw(pattern)
                self._known[pattern] = tuple(row.to(self.device) for row in drawn)
            return self._known[pattern]

    def _draw(self, pattern: tuple[bool, ...]) -> torch.Tensor:
        done, selection = self._frontier
        if pattern[: len(done)] != done or len(done) >= len(pattern):
            done, selection = (), self.sampler.start()
        drawn: torch.Tensor | None = None
        for full in pattern[len(done) :]:
            if full:
                selection.refreshed()
            else:
                drawn = selection.draw()
        self._frontier = (pattern, selection)
        assert drawn is not None, "selections are for cached steps"
        return drawn


class Stepper:
    """The callable that Dynamo gets for one graph."""

    def __init__(
        self,
        *,
        full: Step,
        cached: Sequence[Step],
        policy: Policy,
        schedule: Schedule,
        state: Sequence[StateSpec],
        sampler: PatchSampler | None,
        timestep: int,
        context: ContextListener | None = None,
        planned: Planned | None = None,
    ) -> None:
        self.full = full
        self.cached = tuple(cached)
        self.policy = policy
        self.store = StateStore(state, schedule)
        self.selections = Selections(sampler, full.device) if sampler is not None else None
        self.timestep = timestep
        self.reader = TimestepReader()
        self.context = context
        self.planned = planned
        self.counts: Counter[str] = Counter()
        self.last: Call | None = None
        self._scalars: dict[tuple[float, torch.device], torch.Tensor] = {}
        self._lock = threading.Lock()  # for what sessions share: the reader and the counts

    def __call__(self, *inputs: Any) -> Any:
        trajectory = self.store.trajectory(current_session())
        with trajectory.lock:
            name, step_index = self.context.current() if self.context is not None else (None, None)
            with self._lock:
                timestep = self.reader.read(inputs[self.timestep])
            call = trajectory.guard.advance(timestep, name=name, step_index=step_index)
            try:
                return self._run(call, trajectory, inputs, timestep)
            except BaseException:
                # The state may be half written, and a call that is made again must not pass for the step's next lane.
                trajectory.guard.reset()
                raise

    def _run(self, call: Call, trajectory: Trajectory, inputs: Sequence[Any], timestep: tuple[float, float]) -> Any:
        if call.new_trajectory:
            trajectory.patterns.clear()
        pattern = (*trajectory.patterns.get(call.lane, ()), call.full)
        trajectory.patterns[call.lane] = pattern
        lane = list(trajectory.patterns).index(call.lane)
        if self.planned is not None:
            self.planned.check(call, pattern, lane, timestep)
        state = self.store.lane(trajectory, call.lane, fresh=call.full and call.fulls == 0)
        step = self.full if call.full else self.cached[self.policy.kind(call.since_full)]
        extra = [self._fill(slot, call, lane, state, pattern, step.device) for slot in step.slots]
        with self._lock:
            self.counts["full" if call.full else "cached"] += 1
            self.last = call
        return step.run(*inputs, *extra)

    def _fill(
        self,
        slot: Slot,
        call: Call,
        lane: int,
        state: dict[StateSlot, torch.Tensor],
        pattern: tuple[bool, ...],
        device: torch.device,
    ) -> torch.Tensor:
        match slot:
            case StateSlot():
                return state[slot]
            case ScalarSlot(name):
                return self._scalar(scalar_value(name, call), device)
            case IndexSlot(layer):
                assert self.selections is not None
                return self.selections.at(pattern)[layer or 0]
            case TableSlot():
                assert self.planned is not None
                return self.planned.weight(slot, call, lane, device)

    def _scalar(self, value: float, device: torch.device) -> torch.Tensor:
        """A 0-d tensor on the device, made once per value: x and 1 / d take few values, so none is copied per call."""
        key = (value, device)
        if key not in self._scalars:
            with torch.inference_mode(False):
                self._scalars[key] = torch.tensor(value, dtype=torch.float32, device=device)
        return self._scalars[key]
