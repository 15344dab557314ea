"""What happens at each call: lanes, trajectories, timesteps and shapes, each with its own state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys
from .support.loops import Told, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STEPS = 9


def test_two_calls_per_step_are_two_lanes() -> None:
    call, backend = toys.made()
    times, starts = toys.times(STEPS), [toys.latents(seed=1), toys.latents(seed=2)]
    both = toys.in_turns([call, call], starts, times)
    assert backend.steppers[0].last is not None
    assert backend.steppers[0].last.lane == 1
    assert (backend.stats().cached_steps, backend.stats().cached_calls) == (4, 2 * 4)
    assert backend.stats().state_bytes == 2 * backend.graphs[0].state_bytes
    for outputs, start in zip(both, starts, strict=True):
        assert toys.same(outputs, toys.alone(call, backend, start, times))


def told() -> tuple[Any, hero_fx.Backend]:
    """Called with (latents, timestep, text)."""
    torch.manual_seed(0)
    return toys.compiled(tiny.randomized(Told()))


def test_lanes_with_texts_of_different_length() -> None:
    call, backend = told()
    times, start, words = toys.times(STEPS), toys.latents(), text(1)

    def lane(length: int) -> Callable[..., Any]:
        return lambda x, t: call(x, t, words[:, :length].clone())

    both = toys.in_turns([lane(4), lane(3)], [start] * 2, times)
    assert [s.last.lane for s in backend.steppers if s.last] == [0, 0]
    for outputs, length in zip(both, (4, 3), strict=True):
        assert toys.same(outputs, toys.alone(lane(length), backend, start, times))


def test_cache_context_names_lanes_and_steps() -> None:
    call, backend = told()
    for with_index in (False, True):
        backend.reset()
        _runs_as_named(call, backend, with_index)


def _runs_as_named(call: Any, backend: hero_fx.Backend, with_index: bool) -> None:
    """Two runs whose calls are named, with the index of their step or without."""
    times, words = toys.times(STEPS), text(1)
    step, seen = [0], []

    def lane(name: str) -> Callable[..., Any]:
        def run(x: Tensor, t: Tensor) -> Any:
            index = {"step_index": step[0]} if with_index else {}
            # With an index the timestep may stand still, as it does for a scheduler of second order.
            t = times[step[0] // 2] if with_index else t
            with call.cache_context(name, **index):
                out = call(x, t, words)
            last = backend.steppers[0].last
            assert last is not None
            seen.append((last.step, last.lane, last.full))
            step[0] += name == "uncond"
            return out

        return run

    starts, names = [toys.latents(seed=1), toys.latents(seed=2)], ["cond", "uncond"]
    first = toys.in_turns([lane(name) for name in names], starts, times)
    full = [True, True] + [i % 2 == 1 for i in range(2, STEPS)]
    assert seen == [(i, name, full[i]) for i in range(STEPS) for name in names]
    assert backend.stats().state_bytes == 2 * backend.graphs[0].state_bytes
    step[0] = 0
    with torch.compiler.set_stance("fail_on_recompile"):
        second = toys.in_turns([lane(name) for name in names], starts, times)
    assert all(map(toys.same, first, second))
    assert seen[: 2 * STEPS] == seen[2 * STEPS :]


@pytest.mark.parametrize("num_steps", [None, STEPS])
def test_a_jump_back_starts_a_trajectory(num_steps: int | None) -> None:
    call, backend = toys.made(num_steps=num_steps)
    times = toys.times(STEPS)
    whole = toys.loop(call, toys.latents(), times)
    toys.loop(call, toys.latents(seed=9), times[:5])
    assert toys.same(toys.loop(call, toys.latents(), times), whole)
    last = backend.steppers[0].last
    assert last is not None
    assert (last.trajectory, last.step) == (3, STEPS - 1)


@cache
def usual() -> list[Tensor]:
    """The trajectory of int timesteps of shape [2]."""
    return toys.loop(toys.compiled()[0], toys.latents(), toys.times(STEPS))


@pytest.mark.parametrize(
    ("kind", "shape"), [("int", ()), ("float", (1,)), ("float", (2,)), ("scaled", (2,)), ("double", ())], ids=str
)
def test_forms_of_timestep(kind: str, shape: tuple[int, ...]) -> None:
    table = tiny.timesteps(STEPS)
    times = {"int": table, "float": table.float(), "scaled": table.float() / 1000, "double": table.double()}[kind]
    model = toys.toy(scale=1000.0 if kind == "scaled" else 1.0)
    call, backend = toys.compiled(model)
    ours = toys.loop(call, toys.latents(), [t.expand(shape) for t in times])
    assert (backend.stats().full_steps, backend.stats().cached_steps) == (5, 4)
    assert tiny.worst(ours, usual()) < 1e-3


def test_ascending_timesteps() -> None:
    call, backend = toys.made()
    times = toys.times(STEPS)[::-1]
    whole = toys.loop(call, toys.latents(), times)
    assert toys.same(toys.loop(call, toys.latents(), times), whole)
    last = backend.steppers[0].last
    assert last is not None
    assert (last.trajectory, last.step, backend.stats().cached_steps) == (2, STEPS - 1, 8)


def test_timesteps_per_token() -> None:
    call, backend = toys.compiled()
    table = toys.times(STEPS)
    even = toys.loop(call, toys.latents(), [t[:, None].expand(2, toys.TOKENS).clone() for t in table])
    assert tiny.worst(even, usual()) < 1e-4
    # Conditioning tokens stand still at zero; the others say which step it is.
    held = [torch.cat([torch.zeros(2, 10), t[:, None].expand(2, 20)], dim=1) for t in table]
    backend.reset()
    toys.loop(call, toys.latents(), held)
    assert backend.stats().cached_steps == 2 * 4


def test_time_input_by_structure_and_by_argument() -> None:
    for options in ({}, {"timestep": "when"}):
        torch._dynamo.reset()
        call, _ = toys.compiled(toys.Renamed(toys.toy()).eval(), **options)
        assert toys.same(toys.loop(call, toys.latents(), toys.times(STEPS)), usual())


# More of `dynamic=True` is in test_dynamic_shapes.py.
@pytest.mark.parametrize(
    ("inner", "dynamic"), [("aot_eager", None), pytest.param("eager", True, marks=pytest.mark.exhaustive)]
)
def test_another_batch_compiles_once_more(inner: str, dynamic: bool | None) -> None:
    backend = hero_fx.backend(inner=inner, policy="taylorseer", warmup=2)
    call = toys.torch_compile(toys.toy(layers=2), backend=backend, fullgraph=True, dynamic=dynamic)
    for graphs, batch in enumerate((2, 3, 2), start=1):
        ours = toys.loop(call, toys.latents(batch), toys.times(STEPS, batch))
        assert backend.stats().graphs == min(graphs, 2)
        plain = toys.loop(toys.toy(layers=2), toys.latents(batch), toys.times(STEPS, batch))
        assert tiny.worst(ours[:2], plain[:2]) < 1e-5 < 1e-4 < tiny.worst(ours, plain)


def test_too_many_calls_at_one_timestep() -> None:
    call, _ = toys.made()
    toys.loop(call, toys.latents(), toys.times(1) * 8)
    with pytest.raises(RuntimeError, match=r"9 calls in a row with timestep=.*hero_fx.session"):
        toys.loop(call, toys.latents(), toys.times(1))


def test_lane_names_that_change_do_not_pile_up() -> None:
    call, backend = told()
    with torch.no_grad():
        for request in range(6):
            for t in toys.times(2):
                with call.cache_context(f"request {request}"):
                    call(toys.latents(), t, text(1))
    assert backend.stats().state_bytes <= 2 * backend.graphs[0].state_bytes


def test_inference_mode() -> None:
    call, backend = toys.compiled()
    with torch.inference_mode():
        inside = toys.loop(call, toys.latents(), toys.times(STEPS))
    assert backend.stats().cached_steps == 4
    assert toys.same(inside, toys.loop(call, toys.latents(), toys.times(STEPS)))


def test_inference_mode_in_the_middle_of_a_trajectory() -> None:
    call, _ = toys.made()
    latents, outputs, times = toys.latents(), [], toys.times(STEPS)
    for i, t in enumerate(times):
        with torch.inference_mode(i % 3 == 0), torch.no_grad():
            outputs.append(call(latents, t))
            latents = latents - outputs[-1] / STEPS
    assert toys.same(outputs, toys.loop(call, toys.latents(), times))


def test_a_trajectory_of_nan_does_not_spoil_the_next() -> None:
    call, _ = toys.made(warmup=1)
    expected = toys.loop(call, toys.latents(), toys.times(STEPS))
    assert toys.loop(call, toys.latents() * torch.nan, toys.times(STEPS))[-1].isnan().all()
    assert toys.same(toys.loop(call, toys.latents(), toys.times(STEPS)), expected)


@pytest.mark.parametrize("at", [0, 3, 4], ids=["first", "full", "cached"])
def test_a_call_that_fails_forgets_the_trajectory(at: int) -> None:
    fails: list[bool] = []

    def inner(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = gm.forward(*args)
            if fails:
                raise MemoryError(fails.pop())
            return result

        return run

    call, backend = toys.made(inner=inner)
    times = toys.times(STEPS)
    expected = toys.loop(call, toys.latents(), times)
    toys.loop(call, toys.latents(), times[:at])
    fails.append(True)
    with torch.no_grad(), pytest.raises(MemoryError):
        call(toys.latents(), times[at])
    # From another thread: no lock is left held. Its features may be half written, so the next call is a first one.
    results: list[Tensor] = []
    rest = threading.Thread(target=lambda: results.extend(toys.loop(call, toys.latents(), times[at:])))
    rest.start()
    rest.join(60)
    assert toys.same(results[:2], toys.loop(toys.toy(), toys.latents(), times[at:])[:2])
    assert backend.steppers[0].last is not None
    assert backend.steppers[0].last.lane == 0
    assert toys.same(toys.loop(call, toys.latents(), times), expected)
