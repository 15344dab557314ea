"""The tracker: from what a call is made of to its step, its lane and what kind of step it is.

A compiled model sees one call after another and nothing of the loop around it. The step has to be read off
the calls, and counting them is not enough: pipelines call once or several times a step, stop early, start
over, and serve several trajectories in a row. What does tell is the timestep:

    timestep   999 999 979 979 959 959 ... 999        same again = the next lane of the same step
    step         0   0   1   1   2   2       0        further along = the next step
    lane         0   1   0   1   0   1       0        back against the direction of travel = a new trajectory

A lane is one of the calls that a step makes (classifier-free guidance makes a conditional and an unconditional
one); each has features of its own. Where the timestep alone leaves a choice, the memory of the inputs decides:

* text embeddings that stay the same all along tell lanes apart, whatever their order, and a change of them starts
  a trajectory, whatever the timestep;
* a timestep that is a view of the scheduler's table is known by its place in it, also where values repeat;
* windows into one tensor of latents are known by their place in it.

Inputs that are made anew at each call tell nothing; then the order of the calls does. Where that order cannot be
right (a step has more or fewer calls than the one before, and nothing says which is which), the call is refused.
All of this is host arithmetic on a few numbers and addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hero_fx.arguments import whole_number
from hero_fx.schedule import Schedule

from .evidence import Evidence, Roles
from .lanes import Lanes, by_memory_alone
from .seen import Seen, Undecided

__all__ = ["Call", "Tracker"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model, placed in its trajectory."""

    step: int
    """Index of the step in the trajectory."""
    lane: int | str
    """Which of the calls of a step: counted from 0, or the name of a named lane."""
    full: bool
    """Whether this call must compute every layer, at least for a part of the batch."""
    since_full: int
    """x of Eq. 6: steps since this lane's last full step; 0 where `full`."""
    gap: int
    """d of Eq. 6: distance between the lane's last two full steps, this one included; 0 if there is one."""
    fulls: int
    """Full steps of this lane before this call, in this trajectory."""
    new_trajectory: bool
    """This call starts a trajectory: whatever state there is belongs to another one."""
    trajectory: int
    """Number of the trajectory, from 1; a reset does not start the count anew."""
    forced: bool = field(default=False, compare=False)
    """It is full for all of the batch, whatever the schedule says: no features of this trajectory can be trusted."""
    new_step: bool = field(default=True, compare=False)
    """This call is the first one of its step."""
    schedule: Schedule | None = field(default=None, compare=False, repr=False)
    """Of its trajectory, as far as it is known."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a call belongs; nothing of the tracker has changed yet."""

    starts: bool
    step: int
    direction: int
    lane: int | str


