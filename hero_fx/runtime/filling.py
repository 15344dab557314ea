"""What the extra inputs of a step graph are filled with: numbers of the call and selected tokens."""

from __future__ import annotations

import threading
from math import factorial

import torch

from hero_fx.passes.slots import RowsSlot, ScalarSlot
from hero_fx.selection import PatchSampler, Selection

from .tracker import Call

__all__ = ["Constants", "Selections", "scalar_value"]


def scalar_value(slot: ScalarSlot, call: Call) -> float:
    """The number that a slot stands for at a call.

    A power: x^i / i!, with x the steps since the last full step. An inverse gap: 1 / d, with d the distance of this full
    step to the one before, or 0 while there have been fewer than i full steps: then the i-th difference does not exist yet.
    """
    if slot.of == "inverse_gap":
        return 1.0 / call.gap if call.fulls >= slot.order else 0.0
    return float(call.since_full**slot.order) / factorial(slot.order)


class Selections:
    """The selections of a trajectory, drawn once: they depend on the seed and on which steps were full, nothing else."""

    def __init__(self, sampler: PatchSampler, device: torch.device, most: int = 512) -> None:
        self.sampler = sampler
        self.device = device
        self._known: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
        self._most = most
        self._frontier: tuple[tuple[int, ...], Selection] = ((), sampler.start())
        self._lock = threading.Lock()

    def at(self, pattern: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
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

    def _draw(self, pattern: tuple[int, ...]) -> torch.Tensor:
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


class Constants:
    """Small tensors that take few values, each made once for a device, so that none is copied per call."""

    def __init__(self) -> None:
        self._scalars: dict[tuple[float, torch.device], torch.Tensor] = {}
        self._rows: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def scalar(self, value: float, device: torch.device) -> torch.Tensor:
        """A 0-d tensor: x and 1 / d take few values."""
        key = (value, device)
        if key not in self._scalars:
            with torch.inference_mode(False):
                self._scalars[key] = torch.tensor(value, dtype=torch.float32, device=device)
        return self._scalars[key]

    def rows(self, slot: RowsSlot, part: int, device: torch.device) -> torch.Tensor:
        """The rows of a part of the batch."""
        key = (slot.count, part, device)
        if key not in self._rows:
            with torch.inference_mode(False):
                self._rows[key] = torch.arange(part * slot.count, (part + 1) * slot.count, device=device)
        return self._rows[key]
