"""Calls of several requests at once, in threads, tasks and generators: each is its own, or refused."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys
from .support.loops import OPTIONS, Loop, Told, guided, lone, made, plain_times, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_threads_without_sessions_are_refused() -> None:
    call, _ = made()
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

    call, _ = toys.made(inner=inner, policy="fora", grid=None)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, toys.latents(), toys.times(1)[0])
        assert inside.wait(60)
        with pytest.raises(hero_fx.AmbiguousCall, match=r"two calls without a session overlap.*hero_fx.session"):
            call(toys.latents(), toys.times(1)[0])
        leave.set()
        running.result()


def test_tasks_without_sessions_are_refused_and_with_sessions_are_not() -> None:
    call, _ = guided()
    times = plain_times()
    Loop(call, 0, text(0)).step(times[0])  # Dynamo compiles twice where the first two calls come at once
    hero_fx.reset()

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
    call, _ = made()
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
    call, _ = made()

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
    gc.freeze()  # else the collection below walks all that tests before have made
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


def test_streams_that_take_turns_and_are_cut_short() -> None:
    """Sync and async generators, a task for each step. Who is aborted in the middle drops its session and disturbs nobody."""
    call, backend = made()
    times = plain_times()
    expected = [lone(call, toys.latents(seed=seed), times, text(seed)) for seed in range(6)]
    hero_fx.reset()

    def sync_stream(seed: int) -> Generator[Tensor, None, None]:
        loop = Loop(call, seed, text(seed))
        try:
            for step, t in enumerate(times):
                with hero_fx.calling(session=f"request {seed}", step_index=step):
                    loop.step(t)
                yield loop.outputs[-1]
        finally:
            hero_fx.session(f"request {seed}").drop()

    async def async_stream(seed: int) -> AsyncIterator[Tensor]:
        with closing(sync_stream(seed)) as stream:
            while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                yield piece

    async def step(stream: Any) -> Tensor | None:
        return next(stream, None) if isinstance(stream, Iterator) else await anext(stream, None)

    async def serve() -> list[list[Tensor]]:
        draw, found = random.Random(0), [list[Tensor]() for _ in expected]
        streams: dict[int, Any] = {seed: (sync_stream if seed % 2 else async_stream)(seed) for seed in range(6)}
        while streams:
            seed = draw.choice(list(streams))
            if seed in (2, 3) and len(found[seed]) == 4:
                stream = streams.pop(seed)
                stream.close() if seed % 2 else await stream.aclose()
            elif (piece := await asyncio.create_task(step(streams[seed]))) is None:
                del streams[seed]
            else:
                found[seed].append(piece)
        return found

    for seed, outputs in enumerate(asyncio.run(serve())):
        assert toys.same(outputs, expected[seed][: 4 if seed in (2, 3) else None])
    assert (backend.stats().sessions, backend.stats().state_bytes) == (0, 0)


def test_a_context_manager_of_ones_own_around_a_session() -> None:
    from contextlib import contextmanager

    call, backend = made()

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


def test_cache_contexts_of_threads_and_tasks_are_their_own() -> None:
    model = tiny.randomized(Told())
    backend = hero_fx.backend(**OPTIONS)
    call = toys.torch_compile(model, backend, fullgraph=True)
    times = plain_times(4)
    seen: list[tuple[str, Any]] = []
    lock, words = threading.Lock(), text(1)

    def step(t: Tensor, name: str) -> None:
        with torch.no_grad(), lock:
            call(toys.latents(), t, words)
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
    model, other = Told().eval(), Told().eval()
    backend = hero_fx.backend(**OPTIONS)
    call = toys.torch_compile(model, backend, fullgraph=True)
    with torch.no_grad(), other.cache_context("cond"):
        call(toys.latents(), toys.times(1)[0], text(1))
    assert backend.steppers[0].last is not None
    assert backend.steppers[0].last.lane == 0
