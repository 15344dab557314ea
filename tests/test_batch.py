"""Several requests in one call: each row is what its request is alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule

from .support import forecasts, tiny, toys
from .support.requests import Requests, Spoiled, apart, options, single, together

pytestmark = pytest.mark.usefixtures("no_grad")
fresh = pytest.mark.usefixtures("fresh_dynamo")
Compiled = tuple[Any, hero_fx.Backend]

POLICIES: dict[str, dict[str, Any]] = {
    "hero": {},
    "taylorseer": {"policy": "taylorseer", "grid": None},
    "int8": {"state_dtype": torch.int8, "selection": "per_layer"},
    "toca": {"policy": "toca"},
}


# TaylorSeer's layers are HERO's deep ones.
@fresh
@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=pytest.mark.exhaustive if name == "taylorseer" else ()) for name in POLICIES]
)
def test_each_row_is_its_request_alone(policy: str) -> None:
    """Float64, where rounding is far below any fault; full rows stand beside cached ones, selections and gaps differ."""
    call, backend = toys.compiled(toys.toy().double(), warmup=1, cooldown=0, **POLICIES[policy])
    requests = Requests(call)
    requests.starts = [x.double() for x in requests.starts]
    alone = requests.alone()
    before = backend.stats()
    more: dict[str, Any] = {} if policy == "hero" else {"most": 2}
    assert apart(requests.mixed(seed=0, **more), alone) < (1e-6 if policy == "int8" else 1e-13)
    after = backend.stats()
    assert after.graphs == 1
    assert after.full_calls - before.full_calls == before.full_calls
    assert after.cached_calls - before.cached_calls == before.cached_calls
    assert after.batched_graphs <= 6  # full and cached, of 2, 4 and 8


@fresh
def test_compiled_step_graphs_are_as_many_as_buckets() -> None:
    call, backend = toys.compiled(inner="aot_eager", warmup=1, cooldown=0)
    requests = Requests(call)
    alone = requests.alone()
    assert apart(requests.mixed(seed=0, buckets=(3,)), alone) < 1e-6
    assert backend.stats().batched_graphs == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert apart(requests.mixed(seed=1, buckets=(3,)), alone) < 1e-6
    assert backend.stats().batched_graphs == 2
    assert backend.stats().graphs == 1


def test_an_ordinary_batch_is_not_taken_for_requests(toy: Compiled) -> None:
    """The same shapes, before and behind a batch of requests: one request with four rows."""
    call, backend = toy
    single(call, "warm-up", 0, 0)
    together(call, "abcd", [0, 0, 0, 0])
    graphs = backend.stats().graphs
    rows = torch.cat([toys.latents(1, seed=i) for i in range(4)])
    with hero_fx.calling(session="four", step_index=0):
        four = call(rows, tiny.timesteps(9)[[0] * 4])
    assert tiny.worst([together(call, "abcd", [0, 0, 0, 0])], [four]) < 1e-6
    assert backend.stats().graphs == graphs + 1
    assert backend.stats().bytes_by_session["four"] == backend.graphs[-1].state_bytes


def test_lanes_and_pairs_of_guidance(toy: Compiled) -> None:
    """Unconditional rows in a lane of their own, and pairs of rows that are one request."""
    call, _ = toy
    lanes = ("uncond", "cond")
    alone = [
        [single(call, f"alone-{s}", step, 2 * s + k, lane=lanes[k]) for s in (0, 1) for k in (0, 1)]
        for step in range(3)
    ]
    for step, expected in enumerate(alone):
        words = [options(step, 9, f"{s}", lane=lanes[k]) for k in (0, 1) for s in (0, 1)]
        rows = torch.cat([toys.latents(1, seed=2 * s + k) for k in (0, 1) for s in (0, 1)])
        with hero_fx.batch(words):
            found = call(rows, tiny.timesteps(9)[[step] * 4]).split(1)
        assert tiny.worst([found[i] for i in (0, 2, 1, 3)], expected) < 1e-6
    requests = Requests(call, rows=2)
    pairs = [x.clone() for outputs in requests.alone() for x in outputs]
    mixed = [x for outputs in requests.mixed(seed=3, most=3, buckets=(3,)) for x in outputs]
    assert tiny.worst(mixed, pairs) < 1e-6


@pytest.mark.parametrize("steps_alone", [(0, 1, 4), (1, 4, 5), (2, 3)])
def test_requests_go_on_alone_and_in_batches(toy: Compiled, steps_alone: tuple[int, ...]) -> None:
    """A lane without a name is the same one, called alone or in a batch, whichever comes first."""
    call, backend = toy
    alone = [[single(call, f"alone-{i}", step, i) for step in range(6)] for i in range(2)]
    before = backend.stats()
    for step in range(6):
        if step in steps_alone:
            found = [single(call, "ab"[i], step, i) for i in range(2)]
        else:
            found = list(together(call, "ab", [step, step]).split(1))
        assert tiny.worst(found, [outputs[step] for outputs in alone]) < 1e-6
    after = backend.stats()
    assert (after.full_calls - before.full_calls, after.cached_calls - before.cached_calls) == (6, 6)


def test_threads_with_the_same_sessions_do_not_wait_for_each_other(toy: Compiled) -> None:
    call, backend = toy
    single(call, "warm-up", 0, 0)
    together(call, "ab", [0, 0])
    failed: list[BaseException] = []

    def work(sessions: str) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    together(call, sessions, [0, 0], lane="x")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(names,), daemon=True) for names in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
    assert all(trajectory.running == 0 for trajectory in backend.steppers[0].store.holders())


@fresh
def test_rows_cannot_act_on_each_other() -> None:
    """Even where the model's own batch would: each row is what it is alone."""
    model = Spoiled(lambda _, x: x - x.mean(dim=0) + x.amax()).eval().requires_grad_(False)
    call, _ = toys.compiled(model)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(3)]
    assert tiny.worst(together(call, "abc", [0, 0, 0]).split(1), alone) < 1e-6


