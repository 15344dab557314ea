"""Feature state: one set of tensors per (compiled graph, session, lane), allocated once, updated in place by the graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from hero_fx.passes.emit import StateSlot

from .guard import TimestepGuard
from .schedule import Schedule
from .steps import StateSpec

__all__ = ["Session", "StateStore", "Trajectory", "current_session", "reset", "session"]

_CURRENT: ContextVar[str] = ContextVar("hero_fx_session", default="")
# Every store that is alive, so that reset() and Session.drop() reach the state of all compiled graphs.
_STORES: weakref.WeakSet[StateStore] = weakref.WeakSet()


@dataclass(slots=True)
class Trajectory:
    """Where one session's denoising loop stands in one compiled graph, and its feature state by lane."""

    guard: TimestepGuard
    lanes: dict[int | str, dict[StateSlot, torch.Tensor]] = field(default_factory=dict)
    patterns: dict[int | str, tuple[bool, ...]] = field(default_factory=dict)
    """Per lane, which calls of the trajectory were full so far: what the selections depend on."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def nbytes(self) -> int:
        """Bytes of feature state held."""
        return sum(t.nbytes for lane in list(self.lanes.values()) for t in lane.values())


class StateStore:
    """The trajectories of one compiled graph, by session."""

    def __init__(self, specs: Sequence[StateSpec], schedule: Schedule) -> None:
        self.specs = tuple(specs)
        self.schedule = schedule
        self._trajectories: dict[str, Trajectory] = {}
        self._lock = threading.Lock()
        _STORES.add(self)

    def trajectory(self, session: str) -> Trajectory:
        """The session's trajectory, new if it has none."""
        with self._lock:
            if session not in self._trajectories:
                self._trajectories[session] = Trajectory(TimestepGuard(self.schedule))
            return self._trajectories[session]

    def lane(self, trajectory: Trajectory, lane: int | str, *, fresh: bool) -> dict[StateSlot, torch.Tensor]:
        """The state of a lane; `fresh` zeroes it in place, so that addresses stay what compiled graphs know."""
        if lane not in trajectory.lanes:
            # It takes the place of lanes that only past trajectories called: names such as "request 7" do not pile up.
            for old in trajectory.lanes.keys() - trajectory.patterns.keys():
                del trajectory.lanes[old]
            # Plain tensors even under torch.inference_mode: a later call outside of it must be able to update them.
            with torch.inference_mode(False):
                trajectory.lanes[lane] = {
                    spec.slot: torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) for spec in self.specs
                }
        elif fresh:
            for tensor in trajectory.lanes[lane].values():
                tensor.zero_()
        return trajectory.lanes[lane]

    def drop(self, session: str | None = None) -> None:
        """Forgets one session, or all of them, and frees their state."""
        with self._lock:
            if session is None:
                self._trajectories.clear()
            else:
                self._trajectories.pop(session, None)

    @property
    def nbytes(self) -> int:
        """Bytes of feature state held by all sessions."""
        with self._lock:
            return sum(t.nbytes for t in self._trajectories.values())

    @property
    def sessions(self) -> tuple[str, ...]:
        """Sessions that hold state; the empty name is the default one."""
        with self._lock:
            return tuple(self._trajectories)


@dataclass(frozen=True, slots=True)
class Session:
    """A request with its own trajectory and feature state; see `session`."""

    id: str
    _tokens: list[object] = field(default_factory=list, repr=False, compare=False)

    def __enter__(self) -> Session:
        self._tokens.append(_CURRENT.set(self.id))
        return self

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self._tokens.pop())  # type: ignore[arg-type]

    def drop(self) -> None:
        """Forgets the session's trajectory and frees its state in every compiled graph."""
        for store in list(_STORES):
            store.drop(self.id)


def session(id: str) -> Session:
    """A context in which calls of compiled models belong to the request `id`.

    Requests that are denoised in turns each need their own trajectory and features::

        with hero_fx.session("request-42"):
            noise = model(latents, timestep=t)
        ...
        hero_fx.session("request-42").drop()  # done: frees its state

    Calls outside of any session share one default trajectory. The current session is a context variable: threads and
    asyncio tasks each have their own.

    Raises:
        ValueError: `id` is not a non-empty string.
    """
    if not isinstance(id, str) or not id:
        raise ValueError(f"id={id!r} must be a non-empty string that names the request")
    return Session(id)


def current_session() -> str:
    """Id of the session of this context; empty outside of any."""
    return _CURRENT.get()


def reset() -> None:
    """Forgets all trajectories of all sessions in every compiled graph and frees their state; compiled code stays."""
    for store in list(_STORES):
        store.drop()
