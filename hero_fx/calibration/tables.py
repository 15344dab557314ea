"""From recordings to a plan's tables: what cached steps are multiplied with, for a policy and a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hero_fx.passes.rewrite.forecast import THETAS, OutputRule

from .record import Recording
from .samples import frames_axis
from .search import Schedule
from .solve import Fit, Past, fit, past_of

__all__ = ["Features", "Outputs", "Predictor"]


class Predictor(ABC):
    """What fits the cached steps of one policy."""

    @property
    def parts(self) -> int:
        """Of the batch, with full steps of their own."""
        return 1

    def part_schedules(self, schedule: Schedule) -> tuple[tuple[bool, ...], ...]:
        """The schedule of each part."""
        return (tuple(map(bool, schedule)),)

    @abstractmethod
    def errors(self, pasts: Sequence[Past], power: float) -> list[float]:
        """Squared one-step errors for dynamic programming, times how far they move the next latent to that power; where parts
        of the batch have full steps of their own, those of the part that has the most."""

    @abstractmethod
    def tables(self, schedule: Schedule) -> dict[str, Tensor]:
        """Coefficients by table, [steps, terms, ...]."""


@dataclass(frozen=True, slots=True)
class Outputs(Predictor):
    """Policy "forecast"."""

    recordings: tuple[Recording, ...]
    rules: tuple[OutputRule, ...]
    ranks: tuple[int, ...]
    """Of the outputs."""
    apart: bool = False
    """Whether the parts of the batch have full steps of their own: then each has tables of its own too."""

    @property
    def parts(self) -> int:
        """Of the batch, with full steps of their own."""
        return self.rules[0].groups if self.apart else 1

    def part_schedules(self, schedule: Schedule) -> tuple[tuple[bool, ...], ...]:
        """The schedule of each part: where fewer than all are full, they are those that move the latent most."""
        if not self.apart:
            return (tuple(map(bool, schedule)),)
        rank = self.moves().sum(dim=0).argsort(descending=True).argsort().tolist()
        return tuple(tuple(level > rank[part] for level in schedule) for part in range(self.parts))

    def moves(self) -> Tensor:
        """[T, groups]: how far an error of each part moves the next latent."""
        return torch.stack([r.gains for r in self.recordings]).double().mean(dim=(0, 2))

    def ruled(self) -> tuple[OutputRule, ...]:
        """The rules as a plan has them: a part of the batch that runs by itself has no parts."""
        return tuple(replace(rule, groups=1) for rule in self.rules) if self.apart else self.rules

    def _gram(self, rule: OutputRule) -> Tensor:
        """[lanes, groups or 1, frames or 1, channels, M, M], summed over trajectories, and over what shares coefficients."""
        gram = torch.stack([r.outputs[rule.table] for r in self.recordings]).double().mean(dim=0)
        if rule.groups == 1:
            gram = gram.mean(dim=1, keepdim=True)
        return gram if rule.frames is not None else gram.mean(dim=2, keepdim=True)

    def _fit(self, rule: OutputRule, pasts: Sequence[Past]) -> tuple[Fit, torch.Size]:
        gram, steps = self._gram(rule), len(self.recordings[0].timesteps)
        flat = gram.flatten(0, 3)
        return fit(flat, pasts, steps=steps, history=rule.history, latent=rule.latent is not None), gram.shape[:4]

    def errors(self, pasts: Sequence[Past], power: float) -> list[float]:
        total = torch.zeros(len(pasts), dtype=torch.float64)
        gains = torch.stack([r.gains for r in self.recordings]).double().mean(dim=0).pow(power)  # [T, lanes, groups]
        at = torch.tensor([p.step for p in pasts])
        for rule in self.rules:
            gram, steps = self._gram(rule), gains.shape[0]
            parts = [
                fit(g, pasts[n : n + 2048], steps=steps, history=rule.history, latent=rule.latent is not None).error
                for g in [gram.flatten(0, 3)]
                for n in range(0, len(pasts), 2048)
            ]
            error = torch.cat(parts, dim=1).reshape(*gram.shape[:4], -1)
            # In units of what the channel holds at the end of the trajectory: of its latent, or of its output.
            size = gram.diagonal(dim1=-2, dim2=-1)[..., -1].mean(dim=(0, 1, 2)).clamp(min=1e-12)
            relative = (error.mean(dim=2) / size[None, None, :, None]).mean(dim=2)  # [lanes, groups, pasts]
            weight = gains[at].permute(1, 2, 0)
            weight = weight if relative.shape[1] == weight.shape[1] else weight.mean(dim=1, keepdim=True)
            of_parts = (relative * weight).sum(dim=0)
            total += of_parts[self.moves().sum(dim=0).argmax()] if self.apart else of_parts.sum(dim=0)
        return total.tolist()

    def tables(self, schedule: Schedule) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for rule in self.rules:
            if self.apart:
                thetas = [
                    self._theta(rule, past_of(own))[0, part : part + 1]
                    for part, own in enumerate(self.part_schedules(schedule))
                ]
            else:
                thetas = [*self._theta(rule, past_of(schedule))]
            result |= self.placed(rule, schedule, thetas)
        return result

    def placed(self, rule: OutputRule, schedule: Schedule, thetas: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tables from coefficients [groups, frames, channels, cached steps, terms], one for each lane, or for each part of the
        batch where they have full steps of their own."""
        own, rank = self.part_schedules(schedule), self.ranks[self.rules.index(rule)]
        return {
            _name(rule, number): _table(rule, rank, theta, own[number if self.apart else 0])
            for number, theta in enumerate(thetas)
        }

    def _theta(self, rule: OutputRule, pasts: Sequence[Past]) -> Tensor:
        """[lanes, groups, frames, channels, pasts, terms]."""
        found, (lanes, groups, frames, channels) = self._fit(rule, pasts)
        return found.theta.reshape(lanes, groups, frames, channels, len(pasts), found.theta.shape[-1]).float()


