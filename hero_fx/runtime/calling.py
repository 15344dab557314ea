"""Whose call it is: sessions, and an explicit word for one call.

Both are context variables, so threads and asyncio tasks each have their own. What a context variable cannot do is
follow a call to a thread of a pool, or survive a `yield` of a generator whose pieces run in different contexts; a call
that comes without a session while one is entered elsewhere is therefore refused, not put into the default one.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Protocol

from hero_fx.arguments import whole_number

from .leaving import leave
from .timestep import AmbiguousCall

__all__ = ["Calling", "Session", "calling", "current_calling", "current_session", "reset", "session", "watch_state"]


class HoldsState(Protocol):
    """What holds feature state by session."""

    def drop(self, session: str | None = None) -> None:
        """Forgets one session, or all, and frees their state."""


# All that holds state and is alive, so that reset() and Session.drop() reach every compiled graph.
_HOLDERS: weakref.WeakSet[HoldsState] = weakref.WeakSet()


def watch_state(holder: HoldsState) -> None:
    """`hero_fx.reset()` and `Session.drop()` will reach `holder` as long as it lives."""
    _HOLDERS.add(holder)


@dataclass(eq=False, slots=True)
class _Entry:
    """One `with` block of a session."""

    session: str
    below: _Entry | None
    generator: FrameType | None
    """The frame of the generator that the block is in; None in a plain function."""
    token: Token[_Entry | None] | None = None
    left: bool = False


_CURRENT: ContextVar[_Entry | None] = ContextVar("hero_fx_session", default=None)


class _Entered:
    """The blocks that are entered and not left, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}

    def add(self, entry: _Entry) -> None:
        with self._lock:
            self._entries[id(entry)] = entry

    def remove(self, entry: _Entry) -> None:
        with self._lock:
            self._entries.pop(id(entry), None)

    def any(self) -> str | None:
        """The session of the block entered last."""
        with self._lock:
            return next(reversed(self._entries.values())).session if self._entries else None


_ENTERED = _Entered()


