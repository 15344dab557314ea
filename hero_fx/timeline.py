"""A plan for one number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .arguments import whole_number
from .schedule import check_step

__all__ = ["Timeline"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """A plan for one number of steps; a `hero_fx.schedule.Schedule`."""

    schedule: tuple[bool, ...]
    """One truth value per step, true = full."""
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
        """How many steps are full."""
        return sum(self.schedule)

    @property
    def span(self) -> str:
        """The first and the last timestep, as text."""
        return f"{self.timesteps[0]:g} .. {self.timesteps[-1]:g}"

    @property
    def strip(self) -> str:
        """The schedule as text: `█` for a full step, `·` for a cached one."""
        return "".join("█" if full else "·" for full in self.schedule)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the coefficients of a step, by table."""
        return {name: tuple(table.shape[1:]) for name, table in self.coefficients.items()}
