"""Generated sequences of calls: sessions, lanes, shapes and jumps in any order, against what was meant.

The step graphs are real, but run by a ledger: a full step signs the state of its lane, a cached step checks whose
signature it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hero_fx
from hero_fx.passes.slots import StateSlot, slots_of
from hero_fx.schedule import Schedule

from .support import tiny, toys


@dataclass(frozen=True)
class Made:
    """A call, and what it belongs to by construction."""

    session: int
    batch: int
    trajectory: int
    step: int
    lane: int


@dataclass(frozen=True)
class Ledger:
    """A backend for models of two shapes, and its book: of each call (full, call that signed the state it was given)."""

    backend: hero_fx.Backend
    runs: dict[int, Callable[..., Any]]
    book: list[tuple[bool, int]]
    failing: list[bool] = field(default_factory=list)
    """Something in it makes the next call fail, half way through."""


LATENTS = {batch: toys.latents(batch) for batch in (1, 2)}
TEXT = {batch: torch.zeros(batch, 4, toys.WIDTH) for batch in (1, 2)}


@cache
def captured(batch: int) -> toys.Captured:
    model = toys.Guided().eval().requires_grad_(False)
    return toys.Captured(model, latents=LATENTS[batch], timestep=toys.times(1, batch)[0], text=TEXT[batch])


@cache
def ledger(interval: int) -> Ledger:
    book: list[tuple[bool, int]] = []
    failing: list[bool] = []
    compiled: list[Any] = []

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        full = len(compiled) % 2 == 0
        compiled.append(gm)
        slots = [slot for _, slot in slots_of(gm)]
        first = len(gm.graph.find_nodes(op="placeholder")) - len(slots)
        state = [first + i for i, slot in enumerate(slots) if isinstance(slot, StateSlot)]

        def run(*args: Any) -> tuple[torch.Tensor]:
            number = len(book)
            if full:
                for i in state:
                    args[i].fill_(number)
                    if failing:
                        break
            if failing:
                book.append((full, -1))
                raise MemoryError(failing.pop())
            found = {int(end) for i in state for end in args[i].aminmax()}
            assert len(found) == 1, "the state of several lanes got mixed"
            book.append((full, found.pop()))
            return (args[state[0]],)

        return run

    backend = hero_fx.backend(policy="fora", interval=interval, warmup=1, inner=inner)
    runs = {batch: captured(batch).compiled(backend) for batch in (1, 2)}
    return Ledger(backend, runs, book, failing)


@st.composite
def sequences(draw: st.DrawFn) -> list[Made]:
    """Every (session, batch) has its trajectories, of 1 to 3 lanes; they are interleaved at random."""
    queues: list[list[Made]] = []
    for session in range(draw(st.integers(1, 3))):
        for batch in draw(st.sampled_from([(1,), (2,), (1, 2)])):
            trajectories = draw(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 3)), min_size=1, max_size=3))
            queues.append(
                [
                    Made(session, batch, number, step, lane)
                    for number, (steps, lanes) in enumerate(trajectories)
                    for step in range(steps)
                    for lane in range(lanes)
                ]
            )
    order = draw(st.permutations([i for i, queue in enumerate(queues) for _ in queue]))
    return [queues[i].pop(0) for i in order]


def meant(calls: list[Made], schedule: Schedule) -> list[tuple[bool, int]]:
    """Full or not, and by which call the features were computed, searched in the whole past."""
    result: list[tuple[bool, int]] = []
    for number, call in enumerate(calls):
        fulls = [
            (before.step, i)
            for i, before in enumerate(calls[:number])
            if result[i][0]
            and (before.session, before.batch, before.trajectory, before.lane)
            == (call.session, call.batch, call.trajectory, call.lane)
        ]
        full = not fulls or any(schedule.is_full(step) for step in range(fulls[-1][0] + 1, call.step + 1))
        result.append((full, number if full else fulls[-1][1]))
    return result


@settings(max_examples=20, deadline=None)
@given(calls=sequences(), interval=st.sampled_from([2, 3]), rising=st.booleans())
def test_every_call_finds_its_own_features(calls: list[Made], interval: int, rising: bool) -> None:
    made = ledger(interval)
    made.backend.reset()
    made.book.clear()
    times = tiny.timesteps(9).flip(0) if rising else tiny.timesteps(9)
    for call in calls:
        with hero_fx.session(f"request {call.session}"):
            made.runs[call.batch](LATENTS[call.batch], times[call.step].expand(call.batch), TEXT[call.batch])
        last = made.backend.steppers[call.batch - 1].last
        assert last is not None
        assert (last.step, last.lane, last.trajectory) == (call.step, call.lane, call.trajectory + 1)
    assert made.book == meant(calls, made.backend.config.make_schedule())
    assert made.backend.stats().sessions == len({call.session for call in calls})


@dataclass(frozen=True)
class Served:
    """A call as a server makes it."""

    request: int
    batch: int
    trajectory: int
    step: int
    lane: int
    told: bool = False
    """Its lane and step are said by `hero_fx.calling`."""
    thread: int = 0
    fails: bool = False


@st.composite
def served(draw: st.DrawFn) -> list[Served]:
    """Requests, each of several runs that begin and stop anywhere, with lanes that come and go, interleaved at random."""
    queues: list[list[Served]] = []
    for request in range(draw(st.integers(1, 3))):
        queue: list[Served] = []
        told = draw(st.booleans())
        for trajectory in range(draw(st.integers(1, 3))):
            batch = draw(st.sampled_from([1, 2]))
            first = draw(st.integers(0, 6))
            for step in range(first, draw(st.integers(first + 1, 9))):
                for lane in draw(st.sampled_from([[0], [0, 1], [1, 0], [1], [2, 0, 1]])):
                    thread, fails = draw(st.integers(0, 1)), draw(st.integers(0, 15)) == 15
                    queue.append(Served(request, batch, trajectory, step, lane, told, thread, fails))
        queues.append(queue)
    order = draw(st.permutations([i for i, queue in enumerate(queues) for _ in queue]))
    return [queues[i].pop(0) for i in order]


@contextmanager
def word(call: Served) -> Iterator[None]:
    """What the server says of a call."""
    name = f"request {call.request}"
    if call.told:
        # A run that starts above the step where the last one stopped is another one by its name alone.
        with hero_fx.calling(session=f"{name}, run {call.trajectory}", lane=call.lane, step_index=call.step):
            yield
    else:
        with hero_fx.session(name):
            yield


@pytest.mark.filterwarnings("ignore:hero_fx. another model takes over")  # each batch has a model of its own here
@settings(max_examples=60, deadline=None)
@given(calls=served(), interval=st.sampled_from([2, 3]))
@example(calls=[Served(0, 1, 0, s, lane) for s in range(4) for lane in ([0, 1] if s != 2 else [1])], interval=3)
@example(calls=[Served(0, 1, 0, s, s % 2) for s in range(5)], interval=3)
@example(calls=[Served(0, 1, 0, s, lane) for s, lane in enumerate([1, 0, 2, 0, 1])], interval=3)
@example(calls=[Served(0, 1, 0, 0, 0), *(Served(0, 1, 1, s, 0) for s in range(3, 7))], interval=3)
def test_no_call_finds_the_features_of_another(calls: list[Served], interval: int) -> None:
    """A cached call has features of its own lane of its own run, whatever else is called; or it is refused."""
    made = ledger(interval)
    made.backend.reset()
    made.book.clear()
    times = tiny.timesteps(9)
    texts: dict[tuple[int, ...], torch.Tensor] = {}
    signed: dict[int, Served] = {}
    refused: set[tuple[int, int]] = set()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for call in calls:
            run = call.request, call.trajectory
            if run in refused:
                continue
            key = (*run, call.batch, call.lane)
            inputs = (
                torch.zeros_like(LATENTS[call.batch]),
                times[call.step].clone().expand(call.batch),
                texts.setdefault(key, torch.zeros_like(TEXT[call.batch])),
            )

            def serve(call: Served = call, inputs: tuple[torch.Tensor, ...] = inputs) -> None:
                with word(call):
                    made.runs[call.batch](*inputs)

            made.failing[:] = [True] if call.fails else []
            number = len(made.book)
            signed[number] = call
            try:
                (first, second)[call.thread].submit(serve).result()
            except MemoryError:
                continue
            except hero_fx.AmbiguousCall:
                refused.add(run)
                hero_fx.session(f"request {call.request}").drop()
                made.failing.clear()
                continue
            full, owner = made.book[number]
            found = signed[owner]
            assert (found.request, found.trajectory, found.batch, found.lane) == (*run, call.batch, call.lane)
            assert full == (owner == number)
