"""The lanes of a trajectory: which of the calls of a step a call is, going by its name or by inputs that stay the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .evidence import Evidence, Mark, Roles
from .timestep import AmbiguousCall

__all__ = ["Lane", "Lanes", "by_memory_alone"]

log = logging.getLogger(__name__)

_FIX = (
    "wrap each call of the model in hero_fx.calling(lane=..., step_index=...), or in its cache_context(name, step_index=...); "
    "after a call that belongs to no trajectory (a warm-up) call hero_fx.reset()"
)


@dataclass(slots=True)
class Lane:
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
    """Of its last call that was no batch's: memory of a batch tells nothing. Empty as long as there was none."""
    steady: frozenset[int] | None = None
    """Positions of marks that were the same at its first two steps; None before the second."""
    doubt: frozenset[int] = frozenset()
    """Conditioning that was another at its second step than at its first: made anew, or of a new trajectory?"""
    first: tuple[Mark, ...] = ()
    """Of its first call, as long as there is a doubt."""

    def same(self, evidence: Evidence) -> frozenset[int]:
        """The positions at which a call shows what this lane's last call showed."""
        pairs = zip(self.marks, evidence.marks, strict=bool(self.marks))
        return frozenset(p for p, (mine, other) in enumerate(pairs) if mine == other)

    def places(self) -> tuple[object, ...]:
        """The parts of larger tensors that its last call showed."""
        return tuple(mark.place for mark in self.marks)

    def alike(self, other: Lane) -> bool:
        """Whether nothing but their order tells the calls of two lanes apart."""
        if not (self.marks and other.marks):
            return self.name == other.name
        known = self.steady if other.steady is None else other.steady
        if known is None or (self.steady is not None and self.steady != known):
            return known is None and self.name == other.name and self.places() == other.places()
        same = all(self.marks[p] == other.marks[p] for p in known)
        return same and self.name == other.name and self.places() == other.places()