@dataclass(frozen=True, slots=True)
class Session:
    """A request with its own trajectory and feature state; see `session`."""

    id: str
    _entries: list[_Entry] = field(default_factory=list, repr=False, compare=False)

    def __enter__(self) -> Session:
        entry = _Entry(self.id, _current_entry(), _generator_frame(sys._getframe(1)))
        entry.token = _CURRENT.set(entry)
        self._entries.append(entry)
        _ENTERED.add(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        current = _current_entry()
        entry = current if current in self._entries else self._entries[-1]  # threads may share this object
        assert entry is not None
        self._entries.remove(entry)
        _ENTERED.remove(entry)
        entry.left, entry.generator = True, None
        assert entry.token is not None
        # Entered in another context (a generator whose pieces ran in different threads), the session was never in this one,
        # and calls in between were refused.
        with suppress(ValueError):
            _CURRENT.reset(entry.token)
        if kind is not None:
            self.drop()

    def drop(self) -> None:
        """Forgets the session's trajectory and frees its state in every compiled graph."""
        for holder in list(_HOLDERS):
            holder.drop(self.id)


def session(id: str) -> Session:
    """A context in which calls of compiled models belong to the request `id`.

    Requests that are denoised in turns each need their own trajectory and features::

        with hero_fx.session("request-42"):
            noise = model(latents, timestep=t)
        ...
        hero_fx.session("request-42").drop()  # done: frees its state

    A block that is left by an exception (a cancelled task, a failed call) drops its session.

    Calls outside of any session share one default trajectory, and must then come from one thread or task. The current
    session is a context variable: threads and asyncio tasks each have their own, and `asyncio.to_thread` hands it on
    (`run_in_executor` does not). Do not `yield` inside the block: use `hero_fx.calling` around each call there.

    Raises:
        ValueError: `id` is not a non-empty string.
    """
    if not isinstance(id, str) or not id:
        raise ValueError(f"id={id!r} must be a non-empty string that names the request")
    return Session(id)


def _generator_frame(frame: FrameType) -> FrameType | None:
    flags = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    return frame if frame.f_code.co_flags & flags else None


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _current_entry() -> _Entry | None:
    """The innermost block of this context. Generators that were left out of order may have put back one that was left."""
    entry = _CURRENT.get()
    while entry is not None and entry.left:
        entry = entry.below
    return entry


def current_session() -> str:
    """Id of the session of this call; empty outside of any.

    Raises:
        AmbiguousCall: a session is entered, but not in this context, or the one in this context was left behind by
            another generator.
    """
    word = current_calling()
    if word is not None and word.session is not None:
        return word.session
    entry = _current_entry()
    if entry is None:
        elsewhere = _ENTERED.any()
        if elsewhere is None:
            return ""
        raise AmbiguousCall(
            f"this call is in no session, while hero_fx.session({elsewhere!r}) is entered elsewhere: it does not reach a "
            "thread of a pool, nor the part of a generator behind a yield. Enter the session in the function that calls the "
            "model (asyncio.to_thread hands it on, run_in_executor does not), or use hero_fx.calling(session=...) around "
            "each call; once sessions are in use, every call needs one"
        )
    if entry.generator is not None and entry.below is not None and all(f is not entry.generator for f in _callers()):
        raise AmbiguousCall(
            f"hero_fx.session({entry.session!r}) was entered in a generator that is not running now, within "
            f"hero_fx.session({entry.below.session!r}): generators that take turns leave their sessions to each other at a "
            "yield. Use hero_fx.calling(session=...) around each call"
        )
    return entry.session


_CALLING: ContextVar[Calling | None] = ContextVar("hero_fx_calling", default=None)


@dataclass(eq=False, slots=True)
class Calling:
    """What is said of one call; see `calling`."""

    session: str | None
    lane: str | None
    step_index: int | None
    num_steps: int | None
    _token: Token[Calling | None] | None = None
    _spent: bool = False
    _seen: set[int] = field(default_factory=set)

    def __enter__(self) -> Calling:
        outer = _CALLING.get()
        if outer is not None:
            raise RuntimeError(
                f"hero_fx.calling is entered within hero_fx.calling(session={outer.session!r}, lane={outer.lane!r}): it is "
                "for one call of the model and must not stay entered across a yield; leave the outer one first"
            )
        self.spend()
        self._token = _CALLING.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        leave("calling", _CALLING, self._token, failed=kind is not None)

    def spend(self) -> None:
        """Notes that it is entered, by itself or in a batch. Raises RuntimeError at the second time."""
        if self._spent:
            raise RuntimeError("this hero_fx.calling(...) was used before: make one for each call of the model")
        self._spent = True

    def use(self, model: int) -> None:
        """Notes a call of a model. Raises RuntimeError at the second one."""
        if model in self._seen:
            raise RuntimeError(
                "the model was called twice within one hero_fx.calling(...): it is for one call; enter another one for each"
            )
        self._seen.add(model)


def calling(
    *,
    session: str | None = None,
    lane: str | int | None = None,
    step_index: int | None = None,
    num_steps: int | None = None,
) -> Calling:
    """Says what one call of a compiled model is, in place of what would be told from the call itself.

    ::

        for i, t in enumerate(timesteps):
            with hero_fx.calling(session="request-42", lane="cond", step_index=i, num_steps=len(timesteps)):
                noise = model(latents, timestep=t, ...)

    Entered around one call, never across a `yield`. It wins over `hero_fx.session`, over diffusers' `cache_context`, and
    over everything that is told from timesteps and inputs. What is not given is told as ever.

    Args:
        session: the request; each has its own trajectory and features.
        lane: which of the calls of a step (`"cond"`, `"uncond"`, a window); each has features of its own.
        step_index: index of the step, from 0. A lower one than before, or the same one with the same lane, starts a
            trajectory.
        num_steps: steps of this trajectory, in place of `hero_fx.backend(num_steps=...)`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: on entering, within another `calling`; at the call, for the second call of one model.
    """
    if session is not None and (not isinstance(session, str) or not session):
        raise ValueError(f"session={session!r} must be a non-empty string that names the request")
    if lane is not None and (not isinstance(lane, str | int) or isinstance(lane, bool) or lane == ""):
        raise ValueError(f"lane={lane!r} must be a non-empty string or a whole number that names the call of a step")
    for name, value, least in (("step_index", step_index, 0), ("num_steps", num_steps, 1)):
        if value is not None:
            whole_number(name, value, least)
    if step_index is not None and num_steps is not None and step_index >= num_steps:
        raise ValueError(
            f"step_index={step_index} is not below num_steps={num_steps}; steps are counted from 0 to {num_steps - 1}"
        )
    return Calling(session, None if lane is None else str(lane), step_index, num_steps)


def current_calling() -> Calling | None:
    """What is said of this call, if anything is."""
    return _CALLING.get()


def reset() -> None:
    """Forgets all trajectories of all sessions in every compiled graph and frees their state; compiled code stays."""
    for holder in list(_HOLDERS):
        holder.drop()
