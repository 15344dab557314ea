"""Which steps of a trajectory are full.

A full step computes every layer and records its features; the steps between two full steps are cached.
A schedule decides from the index of the step alone, so the decision costs nothing, needs no tensor and can
be printed ahead.

    uniform   interval=3 warmup=3 cooldown=1 num_steps=30    0 1 2 5 8 11 14 17 20 23 26 29
    toca      interval=3 num_steps=30                        0 1 2 5 8 10 12 15 18 21 24 26 28 29
    explicit  (True, True, False, True)                      0 1 3
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .arguments import whole_number

__all__ = ["Explicit", "Schedule", "Toca", "Uniform", "check_step", "full_steps", "make_schedule"]


@runtime_checkable
class Schedule(Protocol):
    """Says which steps are full. Immutable, so one schedule serves any number of trajectories."""

    @property
    def num_steps(self) -> int | None:
        """Steps in a trajectory, or None where that is not known ahead."""

    def is_full(self, step: int) -> bool:
        """Whether the step of this index (0 = first) is full; ValueError beyond `num_steps`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """The first steps, the last steps, and every `interval`-th step between them (FORA, TaylorSeer, HERO).

    Raises ValueError for an interval or a warmup below 1, and for a cooldown of more than one step that could
    not be honoured because `num_steps` is unknown.
    """

    interval: int
    """Distance between full steps, counted from the last warm-up step; 1 makes every step full."""
    warmup: int = 3
    """Full steps at the start; at least 1, because the first step has nothing to reuse."""
    cooldown: int = 1
    """Full steps at the end. Only `num_steps` tells where that is; without it the default of 1 is idle."""
    num_steps: int | None = None
    """Steps in a trajectory, or None where that is not known ahead."""

    def __post_init__(self) -> None:
        whole_number("interval", self.interval, 1, "(use 1 to make every step full)")
        whole_number("warmup", self.warmup, 1, "(the first step must be full, for there is nothing to reuse yet)")
        whole_number("cooldown", self.cooldown, 0, "(use 0 for no full steps at the end)")
        if self.num_steps is not None:
            whole_number("num_steps", self.num_steps, 1, "(leave it out if the number of steps is not known)")
        elif self.cooldown > 1:
            raise ValueError(
                f"cooldown={self.cooldown} needs num_steps: the last steps cannot be told from the others "
                "without it. Allowed without num_steps: 0 or 1. Pass num_steps= (the length of the loop)."
            )

    def is_full(self, step: int) -> bool:
        """Whether step `step` is full; ValueError for a step that the trajectory does not have."""
        check_step(step, self.num_steps)
        if step < self.warmup:
            return True
        if self.num_steps is not None and step >= self.num_steps - self.cooldown:
            return True
        return (step - (self.warmup - 1)) % self.interval == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Toca:
    """The schedule published with ToCa, which gives the number of full steps in HERO's tables::

        full(s) = s <= 2  or  s == T-1  or  s % thr == 0
        after each full step s:  thr = round_half_even(N / (0.6 + 0.8 * s / T)),
                                 but 2 while int(0.2 * T) <= s < int(0.4 * T)

    with N = `interval` and T = `num_steps`: dense at the start and from 0.2 T to 0.4 T, and again at the end.
    """

    interval: int
    """N, the nominal distance between full steps; 1 makes (nearly) every step full."""
    num_steps: int
    """T, the number of steps in a trajectory."""
    _mask: tuple[bool, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("interval", self.interval, 1, "(the paper uses 2 and 3)")
        whole_number("num_steps", self.num_steps, 1, "(pass the length of the denoising loop)")
        total, mask, threshold = self.num_steps, [], 1
        for step in range(total):
            full = step <= 2 or step == total - 1 or step % threshold == 0
            if full:
                # The constants are ToCa's. The divisor stays below 1.4, so not even N = 1 rounds to 0.
                threshold = round(self.interval / (0.6 + 0.8 * step / total))
                if int(0.2 * total) <= step < int(0.4 * total):
                    threshold = 2
            mask.append(full)
        object.__setattr__(self, "_mask", tuple(mask))

    def is_full(self, step: int) -> bool:
        """Whether step `step` is full; ValueError for a step that the trajectory does not have."""
        check_step(step, self.num_steps)
        return self._mask[step]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explicit:
    """One truth value a step; true = full."""

    mask: tuple[bool, ...]
    """One truth value for each step of the trajectory; the first must be true."""

    def __post_init__(self) -> None:
        if not self.mask:
            raise ValueError("schedule=() is empty; allowed: one truth value for each step, true = full step.")
        if not self.mask[0]:
            raise ValueError(
                f"schedule={_shorten(self.mask)} starts with a step that is not full, but the first step has "
                "nothing to reuse. Make the first value true (give one truth value a step, not step numbers)."
            )

    @property
    def num_steps(self) -> int:
        """Steps in a trajectory."""
        return len(self.mask)

    def is_full(self, step: int) -> bool:
        """Whether step `step` is full; ValueError for a step that the trajectory does not have."""
        check_step(step, len(self.mask))
        return self.mask[step]


def make_schedule(
    schedule: str | Sequence[object], *, interval: int, num_steps: int | None, warmup: int, cooldown: int
) -> Schedule:
    """The schedule that the arguments of `hero_fx.backend` describe.

    `schedule` is "uniform" (uses all arguments), "toca" (needs `num_steps`; has its own warm-up and end), or
    one truth value a step (uses `num_steps` only as a check). Raises ValueError for anything else, for "toca"
    without `num_steps`, and for a sequence whose length differs from `num_steps`.
    """
    if isinstance(schedule, str):
        if schedule == "uniform":
            return Uniform(interval=interval, warmup=warmup, cooldown=cooldown, num_steps=num_steps)
        if schedule == "toca":
            if num_steps is None:
                raise ValueError(
                    'schedule="toca" needs num_steps: its spacing depends on the length of the trajectory. '
                    'Pass num_steps= (the length of the denoising loop), or use schedule="uniform".'
                )
            return Toca(interval=interval, num_steps=num_steps)
        raise ValueError(f"schedule={schedule!r} is unknown; {_ALLOWED}.")
    if not isinstance(schedule, Iterable):
        raise ValueError(f"schedule={schedule!r} is not a schedule; {_ALLOWED}.")
    mask = tuple(_truth(index, value) for index, value in enumerate(schedule))
    if num_steps is not None and num_steps != len(mask):
        raise ValueError(
            f"num_steps={num_steps} but schedule= has {len(mask)} values; allowed: one value for each step. "
            "Make them agree, or leave num_steps out."
        )
    return Explicit(mask=mask)


def full_steps(schedule: Schedule, num_steps: int | None = None) -> list[int]:
    """Indices of the full steps among the first `num_steps` steps (default: all that the schedule has).

    Raises ValueError if neither the schedule nor the argument tells the number of steps.
    """
    total = schedule.num_steps if num_steps is None else num_steps
    if total is None:
        raise ValueError(
            "num_steps=None, and the schedule has no length of its own; allowed: an int of at least 0. "
            "Pass num_steps= to say how many steps to list."
        )
    return [step for step in range(total) if schedule.is_full(step)]


_ALLOWED = 'allowed: "uniform", "toca" (needs num_steps), or a sequence of one truth value a step, true = full'


def _truth(index: int, value: object) -> bool:
    """`value` as a bool; 0, 1 and booleans of NumPy and torch pass, other things that are truthy do not."""
    try:
        truth = bool(value)
        exact = bool(truth == value)
    except (RuntimeError, TypeError, ValueError):  # an array of several values has no truth value
        exact = False
    if not exact:
        raise ValueError(f"schedule[{index}]={value!r} is not a truth value; {_ALLOWED}.")
    return truth


def check_step(step: int, num_steps: int | None) -> None:
    """Refuses a step that a trajectory does not have."""
    if step < 0:
        raise ValueError(f"step={step} is negative; steps are counted from 0.")
    if num_steps is not None and step >= num_steps:
        raise ValueError(
            f"step={step}, but the schedule has {num_steps} steps: more steps were run than it was made for. "
            "Pass the num_steps (or the schedule) that the denoising loop really runs. If it runs no more "
            "than that, check that it changes the timestep once a step, and call hero_fx.reset() where a new "
            "trajectory starts."
        )


def _shorten(mask: tuple[bool, ...], most: int = 6) -> str:
    shown = ", ".join(str(int(value)) for value in mask[:most])
    return f"({shown}{', ...' if len(mask) > most else ''})"
