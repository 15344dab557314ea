"""Feature state: one set of tensors per (compiled graph, model, session, lane), allocated once, updated in place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from hero_fx.step_graphs import StateSpec

from .budget import Budget, Holder
from .calling import watch_state
from .evidence import Evidence, Owner
from .lane_state import LaneState, Stack
from .timestep import AmbiguousCall
from .tracker import Tracker
from .weights import Model

__all__ = ["StateStore", "Trajectory"]

_MOST_OWNERS = 16


@dataclass(slots=True, weakref_slot=True, eq=False)
class Trajectory:
    """Where one session's denoising loop stands in one model, and its feature state by lane."""

    tracker: Tracker
    lanes: dict[int | str, LaneState] = field(default_factory=dict)
    patterns: dict[int | str, tuple[int, ...]] = field(default_factory=dict)
    """Per lane, which calls of the trajectory were full so far (of how many parts of the batch): selections depend on it."""
    caches: bool = False
    """Whether a call of the present step was cached."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    used: int = 0
    """Tick of its last call."""
    running: int = 0
    """Calls that run now; of one batch there may be several."""
    owner: Owner | None = None
    """Where its calls come from; kept for the default session alone."""
    others: OrderedDict[Owner, Tracker] = field(default_factory=OrderedDict)
    """Trajectories of other threads or tasks that this one took the place of."""

    @property
    def nbytes(self) -> int:
        """Bytes of feature state held."""
        return sum(lane.nbytes for lane in list(self.lanes.values()))

    def evict(self) -> None:
        """Frees the state; the next call of each lane is full."""
        stacks = self.free()
        self.tracker.forget_features()
        for stack in stacks:
            stack.dissolve()

    def free(self) -> set[Stack]:
        """Frees the state; returns the stacks that it was in, which are to be dissolved."""
        lanes = list(self.lanes.values())
        self.lanes.clear()
        return {stack for lane in lanes if (stack := lane.free()) is not None}

    def settle(self) -> None:
        """Gives lanes tensors of their own that shared memory with lanes that are gone."""
        for lane in list(self.lanes.values()):
            lane.settle()

    def claim(self, owner: Owner, evidence: Evidence, new: Callable[[int], Tracker]) -> None:
        """Notes where a call without a session comes from.

        Raises:
            AmbiguousCall: it would go on with a trajectory whose calls come from elsewhere.
        """
        if self.owner is None or self.owner == owner:
            self.owner = owner
            return
        own = self.others.get(owner)
        if not self.tracker.starts(evidence) or not (own is None or own.starts(evidence)):
            raise AmbiguousCall(
                f"calls without a session come from {owner} and from {self.owner} in turns: if they are of several requests, "
                "each mixes with the others' trajectory. Enter hero_fx.session(...) in the function that calls the model, or "
                "use hero_fx.calling(session=...) around each call, also for one request whose calls run on several threads; "
                "after a warm-up on another thread call hero_fx.reset()"
            )
        self.others.pop(owner, None)
        self.others[self.owner] = self.tracker
        if len(self.others) > _MOST_OWNERS:
            self.others.popitem(last=False)
        self.owner, self.tracker = owner, new(self.tracker.trajectory)


class StateStore:
    """The trajectories of one compiled graph, by session and model."""

    def __init__(
        self, specs: Sequence[StateSpec], new_tracker: Callable[[int], Tracker], budget: Budget | None = None
    ) -> None:
        """`new_tracker` makes a tracker, given how many trajectories there were before; `budget` is shared with others."""
        self.specs = tuple(specs)
        self.budget = budget or Budget()
        self.new_tracker = new_tracker
        self.forgets = True
        """Whether a session without state may be forgotten; not where it matters how many trajectories it had."""
        self._trajectories: dict[tuple[str, Model], Trajectory] = {}
        self._lock = threading.RLock()  # freeing tensors may call back into it
        watch_state(self)
        self.budget.watch(self)

    def trajectory(self, session: str, model: Model) -> Trajectory:
        """A session's trajectory of a model, new if it has none."""
        with self._lock:
            key = session, model
            if key not in self._trajectories:
                self._trajectories[key] = Trajectory(self.new_tracker(0))
            return self._trajectories[key]

    def of_session(self, session: str) -> Iterator[tuple[Model, Trajectory]]:
        """The trajectories of one session."""
        with self._lock:
            found = [(model, t) for (name, model), t in self._trajectories.items() if name == session]
        yield from found

    def lane(self, trajectory: Trajectory, lane: int | str, *, fresh: bool) -> LaneState:
        """The state of a lane; `fresh` zeroes it in place, so that addresses stay what compiled graphs know."""
        if lane not in trajectory.lanes:
            # It takes the place of lanes that only past trajectories called: names such as "request 7" do not pile up.
            for old in trajectory.lanes.keys() - trajectory.patterns.keys():
                if (stack := trajectory.lanes.pop(old).free()) is not None:
                    stack.dissolve()
            with self.budget.room(sum(spec.nbytes for spec in self.specs), trajectory):
                trajectory.lanes[lane] = self.new_lane(trajectory)
        elif fresh:
            for tensor in trajectory.lanes[lane].tensors.values():
                tensor.zero_()
        return trajectory.lanes[lane]

    def new_lane(self, trajectory: Trajectory | None = None) -> LaneState:
        """State tensors of zeros; `trajectory`: whose they are, None for those of one call."""
        # Plain tensors even under torch.inference_mode: a later call outside of it must be able to update them.
        with torch.inference_mode(False):
            zeros = {spec.slot: torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) for spec in self.specs}
        return LaneState(zeros, trajectory)

    def drop(self, session: str | None = None) -> None:
        """Forgets one session, or all of them, and frees their state."""
        self._drop(lambda name, _: session is None or name == session)

    def drop_model(self, model: Model) -> None:
        """Forgets a model whose weights are gone."""
        self._drop(lambda _, other: other is model)

    def _drop(self, chosen: Callable[[str, Model], bool]) -> None:
        with self._lock:
            gone = [self._trajectories.pop(key) for key in list(self._trajectories) if chosen(*key)]
            stacks = set[Stack]()
            for trajectory in gone:
                if trajectory.lock.acquire(blocking=False):
                    try:
                        if not trajectory.running:  # else its state is freed when its call ends
                            stacks |= trajectory.free()
                            trajectory.tracker.reset()  # a call of another thread may have found it just before
                    finally:
                        trajectory.lock.release()
            for stack in stacks:
                stack.dissolve()

    def holders(self) -> list[Trajectory]:
        """All trajectories."""
        with self._lock:
            return list(self._trajectories.values())

    def forget(self, holder: Holder) -> None:
        """Forgets one trajectory, if it is here."""
        with self._lock:
            for key in [key for key, own in self._trajectories.items() if own is holder and self.forgets]:
                del self._trajectories[key]

    @property
    def nbytes(self) -> int:
        """Bytes of feature state held by all sessions."""
        return sum(trajectory.nbytes for trajectory in self.holders())

    @property
    def sessions(self) -> dict[str, int]:
        """Bytes held by each session; the empty name is the default one."""
        with self._lock:
            found = [(name, trajectory) for (name, _), trajectory in self._trajectories.items()]
        held: dict[str, int] = {}
        for name, trajectory in found:
            held[name] = held.get(name, 0) + trajectory.nbytes
        return held
