"""Several requests in one call: each row is what its request is alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import hero_fx
from hero_fx.passes.rewrite.forecast import OutputRule

from .support import forecasts, tiny, toys

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

COUNTS = (6, 7, 4, 5)
"""Steps of each request."""


def options(step: int, num_steps: int, session: str, **more: Any) -> hero_fx.Calling:
    return hero_fx.calling(session=session, step_index=step, num_steps=num_steps, **more)


class Requests:
    """Requests over a toy, each with its own latents, number of steps and timesteps."""

    def __init__(self, call: Callable[..., Any], rows: int = 1) -> None:
        self.call, self.rows = call, rows
        self.starts = [toys.latents(rows, seed=i) for i in range(len(COUNTS))]
        self.times = [tiny.timesteps(count) for count in COUNTS]

    def alone(self, name: str = "alone") -> list[list[Tensor]]:
        """Every output of each request, one after the other."""
        outputs: list[list[Tensor]] = []
        for i, (x, count) in enumerate(zip(self.starts, COUNTS, strict=True)):
            outputs.append([])
            for step, t in enumerate(self.times[i]):
                with options(step, count, f"{name}-{i}"):
                    outputs[i].append(self.call(x, t.repeat(self.rows)))
                x = x - outputs[i][-1] / count
        return outputs

    def mixed(self, seed: int, most: int = len(COUNTS), **more: Any) -> list[list[Tensor]]:
        """The same, in batches of requests drawn at random: they join and leave at any step."""
        draw, states = random.Random(seed), list(self.starts)
        outputs: list[list[Tensor]] = [[] for _ in COUNTS]
        while live := [i for i, count in enumerate(COUNTS) if len(outputs[i]) < count]:
            chosen = draw.sample(live, draw.randint(1, min(most, len(live))))
            calls = [options(len(outputs[i]), COUNTS[i], f"mixed{seed}-{i}") for i in chosen]
            t = torch.stack([self.times[i][len(outputs[i])] for i in chosen]).repeat_interleave(self.rows)
            with hero_fx.batch(calls, **more):
                found = self.call(torch.cat([states[i] for i in chosen]), t)
            for i, output in zip(chosen, found.split(self.rows), strict=True):
                outputs[i].append(output)
                states[i] = states[i] - output / COUNTS[i]
        return outputs


def apart(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """Largest relative error of any output of any request."""
    return max(tiny.worst(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


POLICIES: dict[str, dict[str, Any]] = {
    "hero": {},
    "taylorseer": {"policy": "taylorseer", "grid": None},
    "int8": {"state_dtype": torch.int8, "selection": "per_layer"},
    "toca": {"policy": "toca"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_row_is_its_request_alone(policy: str) -> None:
    """Float64, where rounding is far below any fault; full rows stand beside cached ones, selections and gaps differ."""
    call, backend = toys.compiled(toys.toy().double(), warmup=1, cooldown=0, **POLICIES[policy])
    requests = Requests(call)
    requests.starts = [x.double() for x in requests.starts]
    alone = requests.alone()
    before = backend.stats()
    assert apart(requests.mixed(seed=0), alone) < (1e-6 if policy == "int8" else 1e-13)
    after = backend.stats()
    assert after.graphs == 1
    assert after.full_calls - before.full_calls == before.full_calls
    assert after.cached_calls - before.cached_calls == before.cached_calls
    assert after.batched_graphs <= 6  # full and cached, of 2, 4 and 8


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


def together(
    call: Any, sessions: str, steps: Sequence[int], t: Tensor | None = None, lane: str | None = None, **more: Any
) -> Tensor:
    """One call of a request for each letter, on the latents of seed 0, 1, ..."""
    words = [options(step, 9, session, lane=lane) for session, step in zip(sessions, steps, strict=True)]
    latents = torch.cat([toys.latents(1, seed=i) for i in range(len(sessions))])
    times = tiny.timesteps(9)[list(steps)] if t is None else t
    with hero_fx.batch(words, **more):
        result: Tensor = call(latents, times)
    return result


def single(call: Any, session: str, step: int, seed: int, **more: Any) -> Tensor:
    with options(step, 9, session, **more):
        result: Tensor = call(toys.latents(1, seed=seed), tiny.timesteps(9)[[step]])
    return result


def test_calls_that_are_no_batch() -> None:
    call = hero_fx.calling
    for calls, message in (
        ([], "must be one hero_fx.calling"),
        (["a"], "must be one hero_fx.calling"),
        ([call(step_index=0)], r"calls\[0\] has no session"),
        ([call(session="a", step_index=0), call(session="b")], r"calls\[1\] has no step_index"),
        ([call(session="a", step_index=0), call(session="a", step_index=0)], "are of session='a' and lane=None"),
        (
            [call(session="a", lane=0, step_index=0), call(session="a", lane=1, step_index=2)],
            "session='a' is in the batch with step_index=0 and step_index=2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hero_fx.batch(calls)  # type: ignore[arg-type]
    for buckets in ((1, 2), (), (2.5,)):
        with pytest.raises(ValueError, match="buckets="):
            hero_fx.batch([call(session="a", step_index=0)], buckets=buckets)  # type: ignore[arg-type]
    spent = call(session="a", step_index=0)
    with hero_fx.batch([spent]), pytest.raises(RuntimeError, match="used before"), spent:
        pass
    fresh = call(session="a", step_index=0)
    with hero_fx.batch([call(session="b", step_index=0)]), pytest.raises(RuntimeError, match="within another"):
        hero_fx.batch([fresh]).__enter__()
    with call(session="b", step_index=0), pytest.raises(RuntimeError, match="within another"):
        hero_fx.batch([fresh]).__enter__()


def test_what_is_refused_at_a_call() -> None:
    call, backend = toys.compiled(warmup=1, cooldown=0)
    with pytest.raises(BackendCompilerFailed, match="call the model for one such request alone before"):
        together(call, "ab", [0, 0])
    single(call, "warm-up", 0, 0)
    expected = [single(call, "c", step, 1) for step in range(2)]
    together(call, "ab", [0, 0])
    together(call, "ab", [1, 1])
    with pytest.raises(
        BackendCompilerFailed, match=r"L\['timestep'\] is .* \[1\] .* for one request, and .* \[\] .* in a batch of 2"
    ):
        together(call, "ab", [2, 2], torch.tensor(500))
    with hero_fx.batch([options(2, 9, "a"), options(2, 9, "b")]):
        call(toys.latents(2), tiny.timesteps(9)[[2, 2]])
        with pytest.raises(RuntimeError, match="called twice within one"):
            call(toys.latents(2), tiny.timesteps(9)[[2, 2]])
    both = hero_fx.batch([options(3, 9, "a"), options(3, 9, "b")])
    with both, hero_fx.calling(session="a"), pytest.raises(RuntimeError, match="entered within"):
        call(toys.latents(2), tiny.timesteps(9)[[3, 3]])
    torch.set_autocast_cache_enabled(False)
    try:
        with pytest.raises(RuntimeError, match="autocast keeps casts"):
            call(toys.latents(2), tiny.timesteps(9)[[3, 3]])
    finally:
        torch.set_autocast_cache_enabled(True)
    # A row that is refused leaves none of the others half way: they start anew, full.
    wrong = hero_fx.batch([options(0, 9, "A"), options(3, 8, "a")])
    with pytest.raises(ValueError, match="num_steps=8, but this trajectory began with num_steps=9"), wrong:
        call(torch.cat([toys.latents(1, seed=1)] * 2), tiny.timesteps(9)[[0, 3]])
    for step in range(2):
        assert tiny.worst([single(call, "A", step, 1)], [expected[step]]) < 1e-6
    assert backend.stats().graphs == 1


def test_an_ordinary_batch_is_not_taken_for_requests() -> None:
    """The same shapes, before and behind a batch of requests: one request with four rows."""
    call, backend = toys.compiled(warmup=1, cooldown=0)
    single(call, "warm-up", 0, 0)
    together(call, "abcd", [0, 0, 0, 0])
    rows = torch.cat([toys.latents(1, seed=i) for i in range(4)])
    with hero_fx.calling(session="four", step_index=0):
        four = call(rows, tiny.timesteps(9)[[0] * 4])
    assert tiny.worst([together(call, "abcd", [0, 0, 0, 0])], [four]) < 1e-6
    assert backend.stats().graphs == 2
    assert backend.stats().bytes_by_session["four"] == backend.graphs[1].state_bytes


class Spoiled(torch.nn.Module):
    """A toy with something in front that a batch must not change."""

    def __init__(self, spoil: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.spoil, self.scale = toys.toy(), spoil, 1.0
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.inner(self.spoil(self, latents), timestep)
        return result


def counted(model: Any, x: Tensor) -> Tensor:
    model.calls.add_(1)
    result: Tensor = x + model.calls
    return result


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, x: x * 2 if x.shape[0] > 1 else x, "does not run the same ops"),
        (lambda model, x: x * model.scale, "do not take the same tensors"),
        (counted, "the model writes to its input or buffer"),
    ],
    ids=["goes by the batch", "has changed", "writes"],
)
def test_another_program_is_refused(spoil: Any, message: str) -> None:
    model = Spoiled(spoil).eval().requires_grad_(False)
    call, _ = toys.compiled(model)
    single(call, "warm-up", 0, 0)
    model.scale = 2.0
    with pytest.raises((BackendCompilerFailed, hero_fx.NotBatched), match=message):
        together(call, "ab", [0, 0])


def test_rows_cannot_act_on_each_other() -> None:
    """Even where the model's own batch would: each row is what it is alone."""
    model = Spoiled(lambda _, x: x - x.mean(dim=0) + x.amax()).eval().requires_grad_(False)
    call, _ = toys.compiled(model)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(3)]
    assert tiny.worst(together(call, "abc", [0, 0, 0]).split(1), alone) < 1e-6


