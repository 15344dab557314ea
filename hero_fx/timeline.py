"""A plan for one number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate
from torch import Tensor

from .arguments import whole_number
from .schedule import check_step

__all__ = ["Timeline", "table_of"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """A plan for one number of steps; a `hero_fx.schedule.Schedule`."""

    schedule: tuple[bool, ...]
    """One truth value per step, true = full; where parts of the batch have schedules of their own, true = full for some."""
    timesteps: tuple[float, ...]
    """What the model's timestep input holds at each step (the highest of its values)."""
    coefficients: Mapping[str, Tensor]
    """By table. Outputs: `out0` [steps, 5, groups, ...], θ0 .. θ4 of each step (see `hero_fx.passes.forecast`), in the
    output's axes, of size 1 where all share them. Features: [steps, terms, channels], what Y_0, Y_1, ... are multiplied
    with. Rows of full steps are not read. `name@1` holds for the second call of a step, and so on, where it is there."""
    error: Mapping[str, float] = field(default_factory=dict)
    """Predicted relative L2 distance of the final sample to full compute, on trajectories that were not fitted."""
    speed: float = 0.0
    """Predicted speed-up by FLOPs, with attention; 0 where it was not counted."""
    parts: tuple[tuple[bool, ...], ...] = ()
    """Of each equal part of the batch its own schedule, where they have some: guidance puts the unconditional and the
    conditional half of it into one call, and early steps need the latter alone. `name@1` is then for the second part."""
    phase: int = 0
    """Which trajectory of a session it is for, where a video is made by several, one after another: 0 for the first. The last
    one that a plan has is for all that follow."""

    def __post_init__(self) -> None:
        steps = len(self.schedule)
        whole_number("phase", self.phase, 0)
        if not steps or not self.schedule[0]:
            raise ValueError(f"schedule={self.schedule!r}: its first step must be full")
        if len(self.timesteps) != steps:
            raise ValueError(f"timesteps={self.timesteps!r} has {len(self.timesteps)} values for {steps} steps")
        for part in self.parts:
            if len(part) != steps or not part[0]:
                raise ValueError(f"parts={self.parts!r}: each needs {steps} values, the first of them true")
        if self.parts and tuple(map(any, zip(*self.parts, strict=True))) != tuple(map(bool, self.schedule)):
            raise ValueError(
                f"schedule={self.schedule!r}: must be true where some of its parts={self.parts!r} is, and only there"
            )
        for name, table in self.coefficients.items():
            if table.dim() < 2 or table.shape[0] != steps or not table.is_floating_point():
                raise ValueError(
                    f"coefficients[{name!r}] has shape {tuple(table.shape)} and dtype {table.dtype}; it must be "
                    f"floating-point, [{steps} steps, terms, ...]"
                )
            if not bool(table.isfinite().all()):
                raise ValueError(f"coefficients[{name!r}] holds values that are not finite")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.schedule)

    def is_full(self, step: int) -> bool:
        """Whether the step of this index is full; ValueError beyond the last one."""
        check_step(step, self.num_steps)
        return self.schedule[step]

    @property
    def full(self) -> int:
        """How many steps are full, at least for a part of the batch."""
        return sum(self.schedule)

    @property
    def levels(self) -> tuple[int, ...]:
        """At each step, how many parts of the batch are full: 0 or 1 where the batch has no parts."""
        return tuple(map(sum, zip(*(self.parts or (self.schedule,)), strict=True)))

    @property
    def counted(self) -> str:
        """How many steps are full, as text."""
        whole = sum(level == len(self.parts) for level in self.levels)
        return f"{whole} + {self.full - whole} in part" if self.parts else str(self.full)

    @property
    def span(self) -> str:
        """The first and the last timestep, as text."""
        return f"{self.timesteps[0]:g} .. {self.timesteps[-1]:g}"

    @property
    def strip(self) -> str:
        """The schedule as text: `█` for a full step, `▄` for one that is full for a part of the batch, `·` for a cached one."""
        most = max(1, len(self.parts))
        return "".join("·" if not level else "█" if level == most else "▄" for level in self.levels)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the coefficients of a step, by table."""
        return {name: tuple(table.shape[1:]) for name, table in self.coefficients.items()}


def table_of(timelines: Sequence[Timeline]) -> str:
    """Timelines as a table, for people."""
    rows, several = [], any(t.phase for t in timelines)
    for t in timelines:
        error = ", ".join(f"{name} {value:.4f}" for name, value in t.error.items())
        speed = f"{t.speed:.2f}" if t.speed else ""
        rows.append([t.num_steps, *[t.phase] * several, t.counted, speed, error, t.span, t.strip])
    heads = [
        "steps",
        *["phase"] * several,
        "full",
        "speed-up",
        "predicted error",
        "timesteps",
        "schedule (█ full, · cached)" if timelines[0].parts == () else "schedule (█ full, ▄ in part, · cached)",
    ]
    return tabulate(rows, headers=heads, disable_numparse=True)
