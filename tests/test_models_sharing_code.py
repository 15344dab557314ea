"""Models that share compiled code, that are compiled again, and whose calls change: state is never shared."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import hero_fx

from .support import tiny, toys
from .support.loops import OPTIONS, Loop, guided, lone, plain_times, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def test_a_model_that_compiles_again_at_every_step_is_warned_of() -> None:
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


def test_a_batch_that_changes_in_the_middle_is_warned_of() -> None:
    call, _ = guided()
    times, words = plain_times(), text(1)
    with torch.no_grad():
        for t in times[:3]:
            call(toys.latents(), t, words)
        with pytest.warns(
            UserWarning, match=r"changed their shape in the middle.*latents \[2, 30, 6\] -> \[1, 30, 6\]"
        ):
            call(toys.latents()[:1], times[3][:1], words[:1])


def test_state_goes_with_the_model_and_with_its_code() -> None:
    gc.freeze()  # else each collection below walks all that tests before have made
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
