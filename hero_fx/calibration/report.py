"""What a calibration found: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from hero_fx.plan import Plan

from .search import Schedule

__all__ = ["Calibration", "Candidate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One policy with its coefficients and schedule."""

    policy: str
    plan: Plan
    seeds: tuple[Schedule, ...]
    """What the search started from: evenly spaced, and by dynamic programming."""
    error: Mapping[str, float]
    """Distances to full compute on trajectories that were not fitted."""
    speed: float
    """By FLOPs, with attention."""
    share: float
    """FLOPs of a cached step, of a full one's."""
    score: float
    """Sum of the logarithms of the distances."""
    tried: tuple[tuple[int, Schedule, float], ...]
    """(full steps, schedule, score on fitted trajectories) of every schedule that was run."""
    state_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """All candidates, the best one first; print it to read it."""

    candidates: tuple[Candidate, ...]
    unsupported: Mapping[str, str]
    """Policies that do not fit the model or the budget, and why."""

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.candidates[0].plan

    def __str__(self) -> str:
        rows = []
        for c in self.candidates:
            line = c.plan.timelines[0]
            errors = [f"{value:.5f}" for value in c.error.values()]
            rows.append(
                [c.policy, line.full, f"{c.speed:.2f}", *errors, f"{c.state_bytes / 1e6:.2f}", len(c.tried), line.strip]
            )
        heads = [
            "policy",
            "full steps",
            "speed-up",
            *self.candidates[0].error,
            "state, MB",
            "schedules tried",
            "schedule",
        ]
        left = [f"note: policy {policy!r} is left out: {reason}" for policy, reason in self.unsupported.items()]
        return "\n".join([tabulate(rows, headers=heads, disable_numparse=True), *left])

    def plot(self, path: str | Path) -> None:
        """Draws the errors of all candidates against their speed-up, and the schedules as strips."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.2 + 0.35 * len(self.candidates)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[3, 0.3 + 0.5 * len(self.candidates)])
        names = list(self.candidates[0].error)
        for number, c in enumerate(self.candidates):
            above.plot(range(len(names)), [c.error[n] for n in names], "o-", color=f"C{number}",
                       label=f"{c.policy}, {c.plan.timelines[0].full} full steps, {c.speed:.2f}x")  # fmt: skip
            for step, full in enumerate(c.plan.timelines[0].schedule):
                below.barh(-number, 0.9, left=step, height=0.8, color=f"C{number}" if full else "0.9")
        above.set_xticks(range(len(names)), names)
        above.set(yscale="log", ylabel="distance to full compute")
        above.legend(fontsize=8)
        below.set_yticks([-n for n in range(len(self.candidates))], [c.policy for c in self.candidates])
        below.set_xlabel("step; full steps in colour")
        figure.savefig(path, dpi=110)
