"""Sessions: requests that are denoised in turns or in threads own their trajectories and state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.runtime.timestep import TimestepReader

from .support import toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STEPS = 9


def test_sessions_in_turns() -> None:
    call, backend = toys.made()
    times, starts = toys.times(STEPS), [toys.latents(seed=1), toys.latents(seed=2)]

    def within(name: str) -> Callable[..., Any]:
        def run(x: Tensor, t: Tensor) -> Any:
            with hero_fx.session(name):
                return call(x, t)

        return run

    both = toys.in_turns([within("a"), within("b")], starts, times)
    per_lane = backend.graphs[0].state_bytes
    assert (backend.stats().sessions, backend.stats().state_bytes) == (2, 2 * per_lane)
    hero_fx.session("a").drop()
    assert (backend.stats().sessions, backend.stats().state_bytes) == (1, per_lane)
    for outputs, start in zip(both, starts, strict=True):
        assert toys.same(outputs, toys.alone(call, backend, start, times))


@pytest.mark.parametrize("names", [["a"] * 3, ["a", "b", "c"]], ids=["one session", "three sessions"])
def test_calls_of_a_session_queue_up_and_sessions_do_not(names: list[str]) -> None:
    inside: list[int] = []
    most: list[int] = []
    together = threading.Barrier(3)

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inside.append(1)
            most.append(len(inside))
            if len(set(names)) > 1:
                together.wait(30)
            time.sleep(0.02)
            inside.pop()
            return gm.forward(*args)

        return run

    call, _ = toys.made(inner=inner)

    def work(name: str) -> None:
        with hero_fx.session(name):
            call(toys.latents(), toys.times(1)[0])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 3
    assert max(most) == len(set(names))


def test_no_two_threads_write_the_code_of_a_step() -> None:
    written: list[bool] = []

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        written.append("_lazy_forward" not in str(gm.forward))
        return gm.forward  # type: ignore[no-any-return]

    call, _ = toys.compiled(timestep="timestep", inner=inner)
    with torch.no_grad():
        call(toys.latents(), toys.times(1)[0])
    assert written == [True, True]


def test_sessions_nest_and_need_a_name() -> None:
    call, backend = toys.made(timestep="timestep")
    with torch.no_grad(), hero_fx.session("outer"):
        with hero_fx.session("inner"):
            call(toys.latents(), toys.times(1)[0])
        store = backend.steppers[0].store
        assert list(store.sessions) == ["inner"]
        call(toys.latents(), toys.times(1)[0])
    assert list(store.sessions) == ["inner", "outer"]
    with pytest.raises(ValueError, match="id='' must be a non-empty string"):
        hero_fx.session("")


def test_threads_with_sessions() -> None:
    call, backend = toys.made()
    times, count = toys.times(12), 6
    starts = [toys.latents(seed=seed) for seed in range(count)]
    toys.loop(call, starts[0], times)
    expected = [toys.alone(call, backend, start, times) for start in starts]
    before = backend.stats()
    backend.steppers[0].reader = TimestepReader(tables_on_cpu=True)
    results: dict[int, list[Tensor]] = {}
    ready = threading.Barrier(count)

    def work(i: int) -> None:
        ready.wait()
        with hero_fx.session(f"request-{i}"):
            results[i] = toys.loop(call, starts[i], toys.times(12))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(toys.same(results[i], expected[i]) for i in range(count))
    after = backend.stats()
    assert after.full_steps + after.cached_steps - before.full_steps - before.cached_steps == count * len(times)