class Tracker:
    """Follows the calls of one session through their trajectories.

    Not thread-safe: who makes a session's calls holds a lock. A call that raises leaves the tracker as it was.
    """

    def __init__(
        self,
        schedule: Callable[[Seen], Schedule] | Schedule,
        *,
        roles: Roles | None = None,
        max_lanes: int = 8,
        trajectory: int = 0,
        strict: bool = False,
        shared: bool = False,
    ) -> None:
        """`schedule` says which steps are full, as a function of what is seen where that tells it; `roles`: what the marks of
        a call are of; more than `max_lanes` lanes are taken for a mistake; `trajectory`: how many trajectories there were
        before; `strict`: cached steps are for the schedule's full steps alone; `shared`: several processes must decide
        alike, so nothing is decided by memory, which is each one's own."""
        whole_number("max_lanes", max_lanes, 1)
        self._schedules = schedule if callable(schedule) else lambda _: schedule
        self._roles = roles or Roles()
        self._max_lanes = max_lanes
        self._strict = strict
        self._shared = shared
        self.trajectory = trajectory
        """Trajectories so far."""
        self._finished = 0  # before the present one
        self.reset()

    def reset(self) -> None:
        """Forgets the trajectory: the next call starts a new one."""
        self.step: int | None = None
        """Step of the last call; None where no trajectory is under way."""
        self._schedule: Schedule | None = None
        self._last: Evidence | None = None
        self._direction = 0
        self._full_to_the_end = False
        self.lanes = Lanes(self._roles, self._max_lanes)
        # Whether the steps so far were views of one table; "doubt" where the second was of another than the first.
        self._table: Literal["same", "doubt", "no"] | None = None
        self._sure = False  # the present step is the next one in the table

    def forget_features(self) -> None:
        """The features of all lanes are gone: each is full at its next call, as at its first.

        Where coefficients are for the full steps of a schedule alone, the rest of the trajectory is full.
        """
        self.lanes.lose()
        self._full_to_the_end = self._strict

    def starts(self, evidence: Evidence) -> bool:
        """Whether this call would start a trajectory. Changes nothing; raises what `advance` raises."""
        return self._locate(evidence).starts

    def follows(self, evidence: Evidence) -> bool:
        """Whether a call comes later in the trajectory under way, going by the timestep alone."""
        if self._last is None or self.step is None or self._is_over():
            return False
        change = self._change(evidence)
        return change != 0 and change * self._direction >= 0

    @property
    def finished(self) -> int:
        """Trajectories that came to the last step of their schedule, the present one among them if it has."""
        return self._finished + (self.step is not None and self._is_over())

    def advance(self, evidence: Evidence, elsewhere: Callable[[], int] = int) -> Call:
        """Places the next call; `elsewhere`: how many trajectories of the session other graphs of the model finished.

        Two calls are of the same step only if their timesteps agree in all values: those of conditioning tokens may
        stand still while the others move. Exact comparison is right, because the loop hands all calls of a step the
        same tensor. The direction of travel is the sign of the first change of a trajectory.

        A name and a step index are what diffusers' `cache_context(name, step_index=...)` or `hero_fx.calling` say. A
        name that comes again at the same timestep starts a new step (Heun's method evaluates a timestep twice). A step
        index wins over the timestep: a lower one starts a trajectory, and so does the same one with a name that was seen
        in this step. It may skip steps, and a trajectory may start with any.

        A lane without a full step in this trajectory gets one, and so does a lane that was not called at a
        step that the schedule makes full, and one whose conditioning is another at its second step than at its first.
        After the last step of a schedule of known length, another timestep (or a name that comes again) starts a
        trajectory, whatever the direction.

        Raises:
            ValueError: a negative step index, or a step that the schedule does not have.
            AmbiguousCall: the lane of the call cannot be told, or there are more than `max_lanes`.
        """
        place = self._locate(evidence)
        finished = self.finished if place.starts else self._finished
        schedule = self._schedule_of(evidence, place, lambda: finished + elsewhere())
        lanes = Lanes(self._roles, self._max_lanes) if place.starts else self.lanes
        if place.starts:
            self._full_to_the_end = False
        scheduled = schedule.is_full(place.step)
        past = lanes.get(place.lane)
        if past is None:
            lanes.check_room(evidence)
        new_step = place.starts or place.step != self.step
        if new_step:
            self._learn_table(evidence, place.starts)
        if past is None:
            full, forced, fulls, since, gap = True, True, 0, 0, 0
            lanes.add(place.lane, evidence, place.step)
        else:
            # Between two calls a lane can miss steps, full ones among them; its features are then too old.
            forced = self._full_to_the_end or any(map(schedule.is_full, range(past.called + 1, place.step)))
            forced |= past.fulls == 0
            if lanes.learn(past, evidence, place.step, sure=self._sure) or self._table == "doubt":
                if self._shared and not (scheduled or forced):
                    self.reset()  # the doubt is over at the lane's next step, but not what it was about
                    raise by_memory_alone(evidence)
                forced = True
            full = scheduled or forced
            fulls, since, gap = past.fulls, place.step - past.full_at, past.gap
            past.called, past.marks = place.step, past.marks if evidence.batched else evidence.marks
            if full:
                gap = since if fulls else 0  # to a full step whose features are still there
                past.full_at, past.gap, past.fulls, since = place.step, gap, fulls + 1, 0
        self.trajectory, self._finished = self.trajectory + int(place.starts), finished
        self.step, self._last, self._direction = place.step, evidence, place.direction
        self._schedule, self.lanes = schedule, lanes
        lanes.saw(evidence)
        of = (since, gap, fulls, place.starts, self.trajectory, forced, new_step, schedule)
        return Call(place.step, place.lane, full, *of)

    def _learn_table(self, evidence: Evidence, starts: bool) -> None:
        """Notes at the first call of a step whether it follows the last one in the scheduler's table."""
        moved = None if starts else self._moved_in_table(evidence)
        self._sure = moved in (-1, 1)
        if starts:
            self._table = None
        elif self._table is None:
            other = (
                evidence.timestep.table is not None and self._last is not None and self._last.timestep.table is not None
            )
            self._table = "same" if moved is not None else "doubt" if other and evidence.step_index is None else "no"
        elif self._table == "doubt":
            self._table = "no"

    def _schedule_of(self, evidence: Evidence, place: _Place, phase: Callable[[], int]) -> Schedule:
        known, given = None if place.starts else self._schedule, evidence.num_steps
        if known is None or isinstance(known, Undecided):
            seen = Seen(phase=phase()) if known is None else known.seen
            return self._schedules(seen.and_at(place.step, max(evidence.timestep.values), given))
        if given not in (None, known.num_steps):
            raise ValueError(
                f"num_steps={given}, but this trajectory began with num_steps={known.num_steps}: give hero_fx.calling the same "
                "number at every call of a trajectory"
            )
        return known

    def _locate(self, evidence: Evidence) -> _Place:
        """Where the call belongs; changes nothing."""
        index, step = evidence.step_index, self.step
        if index is not None and index < 0:
            raise ValueError(f"step_index={index} is negative; steps are counted from 0.")
        start = _Place(True, index or 0, 0, 0 if evidence.name is None else evidence.name)
        if step is None:
            return start
        if index is not None:
            lane = (
                self.lanes.of_this_step(evidence, step, same_entry=self._moved_in_table(evidence) == 0)
                if index == step
                else self.lanes.of_next_step(evidence)
            )
            if index < step or lane is None:
                return start
            return _Place(False, index, self._direction or self._change(evidence), lane)
        change = 0
        if self._is_same_time(evidence):
            lane = self.lanes.of_this_step(evidence, step, same_entry=self._moved_in_table(evidence) == 0)
            if lane is not None:
                return _Place(False, step, self._direction, lane)
        else:
            change = self._change(evidence)
        if self._is_over() or change * self._direction < 0 or self._is_other_table(evidence):
            return start
        lane = self.lanes.of_next_step(evidence)
        if lane is None:
            if self._shared:
                raise by_memory_alone(evidence)
            log.info("a trajectory starts at timestep %s: its conditioning is new", evidence.timestep)
            return start
        self.lanes.check_order(evidence, step)
        return _Place(False, step + 1, self._direction or change, lane)

    def _is_over(self) -> bool:
        """Whether the last call was of the last step."""
        assert self._schedule is not None
        assert self.step is not None
        total = self._schedule.num_steps
        return total is not None and self.step + 1 >= total

    def _change(self, evidence: Evidence) -> int:
        """Sign of the change of the timestep."""
        assert self._last is not None
        change = evidence.timestep.total - self._last.timestep.total
        return (change > 0) - (change < 0)

    def _is_same_time(self, evidence: Evidence) -> bool:
        """Whether a call is at the timestep of the last one: of equal value, and not of another place in the table."""
        assert self._last is not None
        return evidence.timestep.values == self._last.timestep.values and self._moved_in_table(evidence) in (None, 0)

    def _moved_in_table(self, evidence: Evidence) -> int | None:
        """How far the timestep moved in the scheduler's table; None where both are not of one table."""
        assert self._last is not None
        mine, last = evidence.timestep.table, self._last.timestep.table
        if mine is None or last is None or mine.storage != last.storage:
            return None
        return mine.offset - last.offset

    def _is_other_table(self, evidence: Evidence) -> bool:
        """Whether the scheduler's table says that a trajectory starts: each has a table of its own."""
        if evidence.timestep.table is None:
            return False
        moved = self._moved_in_table(evidence)
        return moved is None if self._table == "same" else moved is not None and self._table == "doubt"
