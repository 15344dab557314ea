"""Whose call it is: lanes, trajectories, requests and models that a timestep alone cannot tell apart.

Each test runs calls as a loop, a server or a pipeline makes them; what comes out must be bit for bit what the same calls
give alone, or an error that says what to do.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys

STEPS = 9
OPTIONS: dict[str, Any] = {"policy": "taylorseer", "interval": 3, "warmup": 1, "grid": None, "inner": tiny.INNER}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def text(seed: int) -> Tensor:
    return torch.randn(2, 4, toys.WIDTH, generator=torch.Generator().manual_seed(seed))


def guided(**options: Any) -> tuple[Any, hero_fx.Backend]:
    """A toy that is called with (latents, timestep, text)."""
    torch.manual_seed(0)
    backend = hero_fx.backend(**{**OPTIONS, **options})
    return toys.torch_compile(tiny.randomized(toys.Guided()), backend, fullgraph=True), backend


def lone(call: Any, start: Tensor, times: list[Tensor], words: Tensor) -> list[Tensor]:
    """What a trajectory gives by itself: with a word said of every call, and nothing to be told."""
    outputs = []
    hero_fx.reset()
    with torch.no_grad():
        x = start
        for step, t in enumerate(times):
            with hero_fx.calling(session="alone", step_index=step):
                outputs.append(call(x, t.clone(), words.clone()))
            x = x - outputs[-1] / STEPS
    hero_fx.reset()
    return outputs


def plain_times(steps: int = STEPS) -> list[Tensor]:
    """Timesteps that are no views of a table."""
    return [time.clone() for time in toys.times(steps)]


class Loop:
    """A denoising loop that is advanced call by call."""

    def __init__(self, call: Any, seed: int, words: Tensor | None) -> None:
        self.call, self.x, self.words = call, toys.latents(seed=seed), words
        self.start, self.outputs = self.x, list[Tensor]()

    def step(self, t: Tensor) -> None:
        with torch.no_grad():
            out = self.call(self.x, t) if self.words is None else self.call(self.x, t, self.words)
        self.outputs.append(out)
        self.x = self.x - out / STEPS


# Lanes


@pytest.mark.parametrize("skipped", [{3, 4}, {1}, {0}, {6, 7, 8}], ids=str)
@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_guidance_that_is_switched_off_for_some_steps(first: str, skipped: set[int]) -> None:
    call, _ = guided()
    times = plain_times()
    cond, uncond = Loop(call, 1, text(1)), Loop(call, 2, text(2))
    hero_fx.reset()
    cond.step(times[0]) if 0 in skipped else None
    if skipped == {0} and first == "uncond":
        # At the second step it could be a new trajectory, or texts that are made anew at each call.
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
    call, backend = guided()
    loops, times = [Loop(call, seed, text(seed)) for seed in (1, 2, 3)], plain_times()
    for step, t in enumerate(times):
        for i in range(3):
            loops[(i + step) % 3].step(t)
    assert backend.stats().cached_calls == 3 * 6
    for loop in loops:
        assert loop.words is not None
        assert toys.same(loop.outputs, lone(call, loop.start, times, loop.words))


def test_texts_made_anew_at_each_call_go_by_their_order() -> None:
    call, backend = guided(warmup=2)
    loops, times = [Loop(call, seed, None) for seed in (1, 2)], plain_times()
    words = [text(1), text(2)]
    for t in times:
        for loop, own in zip(loops, words, strict=True):
            loop.words = own.clone()
            loop.step(t)
    assert backend.stats().cached_calls == 2 * 5
    for loop, own in zip(loops, words, strict=True):
        assert toys.same(loop.outputs, lone(call, loop.start, times, own))


def test_calls_that_come_and_go_without_evidence_are_refused() -> None:
    call, _ = toys.compiled(**OPTIONS)
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
    call, backend = guided()
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
    call, backend = guided()
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
    call, backend = guided()
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
    call, backend = guided()
    with pytest.raises(hero_fx.AmbiguousCall, match=r"2 elements of the batch are at different timesteps \(100, 979\)"):
        Loop(call, 1, text(1)).step(torch.tensor([100, 979]))
    assert backend.stats().full_calls == 0


# Requests


def test_threads_without_sessions_are_refused() -> None:
    call, _ = guided()
    loops, times = [Loop(call, seed, text(seed)) for seed in (1, 2)], plain_times()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        first.submit(loops[0].step, times[0]).result()
        with pytest.raises(
            hero_fx.AmbiguousCall, match=r"calls without a session come from.*in turns.*hero_fx.session"
        ):
            second.submit(loops[1].step, times[0]).result()
        # The first one is not disturbed, and one that starts later takes its place only as long as it is silent.
        first.submit(loops[0].step, times[1]).result()
        assert toys.same(loops[0].outputs, first.submit(lone, call, loops[0].start, times[:2], text(1)).result())
        for t in times[:2]:
            first.submit(loops[0].step, t).result()
        second.submit(loops[1].step, times[0]).result()
        with pytest.raises(hero_fx.AmbiguousCall, match="in turns"):
            first.submit(loops[0].step, times[2]).result()
        second.submit(loops[1].step, times[1]).result()
    with ThreadPoolExecutor(1) as third:  # one request after the other, each in a thread of its own
        for t in times:
            third.submit(loops[0].step, t).result()


def test_calls_that_overlap_without_a_session_are_refused() -> None:
    inside, leave = threading.Event(), threading.Event()

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inside.set()
            assert leave.wait(60)
            return gm.forward(*args)

        return run

    call = tiny.captured(layers=2).compiled(hero_fx.backend(inner=inner, policy="fora"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, timestep=toys.times(1)[0])
        assert inside.wait(60)
        with pytest.raises(hero_fx.AmbiguousCall, match=r"two calls without a session overlap.*hero_fx.session"):
            call(timestep=toys.times(1)[0])
        leave.set()
        running.result()


def test_tasks_without_sessions_are_refused_and_with_sessions_are_not() -> None:
    call, _ = guided()
    times = plain_times()

    async def request(seed: int, named: bool) -> list[Tensor]:
        loop = Loop(call, seed, text(seed))
        for t in times:
            if named:
                with hero_fx.session(f"request {seed}"):
                    await asyncio.to_thread(loop.step, t)
            else:
                loop.step(t)
            await asyncio.sleep(0)
        return loop.outputs

    async def serve(named: bool) -> list[list[Tensor]]:
        return list(await asyncio.gather(request(1, named), request(2, named)))

    both = asyncio.run(serve(named=True))
    for seed, outputs in zip((1, 2), both, strict=True):
        assert toys.same(outputs, lone(call, toys.latents(seed=seed), times, text(seed)))
    with pytest.raises(hero_fx.AmbiguousCall, match="in turns"):
        asyncio.run(serve(named=False))


def test_a_session_that_does_not_reach_the_thread_of_a_pool_is_refused() -> None:
    call, _ = guided()
    loop = Loop(call, 1, text(1))
    with ThreadPoolExecutor(1) as pool, hero_fx.session("request 1"):
        with pytest.raises(
            hero_fx.AmbiguousCall, match=r"hero_fx.session\('request 1'\) is entered elsewhere.*to_thread"
        ):
            pool.submit(loop.step, plain_times()[0]).result()
        loop.step(plain_times()[0])
    loop.step(plain_times()[0])  # outside of the block there is no session anywhere


def test_a_session_in_a_generator_that_a_thread_pool_runs() -> None:
    """As frameworks run sync generators: each piece in a copy of the context, in any thread."""
    call, _ = guided()

    def stream() -> Iterator[Tensor]:
        loop = Loop(call, 1, text(1))
        with hero_fx.session("request 1"):
            for t in plain_times():
                loop.step(t)
                yield loop.outputs[-1]

    def explicit() -> Iterator[Tensor]:
        loop = Loop(call, 1, text(1))
        for t in plain_times():
            with hero_fx.calling(session="request 1"):
                loop.step(t)
            yield loop.outputs[-1]

    async def consume(pieces: Iterator[Tensor]) -> list[Tensor]:
        found = []
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            found.append(piece)
        return found

    pieces = stream()
    with pytest.raises(hero_fx.AmbiguousCall, match=r"part of a generator behind a yield.*hero_fx.calling\(session="):
        asyncio.run(consume(pieces))
    pieces.close()  # type: ignore[attr-defined]
    ours = asyncio.run(consume(explicit()))
    assert toys.same(ours, lone(call, toys.latents(seed=1), plain_times(), text(1)))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_generators_that_take_turns(kind: str) -> None:
    call, _ = guided()

    def sync_stream(seed: int, times: list[Tensor]) -> Iterator[Tensor]:
        loop = Loop(call, seed, text(seed))
        with hero_fx.session(f"request {seed}"):
            for t in times:
                loop.step(t)
                yield loop.outputs[-1]

    async def async_stream(seed: int, times: list[Tensor]) -> AsyncIterator[Tensor]:
        for piece in sync_stream(seed, times):
            yield piece

    async def turns() -> None:
        streams = [async_stream(seed, plain_times()) for seed in (1, 2)]
        for _ in range(2):
            for stream in streams:
                await anext(stream)

    def sync_turns() -> None:
        streams = [sync_stream(seed, plain_times()) for seed in (1, 2)]
        for _ in range(2):
            for stream in streams:
                next(stream)

    with pytest.raises(hero_fx.AmbiguousCall, match=r"generator that is not running now.*hero_fx.calling\(session="):
        asyncio.run(turns()) if kind == "async" else sync_turns()
    gc.collect()
    loop = Loop(call, 3, text(3))
    loop.step(plain_times()[0])  # whatever the order in which the generators were closed, their sessions are left


def test_a_context_manager_of_ones_own_around_a_session() -> None:
    from contextlib import contextmanager

    call, backend = guided()

    @contextmanager
    def request(name: str) -> Iterator[None]:
        with hero_fx.session(name):
            yield

    loop = Loop(call, 1, text(1))
    for t in plain_times():
        with request("request 1"):
            loop.step(t)
    assert toys.same(loop.outputs, lone(call, loop.start, plain_times(), text(1)))
    assert backend.stats().sessions == 0


# The word of the caller


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
                loop.words = text({"cond": 1, "uncond": 2}[lane])  # made anew
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


# cache_context of diffusers


def test_cache_contexts_of_threads_and_tasks_are_their_own() -> None:
    model = tiny.cogvideox(layers=2)
    backend = hero_fx.backend(**OPTIONS)
    call = toys.torch_compile(model, backend, fullgraph=True)
    kwargs, times = tiny.inputs(), tiny.timesteps(4)
    seen: list[tuple[str, Any]] = []
    lock = threading.Lock()

    def step(t: Tensor, name: str) -> None:
        with torch.no_grad(), lock:
            call(**kwargs, timestep=t.expand(2), return_dict=False)
            last = backend.steppers[0].last
            assert last is not None
            seen.append((name, last.lane))

    together = threading.Barrier(2)

    def request(name: str) -> None:
        for t in times:
            with hero_fx.session(f"request {name}"), model.cache_context(name):
                together.wait(60)  # both are within their contexts, which the module has one attribute for
                step(t, name)
                together.wait(60)

    threads = [threading.Thread(target=request, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == 8
    assert all(name == lane for name, lane in seen)

    async def task(name: str) -> None:
        for t in times:
            with hero_fx.session(f"task {name}"), model.cache_context(name):
                await asyncio.sleep(0)
                step(t, name)

    async def serve() -> None:
        await asyncio.gather(task("cond"), task("uncond"))

    seen.clear()
    asyncio.run(serve())
    assert len(seen) == 8
    assert all(name == lane for name, lane in seen)


def test_a_context_of_another_model_is_not_this_ones() -> None:
    model, other = tiny.cogvideox(layers=2), tiny.cogvideox(layers=2)
    backend = hero_fx.backend(**OPTIONS)
    call, kwargs = toys.torch_compile(model, backend, fullgraph=True), tiny.inputs()
    with torch.no_grad(), other.cache_context("cond"):
        call(**kwargs, timestep=tiny.timesteps(1).expand(2), return_dict=False)
    assert backend.steppers[0].last is not None
    assert backend.steppers[0].last.lane == 0


# Models


@pytest.mark.parametrize("by_name", [False, True])
def test_two_models_of_one_class_share_code_and_no_state(by_name: bool) -> None:
    backend = hero_fx.backend(**OPTIONS)
    options = {"options": {k: v for k, v in OPTIONS.items() if v is not None}} if by_name else {}
    torch.manual_seed(0)
    models = [tiny.randomized(toys.Guided(), seed) for seed in (1, 2)]
    with torch.no_grad():
        models[1].read.weight.mul_(-1)
    calls = [toys.torch_compile(m, "hero_fx" if by_name else backend, fullgraph=True, **options) for m in models]
    times = plain_times()
    loops = [Loop(call, 1, text(1)) for call in calls]
    for t in times:
        for loop in loops:
            loop.step(t)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(
            toys.same(loop.outputs, lone(call, loop.start, times, text(1)))
            for loop, call in zip(loops, calls, strict=True)
        )
    if not by_name:
        assert backend.stats().graphs == 1, "they share the compiled code"
    # The second takes over from the first in the middle of a loop, as in Wan 2.2.
    hero_fx.reset()
    for t in times[:4]:
        loops[0].step(t)
    loops[1] = Loop(calls[1], 1, text(1))
    with pytest.warns(UserWarning, match="another model takes over in the middle of a trajectory"):
        loops[1].step(times[4])
    for t in times[5:]:
        loops[1].step(t)
    assert toys.same(loops[1].outputs, lone(calls[1], loops[1].start, times[4:], text(1)))


class Counting(toys.Guided):
    """Counts its calls, which Dynamo guards on."""

    calls = 0

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(latents, timestep, text)


def test_a_model_that_compiles_anew_at_every_step_is_said() -> None:
    torch.manual_seed(0)
    backend = hero_fx.backend(**OPTIONS)
    call = toys.torch_compile(tiny.randomized(Counting()), backend, fullgraph=True)
    loop, times = Loop(call, 1, text(1)), plain_times()
    loop.step(times[0])
    with pytest.warns(
        UserWarning, match=r"compiled again in the middle.*guard that failed: .*calls.*nothing is cached"
    ):
        loop.step(times[1])
    loop.step(times[2])  # said once
    assert (backend.stats().full_calls, backend.stats().cached_calls) == (3, 0)


def test_a_batch_that_changes_in_the_middle_is_said() -> None:
    call, _ = guided()
    times = plain_times()
    with torch.no_grad():
        for t in times[:3]:
            call(toys.latents(), t, text(1))
        with pytest.warns(
            UserWarning, match=r"changed their shape in the middle.*latents \[2, 30, 6\] -> \[1, 30, 6\]"
        ):
            call(toys.latents()[:1], times[3][:1], text(1)[:1])


def test_state_goes_with_the_model_and_with_its_code() -> None:
    call, backend = guided()
    loop = Loop(call, 1, text(1))
    for t in plain_times():
        loop.step(t)
    assert backend.stats().state_bytes > 0
    stepper = weakref.ref(backend.steppers[0])
    torch._dynamo.reset()
    gc.collect()
    assert stepper() is None
    assert (backend.stats().graphs, backend.stats().state_bytes, backend.graphs) == (0, 0, [])
    assert backend.stats().cached_calls == 6, "what was counted stays"

    call, backend = guided()
    loop = Loop(call, 1, text(1))
    for t in plain_times():
        loop.step(t)
    del call, loop
    gc.collect()
    assert (backend.stats().state_bytes, backend.stats().sessions) == (0, 0)
