"""`max_state_bytes`: sessions share a bound on feature state, and one whose state was freed goes on rightly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.runtime.budget import Budget, OverBudget

from .support import toys

STEPS = 9
FULL = [True, True, False, True, False, True, False, True, False]
"""Of the toys' schedule."""


def bounded(lanes: int, **options: Any) -> tuple[Any, hero_fx.Backend]:
    """A toy whose sessions may hold as many lanes together."""
    return toys.made(max_state_bytes=lanes * toys.state_bytes(**options), **options)


def run(call: Any, name: str, x: Tensor, time: Tensor) -> Tensor:
    """One call of a session, without gradients."""
    with torch.no_grad(), hero_fx.session(name):
        result: Tensor = call(x, time)
        return result


def test_the_session_used_least_recently_goes_first() -> None:
    call, backend = bounded(2)
    times = toys.times(STEPS)
    for step in range(3):
        for name in ("a", "b"):
            run(call, name, toys.latents(seed=1), times[step])
    assert backend.stats().evictions == 0
    run(call, "a", toys.latents(seed=1), times[3])
    run(call, "c", toys.latents(seed=1), times[0])
    stats, per_lane = backend.stats(), backend.graphs[0].state_bytes
    assert stats.bytes_by_session == {"a": per_lane, "b": 0, "c": per_lane}
    assert (stats.evictions, stats.state_bytes, stats.sessions) == (1, 2 * per_lane, 3)


def test_a_session_whose_state_was_freed_goes_on_with_a_full_step() -> None:
    """From there it is what a trajectory gives that misses the features: the next step is full, the schedule as ever."""
    model, times = toys.toy(), toys.times(STEPS)
    call, backend = bounded(1)
    for at in range(1, STEPS):
        x, kinds, evictions = toys.latents(seed=1), [], backend.stats().evictions
        for step, time in enumerate(times):
            if step == at:
                run(call, "other", toys.latents(seed=2), times[0])
            before = backend.stats().full_calls
            output = run(call, "request", x, time)
            kinds.append(backend.stats().full_calls > before)
            if kinds[-1]:
                torch.testing.assert_close(output, model(x, time), rtol=1e-5, atol=1e-5)
            x = x - output / STEPS
        assert kinds == [full or step == at for step, full in enumerate(FULL)], f"freed before step {at}"
        assert backend.stats().evictions == evictions + 2, f"freed before step {at}"
        backend.reset()


def test_sessions_that_are_never_dropped_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those whose state was freed, the place of a few is remembered; an older one starts a trajectory anew."""
    monkeypatch.setattr("hero_fx.runtime.budget.MOST_EVICTED", 3)
    call, backend = bounded(1)
    times, x = toys.times(STEPS), toys.latents(seed=1)
    for name in "abcdefgh":
        run(call, name, x, times[0])
    assert set(backend.stats().bytes_by_session) <= set("defgh")
    assert len(backend.stats().bytes_by_session) == 4
    before = backend.stats().full_calls
    torch.testing.assert_close(run(call, "a", x, times[2]), toys.toy()(x, times[2]), rtol=1e-5, atol=1e-5)
    assert backend.stats().full_calls == before + 1


def test_features_of_before_are_not_extrapolated_from() -> None:
    """After its state was freed a session has one full step, so there is no difference yet: features are reused."""
    call, _ = bounded(1, policy="taylorseer", grid=None)
    x, times = toys.latents(seed=1), toys.times(STEPS)
    for step in range(3):
        run(call, "request", x, times[step])
    run(call, "other", x, times[0])
    ours = [run(call, "request", x, times[step]) for step in (3, 4)]  # full, cached
    reuse, _ = toys.made(policy="fora", grid=None, warmup=1)
    with torch.no_grad():
        theirs = [reuse(x, times[step]) for step in (3, 4)]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_or_computed_in_full() -> None:
    for strict in (True, False):
        call, backend = toys.made(max_state_bytes=100, strict=strict)
        if strict:
            with pytest.raises(
                RuntimeError, match=r"max_state_bytes=100: a call needs \d+ bytes of feature state more"
            ):
                toys.loop(call, toys.latents(), toys.times(1))
        else:
            with pytest.warns(UserWarning, match="computes a call in full.*max_state_bytes=100"):
                (output,) = toys.loop(call, toys.latents(), toys.times(1))
            torch.testing.assert_close(output, toys.toy()(toys.latents(), toys.times(1)[0]), rtol=1e-5, atol=1e-5)
            assert backend.stats().state_bytes == 0


class Held:
    """Something that holds state."""

    def __init__(self) -> None:
        self.used, self.nbytes, self.running, self.lock = 0, 0, 0, threading.RLock()

    def evict(self) -> None:
        self.nbytes = 0

    def settle(self) -> None: ...

    def holders(self) -> list[Held]:
        return [self]

    def forget(self, holder: object) -> None:
        raise AssertionError("nothing is forgotten here")


def test_state_that_is_being_allocated_counts() -> None:
    """Two sessions that start at once do not both get the room that is there for one."""
    budget, first, second = Budget(100), Held(), Held()
    budget.watch(first)
    budget.watch(second)
    errors: list[Exception] = []

    def start() -> None:
        try:
            with second.lock, budget.room(60, second):
                second.nbytes = 60
        except OverBudget as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    with first.lock:
        with budget.room(60, first):
            thread.start()
            thread.join(0.2)  # it waits
            first.nbytes = 60
        thread.join(30)
    assert (first.nbytes, second.nbytes, len(errors)) == (60, 0, 1)
    with second.lock, budget.room(60, second):  # the first one's call is over
        second.nbytes = 60
    assert (first.nbytes, second.nbytes, budget.evictions) == (0, 60, 1)


def test_an_abort_drops_the_session() -> None:
    call, backend = toys.made()

    async def request(name: str) -> AsyncIterator[Tensor]:
        for time in toys.times(STEPS):
            with hero_fx.calling(session=name):
                yield call(toys.latents(), time)

    async def cancelled() -> None:
        with hero_fx.session("cancelled"):
            call(toys.latents(), toys.times(1)[0])
            await asyncio.sleep(60)

    async def serve() -> None:
        task = asyncio.create_task(cancelled())
        await asyncio.sleep(0)
        assert backend.stats().bytes_by_session.keys() == {"cancelled"}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with torch.no_grad():
        asyncio.run(serve())
    assert (backend.stats().sessions, backend.stats().state_bytes) == (0, 0)
