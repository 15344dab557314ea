"""What has been seen of a trajectory, where its schedule is told by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hero_fx.schedule import Schedule
from hero_fx.timeline import Timeline

from .timestep import AmbiguousCall

__all__ = ["Seen", "Undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is known of a trajectory at one of its calls."""

    num_steps: int | None = None
    """Its steps, where `hero_fx.calling` says them."""
    phase: int = 0
    """How many trajectories its session has finished before it."""
    timesteps: Mapping[int, float] = field(default_factory=dict)
    """By step, the highest value of the timestep of each step so far."""

    def and_at(self, step: int, timestep: float, num_steps: int | None) -> Seen:
        """What is known one call later."""
        return replace(self, num_steps=num_steps, timesteps={**self.timesteps, step: timestep})


@dataclass(frozen=True, slots=True)
class Undecided:
    """Several schedules that fit all that has been seen of a trajectory: followed where they agree on a full step."""

    schedules: tuple[Schedule, ...]
    seen: Seen

    @property
    def num_steps(self) -> None:
        """Not known yet."""
        return None

    def is_full(self, step: int) -> bool:
        """True where the step is full in all of them, for all of the batch.

        Raises:
            AmbiguousCall: it is not, so that it matters which one is followed.
        """
        if all(schedule.is_full(step) and _is_whole(schedule, step) for schedule in self.schedules):
            return True
        times = ", ".join(f"{self.seen.timesteps[n]:g}" for n in sorted(self.seen.timesteps))
        counts = ", ".join(str(schedule.num_steps) for schedule in self.schedules)
        raise AmbiguousCall(
            f"step {step}: after the timesteps {times} the trajectory may be one of {counts} steps, and these differ here: say "
            "which with hero_fx.backend(num_steps=...) or hero_fx.calling(num_steps=...)"
        )


def _is_whole(schedule: Schedule, step: int) -> bool:
    return not isinstance(schedule, Timeline) or all(part[step] for part in schedule.parts)
