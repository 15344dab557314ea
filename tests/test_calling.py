"""`hero_fx.calling`: what the caller says goes before everything that is concluded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hero_fx

from .support import toys
from .support.loops import OPTIONS, STEPS, Loop, guided, plain_times, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_calling_wins_over_everything() -> None:
    call, backend = guided(num_steps=50)
    times, noise = plain_times(), plain_times()[::-1]
    loops = {lane: Loop(call, seed, text(seed)) for lane, seed in (("cond", 1), ("uncond", 2))}
    for step in range(STEPS):
        for lane, loop in loops.items():
            with (
                hero_fx.session("another"),
                hero_fx.calling(session="request", lane=lane, step_index=step, num_steps=STEPS),
            ):
                loop.words = text({"cond": 1, "uncond": 2}[lane])  # a new tensor
                loop.step(noise[step] if step % 2 else times[step])  # timesteps that go back and forth
    assert backend.stats().sessions == 1
    steppers = backend.steppers
    assert [m.number for m, _ in steppers[0].store.of_session("request")] == [0]
    # Full: 0 3 6, and the last of nine.
    assert (backend.stats().full_steps, backend.stats().full_calls, backend.stats().cached_calls) == (4, 8, 10)


def test_calling_tells_what_nothing_else_tells() -> None:
    call, _ = toys.compiled(**OPTIONS)
    loops, times = [Loop(call, seed, None) for seed in (1, 2)], plain_times()
    for step, t in enumerate(times):
        for lane in (0, 1):
            if lane == 1 or step not in (3, 4, 7):
                with hero_fx.calling(lane=lane, step_index=step):
                    loops[lane].step(t)
    hero_fx.reset()
    assert toys.same(loops[1].outputs, toys.loop(call, loops[1].start, times))


def test_calling_is_for_one_call() -> None:
    call, _ = guided()
    loop, t = Loop(call, 1, text(1)), plain_times()[0]
    with hero_fx.calling(session="a"):
        loop.step(t)
        with pytest.raises(RuntimeError, match=r"called twice within one hero_fx.calling"):
            loop.step(t)
    with (
        pytest.raises(RuntimeError, match=r"within hero_fx.calling\(session='a'.*not stay entered across a yield"),
        hero_fx.calling(session="a"),
        hero_fx.calling(session="b"),
    ):
        pass
    used = hero_fx.calling()
    with used:
        pass
    with pytest.raises(RuntimeError, match="was used before"), used:
        pass
    hero_fx.reset()
    with hero_fx.calling(num_steps=5):
        loop.step(t)
    with (
        pytest.raises(ValueError, match=r"num_steps=6, but this.*began with num_steps=5"),
        hero_fx.calling(num_steps=6),
    ):
        loop.step(plain_times()[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session": ""}, "session='' must be a non-empty string"),
        ({"session": 3}, "session=3 must be a non-empty string"),
        ({"lane": ""}, "lane='' must be a non-empty string or a whole number"),
        ({"lane": True}, "lane=True must be"),
        ({"step_index": -1}, "step_index=-1 must be a whole number of at least 0"),
        ({"num_steps": 0}, "num_steps=0 must be a whole number of at least 1"),
        ({"step_index": 5, "num_steps": 5}, "step_index=5 is not below num_steps=5"),
    ],
)
def test_calling_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hero_fx.calling(**options)


def test_what_cannot_be_told_is_computed_in_full_where_errors_are_not_wanted() -> None:
    call, backend = guided(strict=False)
    model = call._orig_mod
    with torch.no_grad():
        x, t, words = toys.latents(), torch.tensor([100, 979]), text(1)
        with pytest.warns(UserWarning, match="computes a call in full and caches nothing of it: the 2 elements"):
            out = call(x, t, words)
        torch.testing.assert_close(out, model(x, t, words))
        for _ in range(3):  # said once
            torch.testing.assert_close(call(x, t, words), model(x, t, words))
        torch.testing.assert_close(call(x, t * torch.nan, words), model(x, t * torch.nan, words), equal_nan=True)
    stats = backend.stats()
    assert (stats.full_calls, stats.cached_calls, stats.refused_calls, stats.state_bytes) == (5, 0, 5, 0)
