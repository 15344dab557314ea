"""Whose call it is: lanes, trajectories, requests and models that a timestep alone cannot tell apart.

Each test runs calls as a loop, a server or a pipeline makes them; what comes out must be bit for bit what the same calls
give alone, or an error that says what to do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import toys
from .support.loops import OPTIONS, STEPS, Loop, lone, made, plain_times, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# Lanes


@pytest.mark.parametrize("skipped", [{3, 4}, {1}, {0}, {6, 7, 8}], ids=str)
@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_guidance_that_is_switched_off_for_some_steps(first: str, skipped: set[int]) -> None:
    call, _ = made()
    times = plain_times()
    cond, uncond = Loop(call, 1, text(1)), Loop(call, 2, text(2))
    hero_fx.reset()
    cond.step(times[0]) if 0 in skipped else None
    if skipped == {0} and first == "uncond":
        # At the second step it could be a new trajectory, or texts that are new tensors at each call.
        uncond.step(times[1])
        with pytest.raises(hero_fx.AmbiguousCall, match="more calls than the steps before"):
            cond.step(times[1])
        return
    for step, t in list(enumerate(times))[0 in skipped :]:
        for loop in (cond, uncond) if first == "cond" else (uncond, cond):
            if loop is cond or step not in skipped:
                loop.step(t)
    assert toys.same(cond.outputs, lone(call, cond.start, times, text(1)))


def test_lanes_in_changing_order() -> None:
    call, backend = made()
    loops, times = [Loop(call, seed, text(seed)) for seed in (1, 2, 3)], plain_times()
    for step, t in enumerate(times):
        for i in range(3):
            loops[(i + step) % 3].step(t)
    assert backend.stats().cached_calls == 3 * 6
    for loop in loops:
        assert loop.words is not None
        assert toys.same(loop.outputs, lone(call, loop.start, times, loop.words))


def test_texts_that_are_new_tensors_at_each_call_go_by_their_order() -> None:
    call, backend = made(warmup=2)
    words, times = [text(1), text(2)], plain_times()

    def run() -> list[Loop]:
        loops = [Loop(call, seed, None) for seed in (1, 2)]
        for t in times:
            for loop, own in zip(loops, words, strict=True):
                loop.words = own.clone()
                loop.step(t)
        return loops

    with hero_fx.session("of its own"):
        run()  # where nothing can be confused, nothing is said
    with pytest.warns(UserWarning, match="cut short, and the next one starts further along, nothing tells the two"):
        loops = run()
    assert backend.stats().cached_calls == 2 * 2 * 5
    for loop, own in zip(loops, words, strict=True):
        assert toys.same(loop.outputs, lone(call, loop.start, times, own))


def test_calls_that_come_and_go_without_evidence_are_refused() -> None:
    call, _ = toys.made(**OPTIONS)
    loops, times = [Loop(call, seed, None) for seed in (1, 2)], plain_times()
    for step, t in enumerate(times[:4]):
        for loop in loops[: 1 if step == 3 else 2]:
            loop.step(t)
    with pytest.raises(hero_fx.AmbiguousCall, match=r"had 1 of the 2 calls.*hero_fx.calling\(lane=.*cache_context"):
        loops[0].step(times[4])
    hero_fx.reset()
    for step, t in enumerate(times[:4]):
        loops[0].step(t)
        if step == 3:
            with pytest.raises(hero_fx.AmbiguousCall, match="more calls than the steps before"):
                loops[1].step(t)


def windows(call: Any, left_out: dict[int, set[int]], *, views: bool, times: list[Tensor]) -> list[list[Tensor]]:
    """Sliding windows over one tensor of latents [2, 60, CHANNELS]: the outputs of each window."""
    whole, words = torch.cat([toys.latents(seed=1), toys.latents(seed=2), toys.latents(seed=3)], dim=1), text(1)
    outputs: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for step, t in enumerate(times):
            moved = whole.clone()
            for window, found in enumerate(outputs):
                part = slice(30 * window, 30 * window + 30)
                if window not in left_out.get(step, set()):
                    shown = whole[:, part] if views else whole[:, part].clone()
                    found.append(call(shown, t, words))
                    moved[:, part] = moved[:, part] - found[-1] / STEPS
            whole = moved
    return outputs


def test_sliding_windows_that_are_left_out_at_some_steps() -> None:
    call, backend = made()
    times = plain_times()
    expected = []
    for window in range(3):
        # A window that misses steps is computed from where it stands.
        with torch.no_grad():
            x, found = toys.latents(seed=window + 1), []
            for step, t in enumerate(times):
                if step not in (2, 5) or window != step % 3:
                    with hero_fx.calling(session=f"window {window}", step_index=step):
                        found.append(call(x, t, text(1)))
                    x = x - found[-1] / STEPS
        expected.append(found)
    hero_fx.reset()
    before = backend.stats().cached_calls
    ours = windows(call, {2: {2}, 5: {2}}, views=True, times=times)
    assert backend.stats().cached_calls > before
    assert all(map(toys.same, ours, expected))
    hero_fx.reset()
    with pytest.raises(hero_fx.AmbiguousCall, match="had 2 of the 3 calls"):
        windows(call, {2: {2}, 5: {2}}, views=False, times=times)


# Trajectories


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("evidence", ["text", "table"])
def test_a_run_that_stops_early_and_one_that_starts_lower(evidence: str, stop: int) -> None:
    call, backend = made()
    words = [text(1), text(2)] if evidence == "text" else [text(1)] * 2
    tables = [plain_times(), plain_times()] if evidence == "text" else [toys.times(STEPS), toys.times(STEPS)]
    first = Loop(call, 1, words[0])
    for t in tables[0][:stop]:
        first.step(t)
    second = Loop(call, 2, words[1])
    for t in tables[1][5:]:
        second.step(t)
    before = backend.stats()
    assert (before.full_calls + before.cached_calls) == stop + 4
    expected = lone(call, second.start, tables[1][5:], words[1])
    if stop == 1:
        # After a single step the second run's first step is full, and its second one starts the trajectory.
        assert toys.same(second.outputs[:1], expected[:1])
        expected[1:] = lone(call, second.start - expected[0] / STEPS, tables[1][6:], words[1])
    assert toys.same(second.outputs, expected)


def test_timesteps_that_repeat() -> None:
    call, backend = made()
    table = torch.tensor([999, 999, 999, 700, 700, 400, 100, 100, 50])
    for times in ([t.expand(2) for t in table], [t.expand(2).clone() for t in [*table[2:], *table[-1:] - 20]]):
        hero_fx.reset()
        loop = Loop(call, 1, text(1))
        before = backend.stats()
        for t in times:
            loop.step(t)
        after = backend.stats()
        assert after.full_calls + after.cached_calls - before.full_calls - before.cached_calls == len(times)
        assert toys.same(loop.outputs, lone(call, loop.start, times, text(1)))


def test_rows_at_different_timesteps() -> None:
    call, backend = made()
    with pytest.raises(hero_fx.AmbiguousCall, match=r"2 elements of the batch are at different timesteps \(100, 979\)"):
        Loop(call, 1, text(1)).step(torch.tensor([100, 979]))
    assert backend.stats().full_calls == 0