def _name(rule: OutputRule, number: int) -> str:
    """The table of a lane, or of a part of the batch."""
    return f"{rule.table}@{number}" if number else rule.table


def _table(rule: OutputRule, rank: int, theta: Tensor, schedule: Sequence[int]) -> Tensor:
    """[steps, 5, ...] from [groups, frames, channels, cached steps, terms]."""
    groups, frames, channels = theta.shape[:3]
    table = torch.zeros(len(schedule), THETAS, *_layout(rule, rank, groups, frames, channels))
    for n, past in enumerate(past_of(schedule)):
        values = theta[..., n, :]
        table[past.step, : values.shape[-1]] = _place(rule, rank, values.movedim(-1, 0))
    return table


def _layout(rule: OutputRule, rank: int, groups: int, frames: int, channels: int) -> tuple[int, ...]:
    sizes = [groups] + [1] * (rank - 1)
    if rule.axis is not None:
        sizes[rule.axis] = channels
    if rule.frames is not None:
        sizes[rule.frames] = frames
    return tuple(sizes)


def _place(rule: OutputRule, rank: int, values: Tensor) -> Tensor:
    """[terms, groups, frames, channels] in the axes of the output: [terms, *layout]."""
    terms, groups, frames, channels = values.shape
    if rule.frames is not None and rule.axis is not None and rule.axis < rule.frames:
        values = values.transpose(2, 3)
    return values.reshape(terms, *_layout(rule, rank, groups, frames, channels))


def by_parts(
    rules: Sequence[OutputRule], ranks: Sequence[int], parts: Collection[str], batch: int
) -> tuple[OutputRule, ...]:
    """Rules with coefficients by frame and by part of the batch, where these are asked for and there are any."""
    return tuple(
        replace(
            rule,
            frames=frames_axis(rule, rank) if "frames" in parts else None,
            groups=batch if "batch" in parts else 1,
        )
        for rule, rank in zip(rules, ranks, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Features(Predictor):
    """Policies that extrapolate features: their Taylor weights, fitted."""

    recordings: tuple[Recording, ...]
    policy: str
    order: int
    refreshed: frozenset[str]
    """Features of which cached steps write rows: Y_0 keeps the weight 1."""

    def _grams(self) -> dict[str, Tensor]:
        prefix = f"{self.policy}/"
        names = [name for name in self.recordings[0].features if name.startswith(prefix)]
        return {
            name.removeprefix(prefix): torch.stack([r.features[name] for r in self.recordings])
            .double()
            .mean(dim=(0, 1))
            for name in names
        }

    def _fit(self, name: str, gram: Tensor, pasts: Sequence[Past]) -> Fit:
        scale = name not in self.refreshed
        return fit(gram, pasts, steps=gram.shape[-1], history=self.order + 1, latent=False, scale=scale)

    def errors(self, pasts: Sequence[Past], power: float) -> list[float]:
        gains = torch.stack([r.gains for r in self.recordings]).double().mean(dim=(0, 2, 3)).pow(power)
        total = torch.zeros(len(pasts), dtype=torch.float64)
        for name, gram in self._grams().items():
            error = self._fit(name, gram, pasts).error.sum(dim=0)
            total += error / gram.diagonal(dim1=-2, dim2=-1).sum(dim=0)[-1].clamp(min=1e-12)
        return (total * gains[torch.tensor([p.step for p in pasts])]).tolist()

    def tables(self, schedule: Schedule) -> dict[str, Tensor]:
        pasts, result = past_of(schedule), {}
        for name, gram in self._grams().items():
            theta = self._fit(name, gram, pasts).theta.float()  # [channels, pasts, 3]
            table = torch.zeros(len(schedule), self.order + 1, gram.shape[0])
            table[:, 0] = 1
            for n, past in enumerate(pasts):
                table[past.step] = _weights(theta[:, n], past, self.order)
            result[name] = table
        return result


def _weights(theta: Tensor, past: Past, order: int) -> Tensor:
    """What Y_0, Y_1, Y_2 are multiplied with, from θ of (F_i), (F_i - F_j), (F_i - F_l): [order + 1, channels]."""
    i, *before = past.fulls
    d = i - before[0] if before else 0
    e = before[0] - before[1] if len(before) > 1 else 0
    weights = [1 + theta[:, 0], torch.zeros_like(theta[:, 0]), torch.zeros_like(theta[:, 0])]
    if order > 1 and e:
        # Y_2 = ((F_i - F_j) / d - (F_j - F_l) / e) / d, and θ2 (F_i - F_l) = θ2 (F_i - F_j) + θ2 (F_j - F_l).
        weights[2] = -theta[:, 2] * d * e
        weights[1] = d * (theta[:, 1] + theta[:, 2]) - weights[2] / d
    elif order > 0 and d:
        weights[1] = d * theta[:, 1]
    return torch.stack(weights[: order + 1])
