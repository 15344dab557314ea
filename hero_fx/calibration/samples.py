"""What a trajectory's calls were given and gave, at a sample of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from hero_fx.find_timestep import find_timestep
from hero_fx.passes.rewrite.forecast import OutputRule, arguments_of
from hero_fx.runtime.evidence import Evidence
from hero_fx.runtime.timestep import TimestepReader
from hero_fx.runtime.tracker import Tracker
from hero_fx.schedule import Uniform

__all__ = ["NEAR", "Arguments", "Calls", "Lane", "Track", "Watch", "frames_axis", "rows", "settled"]

NEAR = 128
"""Positions per frame and row of the batch that are kept of each trajectory, at most."""


def frames_axis(rule: OutputRule, rank: int) -> int | None:
    """The axis of frames of a video [B, C, F, H, W] or [B, F, C, H, W]; None for anything else."""
    return 3 - rule.axis if rank == 5 and rule.axis in (1, 2) else None


def rows(value: Tensor, most: int, seed: int) -> Tensor:
    """A seeded sample of the first axis, the same at every step, in float32 and in memory of its own."""
    if len(value) <= most:
        return value.to(torch.float32, copy=True)
    order = torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))
    return value[order[:most].sort().values.to(value.device)].float()


@dataclass(frozen=True, slots=True)
class Arguments:
    """Where a graph has its arguments, by their names among its inputs."""

    places: Mapping[str, int]
    timestep: int

    @classmethod
    def of(cls, gm: fx.GraphModule, timestep: str | int | None) -> Arguments:
        inputs = gm.graph.find_nodes(op="placeholder")
        places = {name: inputs.index(node) for name, node in arguments_of(gm).items()}
        return cls(places, find_timestep(gm, timestep))

    def latents(self, rules: Sequence[OutputRule], values: Sequence[Any]) -> dict[str, Tensor]:
        """By table, the argument that holds the noisy latent."""
        return {rule.table: values[self.places[rule.latent]] for rule in rules if rule.latent is not None}


class Calls:
    """Tells the calls of a run apart by their timesteps."""

    def __init__(self) -> None:
        self._tracker, self._reader = Tracker(Uniform(interval=1)), TimestepReader()
        self.times: list[float] = []
        """Timesteps of the trajectory that runs."""

    def of(self, timestep: Any) -> tuple[int | str, bool]:
        """The lane of a call, and whether it begins another trajectory than the one before it."""
        times = self._reader.read(timestep)
        at = self._tracker.advance(Evidence(timestep=times))
        begins = at.new_trajectory and bool(self.times)
        if begins:
            self.times = []
        if at.step == len(self.times):
            self.times.append(max(times.values))
        return at.lane, begins

    def end(self) -> None:
        """The run is over."""
        self.times = []


@dataclass(slots=True)
class Lane:
    """The samples of the calls of one lane, by name, one per step."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.kept.setdefault(name, []).append(value)


@dataclass(frozen=True, slots=True)
class Track:
    """Samples of one trajectory, by output table: [T, lanes, groups, frames, positions, channels], float32."""

    outputs: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]
    """Of the rules that have one."""

    def cpu(self) -> Track:
        """The same in main memory."""
        return Track(*({name: value.cpu() for name, value in of.items()} for of in (self.outputs, self.latents)))


class Watch:
    """Keeps samples of a trajectory until it is over."""

    def __init__(self, most: int, seed: int) -> None:
        """`most`: positions of an output, per frame and row of the batch."""
        self.most, self.seed = most, seed
        self.lanes: dict[int | str, Lane] = {}

    def add(
        self, lane: int | str, rules: Sequence[OutputRule], outputs: Sequence[Any], latents: Mapping[str, Tensor]
    ) -> None:
        """Samples a call."""
        kept = self.lanes.setdefault(lane, Lane())
        for rule in rules:
            kept.add(rule.table, self._cells(rule, outputs[rule.index].detach()))
            if rule.table in latents:
                kept.add(f"{rule.table}_x", self._cells(rule, latents[rule.table]))

    def channels(self, rule: OutputRule) -> int:
        """Channels of an output."""
        return next(iter(self.lanes.values())).kept[rule.table][0].shape[-1]

    def take(self, rules: Sequence[OutputRule], steps: int) -> Track:
        """The trajectory that is over; its samples are not held any longer.

        Raises:
            ValueError: lanes were called at different steps.
        """
        counts = {len(values) for lane in self.lanes.values() for values in lane.kept.values()}
        if counts != {steps}:
            raise ValueError(
                f"the calls of a step differ from step to step ({sorted(counts)} calls in {steps} steps): a plan "
                "needs the same calls at every step"
            )
        outputs = {rule.table: self._stacked(rule.table) for rule in rules}
        latents = {}
        for rule in rules:
            if rule.latent is not None:
                channels = outputs[rule.table].shape[-1]
                latents[rule.table] = self._stacked(f"{rule.table}_x")[..., rule.start : rule.start + channels]
        self.lanes.clear()
        return Track(outputs, latents)

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([torch.stack(lane.kept[name]) for lane in self.lanes.values()], dim=1)

    def _cells(self, rule: OutputRule, value: Tensor) -> Tensor:
        """Sampled positions by row of the batch and frame: [groups, frames, positions, channels]."""
        if rule.axis is None:
            value = value.reshape(value.shape[0] if value.dim() else 1, 1, -1, 1)
        else:
            frames = frames_axis(rule, value.dim())
            value = value.movedim(rule.axis, -1)
            # Channels have left their place: an axis behind them has moved up by one.
            if frames is not None:
                value = value.movedim(frames - (frames > rule.axis), 1).flatten(2, -2)
            else:
                value = value.reshape(len(value), 1, -1, value.shape[-1])
        return rows(value.movedim(2, 0), self.most, self.seed).movedim(0, 2)


def settled(rule: OutputRule, varying: Tensor, channels: int) -> OutputRule:
    """The rule with the channels of its argument that are the latent: those that change from step to step."""
    where = varying.nonzero().flatten().tolist()
    whole = bool(where) and where == list(range(where[0], where[0] + channels))
    return replace(rule, start=where[0]) if whole else replace(rule, latent=None)
