"""Following a plan at run time: its coefficients for the call at hand, and whether the call is one the plan was made for."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hero_fx.config import Config
from hero_fx.passes.rewrite.forecast import OutputRule, combination
from hero_fx.passes.slots import TableSlot
from hero_fx.plan import Plan, Timeline
from hero_fx.stack import warn

from .timestep import Timestep
from .tracker import Call

__all__ = ["Planned", "planned_for"]

_CLOSE = 1e-3
"""Relative distance at which two timesteps are the same: models take them in half precision too."""


def planned_for(config: Config) -> Planned | None:
    """What follows the plan of some options; None without a plan."""
    plan, timeline = config.plan, config.timeline
    if timeline is None:
        return None
    assert isinstance(plan, Plan)
    return Planned(timeline, plan.outputs, plan.lanes, mismatch=config.plan_mismatch)


class Planned:
    """A timeline of a plan, as one compiled model follows it."""

    def __init__(self, timeline: Timeline, outputs: Sequence[OutputRule], lanes: int, *, mismatch: str) -> None:
        """`mismatch`: `"error"` or `"warn"`, for timesteps that are not the plan's."""
        self.timeline = timeline
        self.lanes = lanes
        self.mismatch = mismatch
        self._rules: Mapping[str, OutputRule] = {rule.table: rule for rule in outputs}
        self._known: dict[tuple[TableSlot, int, str, torch.device], Tensor] = {}
        self._lock = threading.Lock()
        self._warned = False

    def check(self, call: Call, pattern: tuple[bool, ...], lane: int, timestep: Timestep) -> None:
        """Refuses a call that the plan has no coefficients for.

        Args:
            pattern: of each call of the lane in this trajectory, whether it was full, this one included.
            lane: which call of the step it is, counted from 0.
            timestep: as read from the model's input.

        Raises:
            RuntimeError: it is at another timestep than the plan's, of a lane that the plan does not know, or its last full
                steps are not the plan's.
        """
        if lane >= self.lanes:
            self._differs(
                f"step {call.step} has {lane + 1} calls, and the plan was calibrated with {self.lanes} a step: another "
                "guidance mode"
            )
        expected, highest = self.timeline.timesteps[call.step], max(timestep.values)
        if not math.isclose(highest, expected, rel_tol=_CLOSE, abs_tol=_CLOSE * max(map(abs, self.timeline.timesteps))):
            self._differs(
                f"step {call.step} is at timestep {highest:g}, and the plan of {self.timeline.num_steps} steps was "
                f"calibrated at {expected:g}: another number of steps, or another scheduler"
            )
        if not call.full and pattern != self.timeline.schedule[: call.step + 1]:
            # The coefficients are those of other full steps, so there is no warning in place of this error.
            raise RuntimeError(
                f"step {call.step} of lane {call.lane!r}: the full steps of this trajectory are not those of the plan, since "
                "the lane was not called at every step. Call the model at every step, or calibrate with the loop as it "
                "runs; hero_fx.reset() where a new trajectory starts"
            )

    def _differs(self, what: str) -> None:
        if self.mismatch == "error":
            raise RuntimeError(
                f"{what}. Run what the plan is for, calibrate a plan for this, or pass plan_mismatch='warn' to go on"
            )
        if not self._warned:
            self._warned = True
            warn(f"hero_fx: {what}")

    def weight(self, slot: TableSlot, call: Call, lane: int, device: torch.device) -> Tensor:
        """The tensor of a slot at a call, made once per step."""
        own = f"{slot.table}@{lane}"
        name = own if own in self.timeline.coefficients else slot.table
        key = (slot, call.step, name, device)
        with self._lock:
            if key not in self._known:
                with torch.inference_mode(False):
                    self._known[key] = self._make(slot, self.timeline.coefficients[name][call.step]).to(device)
            return self._known[key]

    def _make(self, slot: TableSlot, row: Tensor) -> Tensor:
        """`row`: [terms, ...] of one step."""
        row = row.to(torch.float32)
        rule = self._rules.get(slot.table)
        weight = row[slot.term.number] if rule is None else combination(list(row), rule)[slot.term]
        if rule is not None and rule.groups > 1:
            weight = weight.repeat_interleave(slot.shape[0] // rule.groups, dim=0)
        return weight.expand(slot.shape).contiguous()