@fresh
def test_padding_and_parts() -> None:
    """Seven requests in buckets of four: a part of four, and three with one that is repeated."""
    call, backend = toys.compiled(warmup=1, cooldown=0)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(7)]
    before = backend.stats()
    assert tiny.worst(together(call, "abcdefg", [0] * 7, buckets=(4,)).split(1), alone) < 1e-6
    after = backend.stats()
    assert (after.batched_graphs, after.full_calls - before.full_calls, after.sessions) == (1, 7, 14)
    assert after.state_bytes == 14 * backend.graphs[0].state_bytes


@fresh
def test_the_budget_holds_for_batches() -> None:
    given: dict[str, Any] = {"policy": "fora", "grid": None, "warmup": 1, "cooldown": 0}
    per_lane = toys.state_bytes(**given) // 2  # of two rows
    call, backend = toys.compiled(max_state_bytes=2 * per_lane, **given)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(3)]
    together(call, "ab", [0, 0])
    assert tiny.worst(together(call, "bc", [1, 0]).split(1)[1:], [single(call, "d", 0, 1)]) < 1e-6
    stats = backend.stats()
    assert (stats.evictions, stats.state_bytes) == (5, 2 * per_lane)
    with pytest.raises(hero_fx.OverBudget, match="max_state_bytes"):
        together(call, "efg", [0, 0, 0])
    call, backend = toys.compiled(max_state_bytes=2 * per_lane, strict=False, **given)
    single(call, "warm-up", 0, 0)
    with pytest.warns(UserWarning, match="computes a call in full"):
        assert tiny.worst(together(call, "efg", [0, 0, 0]).split(1), alone) < 1e-6
    assert backend.stats().refused_calls == 3


@fresh
def test_a_forecast_plan_in_batches() -> None:
    model = forecasts.Conditioned().eval().requires_grad_(False)
    rule = OutputRule(index=0, axis=1, latent="sample")
    plan = forecasts.plan_of(rule, forecasts.theta(1, 3, 1, 1), name="Conditioned", outputs=((3,),))
    backend = hero_fx.backend(plan=plan, inner="eager")
    call = toys.torch_compile(model, backend, fullgraph=True)
    times, steps = tiny.timesteps(forecasts.STEPS), forecasts.STEPS
    samples = [torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    alone: list[list[Tensor]] = [[], [], []]
    for i, sample in enumerate(samples):
        for step in range(steps):
            with options(step, steps, f"alone-{i}"):
                alone[i].append(call(sample, times[[step]]))
    for first in range(-2, steps):  # each is one step behind the one before
        at = {i: first + i for i in range(3) if 0 <= first + i < steps}
        with hero_fx.batch([options(step, steps, f"{i}") for i, step in at.items()]):
            found = call(torch.cat([samples[i] for i in at]), times[list(at.values())]).split(1)
        assert tiny.worst(found, [alone[i][step] for i, step in at.items()]) < 1e-6
    assert backend.stats().cached_calls == 2 * 3 * (steps - sum(forecasts.MASK))