def test_padding_and_parts() -> None:
    """Seven requests in buckets of four: a part of four, and three with one that is repeated."""
    call, backend = toys.compiled(warmup=1, cooldown=0)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(7)]
    before = backend.stats()
    assert tiny.worst(together(call, "abcdefg", [0] * 7, buckets=(4,)).split(1), alone) < 1e-6
    after = backend.stats()
    assert (after.batched_graphs, after.full_calls - before.full_calls, after.sessions) == (1, 7, 14)
    assert after.state_bytes == 14 * backend.graphs[0].state_bytes


def test_lanes_and_pairs_of_guidance() -> None:
    """Unconditional rows in a lane of their own, and pairs of rows that are one request."""
    call, _ = toys.compiled(warmup=1, cooldown=0)
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
    mixed = [x for outputs in requests.mixed(seed=3, most=3) for x in outputs]
    assert tiny.worst(mixed, pairs) < 1e-6


def test_requests_go_on_alone_and_in_batches() -> None:
    """A lane without a name is the same one, called alone or in a batch."""
    call, backend = toys.compiled(warmup=1, cooldown=0)
    alone = [[single(call, f"alone-{i}", step, i) for step in range(6)] for i in range(2)]
    before = backend.stats()
    for step in range(6):
        if step in (0, 1, 4):
            found = [single(call, "ab"[i], step, i) for i in range(2)]
        else:
            found = list(together(call, "ab", [step, step]).split(1))
        assert tiny.worst(found, [outputs[step] for outputs in alone]) < 1e-6
    after = backend.stats()
    assert (after.full_calls - before.full_calls, after.cached_calls - before.cached_calls) == (6, 6)