class Lanes:
    """The lanes of one trajectory, and the conditioning it has shown so far."""

    def __init__(self, roles: Roles, most: int) -> None:
        self._roles = roles
        self._most = most
        self._lanes: dict[int | str, Lane] = {}
        self._seen: set[tuple[int, Mark]] = set()  # all conditioning, by position

    def get(self, key: int | str) -> Lane | None:
        """The lane of this key, if it was called before."""
        return self._lanes.get(key)

    def add(self, key: int | str, evidence: Evidence, step: int) -> None:
        """A lane's first call."""
        self._lanes[key] = Lane(step, step, 0, 1, step, evidence.name, () if evidence.batched else evidence.marks)

    def lose(self) -> None:
        """The features of all lanes are gone."""
        for lane in self._lanes.values():
            lane.fulls = lane.gap = 0

    def saw(self, evidence: Evidence) -> None:
        """Remembers the conditioning of a call."""
        if evidence.batched:
            return
        self._seen.update((p, evidence.marks[p]) for p in self._roles.conditioning)

    def learn(self, lane: Lane, evidence: Evidence, step: int, *, sure: bool) -> bool:
        """Notes which inputs of a lane stay the same; true where that leaves a doubt, so that the call must be full."""
        if lane.steady is not None:
            lane.doubt, lane.first = frozenset(), ()
            return False
        if evidence.batched or not lane.marks:
            return False
        lane.steady, lane.first = lane.same(evidence), lane.marks
        told = evidence.step_index is not None or sure
        lane.doubt = frozenset() if told else self._roles.conditioning - lane.steady
        if lane.doubt:
            log.info("step %d is full: some of its conditioning is not that of the step before", step)
        return bool(lane.doubt)

    def made_anew(self) -> bool:
        """Whether some lane has conditioning that lies in other memory at each call, and none that stays."""
        return any(
            lane.steady is not None and not lane.doubt and lane.steady.isdisjoint(self._roles.conditioning)
            for lane in self._lanes.values()
            if self._roles.conditioning
        )

    def _fitting(self, evidence: Evidence) -> dict[int | str, Lane]:
        """The lanes that a call can be of, going by its name, or by inputs that stay the same: those that fit best."""
        if evidence.told:
            return {key: lane for key, lane in self._lanes.items() if key == evidence.name}
        named = {key: lane for key, lane in self._lanes.items() if lane.name == evidence.name}
        if evidence.batched:
            if len(named) > 1:
                raise AmbiguousCall(
                    f"a call of a batch has no lane, and the steps of its session had {len(named)} calls without one before: "
                    "name each, hero_fx.calling(lane=...)"
                )
            return named
        if evidence.name is None:
            same = {key: lane.same(evidence) for key, lane in named.items()}
            fitting = {key: lane for key, lane in named.items() if lane.steady is None or lane.steady <= same[key]}
            scores = {k: len(same[k] if lane.steady is None else lane.steady) for k, lane in fitting.items()}
            best = max(scores.values(), default=0)
            named = {key: lane for key, lane in fitting.items() if scores[key] == best}
        mine = tuple(mark.place for mark in evidence.marks)
        if not any(mine) and not any(any(lane.places()) for lane in named.values()):
            return named
        return {key: lane for key, lane in named.items() if not lane.marks or lane.places() == mine}

    def of_this_step(self, evidence: Evidence, step: int, *, same_entry: bool) -> int | str | None:
        """The lane of another call at the timestep of the step; None where the call must be of the next step."""
        lanes = self._fitting(evidence)
        waiting = [key for key, lane in lanes.items() if lane.called != step]
        if waiting and not self._reappears(evidence):
            return waiting[0]
        certain = evidence.step_index is None and same_entry
        if evidence.name is not None and lanes and (evidence.told or not certain):
            return None
        if all(lane.born == step for lane in lanes.values()):
            return self._new_key(evidence)
        if len(lanes) == 1 and not certain and self._is_repeat(next(iter(lanes.values())), evidence):
            return None
        raise AmbiguousCall(
            f"a step at timestep {evidence.timestep} has more calls than the steps before, and their inputs do not say "
            f"which of them is new: {_FIX}"
        )

    def _is_repeat(self, lane: Lane, evidence: Evidence) -> bool:
        """Whether a second call at one timestep is the lane's next step: all but its latents is the same."""
        same = lane.same(evidence)
        fixed = frozenset(range(len(evidence.marks))) - self._roles.latents
        return bool(self._roles.conditioning) and fixed <= same and not self._roles.latents <= same

    def of_next_step(self, evidence: Evidence) -> int | str | None:
        """The lane of the first call of another step; None where its conditioning says that a trajectory starts."""
        lanes = self._fitting(evidence)
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
        return self._new_key(evidence) if window or not unlike or evidence.step_index is not None else None

    def _reappears(self, evidence: Evidence) -> bool:
        """Whether some conditioning was seen before, but is not a lane's last: then it is not made anew at each call, and
        neither are the calls in between of that lane."""
        if evidence.name is not None or evidence.batched:
            return False
        last = {(p, lane.marks[p]) for lane in self._lanes.values() if lane.marks for p in self._roles.conditioning}
        return any((p, evidence.marks[p]) in self._seen - last for p in self._roles.conditioning)

    def _knows(self, evidence: Evidence) -> bool:
        """Whether all that stays the same in some lane is the same in a call."""
        return any(lane.steady is None or lane.steady <= lane.same(evidence) for lane in self._lanes.values())

    def check_order(self, evidence: Evidence, step: int) -> None:
        """Refuses to go on if the finished step left out some of the lanes that only their order tells apart."""
        called = [lane for lane in self._lanes.values() if lane.called == step]
        missed = [lane for lane in self._lanes.values() if lane.called != step]
        if any(a.alike(b) for a in called for b in missed):
            raise AmbiguousCall(
                f"the step before timestep {evidence.timestep} had {len(called)} of the {len(self._lanes)} calls that steps "
                f"had before, and their inputs do not say which were left out: {_FIX}"
            )

    def _new_key(self, evidence: Evidence) -> int | str:
        """The key of a further lane."""
        number = sum(lane.name == evidence.name for lane in self._lanes.values())
        if evidence.name is None:
            return number
        return f"{evidence.name}#{number}" if number else evidence.name

    def check_room(self, evidence: Evidence) -> None:
        """Refuses a further lane where there are too many."""
        if len(self._lanes) < self._most:
            return
        if evidence.name is not None:
            raise AmbiguousCall(
                f"name={evidence.name!r} would be lane {self._most + 1} of one trajectory, and at most "
                f"{self._most} are allowed. Give cache_context the same few names at every step (such "
                "as 'cond' and 'uncond'), and call hero_fx.reset() where a new trajectory starts."
            )
        raise AmbiguousCall(
            f"{self._most + 1} calls in a row with timestep={evidence.timestep}, or with conditioning that is new each "
            f"time; at most {self._most} are allowed. A denoising loop changes the timestep from step to step, and that "
            "is how steps are told apart. If these calls start new trajectories, call hero_fx.reset() before each; if they "
            "are of different requests, wrap each in hero_fx.session(...); if they are steps of one loop, "
            "name them with the model's cache_context(name, step_index=...) or hero_fx.calling(step_index=...)."
        )


def by_memory_alone(evidence: Evidence) -> AmbiguousCall:
    """What is said of a call that nothing but its memory tells apart, where several processes must decide alike."""
    return AmbiguousCall(
        f"the conditioning of the call at timestep {evidence.timestep} lies in other memory than before. That may be so in one "
        "process and not in another, and all that run this model together must decide alike: call hero_fx.reset() in each "
        "where a trajectory starts before another has ended, or say steps with hero_fx.calling(lane=..., step_index=...)"
    )
