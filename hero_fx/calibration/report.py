"""What a calibration found: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from hero_fx.plan import Plan

from .search import Schedule

__all__ = ["Calibration", "Candidate", "Tried"]


@dataclass(frozen=True, slots=True)
class Tried:
    """A schedule that was run."""

    schedule: Schedule
    """Of all phases in a row."""
    full: int
    """Full steps of a trajectory; where parts of the batch have their own, those of all of them."""
    error: Mapping[str, float]
    """Distances to full compute, mean over the fitted trajectories that were searched on."""
    speed: float
    """By FLOPs, with attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One policy with its coefficients and schedule."""

    policy: str
    plan: Plan
    error: Mapping[str, float]
    """Distances to full compute on trajectories that were not fitted."""
    speed: float
    """By FLOPs, with attention."""
    share: float
    """FLOPs of a cached step, of a full one's."""
    score: float
    """Sum of the logarithms of the distances."""
    tried: tuple[Tried, ...]
    """Every schedule that was run."""
    state_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """All candidates, the best one first; print it to read it."""

    candidates: tuple[Candidate, ...]
    unsupported: Mapping[str, str]
    """Policies that do not fit the model or the budget, and why."""
    max_error: Mapping[str, float] = field(default_factory=dict)
    """The largest distances that were allowed on fitted trajectories; empty where the budget was given."""
    notes: tuple[str, ...] = ()
    """What to know before the plan is used."""

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.candidates[0].plan

    def __str__(self) -> str:
        rows = []
        for c in self.candidates:
            line, strips = c.plan.timelines[0], " ".join(t.strip for t in c.plan.timelines)
            errors = [f"{value:.5f}" for value in c.error.values()]
            rows.append(
                [c.policy, line.counted, f"{c.speed:.2f}", *errors, f"{c.state_bytes / 1e6:.2f}", len(c.tried), strips]
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
        notes = [f"policy {policy!r} is left out: {reason}" for policy, reason in self.unsupported.items()]
        shown = [tabulate(rows, headers=heads, disable_numparse=True), *self._by_full_steps()]
        return "\n".join([*shown, *(f"note: {note}" for note in (*notes, *self.notes))])

    def _by_full_steps(self) -> list[str]:
        """Where the number of full steps was searched, what each number led to."""
        rows = []
        for c in self.candidates:
            counts = sorted({t.full for t in c.tried})
            if len(counts) > 1:
                for full in counts:
                    of = [t for t in c.tried if t.full == full]
                    nearest = min(of, key=lambda t: max(t.error[name] / most for name, most in self.max_error.items()))
                    errors = [f"{value:.5f}" for value in nearest.error.values()]
                    rows.append([c.policy, full, f"{nearest.speed:.2f}", *errors, len(of)])
        if not rows:
            return []
        asked = ", ".join(f"{name} {value:g}" for name, value in self.max_error.items())
        heads = ["policy", "full steps", "speed-up", *self.candidates[0].error, "schedules tried"]
        table = tabulate(rows, headers=heads, disable_numparse=True)
        return [f"\nasked for at most {asked}; the nearest on fitted trajectories, by full steps:\n{table}"]

    def plot(self, path: str | Path) -> None:
        """Draws error against speed-up of all schedules that were run, and the chosen ones as strips."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6 + 0.35 * len(self.candidates)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[3, 0.3 + 0.5 * len(self.candidates)])
        for number, c in enumerate(self.candidates):
            for marker, (name, error) in zip("osD^v<>pP*" * len(c.error), c.error.items(), strict=False):
                of = [(t.speed, t.error[name]) for t in c.tried]
                above.scatter(*zip(*of, strict=True), color=f"C{number}", marker=marker, s=14, alpha=0.3, linewidths=0)
                above.plot(c.speed, error, marker, color=f"C{number}", label=f"{c.policy}: {name}, {error:.2g}")
            most = c.plan.parts
            for step, level in enumerate(level for t in c.plan.timelines for level in t.levels):
                below.barh(-number, 0.9, left=step, height=0.8, color="0.9")
                below.barh(-number - 0.4, 0.9, left=step, height=0.8 * level / most, color=f"C{number}", align="edge")
        for name, limit in self.max_error.items():
            above.axhline(limit, color="0.5", linewidth=0.8, linestyle=":", label=f"at most: {name}, {limit:.2g}")
        above.set(yscale="log", xlabel="speed-up by FLOPs", ylabel="distance to full compute")
        above.legend(
            fontsize=8, title="chosen, on held-out trajectories; small: tried, on fitted ones", title_fontsize=8
        )
        below.set_yticks([-n for n in range(len(self.candidates))], [c.policy for c in self.candidates])
        below.set_xlabel("step; full steps in colour")
        figure.savefig(path, dpi=110)