def test_the_budget_holds_for_batches() -> None:
    call, backend = toys.compiled(warmup=1, cooldown=0)
    single(call, "warm-up", 0, 0)
    per_lane = backend.graphs[0].state_bytes
    call, backend = toys.compiled(warmup=1, cooldown=0, max_state_bytes=2 * per_lane)
    alone = [single(call, f"alone-{i}", 0, i) for i in range(3)]
    together(call, "ab", [0, 0])
    assert tiny.worst(together(call, "bc", [1, 0]).split(1)[1:], [single(call, "d", 0, 1)]) < 1e-6
    stats = backend.stats()
    assert (stats.evictions, stats.state_bytes) == (5, 2 * per_lane)
    with pytest.raises(hero_fx.OverBudget, match="max_state_bytes"):
        together(call, "efg", [0, 0, 0])
    call, backend = toys.compiled(warmup=1, cooldown=0, max_state_bytes=2 * per_lane, strict=False)
    single(call, "warm-up", 0, 0)
    with pytest.warns(UserWarning, match="computes a call in full"):
        assert tiny.worst(together(call, "efg", [0, 0, 0]).split(1), alone) < 1e-6
    assert backend.stats().refused_calls == 3


def test_threads_with_the_same_sessions_do_not_wait_for_each_other() -> None:
    call, backend = toys.compiled(warmup=1, cooldown=0)
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
