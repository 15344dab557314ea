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

from .evidence import Evidence, Mark, Roles
from .timestep import AmbiguousCall

__all__ = ["Call", "Tracker"]

log = logging.getLogger(__name__)

_FIX = (
    "wrap each call of the model in hero_fx.calling(lane=..., step_index=...), or in its cache_context(name, step_index=...); "
    "after a call that belongs to no trajectory (a warm-up) call hero_fx.reset()"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model, placed in its trajectory."""

    step: int
    """Index of the step in the trajectory."""
    lane: int | str
    """Which of the calls of a step: counted from 0, or the name of a named lane."""
    full: bool
    """Whether this call must compute every layer."""
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
    new_step: bool = field(default=True, compare=False)
    """This call is the first one of its step."""


@dataclass(slots=True)
class _Lane:
    """What has to be known of a lane's past in this trajectory."""

    called: int
    """Step of its last call."""
    full_at: int
    """Its last full step."""
    gap: int
    fulls: int
    born: int
    """Step of its first call."""
    name: str | None
    marks: tuple[Mark, ...]
    """Of its last call."""
    steady: frozenset[int] | None = None
    """Positions of marks that were the same at its first two steps; None before the second."""
    doubt: frozenset[int] = frozenset()
    """Conditioning that was another at its second step than at its first: made anew, or of a new trajectory?"""
    first: tuple[Mark, ...] = ()
    """Of its first call, as long as there is a doubt."""

    def same(self, evidence: Evidence) -> frozenset[int]:
        """The positions at which a call shows what this lane's last call showed."""
        pairs = zip(self.marks, evidence.marks, strict=True)
        return frozenset(p for p, (mine, other) in enumerate(pairs) if mine == other)

    def places(self) -> tuple[object, ...]:
        """The parts of larger tensors that its last call showed."""
        return tuple(mark.place for mark in self.marks)

    def alike(self, other: _Lane) -> bool:
        """Whether nothing but their order tells the calls of two lanes apart."""
        known = self.steady if other.steady is None else other.steady
        if known is None or (self.steady is not None and self.steady != known):
            return known is None and self.name == other.name and self.places() == other.places()
        same = all(self.marks[p] == other.marks[p] for p in known)
        return same and self.name == other.name and self.places() == other.places()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a call belongs; nothing of the tracker has changed yet."""

    starts: bool
    step: int
    direction: int
    lane: int | str


class Tracker:
    """Follows the calls of one session through their trajectories.

    Not thread-safe: calls of one session are ordered anyway, and their owner holds a lock. A call that raises
    leaves the tracker as it was.
    """

    def __init__(
        self,
        schedule: Callable[[int | None], Schedule] | Schedule,
        *,
        roles: Roles | None = None,
        max_lanes: int = 8,
        trajectory: int = 0,
    ) -> None:
        """`schedule` says which steps are full, as a function of the number of steps where a call may tell it; `roles`: what
        the marks of a call are of; more than `max_lanes` lanes are taken for a mistake; `trajectory`: how many trajectories
        there were before."""
        whole_number("max_lanes", max_lanes, 1)
        self._schedules = schedule if callable(schedule) else lambda _: schedule
        self._roles = roles or Roles()
        self._max_lanes = max_lanes
        self.trajectory = trajectory
        """Trajectories so far."""
        self.reset()

    def reset(self) -> None:
        """Forgets the trajectory: the next call starts a new one."""
        self.step: int | None = None
        """Step of the last call; None where no trajectory is under way."""
        self._schedule: Schedule | None = None
        self._last: Evidence | None = None
        self._direction = 0
        self._lanes: dict[int | str, _Lane] = {}
        self._seen: set[tuple[int, Mark]] = set()  # all conditioning of this trajectory, by position
        # Whether the steps so far were views of one table; "doubt" where the second was of another than the first.
        self._table: Literal["same", "doubt", "no"] | None = None
        self._sure = False  # the present step is the next one in the table

    def starts(self, evidence: Evidence) -> bool:
        """Whether this call would start a trajectory. Changes nothing; raises what `advance` raises."""
        return self._locate(evidence).starts

    def follows(self, evidence: Evidence) -> bool:
        """Whether a call comes later in the trajectory under way, going by the timestep alone."""
        if self._last is None or self.step is None or self._is_over():
            return False
        change = self._change(evidence)
        return change != 0 and change * self._direction >= 0

    def advance(self, evidence: Evidence) -> Call:
        """Places the next call.

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
        schedule = self._schedule_of(evidence, place.starts)
        lanes = {} if place.starts else self._lanes
        scheduled = schedule.is_full(place.step)
        past = lanes.get(place.lane)
        if past is None and len(lanes) >= self._max_lanes:
            raise AmbiguousCall(self._too_many_lanes(evidence))
        new_step = place.starts or place.step != self.step
        if new_step:
            self._learn_table(evidence, place.starts)
        if past is None:
            full, fulls, since, gap = True, 0, 0, 0
            lanes[place.lane] = _Lane(place.step, place.step, gap, 1, place.step, evidence.name, evidence.marks)
        else:
            # Between two calls a lane can miss steps, full ones among them; its features are then too old.
            full = scheduled or any(map(schedule.is_full, range(past.called + 1, place.step)))
            full |= self._learn(past, evidence, place.step) or self._table == "doubt"
            fulls, since, gap = past.fulls, place.step - past.full_at, past.gap
            past.called, past.marks = place.step, evidence.marks
            if full:
                past.full_at, past.gap, past.fulls = place.step, since, fulls + 1
                since, gap = 0, since
        self.trajectory += int(place.starts)
        self.step, self._last, self._direction = place.step, evidence, place.direction
        self._schedule, self._lanes = schedule, lanes
        self._seen = set() if place.starts else self._seen
        self._seen.update((p, evidence.marks[p]) for p in self._roles.conditioning)
        return Call(place.step, place.lane, full, since, gap, fulls, place.starts, self.trajectory, new_step)

    def _learn(self, lane: _Lane, evidence: Evidence, step: int) -> bool:
        """Notes which inputs of a lane stay the same; true where that leaves a doubt, so that the call must be full."""
        if lane.steady is not None:
            lane.doubt, lane.first = frozenset(), ()
            return False
        lane.steady, lane.first = lane.same(evidence), lane.marks
        told = evidence.step_index is not None or self._sure
        lane.doubt = frozenset() if told else self._roles.conditioning - lane.steady
        if lane.doubt:
            log.info("step %d is full: some of its conditioning is not that of the step before", step)
        return bool(lane.doubt)

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

    def _schedule_of(self, evidence: Evidence, starts: bool) -> Schedule:
        if starts or self._schedule is None:
            return self._schedules(evidence.num_steps)
        if evidence.num_steps not in (None, self._schedule.num_steps):
            raise ValueError(
                f"num_steps={evidence.num_steps}, but this trajectory began with num_steps={self._schedule.num_steps}: give "
                "hero_fx.calling the same number at every call of a trajectory"
            )
        return self._schedule

    def _locate(self, evidence: Evidence) -> _Place:
        """Where the call belongs; changes nothing."""
        index, step = evidence.step_index, self.step
        if index is not None and index < 0:
            raise ValueError(f"step_index={index} is negative; steps are counted from 0.")
        start = _Place(True, index or 0, 0, 0 if evidence.name is None else evidence.name)
        if step is None:
            return start
        if index is not None:
            lane = self._of_this_step(evidence, step) if index == step else self._of_next_step(evidence)
            if index < step or lane is None:
                return start
            return _Place(False, index, self._direction or self._change(evidence), lane)
        change = 0
        if self._is_same_time(evidence):
            lane = self._of_this_step(evidence, step)
            if lane is not None:
                return _Place(False, step, self._direction, lane)
        else:
            change = self._change(evidence)
        if self._is_over() or change * self._direction < 0 or self._is_other_table(evidence):
            return start
        lane = self._of_next_step(evidence)
        if lane is None:
            log.info("a trajectory starts at timestep %s: its conditioning is new", evidence.timestep)
            return start
        self._check_order(evidence, step)
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

    def _lanes_of(self, evidence: Evidence) -> dict[int | str, _Lane]:
        """The lanes that a call can be of, going by its name, or by inputs that stay the same: those that fit best."""
        if evidence.told:
            return {key: lane for key, lane in self._lanes.items() if key == evidence.name}
        named = {key: lane for key, lane in self._lanes.items() if lane.name == evidence.name}
        if evidence.name is None:
            same = {key: lane.same(evidence) for key, lane in named.items()}
            fitting = {key: lane for key, lane in named.items() if lane.steady is None or lane.steady <= same[key]}
            scores = {k: len(same[k] if lane.steady is None else lane.steady) for k, lane in fitting.items()}
            best = max(scores.values(), default=0)
            named = {key: lane for key, lane in fitting.items() if scores[key] == best}
        mine = tuple(mark.place for mark in evidence.marks)
        if not any(mine) and not any(any(lane.places()) for lane in named.values()):
            return named
        return {key: lane for key, lane in named.items() if lane.places() == mine}

    def _of_this_step(self, evidence: Evidence, step: int) -> int | str | None:
        """The lane of another call at the timestep of the step; None where the call must be of the next step."""
        lanes = self._lanes_of(evidence)
        waiting = [key for key, lane in lanes.items() if lane.called != step]
        if waiting and not self._reappears(evidence):
            return waiting[0]
        certain = evidence.step_index is None and self._moved_in_table(evidence) == 0
        if evidence.name is not None and lanes and (evidence.told or not certain):
            return None
        if all(lane.born == step for lane in lanes.values()):
            return self._new_lane(evidence)
        if len(lanes) == 1 and not certain and self._is_repeat(next(iter(lanes.values())), evidence):
            return None
        raise AmbiguousCall(
            f"a step at timestep {evidence.timestep} has more calls than the steps before, and their inputs do not say "
            f"which of them is new: {_FIX}"
        )

    def _is_repeat(self, lane: _Lane, evidence: Evidence) -> bool:
        """Whether a second call at one timestep is the lane's next step: all but its latents is the same."""
        same = lane.same(evidence)
        fixed = frozenset(range(len(evidence.marks))) - self._roles.latents
        return bool(self._roles.conditioning) and fixed <= same and not self._roles.latents <= same

    def _of_next_step(self, evidence: Evidence) -> int | str | None:
        """The lane of the first call of another step; None where its conditioning says that a trajectory starts."""
        lanes = self._lanes_of(evidence)
        if lanes:
            key, lane = next(iter(lanes.items()))
            same = lane.same(evidence)
            # What is made anew at each call is gone two calls later; what is still held belongs to calls of its own.
            held = any(lane.first[p].alive for p in lane.doubt)
            changed = (
                not (lane.steady or frozenset()) <= same or bool(lane.doubt & same) or held or self._reappears(evidence)
            )
            return None if changed and evidence.step_index is None else key
        unlike = evidence.name is None and any(lane.name is None for lane in self._lanes.values())
        window = any(mark.place for mark in evidence.marks) and self._knows(evidence)
        return self._new_lane(evidence) if window or not unlike or evidence.step_index is not None else None

    def _reappears(self, evidence: Evidence) -> bool:
        """Whether some conditioning was seen before, but is not a lane's last: then it is not made anew at each call, and
        neither are the calls in between of that lane."""
        if evidence.name is not None:
            return False
        last = {(p, lane.marks[p]) for lane in self._lanes.values() for p in self._roles.conditioning}
        return any((p, evidence.marks[p]) in self._seen - last for p in self._roles.conditioning)

    def _knows(self, evidence: Evidence) -> bool:
        """Whether all that stays the same in some lane is the same in a call."""
        return any(lane.steady is None or lane.steady <= lane.same(evidence) for lane in self._lanes.values())

    def _check_order(self, evidence: Evidence, step: int) -> None:
        """Refuses to go on if the finished step left out some of the lanes that only their order tells apart."""
        called = [lane for lane in self._lanes.values() if lane.called == step]
        missed = [lane for lane in self._lanes.values() if lane.called != step]
        if any(a.alike(b) for a in called for b in missed):
            raise AmbiguousCall(
                f"the step before timestep {evidence.timestep} had {len(called)} of the {len(self._lanes)} calls that steps "
                f"had before, and their inputs do not say which were left out: {_FIX}"
            )

    def _new_lane(self, evidence: Evidence) -> int | str:
        """The key of a further lane."""
        number = sum(lane.name == evidence.name for lane in self._lanes.values())
        if evidence.name is None:
            return number
        return f"{evidence.name}#{number}" if number else evidence.name

    def _too_many_lanes(self, evidence: Evidence) -> str:
        if evidence.name is not None:
            return (
                f"name={evidence.name!r} would be lane {self._max_lanes + 1} of one trajectory, and at most "
                f"{self._max_lanes} are allowed. Give cache_context the same few names at every step (such "
                "as 'cond' and 'uncond'), and call hero_fx.reset() where a new trajectory starts."
            )
        return (
            f"{self._max_lanes + 1} calls in a row with timestep={evidence.timestep}, or with conditioning that is new each "
            f"time; at most {self._max_lanes} are allowed. A denoising loop changes the timestep from step to step, and that "
            "is how steps are told apart. If these calls start new trajectories, call hero_fx.reset() before each; if they "
            "are of different requests, wrap each in hero_fx.session(...); if they are steps of one loop, "
            "name them with the model's cache_context(name, step_index=...) or hero_fx.calling(step_index=...)."
        )
