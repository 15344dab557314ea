"""Following a plan at run time: its coefficients for the call at hand, and whether the call is one the plan was made for."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from hero_fx.config import Config
from hero_fx.passes.rewrite.forecast import OutputRule, combination
from hero_fx.passes.slots import TableSlot
from hero_fx.plan import Plan, Timeline
from hero_fx.schedule import Schedule
from hero_fx.stack import warn

from .seen import Seen, Undecided
from .timestep import AmbiguousCall, Timestep
from .tracker import Call

__all__ = ["Planned", "planned_for"]

_CLOSE = 1e-3
"""Relative distance at which two timesteps are the same: models take them in half precision too."""


def planned_for(config: Config) -> Planned | None:
    """What follows the plan of some options; None without a plan."""
    if config.plan is None:
        return None
    assert isinstance(config.plan, Plan)
    return Planned(config.plan, config.num_steps, mismatch=config.plan_mismatch)


class Planned:
    """A plan, as one compiled model follows it."""

    def __init__(self, plan: Plan, num_steps: int | None, *, mismatch: str) -> None:
        """`num_steps`: of the trajectories that do not say theirs; `mismatch`: `"error"` or `"warn"`, for timesteps that are
        not the plan's."""
        self.plan = plan
        self.phases = plan.phases
        self.num_steps = num_steps
        self.mismatch = mismatch
        self._rules: Mapping[str, OutputRule] = {rule.table: rule for rule in plan.outputs}
        self._known: dict[tuple[TableSlot, Timeline, int, str, torch.device], Tensor] = {}
        self._lock = threading.Lock()
        self._warned = False

    def schedule(self, seen: Seen) -> Schedule:
        """The timeline for a trajectory; `Undecided` as long as several have the timesteps that were seen.

        Raises:
            RuntimeError: of several, none has these timesteps.
            ValueError: the plan has no timeline of the number of steps that is said.
        """
        lines = self.plan.fitting(seen.num_steps or self.num_steps, seen.phase)
        if len(lines) == 1:
            return lines[0]  # each call is checked against it
        exact = [line for line in lines if _has(line, seen, close=0.0)]
        fitting = exact or [line for line in lines if _has(line, seen, close=_CLOSE)]
        if not fitting:
            times = ", ".join(f"{seen.timesteps[n]:g}" for n in sorted(seen.timesteps))
            starts = "; ".join(f"{line.num_steps} steps: {line.span}" for line in lines)
            raise RuntimeError(
                f"the trajectory is at the timesteps {times}, which none of the plan's timelines has ({starts}): another "
                "number of steps, or another scheduler. Run what the plan is for, or calibrate a plan for this"
            )
        return fitting[0] if len(fitting) == 1 else Undecided(tuple(fitting), seen)

    def check_session(self) -> None:
        """Refuses a call without a session, where coefficients depend on how many trajectories its video had before.

        Raises:
            AmbiguousCall: they do.
        """
        if self.phases > 1:
            raise AmbiguousCall(
                f"the plan has coefficients of their own for the first {self.phases} trajectories (phases) of a video, and a "
                "call without a session does not tell which video it is of: run each in hero_fx.session(...), or use "
                "hero_fx.calling(session=...) around each call"
            )

    def check(self, call: Call, pattern: tuple[int, ...], lane: int, timestep: Timestep) -> None:
        """Refuses a call that the plan has no coefficients for.

        Args:
            pattern: of each call of the lane in this trajectory, whether it was full, this one included.
            lane: which call of the step it is, counted from 0.
            timestep: as read from the model's input.

        Raises:
            RuntimeError: it is at another timestep than the plan's, of a lane that the plan does not know, or its last full
                steps are not the plan's.
        """
        if lane >= self.plan.lanes:
            self._differs(
                f"step {call.step} has {lane + 1} calls, and the plan was calibrated with {self.plan.lanes} a step: another "
                "guidance mode"
            )
        line, highest = call.schedule, max(timestep.values)
        if not isinstance(line, Timeline):
            return  # all that it may be have these timesteps, and the step is full in all of them
        if not _same(highest, line, call.step, _CLOSE):
            self._differs(
                f"step {call.step} is at timestep {highest:g}, and the plan of {line.num_steps} steps was "
                f"calibrated at {line.timesteps[call.step]:g}: another number of steps, or another scheduler"
            )
        if not call.full and pattern != line.levels[: call.step + 1]:
            # The coefficients are those of other full steps, so there is no warning in place of this error.
            raise RuntimeError(
                f"step {call.step} of lane {call.lane!r}: the full steps of this trajectory are not those of the plan, since "
                "the lane was not called at every step. Call the model at every step, or calibrate with the loop as it "
                "runs; hero_fx.reset() where a new trajectory starts"
            )

    def computed(self, call: Call, before: tuple[int, ...]) -> tuple[bool, ...]:
        """Of each part of the batch, whether a call computes it. One that the plan leaves out at a full step is forecast only
        if all calls before, `before`, were as planned."""
        line = call.schedule
        if not call.full:
            return (False,) * self.plan.parts
        if call.forced or not isinstance(line, Timeline) or before != line.levels[: call.step]:
            return (True,) * self.plan.parts
        return tuple(part[call.step] for part in line.parts)

    def _differs(self, what: str) -> None:
        if self.mismatch == "error":
            raise RuntimeError(
                f"{what}. Run what the plan is for, calibrate a plan for this, or pass plan_mismatch='warn' to go on"
            )
        if not self._warned:
            self._warned = True
            warn(f"hero_fx: {what}")

    def weight(self, slot: TableSlot, call: Call, lane: int, device: torch.device) -> Tensor:
        """The tensor of a slot at a call, made once per step; `lane`: or part of the batch."""
        line, own = call.schedule, f"{slot.table}@{lane}"
        assert isinstance(line, Timeline), "cached steps are of one timeline"
        name = own if own in line.coefficients else slot.table
        key = (slot, line, call.step, name, device)
        with self._lock:
            if key not in self._known:
                with torch.inference_mode(False):
                    self._known[key] = self._make(slot, line.coefficients[name][call.step]).to(device)
            return self._known[key]

    def _make(self, slot: TableSlot, row: Tensor) -> Tensor:
        """`row`: [terms, ...] of one step."""
        row = row.to(torch.float32)
        rule = self._rules.get(slot.table)
        weight = row[slot.term.number] if rule is None else combination(list(row), rule)[slot.term]
        if rule is not None and rule.groups > 1:
            weight = weight.repeat_interleave(slot.shape[0] // rule.groups, dim=0)
        return weight.expand(slot.shape).contiguous()


def _same(timestep: float, line: Timeline, step: int, close: float) -> bool:
    """Whether a timestep is that of a step of a timeline."""
    return math.isclose(timestep, line.timesteps[step], rel_tol=close, abs_tol=close * max(map(abs, line.timesteps)))


def _has(line: Timeline, seen: Seen, close: float) -> bool:
    """Whether a timeline has all the timesteps that were seen of a trajectory."""
    return all(step < line.num_steps and _same(t, line, step, close) for step, t in seen.timesteps.items())
