"""State of requests that are computed together is one stack, and stays exact and counted as they come and go."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.runtime.lane_state import LaneState

from .support import tiny, toys
from .support.requests import COUNTS, Requests, apart, options, single, together

pytestmark = pytest.mark.usefixtures("no_grad")
Compiled = tuple[Any, hero_fx.Backend]


def lane(backend: hero_fx.Backend, session: str) -> LaneState:
    ((_, trajectory),) = backend.steppers[0].store.of_session(session)
    (state,) = trajectory.lanes.values()
    return state


def held(backend: hero_fx.Backend) -> int:
    """Bytes of memory behind all state, each counted once."""
    tensors = [
        tensor
        for trajectory in backend.steppers[0].store.holders()
        for state in trajectory.lanes.values()
        for tensor in state.tensors.values()
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def lanes_held(backend: hero_fx.Backend) -> float:
    """The same as a number of lanes; what `stats` says must be that."""
    assert held(backend) == backend.stats().state_bytes
    return held(backend) / backend.graphs[0].state_bytes


def test_requests_that_stay_together_keep_one_stack(toy: Compiled) -> None:
    call, backend = toy
    single(call, "warm-up", 0, 0)
    together(call, "ab", [0, 0])
    stack = lane(backend, "a").stack
    for step, names in enumerate(("ab", "ba", "abc", "ab"), start=1):
        before = stack
        together(call, names, [*[step] * 2, 0][: len(names)])  # c is at another kind of step
        stack = lane(backend, "a").stack
        assert stack is lane(backend, "b").stack is before is not None
    assert lanes_held(backend) == 4


def leave_alone(call: Any) -> None:
    single(call, "a", 1, 0)


def leave_for_another(call: Any) -> None:
    single(call, "d", 0, 3)
    together(call, "ad", [1, 1])


def leave_in_part(call: Any) -> None:
    together(call, "acd", [1, 1, 1], buckets=(8,))
    hero_fx.session("d").drop()


def be_dropped(call: Any) -> None:
    hero_fx.session("a").drop()
    hero_fx.session("d").drop()


@pytest.mark.parametrize("leave", [leave_alone, leave_for_another, leave_in_part, be_dropped])
def test_who_is_left_has_tensors_of_its_own(toy: Compiled, leave: Callable[[Any], None]) -> None:
    """And goes on as it would have: b and c stay behind where a leaves."""
    call, backend = toy
    alone = [[single(call, f"alone-{i}", step, i) for step in range(3)] for i in range(3)]
    hero_fx.reset()
    together(call, "abc", [0, 0, 0], buckets=(3,))
    leave(call)
    assert lanes_held(backend) == backend.stats().sessions
    assert tiny.worst([single(call, "b", 1, 1)], [alone[1][1]]) < 1e-6
    with hero_fx.batch([options(2, 9, "b"), options(2, 9, "c")]):
        found = call(torch.cat([toys.latents(1, seed=i) for i in (1, 2)]), tiny.timesteps(9)[[2, 2]])
    assert tiny.worst([found[:1]], [alone[1][2]]) < 1e-6
    assert lanes_held(backend) == backend.stats().sessions


def test_requests_that_come_and_go_hold_what_is_counted(toy: Compiled) -> None:
    """Some run alone, some together, some in buckets that they do not fill; who is done is dropped, at once or later."""
    call, backend = toy
    requests = Requests(call)
    alone = requests.alone()
    hero_fx.reset()
    draw, outputs, states = random.Random(0), [list[Tensor]() for _ in COUNTS], list(requests.starts)
    while live := [i for i, count in enumerate(COUNTS) if len(outputs[i]) < count]:
        chosen = draw.sample(live, draw.randint(1, len(live)))
        calls = [options(len(outputs[i]), COUNTS[i], f"{i}") for i in chosen]
        times = torch.stack([requests.times[i][len(outputs[i])] for i in chosen])
        with hero_fx.batch(calls, buckets=draw.choice([(2, 4), (3,), (2, 3)])):
            found = call(torch.cat([states[i] for i in chosen]), times)
        assert lanes_held(backend) == backend.stats().sessions
        for i, output in zip(chosen, found.split(1), strict=True):
            outputs[i].append(output)
            states[i] = states[i] - output / COUNTS[i]
            if len(outputs[i]) == COUNTS[i] or draw.random() < 0.1 * (len(outputs[i]) == COUNTS[i] - 1):
                hero_fx.session(f"{i}").drop()
                assert lanes_held(backend) == backend.stats().sessions
    assert apart(outputs, alone) < 1e-6
    assert lanes_held(backend) == 0


def test_room_is_made_of_a_stack(toy: Compiled) -> None:
    """Memory of a request that is evicted is free at once, though another that runs was in its stack."""
    call, backend = toy
    alone = [single(call, f"alone-{i}", step, i) for i, step in ((1, 0), (1, 1), (2, 0))]
    lanes = backend.graphs[0].state_bytes
    call, backend = toys.compiled(warmup=1, cooldown=0, max_state_bytes=2 * lanes)
    single(call, "warm-up", 0, 0)
    first = together(call, "ab", [0, 0])
    with hero_fx.batch([options(1, 9, "b"), options(0, 9, "c")]):
        second = call(torch.cat([toys.latents(1, seed=i) for i in (1, 2)]), tiny.timesteps(9)[[1, 0]])
    assert tiny.worst([first[1:], *second.split(1)], alone) < 1e-6
    assert (backend.stats().evictions, lanes_held(backend)) == (2, 2)


def test_a_session_that_is_dropped_while_its_batch_runs() -> None:
    dropped: list[bool] = []

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if dropped == [False]:
                dropped[0] = True
                hero_fx.session("a").drop()
            return gm.forward(*args)

        return run

    call, backend = toys.compiled(policy="fora", grid=None, warmup=1, cooldown=0, inner=inner)
    alone = [[single(call, f"alone-{i}", step, i) for step in range(2)] for i in range(2)]
    hero_fx.reset()
    together(call, "ab", [0, 0])
    dropped.append(False)
    for step in (1, 2):
        found = together(call, "ab", [step, step] if step == 1 else [0, 2])
        if step == 1:
            assert tiny.worst(found.split(1), [outputs[1] for outputs in alone]) < 1e-6
    assert (dropped, lanes_held(backend)) == ([True], 2)


def test_a_session_that_is_dropped_as_its_call_begins(toy: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, once the call has found its trajectory: it computes in full, for its features are gone."""
    call, backend = toy
    expected = single(call, "other", 0, 0), single(call, "a", 0, 0)
    store = backend.steppers[0].store
    find = store.trajectory

    def find_and_drop(*of: Any) -> Any:
        found = find(*of)
        store.drop("a")
        return found

    monkeypatch.setattr(store, "trajectory", find_and_drop)
    before = backend.stats().full_calls
    x = toys.latents(1, seed=0)
    with options(1, 9, "a"):
        found = call(x, tiny.timesteps(9)[[1]])
    assert backend.stats().full_calls == before + 1
    assert tiny.worst([found], [toys.toy()(x, tiny.timesteps(9)[[1]])]) < 1e-5
    assert torch.equal(*expected)
